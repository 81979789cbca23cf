"""Clients for the scripted server to check: a good one as a program, and many that break a rule."""
