"""What ggml is: its types, its ops and their numbers, and the hash of tensors."""
