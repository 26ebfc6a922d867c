# SPDX-License-Identifier: AGPL-3.0-or-later
"""Out to other servers: who is owed which sticky events, and paying it.

Changes of the index, acknowledgements and joins of servers come in; transactions to
other servers go out, and watermarks into the store.
"""
