"""The library of compiled routines: what is compiled is right, and what goes wrong is told."""

from __future__ import annotations

import ctypes
import errno
import logging
import mmap
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rpc_server.native import compiler, image
from rpc_server.native.folder import Folder, fingerprint
from rpc_server.native.library import Library
from rpc_server.native.routine import (
    CompileError,
    Constant,
    InterruptedCompileError,
    NoMemoryNowError,
    Routine,
)
from rpc_server.observability.progress import under_way
from tests.native import sources

# A compiler that must not be started.
NONE = (sys.executable, "-c", "import sys; sys.exit('started a compiler')")

# What is compiled in the background waits for everybody, on a busy machine.
_PATIENCE = 240.0

Open = Callable[..., Library]


def routine(name: str, *constants: Constant) -> Routine:
    return Routine("tests.native.sources", name, constants)


def call(address: int, *arguments: int) -> int:
    words = [ctypes.c_int64] * len(arguments)
    result: int = ctypes.CFUNCTYPE(ctypes.c_int64, *words)(address)(*arguments)
    return result


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Library]:
    """One library for all tests that only run what it has."""
    library = Library(Folder(tmp_path_factory.mktemp("kernels"), "0"), 2)
    names = ("add", "nothing", "exponentials", "copied")
    library.request([routine(name) for name in names])
    yield library
    library.close()


@pytest.fixture
def open_library(tmp_path: Path) -> Iterator[Open]:
    """Libraries on one folder, as of several servers, or of one that was started again."""
    opened = []

    def make(limit: int = 1, **how: object) -> Library:
        opened.append(Library(Folder(tmp_path, "0"), limit, **how))  # type: ignore[arg-type]
        return opened[-1]

    yield make
    for library in opened:
        library.close()


@pytest.fixture
def filled(open_library: Open, compiled: Library, tmp_path: Path) -> Path:
    """The file of ``add``, in the folder of ``open_library``."""
    compiled.address(routine("add"))
    content = compiled.file(routine("add")).read_bytes()
    path = open_library().file(routine("add"))
    path.write_bytes(content)
    return path


def test_integers(compiled: Library) -> None:
    address = compiled.address(routine("add"))
    assert call(address, 2, 3) == 5
    assert call(address, -(1 << 62), -1) == -(1 << 62) - 1
    assert call(compiled.address(routine("nothing"))) == -1


@pytest.mark.parametrize("factor", [10, -1])
def test_constants(compiled: Library, factor: int) -> None:
    address = compiled.address(routine("scaled_table", factor))
    found = [call(address, i) for i in range(len(sources.TABLE))]
    assert found == [int(v) * factor + 2 * i for i, v in enumerate(sources.TABLE)]


def test_functions_of_the_c_library(compiled: Library) -> None:
    values = np.linspace(-5, 5, 33, dtype=np.float32)
    expected = np.exp(values)
    address = compiled.address(routine("exponentials"))
    assert call(address, values.ctypes.data, len(values)) == len(values)
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    target = np.zeros_like(values)
    call(compiled.address(routine("copied")), target.ctypes.data, values.ctypes.data, values.nbytes)
    assert (target == values).all()


def test_what_is_on_disk_needs_no_compiler(filled: Path, open_library: Open) -> None:
    library = open_library(command=NONE)
    assert call(library.address(routine("add")), 20, 22) == 42


def test_loading_takes_no_compiler_into_the_process(filled: Path) -> None:
    code = (
        "import sys, ctypes\n"
        "from pathlib import Path\n"
        "from rpc_server.native.image import load\n"
        f"loaded = load(Path({str(filled)!r}).read_bytes())\n"
        "run = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(loaded.address)\n"
        "assert run(1, 2) == 3\n"
        "assert not {'numba', 'llvmlite', 'numpy'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:6],
        lambda content: content[:-1],
        lambda content: content[:50] + bytes([content[50] ^ 1]) + content[51:],
        lambda content: image.pack({"kind": "poem"}, content),
    ],
    ids=["empty", "head cut", "tail cut", "bit flipped", "unknown kind"],
)
def test_a_damaged_file_is_made_anew(
    damage: Callable[[bytes], bytes], filled: Path, open_library: Open
) -> None:
    good = filled.read_bytes()
    filled.write_bytes(damage(good))
    assert call(open_library().address(routine("add")), 1, 2) == 3
    assert filled.read_bytes() == good


def test_without_a_compiler_the_routine_is_missing(open_library: Open) -> None:
    library = open_library(command=NONE)
    with pytest.raises(CompileError, match=r"ended \(status 1\): started a compiler"):
        library.address(routine("add"))


def test_one_that_can_not_be_compiled_does_not_hurt_others(
    open_library: Open, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    library = open_library(2)
    bad = [
        routine("wrong"),
        routine("not_marked"),
        routine("absent"),
        routine("ends_its_process", 7),
    ]
    good = routine("add")
    found = library.addresses([*bad, good])
    errors = [str(found[one]) for one in bad]
    assert "TypingError" in errors[0]
    assert "no routine 'not_marked'" in errors[1]
    assert "no routine 'absent'" in errors[2]
    assert "the compiler ended (status 7)" in errors[3]
    address = found[good]
    assert isinstance(address, int)
    assert call(address, 1, 1) == 2
    # All of them were counted, whatever came of them.
    told = [m for m in caplog.messages if m.startswith("compiled ") and " kernels in " in m]
    assert sum(int(m.split()[1]) for m in told) == 5
    # It stays so: nobody waits twice.
    with pytest.raises(CompileError, match="status 7"):
        library.address(bad[3])


@pytest.mark.slow
def test_a_compiler_that_hangs_is_ended(open_library: Open) -> None:
    library = open_library(timeout=3)
    with pytest.raises(CompileError, match="the compiler ended"):
        library.address(routine("takes_long", 600))


def test_closing_ends_compilers(open_library: Open) -> None:
    library, before = open_library(), under_way()
    library.request([routine("takes_long", 600)])
    (task,) = (t for t in under_way() if t not in before)
    assert task.describe() == "compiling kernels: 0 of 1"
    waiting = threading.Thread(target=library.addresses, args=([routine("takes_long", 600)],))
    waiting.start()
    library.close()
    waiting.join(20)
    assert not waiting.is_alive()
    assert task not in under_way()


def test_what_is_waited_for_comes_first(open_library: Open) -> None:
    library = open_library()
    ahead = [routine("scaled_table", i) for i in range(8)]
    library.request([*ahead, routine("add")])
    assert call(library.address(routine("add")), 1, 2) == 3
    # One compiler, which had at most begun with the first few.
    assert sum(library.file(one).exists() for one in ahead) < len(ahead)
    library.addresses(ahead)
    assert not library.pending(ahead, urgent=True)


def test_what_is_pending_is_told_without_waiting(filled: Path, open_library: Open) -> None:
    library = open_library()
    wanted = [routine("add"), routine("scaled_table", 1), routine("absent")]
    assert library.pending(wanted, urgent=False) == wanted[1:]
    assert not library.failed(wanted[2])
    library.addresses(wanted)
    assert library.pending(wanted, urgent=True) == []
    assert [library.failed(one) for one in wanted] == [False, False, True]
    assert [library.has(one) for one in wanted] == [True, True, False]
    never = routine("nothing")
    assert not library.has(never)
    assert not library.failed(never)


@pytest.mark.slow
def test_two_servers_compile_the_same_at_once(open_library: Open, tmp_path: Path) -> None:
    libraries = [open_library(2), open_library(2)]
    wanted = [routine("add"), routine("copied"), routine("scaled_table", 2)]
    for library in libraries:
        library.request(wanted)
    for library in libraries:
        found = library.addresses(wanted)
        addresses = [found[one] for one in wanted]
        assert all(isinstance(address, int) for address in addresses)
        assert call(int(str(addresses[2])), 3) == 8
    left = {path.name for path in libraries[0].file(wanted[0]).parent.iterdir()}
    assert left == {"in-use", "compiling", *(library.file(one).name for one in wanted)}


@pytest.mark.skipif(sys.platform == "win32", reason="compiles in both")
@pytest.mark.slow
def test_what_two_servers_need_at_once_is_compiled_once(
    open_library: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = tmp_path / "notes"
    monkeypatch.setenv("NATIVE_SOURCES_NOTES", str(notes))
    wanted = [routine("noted", factor) for factor in (2, 3)]
    libraries = [open_library(2), open_library(2)]
    for library in libraries:
        library.request(wanted)
    for library in libraries:
        assert [call(library.address(one), 7) for one in wanted] == [14, 21]
    assert sorted(notes.read_text().split()) == ["2", "3"]


def test_object_files_load_where_images_can_not_be_made(compiled: Library) -> None:
    for name, arguments, result in (("add", (4, 5), 9), ("nothing", (), -1)):
        code = compiler.object_code(compiler.find("tests.native.sources", name, []))
        loaded = image.load(image.pack({"kind": "object"}, code))
        assert call(loaded.address, *arguments) == result


# -- folders ---------------------------------------------------------------------------------------


def test_old_folders_are_deleted_but_none_in_use(tmp_path: Path) -> None:
    folders = [Folder(tmp_path, str(i)) for i in range(6)]
    for age, folder in enumerate(folders):
        os.utime(folder.path / "in-use", (1e9 - age, 1e9 - age))
        (folder.path / "some.bin").write_bytes(b"code")
    used, new = folders[4], folders[0]
    for folder in folders:
        if folder not in (used, new):
            folder.close()
    other = tmp_path / "something-else"
    other.mkdir()
    deleted = new.prune(keep=2)
    assert deleted == [folders[3].path, folders[5].path]
    assert all(folder.path.exists() for folder in (*folders[:3], used))
    assert other.exists()
    used.close()
    assert new.prune(keep=0) == [folders[1].path, folders[2].path, used.path]
    assert (new.path / "some.bin").exists()
    new.close()


def test_a_folder_that_was_deleted_is_made_again(open_library: Open, tmp_path: Path) -> None:
    library = open_library()
    for path in library.file(routine("add")).parent.iterdir():
        path.unlink()
    library.file(routine("add")).parent.rmdir()
    assert call(library.address(routine("add")), 1, 2) == 3
    assert library.file(routine("add")).exists()


def test_without_a_place_to_write_to_the_code_is_temporary(tmp_path: Path) -> None:
    # A file where the folder should be: so it is for root, too.
    (tmp_path / "base").write_text("")
    folder = Folder(tmp_path / "base", "0")
    library = Library(folder, 1)
    assert call(library.address(routine("add")), 1, 2) == 3
    path = folder.path
    assert path.exists()
    library.close()
    assert not path.exists()


def test_a_fingerprint_is_of_all_that_code_depends_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = tmp_path / "one", tmp_path / "two"
    for folder in (first, second):
        (folder / "deeper").mkdir(parents=True)
        (folder / "deeper/a.py").write_text("x = 1")
    seen = {fingerprint([first, second])}
    assert fingerprint([second, first]) in seen
    seen.add(fingerprint([first]))
    (second / "deeper/a.py").write_text("y = 2")
    seen.add(fingerprint([first, second]))
    (second / "b.py").write_text("")
    seen.add(fingerprint([first, second]))
    monkeypatch.setenv("NUMBA_CPU_NAME", "generic")
    seen.add(fingerprint([first, second]))
    monkeypatch.setattr("platform.machine", lambda: "another")
    seen.add(fingerprint([first, second]))
    assert len(seen) == 6


def test_features_of_the_processor_can_be_left_out() -> None:
    features = compiler.features_but("+avx2,+avx512f,-amx-tile,+avx512vl", ("avx512",))
    assert features == "+avx2,-avx512f,-amx-tile,-avx512vl"
    assert compiler.features_but("", ("avx512",)) == ""


def test_a_fingerprint_is_of_the_tables_of_gguf(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels are compiled with its grids: another version of them is other code."""
    seen = {fingerprint([])}
    package = tmp_path / "gguf"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "quants.py").write_text("grid = 1")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "gguf", raising=False)
    seen.add(fingerprint([]))
    (package / "quants.py").write_text("grid = 2")
    seen.add(fingerprint([]))
    assert len(seen) == 3


def test_want_of_memory_is_not_remembered(
    filled: Path, open_library: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A neighbour may have used up all mappings of the process, and be gone the next moment."""

    def none(*_: object, **more: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    library = open_library(command=NONE)
    with monkeypatch.context() as at_first:
        at_first.setattr(mmap, "mmap", none)
        with pytest.raises(NoMemoryNowError, match="Cannot allocate memory"):
            library.address(routine("add"))
    assert call(library.address(routine("add")), 2, 3) == 5


def test_a_folder_that_others_could_write_to_is_emptied(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its code would be run: nobody knows whose it is."""
    path = tmp_path / "cache" / "kernels-0"
    for loose in (path, path.parent):
        path.mkdir(parents=True, exist_ok=True)
        (path / "planted.bin").write_bytes(b"code")
        loose.chmod(0o777)
        folder = Folder(path.parent, "0")
        folder.close()
        assert folder.path == path
        assert not (path / "planted.bin").exists()
        assert [p.stat().st_mode & 0o777 for p in (path, path.parent)] == [0o700, 0o700]
        assert "could be written to by others" in caplog.text
        caplog.clear()


def test_new_folders_are_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        Folder(tmp_path / "cache", "0").close()
    finally:
        os.umask(before)
    path = tmp_path / "cache" / "kernels-0"
    assert [p.stat().st_mode & 0o777 for p in (path, path.parent)] == [0o700, 0o700]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to somebody else")
def test_a_folder_of_another_user_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "cache" / "kernels-0"
    path.mkdir(parents=True)
    os.chown(path, 65534, 65534)
    folder = Folder(path.parent, "0")
    assert folder.path != path
    assert "belongs to user 65534" in caplog.text
    folder.close()
    assert path.stat().st_uid == 65534


@pytest.mark.skipif(sys.platform == "win32", reason="has no owners or modes of this kind")
def test_code_that_others_could_have_written_is_not_loaded(tmp_path: Path) -> None:
    """Even in a folder of this user's: it may have been moved into the place of ours."""
    folder = Folder(tmp_path, "0")
    file = folder.path / "code.bin"
    file.write_bytes(b"code")
    assert folder.read("code.bin") == b"code"
    file.chmod(0o666)
    with pytest.raises(PermissionError, match="others can write to it"):
        folder.read("code.bin")
    file.unlink()
    (tmp_path / "elsewhere").write_bytes(b"code")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"symbolic links"):
        folder.read("code.bin")
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(OSError, match=r"not a regular file"):
        folder.read("code.bin")
    folder.close()


@pytest.mark.skipif(sys.platform == "win32", reason="has no pipes in folders")
def test_a_pipe_in_the_place_of_a_lock_is_not_waited_for(tmp_path: Path) -> None:
    folder = Folder(tmp_path, "0")
    other = tmp_path / "kernels-1"
    other.mkdir()
    os.mkfifo(other / "in-use")
    assert folder.prune(keep=0) == []
    folder.close()


def test_what_is_prepared_is_on_disk_and_not_loaded(open_library: Open) -> None:
    library = open_library()
    wanted = [routine("add"), routine("scaled_table", 3)]
    assert library.missing(wanted) == wanted
    for future in library.prepare(wanted, background=True):
        assert future.result(_PATIENCE) is None
    assert library.missing(wanted) == []
    assert call(open_library(command=NONE).address(routine("add")), 1, 2) == 3


def test_preparing_tells_what_can_not_be_compiled(open_library: Open) -> None:
    good, bad = open_library().prepare([routine("add"), routine("absent")], background=False)
    assert good.result(_PATIENCE) is None
    with pytest.raises(CompileError, match="no routine 'absent'") as error:
        bad.result(_PATIENCE)
    assert not isinstance(error.value, InterruptedCompileError)


@pytest.mark.slow
def test_who_waits_does_not_wait_for_the_background(open_library: Open) -> None:
    library = open_library()
    wanted = [routine("takes_long", 600), routine("scaled_table", 4)]
    futures = library.prepare(wanted, background=True)
    assert call(library.address(routine("add")), 1, 2) == 3
    for future in futures:
        with pytest.raises(InterruptedCompileError):
            future.result(_PATIENCE)
    # It goes on when it is asked to, with a compiler of its own.
    (again,) = library.prepare([routine("scaled_table", 4)], background=True)
    assert again.result(_PATIENCE) is None


def test_an_interruption_reaches_what_has_just_been_taken(
    open_library: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its compiler is about to be started, so there is no process to end."""
    library = open_library(command=NONE)
    take = library._background._take

    def taken() -> Any:
        item = take()
        library.interrupt()
        return item

    monkeypatch.setattr(library._background, "_take", taken)
    (future,) = library.prepare([routine("add")], background=True)
    with pytest.raises(InterruptedCompileError):
        future.result(_PATIENCE)


@pytest.mark.slow
def test_what_is_asked_for_after_an_interruption_is_compiled(open_library: Open) -> None:
    """Though the compiler that was there, with nothing to do, is ended by it."""
    library = open_library()
    for number in range(2):
        (future,) = library.prepare([routine("scaled_table", number)], background=True)
        assert future.result(_PATIENCE) is None
        library.interrupt()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_background_leaves_the_processors_to_others(open_library: Open) -> None:
    library = open_library()
    future = library.prepare([routine("own_priority")], background=True)[0]
    with pytest.raises(CompileError, match=r"nice 19, policy (\d)") as told:
        future.result(_PATIENCE)
    assert str(told.value).endswith(str(os.SCHED_IDLE))
