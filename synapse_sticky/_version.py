# SPDX-License-Identifier: AGPL-3.0-or-later
"""The version of this package; the build reads it from here."""

__version__ = "0.1.0"
