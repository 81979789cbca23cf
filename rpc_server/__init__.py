"""The server: sockets, sessions, graphs and the devices that run them."""

__version__ = "0.1.0"
# What a server calls itself where others ask.
SOFTWARE = f"ggml-rpc-server {__version__}"
