# SPDX-License-Identifier: AGPL-3.0-or-later
"""Runs Synapse's own tests without and with the module, and compares what they say."""
