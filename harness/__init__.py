"""Start real servers (PostgreSQL, Redis, Synapse) and talk to them.

The tests, the demo and the benchmarks share it. Everything listens on 127.0.0.1 only, lives in
temporary directories and is ended when the run is done, whichever way it ends.
"""
