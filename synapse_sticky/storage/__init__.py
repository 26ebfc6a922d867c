# SPDX-License-Identifier: AGPL-3.0-or-later
"""Our own tables, and their migrations.

Rows go in and come out; nothing here knows what they are for.
"""
