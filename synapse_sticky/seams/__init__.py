# SPDX-License-Identifier: AGPL-3.0-or-later
"""We call Synapse here: its streams, tables, events, rules and other servers.

Questions come in, in our own terms; answers go out, and nothing above needs to know how
a release of Synapse finds them. Each seam checks when the module loads that it has what
it relies on, with the parameters or columns that it expects, and refuses to start
otherwise. ``docs/architecture.md`` says why each is needed. What Synapse calls is in
``hooks/``.
"""
