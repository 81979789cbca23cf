"""A shared token in front of a connection, for those who speak ggml RPC inside of TLS.

Not part of ggml RPC: both sides of it are this project's. Before anything else the client sends

    "GRT1" | length u16, little-endian | token

and the server answers with one byte, ACCEPTED or REFUSED; after REFUSED it hangs up. From there on
the connection is ggml RPC. A server that asks for no token takes a connection that begins with
HELLO as well, so that llama.cpp can be brought to it through any TLS client.
"""

from __future__ import annotations

MAGIC = b"GRT1"
HEAD_SIZE = len(MAGIC) + 2
ACCEPTED = b"\1"
REFUSED = b"\0"
SHORTEST, LONGEST = 16, 1024


def check_token(token: bytes) -> bytes:
    """Return ``token``; raise ValueError if it is none. The message doesn't contain it."""
    if not SHORTEST <= len(token) <= LONGEST:
        raise ValueError(f"a token has {SHORTEST} to {LONGEST} bytes, this one {len(token)}")
    return token


def encode_token(token: bytes) -> bytes:
    """Return what the client sends first."""
    return MAGIC + len(check_token(token)).to_bytes(2, "little") + token


def token_size(head: bytes) -> int | None:
    """Return the bytes of the token behind this head, None if it begins something else."""
    if head[: len(MAGIC)] != MAGIC:
        return None
    return int.from_bytes(head[len(MAGIC) : HEAD_SIZE], "little")
