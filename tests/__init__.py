"""Tests of the sticky events module, against real Synapse processes."""
