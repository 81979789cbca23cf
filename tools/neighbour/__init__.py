"""Attacks on servers that are started here, beside a client which must not notice any of them."""
