"""Real clients on real Synapses, which `make test-clients` runs; they need Node."""
