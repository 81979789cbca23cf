"""How much memory there is: the machine's, or what a control group leaves of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rpc_server.devices.cpu.machine import find_groups, system_memory

GIB = 1 << 30


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(text)


def test_version_2(tmp_path: Path) -> None:
    stat = f"anon 5\ninactive_file {GIB}\n"
    service = tmp_path / "system.slice/some.service"
    group(service, memory_max=f"{4 * GIB}\n", memory_current=f"{3 * GIB}\n", memory_stat=stat)
    group(service.parent, memory_max="max\n", memory_current=f"{9 * GIB}\n", memory_stat=stat)
    inner, outer = find_groups("0::/system.slice/some.service\n", tmp_path)
    assert inner.memory(64 * GIB) == (4 * GIB, 2 * GIB)
    assert outer.memory(64 * GIB)[0] == 64 * GIB


def test_a_container_sees_its_own_group_as_the_root(tmp_path: Path) -> None:
    group(tmp_path, memory_max=f"{GIB}\n", memory_current="0\n", memory_stat="")
    for listing in ("0::/\n", "0::/docker/0123\n", "0::/../other\n"):
        (found,) = find_groups(listing, tmp_path)
        assert found.memory(8 * GIB) == (GIB, 0)


def test_version_1(tmp_path: Path) -> None:
    folder = tmp_path / "memory/job"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    (folder / "memory.usage_in_bytes").write_text(f"{2 * GIB}\n")
    (folder / "memory.stat").write_text(f"inactive_file 7\ntotal_inactive_file {GIB}\n")
    (found,) = find_groups("4:cpu,memory:/job\n2:cpuacct:/\n", tmp_path)
    assert found.memory(8 * GIB) == (8 * GIB, GIB)
    # One that is gone limits nothing.
    (folder / "memory.stat").unlink()
    assert found.memory(8 * GIB) == (8 * GIB, 0)


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    free, total = system_memory()
    assert 0 < free <= total
