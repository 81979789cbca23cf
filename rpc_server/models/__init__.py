"""Weights that the operator of a server has put on its disk: GGUF files, served by their hashes."""
