# SPDX-License-Identifier: AGPL-3.0-or-later
"""The deliverable events, in the memory of every process.

Rows come in from the store, on a signal or a poll; answers to "which events after this
position, in these rooms" go out, and news of changes to whoever subscribed.
"""
