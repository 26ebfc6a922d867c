# SPDX-License-Identifier: AGPL-3.0-or-later
"""What admins have decided.

In come the decisions of the server's admin, the state of rooms and the configuration. Out
goes whether sticky events are on: in a room, for a user, for a server. Whoever acts on that
subscribes to the changes.
"""
