# SPDX-License-Identifier: AGPL-3.0-or-later
"""Everything that touches Synapse's internals, and nothing else does.

A seam is, in order of preference: an entry in one of Synapse's own registries;
a subclass put where the homeserver finds the class; last, a wrapped function.
Each checks when the module loads that what it relies on is there, with the
parameters it expects, and refuses to start otherwise: failing loudly then beats
losing events silently later. ``docs/architecture.md`` says why each is needed.

Nothing of ours that Synapse calls back may raise: its callers do not guard.
"""
