"""Tests of the arithmetic, without any Synapse process."""
