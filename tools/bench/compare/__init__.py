"""This server, upstream's and distributed-llama beside each other, on one model in one run."""
