"""Records that are cut into parts: results are the same, and no part has too much to do."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor, contiguous_strides
from rpc_server.devices.cpu.planner import LOWERINGS, Emitted, Planner
from rpc_server.devices.cpu.run_times import RunTimes
from rpc_server.devices.cpu.scratch import ScratchArena
from tests.ops import harness
from tests.ops.harness import run
from tests.ops.tensors import node, params, tensor, values

F32, F16, I32, I64 = GgmlType.F32, GgmlType.F16, GgmlType.I32, GgmlType.I64

_RNG = np.random.default_rng(3)


def given(type_: GgmlType, *ne: int) -> Tensor:
    return tensor(type_, ne, _RNG.standard_normal(ne[::-1]).astype(np.float32))


def numbers(type_: GgmlType, data: np.ndarray) -> Tensor:
    return tensor(type_, data.shape[::-1], data)


def products() -> Tensor:
    """Weights of two heads for four each, more columns than are done together."""
    return node(
        Op.MUL_MAT, F32, (37, 24, 8, 2), [given(GgmlType.Q8_0, 64, 37, 2), given(F32, 64, 24, 8, 2)]
    )


def experts() -> Tensor:
    ids = numbers(I32, _RNG.integers(0, 5, (50, 3)))
    sources = [given(GgmlType.Q4_0, 64, 40, 5), given(F32, 64, 1, 50), ids]
    return node(Op.MUL_MAT_ID, F32, (40, 3, 50), sources)


def attention(n_tokens: int, n_kv: int) -> Tensor:
    q, k, v = given(F32, 64, n_tokens, 4), given(F16, 64, n_kv, 2), given(F16, 64, n_kv, 2)
    mask = given(F16, n_kv, n_tokens)
    return node(Op.FLASH_ATTN_EXT, F32, (64, 4, n_tokens), [q, k, v, mask], params(0.125, 0.0, 0.0))


def rows_set() -> Tensor:
    to = given(GgmlType.Q8_0, 64, 90)
    index = numbers(I64, _RNG.permutation(90)[:70])
    return node(Op.SET_ROWS, GgmlType.Q8_0, to.ne, [given(F16, 64, 70), index], inplace=to)


def converted() -> Tensor:
    x = given(F16, 64, 90)
    to = given(GgmlType.Q4_0, 64, 90)
    return node(Op.CPY, GgmlType.Q4_0, to.ne, [x, to], inplace=to)


NODES: dict[str, Callable[[], Tensor]] = {
    "products": products,
    "experts": experts,
    "attention of few tokens": lambda: attention(1, 700),
    "attention of many tokens": lambda: attention(130, 200),
    "rows set": rows_set,
    "converted": converted,
    "sorted": lambda: node(Op.ARGSORT, I32, (33, 40), [given(F32, 33, 40)], params(1)),
    "largest": lambda: node(Op.TOP_K, I32, (5, 40), [given(F32, 33, 40)]),
    "added": lambda: node(Op.ADD, F32, (512, 40), [given(F32, 512, 40), given(F32, 512, 40)]),
    "normed": lambda: node(Op.RMS_NORM, F32, (512, 40), [given(F32, 512, 40)], params(1e-6)),
    "summed": lambda: node(Op.SUM, F32, (1,), [given(F32, 512, 40)]),
}


@pytest.mark.parametrize("name", NODES)
@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_parts_compute_what_the_whole_does(
    name: str, n_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut: list[int] = []
    emit = Planner.emit

    def noted(self: Planner, *args: object, **kwargs: object) -> None:
        emit(self, *args, **kwargs)  # type: ignore[arg-type]
        cut.append(self.records[-1].parts)

    t = NODES[name]()
    sources = [(s, values(s)) for s in t.src if s is not None]
    run(t, kernels=True, n_threads=n_threads)
    expected = values(t)
    monkeypatch.setattr(Planner, "emit", noted)
    monkeypatch.setattr(Planner, "part_bytes", 512)
    monkeypatch.setattr(Planner, "part_products", 1 << 14)
    # One that has not seen the node yet.
    monkeypatch.setattr(harness, "builder", harness.builder.__wrapped__)
    run(t, kernels=True, n_threads=n_threads)
    assert max(cut) > 2 * n_threads
    assert all(parts % n_threads == 0 for parts in cut)
    # What is put together of other pieces is rounded otherwise.
    rounded = name.partition(" ")[0] in ("attention", "products", "experts")
    tolerance = 3e-5 if rounded else 0.0
    np.testing.assert_allclose(values(t), expected, rtol=tolerance, atol=tolerance)
    for s, before in sources:
        if s.address != t.address:
            np.testing.assert_array_equal(values(s), before)


@pytest.mark.parametrize("name", NODES)
@pytest.mark.parametrize("n_threads", [2, 3])
def test_half_of_the_threads_compute_the_same_bits(
    name: str, n_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    t = NODES[name]()
    run(t, kernels=True, n_threads=n_threads)
    expected = values(t).copy()
    asked: list[float] = []

    def half(self: RunTimes, now: float) -> bool:
        asked.append(now)
        return True

    monkeypatch.setattr(RunTimes, "half", half)
    run(t, kernels=True, n_threads=n_threads)
    np.testing.assert_array_equal(values(t), expected)
    # What has little to do runs on one thread anyway.
    assert asked or name not in ("products", "experts", "attention of many tokens", "added")


def planned(t: Tensor, n_threads: int = 2) -> list[Emitted]:
    planner = Planner(n_threads, ScratchArena())
    planner.begin(t)
    assert LOWERINGS[t.op](t, planner)
    return planner.take()


def bare(type_: GgmlType, *ne: int, nb: tuple[int, int, int, int] | None = None) -> Tensor:
    """A tensor that nobody reads: it has an address, and no memory."""
    ne0, ne1, ne2, ne3 = (*ne, *(1,) * (4 - len(ne)))
    whole = (ne0, ne1, ne2, ne3)
    strides = contiguous_strides(type_, whole) if nb is None else nb
    return Tensor(1, type_, whole, strides, name="t", address=1 << 40)


def bare_node(op: Op, t: Tensor, *sources: Tensor) -> Tensor:
    t.op, t.src = op, (*sources, *(None,) * (10 - len(sources)))
    return t


def test_no_part_of_a_huge_product_is_long() -> None:
    """Of any shape: by rows, or where these are few by columns."""
    for m, n, k in ((6144, 6144, 6144), (4, 1 << 20, 4096), (1, 1 << 20, 1024), (1 << 20, 4, 4096)):
        t = bare_node(Op.MUL_MAT, bare(F32, m, n), bare(F16, k, m), bare(F32, k, n))
        made = [r for r in planned(t) if r.kernel.name == "product_kernel"]
        for record in made:
            rows, columns = int(record.words[2]), int(record.words[3])
            whole = rows * columns * k
            # Rows are multiplied 16 at once.
            least = min(rows, 16) * columns * k
            assert max(whole / max(record.parts, 2), least) <= 2.1 * Planner.part_products
        assert sum(int(r.words[3]) for r in made) == n


def test_heads_that_share_one_matrix_are_cut_too() -> None:
    k, heads = 1024, 1 << 16
    t = bare_node(Op.MUL_MAT, bare(F32, 16, 1, heads), bare(F16, k, 16), bare(F32, k, 1, heads))
    made = [r for r in planned(t) if r.kernel.name == "product_kernel"]
    assert sum(int(r.words[4]) for r in made) == heads
    assert all(int(r.words[4]) * 16 * k <= Planner.part_products for r in made)


def test_elements_over_one_another_are_work() -> None:
    """A stride of 0 makes much of little memory."""
    one = bare(F32, 64, 1 << 20, nb=(4, 0, 0, 0))
    t = bare_node(Op.SUM_ROWS, bare(F32, 1, 1 << 20), one)
    (record,) = planned(t)
    assert record.parts >= 32


def test_what_a_decoder_does_is_not_cut() -> None:
    """A token's products are over within a slice; nothing is counted for them."""
    x = bare(F32, 4096)
    for m in (4096, 11008):
        t = bare_node(Op.MUL_MAT, bare(F32, m), bare(GgmlType.Q4_0, 4096, m), x)
        assert [r.parts for r in planned(t, 4)] == [0, 0]
