"""Starts real servers (PostgreSQL, Redis, Synapse) and talks to them, for the tests.

Everything listens on 127.0.0.1 only, lives in temporary directories and is ended when the
tests are done, whichever way they end.
"""
