"""Features of ARM processors: by the system's word, under LLVM's names."""

from __future__ import annotations

import platform

import pytest

from rpc_server.native.processor import features_of, told_features


def test_features_are_those_whose_bits_are_set() -> None:
    # Of a Cortex-A76: as its /proc/cpuinfo says, asimddp and no i8mm.
    assert features_of({16: 0x119FFF, 26: 0}) == ["lse", "fullfp16", "rdm", "dotprod"]
    assert features_of({16: 1 << 23, 26: 1 << 13}) == ["fp16fml", "i8mm"]
    assert features_of({}) == []


def test_only_arm_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert told_features() == []
