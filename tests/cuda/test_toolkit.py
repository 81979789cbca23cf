"""A machine whose CuPy, compiler or card is not fit is told so before anything is uploaded."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from unittest import mock

import pytest

from rpc_server.devices.cuda import toolkit
from rpc_server.devices.cuda.card import Card
from rpc_server.devices.cuda.compile import ARCHITECTURES
from rpc_server.devices.cuda.toolkit import CardError, check_capability
from tests.cuda import emulation, standin

# As NVRTC 12.9 and 13.5 tell.
_CUDA12 = standin.ARCHITECTURES
_CUDA13 = tuple(n for n in standin.ARCHITECTURES if n >= 75)


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_cuda12_takes_every_card(capability: int) -> None:
    check_capability("a card", capability, _CUDA12)


@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_cuda13_takes_turing_and_newer(capability: int) -> None:
    if capability >= 75:
        check_capability("a card", capability, _CUDA13)
        return
    with pytest.raises(CardError, match=r"\[cuda12\].*without \[cuda13\]"):
        check_capability("Tesla P100", capability, _CUDA13)


def test_a_card_that_is_too_old_is_told_so() -> None:
    with pytest.raises(CardError, match=r"5\.2, and kernels need 6\.0"):
        check_capability("GTX 970", 52, _CUDA12)


def test_a_compiler_that_is_too_old_is_told_so() -> None:
    """Today's cards run code for older ones, so a compiler is seldom too old."""
    check_capability("a card of tomorrow", 130, _CUDA12)
    with pytest.raises(CardError, match="newer NVRTC"):
        check_capability("a card", 80, [90, 100])


@pytest.mark.skipif(emulation.compiler() is None, reason=emulation.NO_COMPILER)
class TestCard:
    """What a card raises when it is opened."""

    def test_of_a_capability_that_the_compiler_does_not_know(self) -> None:
        with (
            standin.installed(),
            mock.patch.object(standin, "ARCHITECTURES", _CUDA13),
            pytest.raises(CardError, match=r"emulated GPU has compute capability 6\.1.*cuda12"),
        ):
            Card(0)

    def test_where_the_compiler_refuses_the_card(self) -> None:
        error = standin.CompileError("nvrtc: error: invalid value for --gpu-architecture\nmore")
        with (
            standin.installed(),
            mock.patch.object(standin.RawModule, "get_function", side_effect=error),
            pytest.raises(CardError, match=r"can't be used: .*gpu-architecture$"),
        ):
            Card(0)

    def test_whose_context_can_not_be_made(self) -> None:
        with standin.installed(2):
            standin.make_unusable(1, "cudaErrorDevicesUnavailable: busy or unavailable")
            with pytest.raises(CardError, match="DevicesUnavailable"):
                Card(1)

    @pytest.mark.parametrize(
        ("name", "without"),
        [
            ("NVIDIA GeForce GTX 1660 SUPER", True),
            ("NVIDIA T1000 8GB", True),
            ("NVIDIA GeForce GTX 1080 Ti", False),
            ("NVIDIA GeForce RTX 2080", False),
            ("Tesla T4", False),
        ],
    )
    def test_without_tensor_cores_although_its_capability_has_them(
        self, name: str, without: bool
    ) -> None:
        with (
            standin.installed(),
            mock.patch.dict(standin._PROPERTIES, name=name.encode()),
            mock.patch.object(standin.RawModule, "__init__", return_value=None) as made,
            mock.patch.object(standin.RawModule, "get_function"),
        ):
            Card(0)
        assert made.call_args.kwargs["code"].startswith("#define WITHOUT_TENSOR_CORES") == without

    def test_leaves_other_cards_alone(self) -> None:
        """A context on a card takes hundreds of megabytes of it."""
        with standin.installed(2):
            card = Card(1)
            card.free(card.allocate(64))
            assert standin.contexts == {1}

    @pytest.mark.slow
    def test_keeps_something_back_for_itself(self) -> None:
        """Clients can fill a card, and its kernels still find room."""
        with standin.installed():
            card = Card(0)
            free, total = card.memory()
            assert total == standin.TOTAL_BYTES
            assert total - free == 512 << 20
            with pytest.raises(MemoryError, match="free for clients"):
                card.allocate_for_client(free + 1)
            weights = card.allocate_for_client(free)
            scratch = card.allocate(180 << 20)
            with pytest.raises(MemoryError, match="MemoryAllocation"):
                card.allocate(400 << 20)
            card.free(scratch)
            card.free(weights)


def test_cupy_keeps_its_kernels_where_the_server_keeps_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CuPy can't be imported where its folder can't be made: HOME is often not to be written to."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert toolkit._writable_cache() == str(tmp_path / "ggml-rpc-server" / "cupy")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    folder = Path(toolkit._writable_cache())
    assert folder.is_dir()
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.rmdir()


def test_a_cupy_that_breaks_at_its_import_is_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def find_spec(self, name: str, *_: object) -> types.ModuleType | None:
            if name == "cupy":
                raise OSError("read-only file system")
            return None

    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    monkeypatch.setenv("CUPY_CACHE_DIR", os.devnull)
    with pytest.raises(CardError, match=r"can't be imported .read-only"):
        toolkit.cupy()
