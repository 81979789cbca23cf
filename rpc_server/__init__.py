"""The server: sockets, sessions, graphs and the devices that run them."""
