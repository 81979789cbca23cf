"""Sockets: who may connect, inside of TLS or not, and for how long."""
