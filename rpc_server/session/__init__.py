"""One client: its requests in order, its buffers, its graphs."""
