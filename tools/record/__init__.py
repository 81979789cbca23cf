"""Records what a ggml RPC client and server say to each other: a proxy that writes pcapng.

``proxy`` passes bytes on, ``recorder`` turns them into the packets of a capture (``frames``,
``pcapng``), ``stats`` counts, ``screen`` shows.
"""
