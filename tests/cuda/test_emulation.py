"""The emulation finds what a card would do wrong without a word."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rpc_server.devices.cpu.kernels.interface.abi import RECORD_WORDS
from rpc_server.devices.cuda.compile import joined
from tests.cuda import emulation
from tests.cuda.harness import STATUS_WORD

pytestmark = pytest.mark.skipif(emulation.compiler() is None, reason=emulation.NO_COMPILER)

THREADS = 64


@pytest.fixture(scope="module")
def module() -> emulation.Module:
    return emulation.build("faults", joined(Path(__file__).parent / "faults.cu"))


def launch(
    module: emulation.Module,
    kernel: str,
    n: int = THREADS,
    grid: int = 1,
    block: int = THREADS,
    shared: int = 0,
    seed: int = 1,
) -> np.ndarray:
    """Run ``kernel`` on n floats and give what it wrote; seed decides the order of threads."""
    source, result = np.arange(n, dtype=np.float32), np.zeros(n, np.float32)
    # The word of failures, and a counter.
    status = np.zeros(2, np.uint32)
    memory = emulation.Memory()
    memory.add(status.ctypes.data, status.nbytes)
    memory.add(source.ctypes.data, source.nbytes, writable=False)
    memory.add(result.ctypes.data, result.nbytes)
    record = np.zeros(RECORD_WORDS, np.int64)
    record[STATUS_WORD] = status.ctypes.data
    record[0], record[2] = result.ctypes.data, n
    record[10], record[12] = source.ctypes.data, n
    module.launch(kernel, record, (grid,), (block,), memory, shared=shared, seed=seed)
    return result


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_modules_share_the_stacks_of_threads(module: emulation.Module) -> None:
    """A process may have 65530 mappings, and one of all tests has some hundred modules."""

    def mappings() -> int:
        return len(Path("/proc/self/maps").read_text().splitlines())

    launch(module, "block_sum", 1024, block=1024)
    before = mappings()
    text = joined(Path(__file__).parent / "faults.cu") + "// once more\n"
    launch(emulation.build("faults", text), "block_sum", 1024, block=1024)
    assert mappings() - before < 50


def test_modules_are_kept_for_one_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are compiled with -march=native, and folders of caches travel."""
    here = emulation.place("faults", "")
    monkeypatch.setattr(emulation, "_target", lambda: "another")
    assert emulation.place("faults", "") != here


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_sound_kernel_runs(module: emulation.Module, seed: int) -> None:
    """Shared memory, barriers, exchanges and atomics, in any order of threads."""
    result = launch(module, "sound", seed=seed)
    assert result[0] == sum(range(THREADS))
    np.testing.assert_array_equal(result[1:], np.arange(THREADS)[::-1][1:])


@pytest.mark.parametrize(("n", "block"), [(64, 64), (96, 96), (1024, 1024), (32, 32)])
def test_sums_over_a_block(module: emulation.Module, n: int, block: int) -> None:
    result = launch(module, "block_sum", n, block=block)
    np.testing.assert_array_equal(result, np.full(n, n * (n - 1) // 2, np.float32))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_last_block_sees_what_others_wrote(module: emulation.Module, seed: int) -> None:
    result = launch(module, "hands_over", grid=2, seed=seed)
    np.testing.assert_array_equal(result, np.arange(THREADS)[::-1])


@pytest.mark.parametrize("checked", [True, False])
def test_atomics_in_shared_memory(checked: bool) -> None:
    text = joined(Path(__file__).parent / "faults.cu")
    module = emulation.build("faults", text, checked=checked)
    np.testing.assert_array_equal(
        launch(module, "counts_in_shared_memory"), np.full(THREADS, THREADS, np.float32)
    )


FAULTS = {
    "reads_past_the_end": "out of bounds: reads 4 bytes",
    "writes_before_the_start": "out of bounds: writes 4 bytes",
    "writes_its_source": "read-only",
    "reads_a_null_pointer": "no memory of the device",
    "reads_past_shared_memory": "out of bounds: reads 4 bytes at .* of shared memory",
    "reads_shared_memory_that_nobody_wrote": "uninitialised",
    "misses_a_barrier": "race in shared memory",
    "misses_a_barrier_before_reuse": "race in shared memory",
    "misses_a_barrier_of_the_warp": "race in shared memory",
    "writes_one_word_from_two_threads": "race in global memory",
    "reads_what_another_block_writes": "race in global memory",
    "hands_over_without_a_fence": "race in global memory",
    "takes_over_without_a_fence": "race in global memory",
    "takes_over_without_a_barrier": "race in global memory",
    "hands_over_before_all_is_written": "race in global memory",
    "waits_at_different_barriers": "threads of a block wait at different ones",
    "leaves_lanes_out_of_an_exchange": "not all of them come|has ended",
    "reads_a_lane_that_takes_no_part": "which takes no part",
    "loads_a_misaligned_number": "misaligned",
    "loads_a_misaligned_vector": "misaligned",
    "stores_a_misaligned_vector": "misaligned",
    "traps": "__trap",
}


@pytest.mark.parametrize("kernel", FAULTS)
def test_faults_are_found(module: emulation.Module, kernel: str) -> None:
    """Each is named with the line it is in."""
    with pytest.raises(emulation.EmulationError, match=FAULTS[kernel]) as raised:
        launch(module, kernel, grid=2, shared=256)
    assert "faults.cu:" in str(raised.value)


def test_after_a_fault_the_next_launch_runs(module: emulation.Module) -> None:
    with pytest.raises(emulation.EmulationError):
        launch(module, "misses_a_barrier")
    assert launch(module, "sound")[0] == sum(range(THREADS))


@pytest.mark.parametrize(
    ("grid", "block", "shared"), [((0,), (32,), 0), ((1,), (2048,), 0), ((1,), (32,), 1 << 20)]
)
def test_wrong_launches_are_refused(
    module: emulation.Module, grid: tuple[int], block: tuple[int], shared: int
) -> None:
    with pytest.raises(emulation.EmulationError, match="the launch"):
        launch(module, "sound", grid=grid[0], block=block[0], shared=shared)
