"""The CPU device: compiled kernels over ggml tensors in host memory."""
