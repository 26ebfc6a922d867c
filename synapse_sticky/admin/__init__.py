# SPDX-License-Identifier: AGPL-3.0-or-later
"""The API for the server's admins: to see which events are held or owed, and to decide.

Checked requests of admins come in; answers go out that are the same on every process.
``openapi.json`` describes them, and is served with them.
"""
