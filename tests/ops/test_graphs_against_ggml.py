"""Graphs made by the client's constructors, run by llama.cpp's server and by this one.

Both must agree within ggml's own bound for backends; what only moves data, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from client.backend import Backend
from client.builder.graph import GraphBuilder
from client.builder.partial import Triangle
from client.builder.products import ROPE_IMROPE, ROPE_NEOX
from protocol.ggml.ops import Op
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor
from rpc_server.types import from_f32
from tests.ops.harness import nmse
from tests.ops.tensors import four
from tests.upstream_server import Endpoint

pytestmark = pytest.mark.upstream

F32, F16, BF16, I32, Q4_0, Q8_0 = (
    GgmlType.F32, GgmlType.F16, GgmlType.BF16, GgmlType.I32, GgmlType.Q4_0, GgmlType.Q8_0,
)  # fmt: skip
MAX_NMSE = 1e-7
MAX_NMSE_OF_PRODUCTS = 5e-4
Array = np.ndarray[Any, Any]
Build = Callable[..., Tensor]


@dataclass(frozen=True)
class Leaf:
    """A tensor with values: normally distributed, or integers below ``limit``."""

    ne: tuple[int, ...]
    type: GgmlType = F32
    limit: int = 5
    change: Callable[[Array], Array] = field(default=lambda x: x)

    def values(self, seed: int) -> Array:
        """What to upload, of quantized types rows of blocks."""
        rng, shape = np.random.default_rng(seed), four(self.ne)[::-1]
        if self.type is I32:
            return rng.integers(0, self.limit, shape, np.int32)
        x = self.change(rng.standard_normal(shape).astype(np.float32))
        if self.type is F32:
            return x
        if self.type is F16:
            return x.astype(np.float16)
        raw: Array = from_f32(self.type, x)
        return raw.view(np.uint16) if self.type is BF16 else raw


@dataclass(frozen=True)
class Case:
    """``build`` makes the node of the graph builder and the leaves.

    ``changed`` leaves are written by the node and compared like its result.
    """

    name: str
    build: Build
    leaves: Sequence[Leaf]
    bound: float = MAX_NMSE
    changed: Sequence[int] = ()

    def __str__(self) -> str:
        return self.name


def probabilities(x: Array) -> Array:
    weights: Array = np.exp(x)
    weights /= weights.sum(axis=-1, keepdims=True)
    return weights


def holes(x: Array) -> Array:
    return np.where(x > 0.5, -np.inf, x).astype(np.float32)


def triangular(x: Array) -> Array:
    """Lower triangles whose solutions stay small."""
    lower: Array = np.tril(x) * 0.3
    n = np.arange(x.shape[-1])
    lower[..., n, n] = 1.5 + abs(x[..., n, n])
    return lower


def halves(g: GraphBuilder, a: Tensor) -> Tensor:
    """Every other row of ``a``: rows are dense and do not follow one another."""
    return g.view_4d(
        a, a.ne[0], a.ne[1] // 2, a.ne[2], a.ne[3], 2 * a.nb[1], a.nb[2], a.nb[3], a.nb[1]
    )


def windows() -> Iterator[Case]:
    for w in (3, 4, 14):
        yield Case(f"part {w}", lambda g, a, w=w: g.win_part(a, w), [Leaf((5, 8, 7))], 0)
        number = -(-8 // w) * -(-7 // w)
        leaf = Leaf((5, w, w, number + 1))
        yield Case(f"unpart {w}", lambda g, a, w=w: g.win_unpart(a, 8, 7, w), [leaf], 0)
    for type_ in (F16, BF16):
        leaf = Leaf((6, 9), type_)
        yield Case(f"relative {type_.name}", lambda g, a: g.get_rel_pos(a, 5, 5), [leaf], 0)
    sources = [Leaf((16, 6, 5)), Leaf((4, 3, 2, 5)), Leaf((4, 3, 2, 5))]
    for inplace in (False, True):
        yield Case(
            f"add relative {inplace}",
            lambda g, a, w, h, i=inplace: g.add_rel_pos(a, w, h, inplace=i),
            sources,
            changed=[0],
        )


def delta_nets() -> Iterator[Case]:
    for name, heads, key_heads, gates, sequences, key_sequences, kept, tokens in (
        ("one gate", 4, 4, 1, 2, 2, 1, 5),
        ("gates", 4, 2, 16, 2, 2, 1, 5),
        ("odd heads", 5, 3, 1, 1, 1, 1, 3),
        ("shared sequences", 4, 4, 16, 4, 2, 1, 3),
        ("snapshots", 4, 2, 1, 2, 1, 3, 7),
    ):
        v = (16, heads, tokens, sequences)
        q = Leaf((16, key_heads, tokens, key_sequences), change=lambda x: x * np.float32(0.3))
        yield Case(
            f"delta net, {name}",
            lambda g, *s, kept=kept: g.gated_delta_net(*s, kept),
            [
                q, q, Leaf(v), Leaf((gates, *v[1:]), change=lambda x: -abs(x)),
                Leaf((1, *v[1:]), change=lambda x: 1 / (1 + np.exp(x))),
                Leaf((16, 16, heads, sequences)),
            ],
        )  # fmt: skip
    q = Leaf((16, 8, 3, 2), change=lambda x: x * np.float32(0.3))
    yield Case(
        "delta net of views",
        lambda g, q, k, v, *s: g.gated_delta_net(halves(g, q), halves(g, k), halves(g, v), *s),
        [q, q, q, Leaf((1, 4, 3, 2)), Leaf((1, 4, 3, 2)), Leaf((16, 16, 4, 2))],
    )


def recurrences() -> Iterator[Case]:
    yield Case(
        "convolution", lambda g, x, c: g.ssm_conv(x, c), [Leaf((7, 6, 3)), Leaf((4, 6))]
    )  # fmt: skip
    for decays, kept in ((16, 1), (1, 1), (1, 3)):
        yield Case(
            f"scan {decays} {kept}",
            lambda g, *s, kept=kept: g.ssm_scan(*s, kept),
            [
                Leaf((16, 4, 6, 3)), Leaf((4, 6, 5, 2)), Leaf((6, 5, 2)),
                Leaf((decays, 6), change=lambda x: -abs(x)), Leaf((16, 2, 5, 2)),
                Leaf((16, 2, 5, 2)), Leaf((2,), I32, 3),
            ],
        )  # fmt: skip
    rows, states = Leaf((64, 3, 4), change=lambda x: x * np.float32(0.3)), Leaf((64 * 64 * 3, 2))
    wkv6 = [rows, rows, rows, Leaf((64, 3)), rows, states]
    yield Case("wkv6", lambda g, *s: g.rwkv_wkv6(*s), wkv6)
    yield Case("wkv7", lambda g, *s: g.rwkv_wkv7(*s), [*[rows] * 6, states])
    yield Case(
        "linear attention",
        lambda g, *s: g.gated_linear_attn(*s, 0.25),
        [*[rows] * 4, states],
    )
    for n, k in ((11, 5), (64, 64), (1, 3)):
        ab = [Leaf((n, n, 3, 2), change=triangular), Leaf((k, n, 3, 2))]
        yield Case(f"solve {n}", lambda g, a, b: g.solve_tri(a, b), ab)
    yield from delta_nets()


def sparse_attention() -> Iterator[Case]:
    for type_ in (F32, F16, BF16, Q8_0, Q4_0):
        for streams, masks in ((1, 1), (4, 2)):
            yield Case(
                f"indexer {type_.name} {streams}",
                lambda g, *s: g.lightning_indexer(*s),
                [
                    Leaf((64, 5, 7, streams)), Leaf((64, 1, 33, streams), type_),
                    Leaf((5, 7, 1, streams)), Leaf((33, 7, 1, masks), F16, change=holes),
                ],
            )  # fmt: skip
    for rounds in (1, 20):
        yield Case(
            f"mixing matrix {rounds}",
            lambda g, *s, n=rounds: g.dsv4_hc_comb(*s, 1e-6, n),
            [Leaf((24, 9)), Leaf((3,)), Leaf((24,))],
        )
    yield Case(
        "mixing matrix of views",
        lambda g, mixes, *s: g.dsv4_hc_comb(g.transpose(mixes), *s, 1e-2, 3),
        [Leaf((9, 24)), Leaf((5,)), Leaf((24,))],
    )
    pre, x = Leaf((4, 9)), Leaf((96, 4, 9))
    yield Case("streams read", lambda g, *s: g.dsv4_hc_pre(*s), [x, pre])
    yield Case("streams gated", lambda g, *s: g.dsv4_hc_pre_gated(*s, 0.7), [x, x])
    yield Case(
        "streams of views",
        lambda g, x, w: g.dsv4_hc_pre(g.permute(x, 1, 0, 2, 3), g.transpose(w)),
        [Leaf((4, 96, 9)), Leaf((9, 4))],
    )
    written = [Leaf((96, 9)), x, pre]
    yield Case("streams written", lambda g, *s: g.dsv4_hc_post(*s), written)
    mixed = [*written, Leaf((4, 4, 9))]
    yield Case("streams mixed", lambda g, *s: g.dsv4_hc_post(*s), mixed)


def attention_back(causal: int) -> Build:
    """The node as ggml's constructor made it, when it still did."""

    def build(g: GraphBuilder, q: Tensor, k: Tensor, v: Tensor, d: Tensor) -> Tensor:
        size = sum(-(-t.nelements // 4) * 4 for t in (q, k, v))
        return g.op(Op.FLASH_ATTN_BACK, F32, (size,), (q, k, v, d), (causal,))

    return build


def training() -> Iterator[Case]:
    a = Leaf((64, 5, 3, 2))
    two = [a, a]
    labels = Leaf((64, 5, 3, 2), change=probabilities)
    yield Case("loss", lambda g, *s: g.cross_entropy_loss(*s), [a, labels])
    large = Leaf((30, 7), change=lambda x: x * np.float32(200))
    sharp = Leaf((30, 7), change=probabilities)
    yield Case("loss of large logits", lambda g, *s: g.cross_entropy_loss(*s), [large, sharp])
    back = [Leaf((1,)), a, labels]
    yield Case("loss back", lambda g, *s: g.cross_entropy_loss_back(*s), back)

    def adamw(g: GraphBuilder, a: Tensor, *s: Tensor) -> Tensor:
        return g.opt_step_adamw(g.set_param(a), *s)

    def sgd(g: GraphBuilder, a: Tensor, *s: Tensor) -> Tensor:
        return g.opt_step_sgd(g.set_param(a), *s)

    square = Leaf((64, 5, 3, 2), change=abs)
    settings = Leaf((7,), change=lambda x: 1 / (1 + np.exp(x)))
    yield Case("adamw", adamw, [a, a, a, square, settings], changed=(0, 2, 3))
    yield Case("sgd", sgd, [a, a, Leaf((2,))], changed=(0,))
    for type_ in (F32, F16):
        leaf = Leaf((64, 5), type_)
        yield Case(f"silu back {type_.name}", lambda g, *s: g.silu_back(*s), [leaf, leaf])
        rows = [leaf, Leaf((5,), I32, 7), Leaf((64, 7), type_)]
        yield Case(f"rows back {type_.name}", lambda g, *s: g.get_rows_back(*s), rows)
        heads = [Leaf((64, 3, 5), type_), Leaf((5,), I32, 4000), Leaf((32,), change=np.exp)]
        for mode in (0, ROPE_NEOX):
            yield Case(
                f"rope back {mode} {type_.name}",
                lambda g, *s, m=mode: g.rope_ext_back(
                    *s, 48, m, 2048, 1e4, 0.5, 0.7, 1.2, 32.0, 1.0
                ),
                heads,
            )
    yield Case(
        "rope of images back",
        lambda g, a, p: g.rope_ext_back(a, p, None, 64, ROPE_IMROPE, sections=(8, 12, 8, 4)),
        [Leaf((64, 3, 5)), Leaf((20,), I32, 4000)],
    )
    yield Case("norm back", lambda g, *s: g.rms_norm_back(*s, 1e-5), two)
    yield Case("soft max back", lambda g, a, y: g.soft_max_ext_back(a, y, 0.3, 0.0), [a, labels])
    yield Case(
        "repeat back", lambda g, a, b: g.repeat_back(a, b), [a, Leaf((16, 5, 1, 2))]
    )  # fmt: skip
    pair = [Leaf((64, 5), I32)] * 2
    yield Case("equals", lambda g, *s: g.count_equal(*s), pair, 0)
    yield Case(
        "equals of views",
        lambda g, a, b: g.count_equal(g.transpose(a), b),
        [Leaf((5, 64), I32), Leaf((64, 5), I32)],
        0,
    )  # fmt: skip
    for type_ in (F32, F16, Q8_0, Q4_0, GgmlType.Q5_1, GgmlType.MXFP4):
        of = [Leaf((64, 7, 2), type_), Leaf((3, 7, 2))]
        name = f"outer {type_.name}"
        yield Case(name, lambda g, *s: g.out_prod(*s), of, MAX_NMSE_OF_PRODUCTS)
    for n_tokens, n_kv, n_heads, kv_heads, batches in (
        (5, 5, 2, 2, 2), (16, 40, 6, 2, 1), (1, 33, 4, 4, 1),
    ):  # fmt: skip
        for causal in (0, 1):
            q = Leaf((32, n_tokens, n_heads, batches))
            yield Case(
                f"attention back {n_tokens} {causal}",
                attention_back(causal),
                [
                    q, Leaf((32, n_kv, kv_heads, batches)),
                    Leaf((n_kv, 32, kv_heads, batches)), q,
                ],
            )  # fmt: skip


def parts() -> Iterator[Case]:
    a, b = Leaf((64, 5, 3, 2)), Leaf((32, 2, 3))
    for inplace in (False, True):
        layout = (4 * 64, 4 * 64 * 5, 4 * 64 * 15, 4 * 70)
        for type_ in (F32, I32):
            yield Case(
                f"set {type_.name} {inplace}",
                lambda g, a, b, w=layout, i=inplace: g.set(a, b, *w, inplace=i),
                [Leaf(a.ne, type_), Leaf(b.ne, type_)],
                0,
            )
        yield Case(
            f"acc {inplace}", lambda g, a, b, w=layout, i=inplace: g.acc(a, b, *w, inplace=i),
            [a, b],
        )  # fmt: skip
        for type_ in (F32, F16, BF16):
            yield Case(
                f"add1 {type_.name} {inplace}",
                lambda g, a, b, i=inplace: g.add1(a, b, inplace=i),
                [Leaf(a.ne, type_), Leaf((1,))],
            )
        yield Case(
            f"mask {inplace}", lambda g, a, i=inplace: g.diag_mask_zero(a, 2, inplace=i), [a], 0
        )
        fill = Leaf((8, 4), F16)
        yield Case(f"fill {inplace}", lambda g, a, i=inplace: g.fill(a, 0.7, inplace=i), [fill], 0)
    yield Case("set 1d", lambda g, a, b: g.set_1d(a, b, 16), [Leaf((64,)), Leaf((9,))], 0)
    yield Case("set 2d", lambda g, a, b: g.set_2d(a, b, 32, 8), [Leaf((8, 5)), Leaf((3, 4))], 0)
    for narrow in (F16, BF16, Q8_0):
        yield Case(
            f"add cast {narrow.name}",
            lambda g, a, b: g.add_cast(a, b, F32),
            [Leaf((64, 5), narrow), Leaf((64, 5))],
        )
    yield Case("diagonals", lambda g, a: g.diag(a), [Leaf((6, 1, 3, 2))], 0)
    for triangle in Triangle:
        leaf = Leaf((6, 6, 3))
        yield Case(f"{triangle.name}", lambda g, a, t=triangle: g.tri(a, t), [leaf], 0)
    yield Case("running sums", lambda g, a: g.cumsum(halves(g, a)), [Leaf((64, 6, 3))])


CASES = [*windows(), *recurrences(), *sparse_attention(), *training(), *parts()]


async def results(endpoint: Endpoint, case: Case) -> list[Array]:
    async with Backend.connect(endpoint.host, endpoint.port) as b:
        leaves = [
            await b.tensor(leaf.type, leaf.ne, leaf.values(i)) for i, leaf in enumerate(case.leaves)
        ]
        node = case.build(b.graph, *leaves)
        computed = await b.compute(node)
        return [computed, *[await b.download(leaves[i]) for i in case.changed]]


@pytest.mark.parametrize("case", CASES, ids=str)
async def test_both_servers_agree(upstream: Endpoint, ours: Endpoint, case: Case) -> None:
    expected = await results(upstream, case)
    actual = await results(ours, case)
    for a, b in zip(expected, actual, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if a.dtype == np.uint16:
            a, b = ((x.astype(np.uint32) << 16).view(np.float32) for x in (a, b))
        if case.bound == 0:
            np.testing.assert_array_equal(b, a)
        else:
            assert nmse(a, b) < case.bound
        assert np.any(a != 0)
