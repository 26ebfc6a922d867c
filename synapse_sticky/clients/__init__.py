# SPDX-License-Identifier: AGPL-3.0-or-later
"""Out to clients: the sticky events that one response to one client carries.

A client's position and rooms come in from ``/sync`` and Sliding Sync; the events for the
sections and the client's next position go out.
"""
