# SPDX-License-Identifier: AGPL-3.0-or-later
"""Synapse calls these: servlets, handlers, filters and callbacks of ours.

Requests, new events and finished transactions come in, in Synapse's terms; what goes
out is the answer that Synapse would give without us, plus our part. A hook is, in order
of preference: an entry in one of Synapse's own registries; a subclass put where the
homeserver finds the class; last, a wrapped function. Each checks when the module loads
that Synapse has the place it hooks into, with the parameters that it expects, and
refuses to start otherwise: failing loudly then beats losing events silently later.

Synapse does not guard the calls that it makes here. ``guard.py`` does it for all of
them: a hook never raises an error of ours, takes a bounded time, and keeps the names by
which Synapse's metrics and logs know what it replaces.
"""
