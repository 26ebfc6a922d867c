# SPDX-License-Identifier: AGPL-3.0-or-later
"""In: sticky events are noticed, and admitted or held.

How far Synapse has written its streams comes in; rows of events, deliverable or held,
and of joins go into the store. One process does this.
"""
