"""A scripted server that checks a client: llama.cpp's, this project's, or one somebody writes.

``python -m conformance --serve`` answers as a small correct server in every protocol version and
watches that the client keeps the rules of the wire (``rules``); in *scenarios* it refuses, breaks
off, answers wrongly or slowly, and watches what the client does then (``scenarios``).

It computes nothing: a graph's results are zeros. Nothing here imports a server.
"""

from conformance.serve.command_line import main

__all__ = ["main"]
