"""The ggml RPC wire format, without I/O: bytes in, messages out, for every protocol version."""
