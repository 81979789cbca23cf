"""A client of any ggml RPC server: connections, graphs, tensors."""
