"""Element Call in a real browser on real Synapses: `make test-element-call`, which needs Node."""
