"""What --split auto chooses from. By itself: a server that splits nothing has the options, too."""

from __future__ import annotations

from dataclasses import dataclass

from client.split.address import ServerAddress


@dataclass(frozen=True, slots=True)
class AutoSplit:
    """The candidates: servers by address, those that announce themselves, this one.

    ``local`` allows this machine a share, and to do all by itself.
    """

    named: tuple[ServerAddress, ...] = ()
    announced: bool = True
    local: bool = True
