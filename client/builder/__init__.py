"""ggml's constructors: tensors and the graphs that compute them."""
