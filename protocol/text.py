"""Text that comes off the wire, made fit to be shown."""

from __future__ import annotations


def printable(text: str) -> str:
    """Return ``text`` with what is no visible character escaped.

    Names of tensors are a client's: a line break in one would forge a line of the log, an escape
    sequence change the terminal of whoever reads it.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def c_string(data: bytes) -> str:
    """Return the text of a field that ends at its first zero, fit to be shown."""
    return printable(bytes(data).split(b"\0", 1)[0].decode("utf-8", "replace"))
