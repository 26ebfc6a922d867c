# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the module costs a server, measured on real Synapse processes.

``python -m benchmarks`` runs everything and writes ``docs/performance.md``.
"""
