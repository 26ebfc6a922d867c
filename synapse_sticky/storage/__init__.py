# SPDX-License-Identifier: AGPL-3.0-or-later
"""Our tables: their migrations, and all SQL that reads or writes them or Synapse's."""
