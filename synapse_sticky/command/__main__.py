# SPDX-License-Identifier: AGPL-3.0-or-later
"""``python -m synapse_sticky.command`` is the command too."""

import sys

from synapse_sticky.command.main import main

if __name__ == "__main__":
    sys.exit(main())
