"""Checks of any server that speaks the ggml RPC wire format, which they reach by socket only."""
