# SPDX-License-Identifier: AGPL-3.0-or-later
"""The command ``synapse-sticky``: check an installation, watch it, try a release of Synapse.

It runs beside Synapse, never in it, and nothing of the module imports it. ``checks.py`` lists
every check; ``docs/command.md`` has that list too.
"""
