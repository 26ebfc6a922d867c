# SPDX-License-Identifier: AGPL-3.0-or-later
"""The API for the server's admins: what there is, what is held and owed, and what they decide.

Requests of admins come in, checked; answers go out that are the same on every process.
``openapi.json`` describes them, and is served with them.
"""
