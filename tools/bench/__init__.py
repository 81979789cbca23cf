"""Measurements, never part of the tests: this server beside upstream's in one run."""
