"""The tensor cache on disk: files by the hash of their content, and their quota."""
