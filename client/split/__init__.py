"""Weights cut over several servers: shares, steps, and a backend that uses them."""
