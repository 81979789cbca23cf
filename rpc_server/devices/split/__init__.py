"""Row-split products: the coordinator that fans them out, and the worker's side of an exchange."""
