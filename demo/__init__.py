"""Sticky events on real Synapse processes, to be looked at. `make demo` runs this."""
