"""Captures of network traffic: files of packets, TCP put together again, ggml RPC found in it.

``files`` reads and writes pcap and pcapng, ``packets`` takes TCP segments out of frames,
``streams`` puts connections together, ``connections`` has the ggml RPC among them decoded.
"""
