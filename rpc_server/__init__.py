"""The server: sockets, sessions, graphs and the devices that run them."""

__version__ = "0.1.0"
