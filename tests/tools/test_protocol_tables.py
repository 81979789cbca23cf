from __future__ import annotations

from tools.protocol_tables import main


def test_documented_tables_are_the_declared_ones() -> None:
    assert main(["--check"]) == 0
