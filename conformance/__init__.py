"""Checks of any server that speaks the ggml RPC wire format; they reach it through a socket only."""
