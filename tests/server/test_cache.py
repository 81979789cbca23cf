"""The tensor cache: upstream's names, never a wrong byte, whatever happens to the folder."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protocol.commands import Command
from protocol.dialects import DIALECTS
from protocol.ggml.hashing import fnv1a_64
from rpc_server.cache import store as cache_module
from rpc_server.cache.quota import PARTIAL, Quota, Usage
from rpc_server.cache.store import (
    HASH_THRESHOLD,
    CacheError,
    TensorCache,
    default_cache_dir,
)
from rpc_server.folders import PrivateFolder
from rpc_server.session import uploads
from tests.server.process import REPOSITORY, Wire, running, tensor
from tools.serving.ports import free_port
from tools.serving.processes import Process, listens, upstream_command

SIZE = 1 << 20


def some_bytes(size: int, seed: int = 3) -> bytes:
    return np.random.default_rng(seed).bytes(size)


@pytest.fixture
def content() -> bytes:
    return some_bytes(HASH_THRESHOLD + 4096)


def fetch(cache: TensorCache, digest: int, size: int) -> bytes | None:
    """What a client gets for a tensor of ``size`` bytes."""
    place = bytearray(size)
    return bytes(place) if cache.load(digest, memoryview(place)) else None


def keep(cache: TensorCache, data: bytes) -> Path:
    path = cache.store(memoryview(data))
    assert path is not None
    return path


def names(folder: Path) -> list[str]:
    """All in the folder but the folder of sums."""
    return sorted(path.name for path in folder.iterdir() if path != sums(folder))


def sums(folder: Path) -> Path:
    return folder / f".sums-{os.geteuid()}"


def quota_of(folder: Path, limit: int) -> Quota:
    """What another server has of the folder."""
    opened = PrivateFolder.open(folder)
    return Quota(opened, opened.child(sums(folder).name), limit)


def test_folder_is_upstreams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_CACHE", "/somewhere")
    assert default_cache_dir() == Path("/somewhere/rpc")
    monkeypatch.delenv("LLAMA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_cache_dir() == Path("/caches/llama.cpp/rpc")


# -- contents


def test_stores_under_the_hash_and_loads(tmp_path: Path) -> None:
    cache, data = TensorCache(tmp_path), some_bytes(SIZE)
    digest = fnv1a_64(data)
    assert fetch(cache, digest, SIZE) is None
    path = keep(cache, data)
    assert path == tmp_path / f"{digest:016x}"
    for reader in (cache, TensorCache(tmp_path)):
        assert fetch(reader, digest, SIZE) == data
    assert names(tmp_path) == [path.name]
    assert path.stat().st_mode & 0o777 == 0o644
    # A second time nothing is written.
    before = path.stat()
    assert keep(cache, data) == path
    assert path.stat() == before


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum")
def test_sums_are_lines_for_sha256sum(tmp_path: Path) -> None:
    path = keep(TensorCache(tmp_path), some_bytes(SIZE))

    def check() -> int:
        return subprocess.run(
            ["sha256sum", "--status", "-c", path.name], cwd=sums(tmp_path), check=False
        ).returncode

    assert check() == 0
    path.write_bytes(bytes(SIZE))
    assert check() == 1
    assert sums(tmp_path).stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("size", [SIZE - 1, SIZE + 1, 0])
def test_only_the_whole_tensor_is_served(tmp_path: Path, size: int) -> None:
    cache, data = TensorCache(tmp_path), some_bytes(SIZE)
    keep(cache, data)
    assert fetch(cache, fnv1a_64(data), size) is None
    assert fetch(cache, fnv1a_64(data), SIZE) == data


def damages(data: bytes) -> Iterator[bytes]:
    changed = bytearray(data)
    changed[1000] ^= 1
    yield bytes(changed)
    yield bytes(len(data))
    yield data[1:] + data[:1]


@pytest.mark.parametrize("summed", [True, False], ids=["own", "upstreams"])
def test_damaged_files_are_not_served(
    tmp_path: Path, summed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    data = some_bytes(SIZE)
    cache, digest = TensorCache(tmp_path), fnv1a_64(data)
    for wrong in damages(data):
        path = keep(cache, data)
        # Verified in this process, then changed behind its back.
        assert fetch(cache, digest, SIZE) == data
        path.write_bytes(wrong)
        if not summed:
            (sums(tmp_path) / path.name).unlink()
        assert fetch(cache, digest, SIZE) is None
        assert "is damaged" in caplog.text
        caplog.clear()
        # It is gone, and what is uploaded instead takes its place.
        assert names(tmp_path) == []
        assert fetch(cache, digest, SIZE) is None


@pytest.mark.parametrize("wrong", [b"", b"short", bytes(SIZE), bytes(SIZE + 1)])
def test_an_upload_replaces_a_damaged_file(tmp_path: Path, wrong: bytes) -> None:
    data = some_bytes(SIZE)
    path = tmp_path / f"{fnv1a_64(data):016x}"
    path.write_bytes(wrong)
    cache = TensorCache(tmp_path)
    keep(cache, data)
    assert path.read_bytes() == data
    if len(wrong) != SIZE:
        # Known to be sound before, then cut short: the sum alone doesn't say that it is there.
        path.write_bytes(wrong)
        keep(cache, data)
        assert path.read_bytes() == data


def test_a_file_of_upstreams_gets_a_sum_that_holds(tmp_path: Path) -> None:
    """From then on a content with the same FNV is another one."""
    data, other = some_bytes(SIZE), some_bytes(SIZE, seed=4)
    path = tmp_path / f"{77:016x}"
    path.write_bytes(data)
    cache = TensorCache(tmp_path, lambda _: 77)
    assert fetch(cache, 77, SIZE) == data
    assert (sums(tmp_path) / path.name).is_file()
    path.write_bytes(other)
    assert fetch(TensorCache(tmp_path, lambda _: 77), 77, SIZE) is None
    assert not path.exists()


@pytest.mark.parametrize("summed", [True, False], ids=["own", "upstreams"])
@pytest.mark.parametrize("size", [SIZE, SIZE // 2])
def test_the_first_content_with_a_hash_stays(
    tmp_path: Path, summed: bool, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    cache = TensorCache(tmp_path, lambda _: 77)
    data, other = some_bytes(SIZE), some_bytes(size, seed=4)
    path = keep(cache, data)
    if not summed:
        (sums(tmp_path) / path.name).unlink()
    assert cache.store(memoryview(other)) is None
    assert "another content has the hash" in caplog.text
    assert path.read_bytes() == data
    assert fetch(cache, 77, SIZE) == data
    assert names(tmp_path) == [path.name]


@pytest.mark.parametrize("line", ["", "0" * 64, "x" * 300, "\0"])
def test_a_sum_that_is_none_is_made_again(tmp_path: Path, line: str) -> None:
    cache, data = TensorCache(tmp_path), some_bytes(SIZE)
    kept = sums(tmp_path) / keep(cache, data).name
    expected = kept.read_text()
    kept.write_text(line)
    assert fetch(TensorCache(tmp_path), fnv1a_64(data), SIZE) == data
    assert kept.read_text() == expected


def test_a_file_cut_short_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Upstream's server writes its files in place."""
    cache, data = TensorCache(tmp_path), some_bytes(SIZE)
    path, fill = keep(cache, data), cache_module._fill

    def cut(file: io.FileIO, place: memoryview, wanted: Callable[[], bool]) -> bool:
        os.truncate(path, SIZE // 2)
        return fill(file, place, wanted)

    monkeypatch.setattr(cache_module, "_fill", cut)
    with caplog.at_level(logging.INFO):
        assert fetch(cache, fnv1a_64(data), SIZE) is None
    assert "changes as it is read" in caplog.text


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    """Nor waited for, as a pipe would have one wait."""
    cache, data = TensorCache(tmp_path), some_bytes(SIZE)
    path = tmp_path / f"{fnv1a_64(data):016x}"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(data)
    makers: list[Callable[[], None]] = [
        path.mkdir,
        lambda: os.mkfifo(path),
        lambda: path.symlink_to(elsewhere),
    ]
    for make in makers:
        make()
        assert fetch(cache, fnv1a_64(data), SIZE) is None
        assert cache.store(memoryview(data)) is None
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink()
    assert names(tmp_path) == ["elsewhere"]


# -- the folder


def test_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="can't be written"):
        TensorCache(tmp_path / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_that_is_read_only(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CacheError, match="can't be written: Permission denied"):
        TensorCache(tmp_path)


def test_folders_that_others_may_write_to_are_refused(tmp_path: Path) -> None:
    keep(TensorCache(tmp_path), some_bytes(SIZE))
    for folder in (tmp_path, sums(tmp_path)):
        for mode in (0o770, 0o702, 0o1777):
            folder.chmod(mode)
            with pytest.raises(CacheError, match=r"others can write to it \(chmod go-w\)"):
                TensorCache(tmp_path)
        folder.chmod(0o700)
    TensorCache(tmp_path)


@pytest.mark.skipif(
    sys.platform == "win32" or os.geteuid() != 0, reason="only root may become another user"
)
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    keep(TensorCache(tmp_path), some_bytes(SIZE))
    for folder in (sums(tmp_path), tmp_path):
        os.chown(folder, 65534, -1)
        with pytest.raises(CacheError, match="belongs to user 65534"):
            TensorCache(tmp_path)
        os.chown(folder, 0, -1)
    TensorCache(tmp_path)


def test_new_folders_are_this_users_alone(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        TensorCache(tmp_path / "a" / "b")
    finally:
        os.umask(umask)
    made = (tmp_path / "a", tmp_path / "a" / "b", sums(tmp_path / "a" / "b"))
    assert {path.stat().st_mode & 0o777 for path in made} == {0o700}


def test_a_folder_that_is_moved_away_stays_the_same(tmp_path: Path) -> None:
    """What somebody puts in its place is not looked at."""
    folder, data = tmp_path / "cache", some_bytes(SIZE)
    cache = TensorCache(folder)
    keep(cache, data)
    folder.rename(tmp_path / "moved")
    folder.mkdir()
    (folder / f"{fnv1a_64(data):016x}").write_bytes(bytes(SIZE))
    assert fetch(cache, fnv1a_64(data), SIZE) == data
    other = some_bytes(SIZE, seed=4)
    keep(cache, other)
    assert (tmp_path / "moved" / f"{fnv1a_64(other):016x}").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="has no pipes in folders")
@pytest.mark.parametrize("name", [f"{PARTIAL}pipe", "lock", "usage"])
def test_pipes_and_links_of_its_own_names(tmp_path: Path, name: str) -> None:
    """Neither waited for nor followed: what a link leads to keeps its content and its mode."""
    keep(TensorCache(tmp_path), some_bytes(SIZE))
    private = tmp_path / "private"
    private.write_bytes(b"secret")
    private.chmod(0o600)
    place = (tmp_path if name.startswith(PARTIAL) else sums(tmp_path)) / name
    makers: tuple[Callable[[], None], ...] = (
        lambda: os.mkfifo(place),
        lambda: place.symlink_to(private),
    )
    for make in makers:
        place.unlink(missing_ok=True)
        make()
        with contextlib.suppress(CacheError):
            cache = TensorCache(tmp_path)
            cache.store(memoryview(some_bytes(SIZE, seed=4)))
        assert private.read_bytes() == b"secret"
        assert private.stat().st_mode & 0o777 == 0o600


def test_read_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = some_bytes(SIZE)
    path = keep(TensorCache(tmp_path), data)
    before = {p: p.stat() for p in tmp_path.rglob("*")}
    cache = TensorCache(tmp_path, read_only=True)
    assert fetch(cache, fnv1a_64(data), SIZE) == data
    assert cache.store(memoryview(some_bytes(SIZE, seed=4))) is None
    # What is damaged isn't served, and stays.
    path.write_bytes(bytes(SIZE))
    assert fetch(cache, fnv1a_64(data), SIZE) is None
    assert "is damaged" in caplog.text
    assert {p: p.stat().st_ino for p in tmp_path.rglob("*")} == {
        p: info.st_ino for p, info in before.items()
    }
    assert cache.usage is None
    # Without sums, as upstream's server leaves a folder.
    shutil.rmtree(sums(tmp_path))
    path.write_bytes(data)
    assert fetch(TensorCache(tmp_path, read_only=True), fnv1a_64(data), SIZE) == data
    assert names(tmp_path) == [path.name]
    assert not sums(tmp_path).exists()
    with pytest.raises(CacheError, match="can't be read: No such file"):
        TensorCache(tmp_path / "none", read_only=True)


def test_small_contents_are_bounded_in_number(tmp_path: Path) -> None:
    """And leave those alone that are worth keeping, although these were used longer ago."""
    large = keep(TensorCache(tmp_path), some_bytes(SIZE))
    os.utime(large, (1, 1))
    folder = PrivateFolder.open(tmp_path)
    quota = Quota(folder, folder.child(sums(tmp_path).name), 100 * SIZE, most_small=10)
    for number in range(50):
        with quota.reserve(8) as (file, name):
            file.write(b"12345678")
            folder.replace(name, f"{number:016x}")
        os.utime(tmp_path / f"{number:016x}", (number + 2, number + 2))
    assert names(tmp_path) == sorted([*(f"{n:016x}" for n in range(40, 50)), large.name])
    assert quota.usage.small == 10


def test_to_keep_one_more_looks_at_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = TensorCache(tmp_path)
    for number in range(20):
        keep(cache, some_bytes(64, number))
    looked = []

    def names(self: PrivateFolder) -> Iterator[str]:
        looked.append(self)
        return iter(())

    monkeypatch.setattr(PrivateFolder, "names", names)
    keep(cache, some_bytes(64, 99))
    assert not looked
    assert cache.usage is not None
    assert (cache.usage.nbytes, cache.usage.small, cache.usage.unfinished) == (21 * 64, 21, 0)


def test_sums_of_the_folder_survive_what_servers_leave(tmp_path: Path) -> None:
    """A ledger that is damaged, or of the future, is made anew."""
    for line in (b"", b"x" * 500, b"-1 0 0 1.000\n", Usage(looked=4e9).encode()):
        cache = TensorCache(tmp_path)
        (sums(tmp_path) / "usage").write_bytes(line)
        keep(cache, some_bytes(SIZE))
        keep(cache, some_bytes(64))
        assert cache.usage is not None
        assert cache.usage.nbytes == sum(
            p.stat().st_size for p in tmp_path.iterdir() if p.is_file()
        )


def test_the_oldest_goes_first(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path, limit=3 * SIZE)
    contents = [some_bytes(SIZE, seed) for seed in range(5)]
    paths = [keep(cache, data) for data in contents[:3]]
    for age, path in enumerate(paths):
        for file in (path, sums(tmp_path) / path.name):
            os.utime(file, (1000 + age, 1000 + age))
    # Served, so used last.
    assert fetch(cache, fnv1a_64(contents[0]), SIZE) == contents[0]
    paths.append(keep(cache, contents[3]))
    assert not paths[1].exists()
    assert not (sums(tmp_path) / paths[1].name).exists()
    # A file of upstream's counts, too; how it was used its own times say.
    upstreams = tmp_path / f"{1:016x}"
    upstreams.write_bytes(bytes(SIZE))
    os.utime(upstreams, (1, 1))
    paths[3].unlink()
    keep(TensorCache(tmp_path, limit=3 * SIZE), contents[4])
    assert not upstreams.exists()
    assert paths[0].exists()
    assert paths[2].exists()


def test_one_address_takes_half_of_what_others_use(tmp_path: Path) -> None:
    """However much it has kept; alone it may have all, whatever was there before."""
    cache = TensorCache(tmp_path, limit=6 * SIZE)
    contents = [some_bytes(SIZE, seed) for seed in range(20)]
    before = [keep(cache, data) for data in contents[:2]]
    ours = [cache.store(memoryview(data), "10.0.0.1") for data in contents[2:6]]
    for age, path in enumerate([*before, *ours]):
        assert path is not None
        for file in (path, sums(tmp_path) / path.name):
            os.utime(file, (1000 + age, 1000 + age))
    assert cache.most_of_one_user == 4 * SIZE
    for data in contents[6:]:
        assert cache.store(memoryview(data), "10.0.0.2") is not None
    assert not any(path.exists() for path in before)
    # Its third took the oldest of the other's, who had more than a half; the rest stays.
    assert [path is not None and path.exists() for path in ours] == [False, True, True, True]
    assert len(names(tmp_path)) == 6
    # What the other is served by hash is its own from then on.
    assert cache.load(fnv1a_64(contents[-1]), memoryview(bytearray(SIZE)), "10.0.0.1")
    assert cache.store(memoryview(contents[0]), "10.0.0.2") is not None
    assert (tmp_path / f"{fnv1a_64(contents[-1]):016x}").exists()


def test_one_address_takes_half_of_the_small_files(tmp_path: Path) -> None:
    folder = PrivateFolder.open(tmp_path)
    quota = Quota(folder, folder.child(sums(tmp_path).name), 100 * SIZE, most_small=10)

    def keep_small(number: int, user: str) -> None:
        with quota.reserve(8, user) as (file, name):
            file.write(b"12345678")
            folder.replace(name, f"{number:016x}")
        quota.users.used(f"{number:016x}", 8, user)
        os.utime(tmp_path / f"{number:016x}", (number + 2, number + 2))

    for number in range(5):
        keep_small(number, "10.0.0.1")
    for number in range(5, 50):
        keep_small(number, "10.0.0.2")
    assert names(tmp_path) == [f"{n:016x}" for n in (*range(5), *range(45, 50))]


def test_what_is_larger_than_the_cache_is_not_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = TensorCache(tmp_path, limit=SIZE)
    kept = keep(cache, some_bytes(SIZE))
    with caplog.at_level(logging.INFO):
        assert cache.store(memoryview(some_bytes(SIZE + 1))) is None
    assert "more than the cache may hold" in caplog.text
    assert names(tmp_path) == [kept.name]


def test_the_end_of_the_disk_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = TensorCache(tmp_path)
    first = keep(cache, some_bytes(SIZE))
    usage = shutil.disk_usage(tmp_path)
    total = 100 * SIZE

    def free(size: int) -> None:
        fake = usage._replace(total=total, free=size)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: fake)

    free(total // 20 + SIZE // 2)
    second = keep(cache, some_bytes(SIZE, seed=4))
    assert not first.exists()
    # Nothing is deleted where that would not be enough.
    free(0)
    with caplog.at_level(logging.INFO):
        assert cache.store(memoryview(some_bytes(SIZE, seed=5))) is None
    assert "0 bytes are left on the disk" in caplog.text
    assert names(tmp_path) == [second.name]


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a file system")
def test_a_disk_that_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", f"size={4 * SIZE},mode=700", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount")
    try:
        cache, data = TensorCache(tmp_path), some_bytes(SIZE)
        path = keep(cache, data)
        with caplog.at_level(logging.INFO):
            assert cache.store(memoryview(some_bytes(4 * SIZE))) is None
        assert "are left on the disk" in caplog.text
        # Somebody else fills it just after it was asked how much is left.
        usage = shutil.disk_usage(tmp_path)._replace(free=1 << 40)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        assert cache.store(memoryview(some_bytes(4 * SIZE))) is None
        assert "No space left on device" in caplog.text
        assert names(tmp_path) == [path.name]
        assert fetch(cache, fnv1a_64(data), SIZE) == data
        # Nor is there room for a sum.
        with contextlib.suppress(OSError), (tmp_path / "filler").open("wb") as filler:
            while True:
                filler.write(bytes(4096))
        (sums(tmp_path) / path.name).unlink()
        assert fetch(TensorCache(tmp_path), fnv1a_64(data), SIZE) == data
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_errors_cost_only_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = TensorCache(tmp_path)
    data = some_bytes(SIZE)
    for module, function in ((os, "replace"), (os, "fchmod"), (os, "truncate")):

        def fail(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(module, function, fail)
            assert cache.store(memoryview(data)) is None
        assert "No space left on device" in caplog.text
        caplog.clear()
        assert names(tmp_path) == []
    keep(cache, data)


# -- several servers, and dead ones


def test_unfinished_files_of_dead_servers_are_deleted(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path)
    room = quota_of(tmp_path, 10 * SIZE)
    with room.reserve(SIZE) as (file, name):
        temporary = tmp_path / name
        assert temporary.stat().st_size == SIZE
        dead = tmp_path / f"{PARTIAL}dead"
        dead.write_bytes(b"x")
        TensorCache(tmp_path)
        assert names(tmp_path) == [temporary.name]
        dead.write_bytes(b"x")
        keep(cache, some_bytes(SIZE))
        TensorCache(tmp_path)
        assert not dead.exists()
        assert temporary.exists()
        file.write(b"x" * SIZE)
    assert not temporary.exists()


def test_what_is_being_written_counts(tmp_path: Path) -> None:
    cache = TensorCache(tmp_path, limit=2 * SIZE)
    room = quota_of(tmp_path, 2 * SIZE)
    with room.reserve(SIZE):
        first = keep(cache, some_bytes(SIZE, seed=1))
        second = keep(cache, some_bytes(SIZE, seed=2))
        assert not first.exists()
        assert second.exists()


def test_nobody_sees_an_unfinished_file_before_it_has_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever looks at the folder meanwhile would keep too much beside it."""
    TensorCache(tmp_path)
    room = quota_of(tmp_path, 2 * SIZE)
    seen: list[int] = []
    right = Quota.locked

    @contextlib.contextmanager
    def locked(self: Quota) -> Iterator[None]:
        with right(self):
            yield
            seen.extend(p.stat().st_size for p in tmp_path.iterdir() if p.name.startswith(PARTIAL))

    monkeypatch.setattr(Quota, "locked", locked)
    with room.reserve(12345):
        pass
    assert seen == [12345]


def test_several_servers_and_threads_in_one_folder(tmp_path: Path) -> None:
    """Of one limit, smaller than what they keep: whatever is found is right, and it stays small."""
    contents = [some_bytes(SIZE // 8 + 64 * seed, seed) for seed in range(24)]
    caches = [TensorCache(tmp_path, limit=2 * SIZE) for _ in range(3)]
    wrong: list[int] = []
    found: list[int] = []

    def work(number: int) -> None:
        rng = np.random.default_rng(number)
        cache = caches[number % len(caches)]
        for _ in range(40):
            i = int(rng.integers(len(contents)))
            got = fetch(cache, fnv1a_64(contents[i]), len(contents[i]))
            if got is None:
                cache.store(memoryview(contents[i]))
            else:
                found.append(i)
                if got != contents[i]:
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert found
    files = [tmp_path / name for name in names(tmp_path)]
    assert not [path for path in files if path.name.startswith(PARTIAL)]
    assert 0 < sum(path.stat().st_size for path in files) <= 2 * SIZE


# Forks, so it is a process without threads. A child keeps contents until it is killed.
_KILLED = """
import os, random, signal, sys, time
from pathlib import Path
from protocol.ggml.hashing import fnv1a_64
from rpc_server.cache.store import TensorCache

folder, rounds = Path(sys.argv[1]), int(sys.argv[2])
random.seed(5)
contents = [random.randbytes(20_000 + 3_000 * i) for i in range(30)]
digests = [fnv1a_64(data) for data in contents]
fnv = dict(zip(map(hash, contents), digests)).__getitem__
limit = 1_000_000
seen = 0
for number in range(rounds):
    child = os.fork()
    if not child:
        try:
            cache = TensorCache(folder, lambda data: fnv(hash(bytes(data))), limit)
            random.seed(number)
            while True:
                cache.store(memoryview(random.choice(contents)))
        finally:
            os._exit(1)
    time.sleep(random.random() * 0.02)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, "it failed before it was killed"
    cache = TensorCache(folder, limit=limit)
    files = [path for path in folder.iterdir() if path.is_file()]
    assert not [path for path in files if path.name.startswith(".partial-")]
    assert sum(path.stat().st_size for path in files) <= limit
    for data, digest in zip(contents, digests):
        place = bytearray(len(data))
        there = (folder / f"{digest:016x}").exists()
        assert cache.load(digest, memoryview(place)) == there, "a file that is not sound"
        assert not there or place == data
        seen += there
print(seen)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.slow
def test_killed_at_any_instant(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, str(tmp_path), "80"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0, "nothing was kept before it was killed"
    assert done.stderr == ""


@pytest.mark.skipif(sys.platform == "win32", reason="has no such limit")
def test_a_limit_of_the_size_of_files(tmp_path: Path) -> None:
    """As a user's quota has it: an error, not a signal that ends the server."""
    script = (
        "import resource, sys; from pathlib import Path; from rpc_server.cache.store import "
        "TensorCache;"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({SIZE}, {SIZE}));"
        "cache = TensorCache(Path(sys.argv[1]));"
        f"assert cache.store(memoryview(bytes({SIZE + 1}))) is None;"
        f"assert cache.store(memoryview(bytes({SIZE}))) is not None"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "File too large" in done.stderr
    assert len(names(tmp_path)) == 1


# -- over the wire


@pytest.mark.parametrize("version", [(7, 0, 0), (6, 0, 0)])
def test_second_upload_comes_from_the_cache(
    tmp_path: Path, content: bytes, version: tuple[int, int, int]
) -> None:
    dialect = next(d for d in DIALECTS if d.version == version)
    env = {**os.environ, "LLAMA_CACHE": str(tmp_path)}
    protocol = f"{version[0]}.{version[1]}"
    digest = fnv1a_64(content)
    with running("--cache", "--protocol", protocol, env=env) as server:
        for expected in (0, 1):
            with Wire(server.port, dialect) as wire:
                handle, base = wire.alloc(len(content) + 256)
                whole = tensor(1, (len(content) // 4,), handle, base)
                # Of another length it is not what the client means.
                longer = tensor(1, (len(content) // 4 + 64,), handle, base)
                offer = {"tensor": longer, "offset": 0, "hash": digest}
                assert wire.call(Command.SET_TENSOR_HASH, offer).result == 0
                part = {"tensor": whole, "offset": 256, "hash": digest}
                assert wire.call(Command.SET_TENSOR_HASH, part).result == 0
                offer["tensor"] = whole
                assert wire.call(Command.SET_TENSOR_HASH, offer).result == expected
                if not expected:
                    fields = {"tensor": whole, "offset": 0, "cache_flag": 1}
                    wire.call(Command.SET_TENSOR, fields, content)
                assert wire.get_tensor(whole, len(content)) == content
    assert names(tmp_path / "rpc") == [f"{digest:016x}"]


def test_newer_clients_say_what_is_kept(tmp_path: Path, content: bytes) -> None:
    with running("--cache-dir", str(tmp_path)) as server, Wire(server.port) as wire:
        handle, base = wire.alloc(len(content))
        whole = tensor(1, (len(content) // 4,), handle, base)
        wire.set_tensor(whole, content)
        assert wire.get_tensor(whole, 16) == content[:16]
    assert names(tmp_path) == []


def test_the_cache_has_a_size(tmp_path: Path) -> None:
    size = 1536 << 10
    with (
        running("--cache-dir", str(tmp_path), "--cache-size", "2") as server,
        Wire(server.port) as wire,
    ):
        handle, base = wire.alloc(size)
        whole = tensor(1, (size // 4,), handle, base)
        for seed in range(3):
            data = some_bytes(size, seed)
            wire.call(Command.SET_TENSOR, {"tensor": whole, "offset": 0, "cache_flag": 1}, data)
            assert wire.get_tensor(whole, size) == data
            assert names(tmp_path) == [f"{fnv1a_64(data):016x}"]


@pytest.mark.upstream
def test_upstreams_server_and_ours_use_one_folder(tmp_path: Path, content: bytes) -> None:
    env = {**os.environ, "LLAMA_CACHE": str(tmp_path)}
    port = free_port()
    command = upstream_command(port, "-t", "1", "-c")
    if command is None:
        pytest.skip("no ggml-rpc-server: run python -m tools.upstream")
    other = content[::-1]

    def use(port: int, data: bytes, expected: int) -> None:
        with Wire(port) as wire:
            handle, base = wire.alloc(len(data))
            whole = tensor(1, (len(data) // 4,), handle, base)
            offer = {"tensor": whole, "offset": 0, "hash": fnv1a_64(data)}
            assert wire.call(Command.SET_TENSOR_HASH, offer).result == expected
            if not expected:
                wire.call(Command.SET_TENSOR, {"tensor": whole, "offset": 0, "cache_flag": 1}, data)
            assert wire.get_tensor(whole, len(data)) == data

    with Process(command, tmp_path / "log", env=env) as upstream:
        upstream.wait_until(lambda: listens(port), 20, "listening socket")
        use(port, content, 0)
        with running("--cache", env=env) as ours:
            use(ours.port, content, 1)
            use(ours.port, other, 0)
        use(port, other, 1)
    assert len(names(tmp_path / "rpc")) == 2


# -- clients that are gone


def until(calls: int) -> Callable[[], bool]:
    """Return what says so often that work is wanted, and then that it isn't."""
    left = iter(range(calls))
    return lambda: next(left, None) is not None


@pytest.fixture
def asking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TensorCache:
    """A cache that asks at each quarter of a content of SIZE bytes whether it is wanted."""
    monkeypatch.setattr(cache_module, "_CHUNK", SIZE // 4)
    return TensorCache(tmp_path)


@pytest.mark.parametrize("calls", [0, 1, 2])
def test_what_nobody_wants_is_not_kept(asking: TensorCache, tmp_path: Path, calls: int) -> None:
    cache, data = asking, some_bytes(SIZE)
    assert cache.store(memoryview(data), wanted=until(calls)) is None
    assert names(tmp_path) == []
    assert keep(cache, data).read_bytes() == data


@pytest.mark.parametrize("calls", [0, 2])
def test_what_nobody_wants_is_not_read_to_its_end(asking: TensorCache, calls: int) -> None:
    cache, data = asking, some_bytes(SIZE)
    keep(cache, data)
    place = bytearray(SIZE)
    assert not cache.load(fnv1a_64(data), memoryview(place), wanted=until(calls))
    assert bytes(place) == data[: calls * SIZE // 4] + bytes(SIZE - calls * SIZE // 4)
    assert fetch(cache, fnv1a_64(data), SIZE) == data


async def test_uploads_that_wait_for_the_disk_end_with_their_client(tmp_path: Path) -> None:
    """Of many clients that send something to be kept and hang up, nothing is left to be done."""
    cache = TensorCache(tmp_path)
    data = memoryview(some_bytes(SIZE))
    for present, kept in ((False, 0), (True, 1)):
        session: Any = types.SimpleNamespace(
            context=types.SimpleNamespace(cache=cache),
            stats=types.SimpleNamespace(address="", cache_stored=0, cache_stored_bytes=0),
            log=logging.getLogger(),
            present=lambda present=present: present,
            answer_empty=lambda command: None,
        )
        await uploads._store(session, data)
        assert len(names(tmp_path)) == session.stats.cache_stored == kept
