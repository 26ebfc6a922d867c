"""`synapse-sticky check-release` against releases from the package index: slow, and needs it."""
