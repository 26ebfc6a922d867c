# SPDX-License-Identifier: AGPL-3.0-or-later
"""For the server's admins: an API to see which events are held or owed, and to decide; metrics.

Checked requests of admins come in; answers go out that are the same on every process.
``openapi.json`` describes them, and is served with them. The metrics go out on Synapse's own
listener.
"""
