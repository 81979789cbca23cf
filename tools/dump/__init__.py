"""``python -m tools.dump``: what ggml RPC clients and servers said, from a capture."""
