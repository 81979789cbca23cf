"""The client against llama.cpp's own server and this one: commands, and ops against numpy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from client.backend import HASH_THRESHOLD, Backend
from client.connection import connect
from client.errors import ConnectionLost, VersionMismatch
from client.gguf_file import load_gguf
from client.tensors import Array, ShapeError
from protocol.dialects import DIALECTS
from protocol.ggml.hashing import fnv1a_64
from protocol.ggml.types import TYPE_INFO, GgmlType
from protocol.tensor import Tensor
from rpc_server.types import to_f32
from tests.client.test_gguf_file import write
from tests.upstream_server import Endpoint
from tools.serving.ports import free_port
from tools.serving.processes import Process, listens, upstream_command

F32, F16, I32, I64, I8 = GgmlType.F32, GgmlType.F16, GgmlType.I32, GgmlType.I64, GgmlType.I8


@pytest.fixture
async def b(server: Endpoint) -> AsyncIterator[Backend]:
    async with Backend.connect(server.host, server.port) as backend:
        yield backend


def values(*shape: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# -- commands


async def test_what_the_server_says_of_itself(b: Backend) -> None:
    c = b.connection
    assert c.server_version == DIALECTS[0].version
    assert await c.device_count() >= 1
    free, total = await c.get_device_memory()
    assert 0 < free <= total
    assert b.alignment & (b.alignment - 1) == 0
    assert b.max_size > 0


@pytest.mark.upstream
async def test_an_older_version_is_not_accepted(upstream: Endpoint) -> None:
    with pytest.raises((VersionMismatch, ConnectionLost)):
        await connect(upstream.host, upstream.port, version="5.1")


async def test_what_is_set_is_got(b: Backend) -> None:
    content = np.random.default_rng(2).integers(-128, 128, 3_000_001, np.int8)
    tensor = await b.tensor(I8, (3_000_001,), content)
    assert np.array_equal((await b.download(tensor)).ravel(), content)
    await b.connection.set_tensor(tensor, b"hello", 1_500_000)
    content[1_500_000:1_500_005] = np.frombuffer(b"hello", np.int8)
    part = await b.connection.get_tensor(tensor, 1_499_990, 30)
    assert np.array_equal(part.view(np.int8), content[1_499_990:1_500_020])


async def test_many_in_flight(b: Backend) -> None:
    tensors = [await b.tensor(I32, (100,)) for _ in range(20)]
    await asyncio.gather(
        *(b.upload(x, np.full(100, i, np.int32)) for i, x in enumerate(tensors)),
    )
    got = await asyncio.gather(*map(b.download, tensors))
    assert [set(x.ravel().tolist()) for x in got] == [{i} for i in range(20)]


async def test_copy_clear_and_memset(b: Backend) -> None:
    first = await b.tensor(I8, (64,), np.arange(64))
    second = await b.tensor(I8, (64,), np.zeros(64))
    assert await b.connection.copy_tensor(first, second)
    assert (await b.download(second)).ravel().tolist() == list(range(64))
    await b.connection.memset_tensor(second, 9, 60)
    await b.connection.memset_tensor(second, 7, 0, 2)
    assert (await b.download(second)).ravel().tolist() == [7, 7, *range(2, 60), 9, 9, 9, 9]
    await b.connection.buffer_clear(first.buffer, 5)
    assert set((await b.download(first)).ravel().tolist()) == {5}


async def test_hash_of_nothing_known(b: Backend) -> None:
    tensor = await b.tensor(I8, (64,), np.arange(64))
    assert not await b.connection.set_tensor_hash(tensor, 0x1234567890ABCDEF)
    assert (await b.download(tensor)).ravel().tolist() == list(range(64))


async def test_large_uploads_are_known_the_second_time(b: Backend) -> None:
    n = HASH_THRESHOLD + 1
    content = np.random.default_rng(3).integers(-128, 128, n, np.int8)
    first = await b.tensor(I8, (n,))
    await b.upload(first, content, cache=True)
    second = await b.tensor(I8, (n,))
    # Downloading makes sure that the server is done with the file.
    assert np.array_equal((await b.download(first)).ravel(), content)
    assert await b.connection.set_tensor_hash(second, fnv1a_64(content.data.cast("B")))
    assert np.array_equal((await b.download(second)).ravel(), content)


async def test_buffers_come_and_go(b: Backend) -> None:
    tensors = [b.graph.new_tensor_1d(F32, n) for n in (1, 5, 100)]
    (buffer,) = await b.allocate(tensors)
    places = [x.location[1] for x in tensors]
    assert all(place % b.alignment == 0 for place in places)
    assert places == sorted(places)
    assert places[2] + 400 <= buffer.base + buffer.size
    await b.free([buffer], tensors)
    assert not any(x.placed for x in tensors)


async def test_tensors_are_spread_over_buffers_of_the_largest_size(b: Backend) -> None:
    b.max_size = 4 * b.alignment
    size = 3 * b.alignment
    tensors = [b.graph.new_tensor_1d(I8, n) for n in (size, b.alignment, size, 1)]
    buffers = await b.allocate(tensors)
    assert [x.buffer for x in tensors] == [buffers[0].handle] * 2 + [buffers[1].handle] * 2
    with pytest.raises(ShapeError, match="at most"):
        await b.tensor(I8, (b.max_size + 1,))
    with pytest.raises(ShapeError, match="has a place"):
        await b.allocate(tensors)


async def test_values_must_fit(b: Backend) -> None:
    tensor = await b.tensor(F32, (3, 2))
    with pytest.raises(ShapeError, match=r"shape \(2, 3\), not \(3, 2\)"):
        await b.upload(tensor, np.zeros((3, 2)))
    with pytest.raises(ShapeError, match="24 B, got 23"):
        await b.upload(tensor, bytes(23))


async def test_a_request_the_server_refuses_ends_the_connection(server: Endpoint) -> None:
    c = await connect(server.host, server.port)
    with pytest.raises(ConnectionLost, match="BUFFER_GET_BASE"):
        await c.buffer_get_base(12345)


# -- graphs


def rms_norm(x: Array) -> Array:
    return np.asarray(x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6))


def soft_max(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


async def test_a_small_graph(b: Backend) -> None:
    w, x, bias = values(32, 64), values(8, 64, seed=2), values(32, seed=3)
    tw, tx = await b.tensor(F32, (64, 32), w), await b.tensor(F32, (64, 8), x)
    tb = await b.tensor(F32, (32,), bias)
    g = b.graph
    product = g.add(g.mul_mat(tw, tx), tb)
    result, middle = await b.compute(g.soft_max(g.rms_norm(product, 1e-6)), product)
    assert np.allclose(middle[0, 0], x @ w.T + bias, rtol=1e-5, atol=1e-5)
    assert np.allclose(result[0, 0], soft_max(rms_norm(x @ w.T + bias)), rtol=1e-5, atol=1e-7)


async def test_a_plan_runs_again_on_new_values(b: Backend) -> None:
    x = await b.tensor(F32, (16,))
    y = b.graph.sqr(x)
    plan = await b.prepare(y)
    for seed in range(3):
        await b.upload(x, values(16, seed=seed))
        await plan.run()
        assert np.allclose((await b.download(y)).ravel(), values(16, seed=seed) ** 2)
    other = await b.compute(b.graph.neg(x))
    assert np.allclose(other.ravel(), -values(16, seed=2))
    # Another graph has run and buffers were freed: the server no longer has this one.
    await plan.run()
    assert np.allclose((await b.download(y)).ravel(), values(16, seed=2) ** 2)
    await plan.free()


async def test_a_cache_written_row_by_row(b: Backend) -> None:
    g = b.graph
    cache = await b.tensor(F16, (8, 6), np.zeros((6, 8)))
    rows = await b.tensor(F32, (8, 2), values(2, 8))
    at = await b.tensor(I64, (2,), [4, 1])
    await b.compute(g.set_rows(cache, rows, at))
    expected = np.zeros((6, 8), np.float16)
    expected[[4, 1]] = values(2, 8).astype(np.float16)
    assert np.array_equal((await b.download(cache))[0, 0], expected)


# What the builder makes of F32 (ne 8, 6, 4: values(4, 6, 8)) and what numpy does.
Op = Callable[[Any, Tensor], Tensor]
Reference = Callable[[Array], Any]
UNARY: dict[str, tuple[Op, Reference]] = {
    "relu": (lambda g, a: g.relu(a), lambda x: np.maximum(x, 0)),
    "silu": (lambda g, a: g.silu(a), lambda x: x / (1 + np.exp(-x))),
    "abs": (lambda g, a: g.abs(a), np.abs),
    "scale": (lambda g, a: g.scale(a, 3, 1), lambda x: 3 * x + 1),
    "clamp": (lambda g, a: g.clamp(a, -0.5, 0.25), lambda x: np.clip(x, -0.5, 0.25)),
    "sqr sqrt": (lambda g, a: g.sqrt(g.sqr(a)), np.abs),
    "sum_rows": (lambda g, a: g.sum_rows(a), lambda x: x.sum(-1, keepdims=True)),
    "mean": (lambda g, a: g.mean(a), lambda x: x.mean(-1, keepdims=True)),
    "norm": (
        lambda g, a: g.norm(a, 1e-6),
        lambda x: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6),
    ),
    "argsort": (lambda g, a: g.argsort(a), lambda x: np.argsort(x, -1)),
    "swiglu": (
        lambda g, a: g.swiglu(a), lambda x: x[..., :4] / (1 + np.exp(-x[..., :4])) * x[..., 4:],
    ),
    "swiglu_split": (
        lambda g, a: g.swiglu_split(a, a), lambda x: x / (1 + np.exp(-x)) * x,
    ),
    "reglu_swapped": (
        lambda g, a: g.reglu_swapped(a), lambda x: np.maximum(x[..., 4:], 0) * x[..., :4],
    ),
    "cont of transpose": (lambda g, a: g.cont(g.transpose(a)), lambda x: x.swapaxes(-1, -2)),
    "cont of permute": (
        lambda g, a: g.cont(g.permute(a, 1, 2, 0, 3)), lambda x: x.transpose(1, 2, 0),
    ),
    "view": (
        lambda g, a: g.cont(g.view_3d(a, 4, 3, 2, a.nb[1], a.nb[2], 4 * 2 + a.nb[1])),
        lambda x: x[:2, 1:4, 2:6],
    ),
    "reshape": (lambda g, a: g.neg(g.reshape(a, 16, 12)), lambda x: -x.reshape(12, 16)),
    "cast": (lambda g, a: g.cast(a, F16), lambda x: x.astype(np.float16)),
    "repeat": (lambda g, a: g.repeat(a, 16, 6, 8), lambda x: np.tile(x, (2, 1, 2))),
    "concat": (lambda g, a: g.concat(a, g.neg(a), 1), lambda x: np.concatenate([x, -x], 1)),
    "pad": (lambda g, a: g.pad(a, 2, 1), lambda x: np.pad(x, ((0, 0), (0, 1), (0, 2)))),
    "roll": (lambda g, a: g.roll(a, 2, -1), lambda x: np.roll(x, (2, -1), (-1, -2))),
    "soft_max_ext": (
        lambda g, a: g.soft_max_ext(a, None, 0.5, 0), lambda x: soft_max(0.5 * x),
    ),
    "in place": (lambda g, a: g.add_inplace(g.dup(a), a), lambda x: x + x),
    "div": (lambda g, a: g.div(g.mul(a, a), a), lambda x: x),
    "out_prod": (
        lambda g, a: g.out_prod(a, a), lambda x: x.swapaxes(-1, -2) @ x,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNARY)
async def test_ops_of_one_tensor(b: Backend, name: str) -> None:
    make, reference = UNARY[name]
    a = await b.tensor(F32, (8, 6, 4), values(4, 6, 8))
    result = (await b.compute(make(b.graph, a)))[0]
    expected = np.asarray(reference(values(4, 6, 8)))
    assert np.allclose(result.reshape(expected.shape), expected, rtol=1e-5, atol=1e-6)


async def test_top_k(b: Backend) -> None:
    a = await b.tensor(F32, (50, 3), values(3, 50))
    result = (await b.compute(b.graph.top_k(a, 5)))[0, 0]
    expected = np.argsort(-values(3, 50), -1)[:, :5]
    assert np.array_equal(np.sort(result, -1), np.sort(expected, -1))


async def test_experts(b: Backend) -> None:
    experts, x, ids = values(5, 6, 8), values(3, 2, 8, seed=2), [[4, 0], [1, 1], [2, 3]]
    te, tx = await b.tensor(F32, (8, 6, 5), experts), await b.tensor(F32, (8, 2, 3), x)
    ti = await b.tensor(I32, (2, 3), ids)
    tb = await b.tensor(F32, (6, 5), values(5, 6, seed=4))
    product = b.graph.mul_mat_id(te, tx, ti)
    result, biased = await b.compute(product, b.graph.add_id(product, tb, ti))
    expected = np.einsum("tkrc,tkc->tkr", experts[np.array(ids)], x)
    assert np.allclose(result[0], expected, rtol=1e-5, atol=1e-5)
    assert np.allclose(biased[0], expected + values(5, 6, seed=4)[np.array(ids)], atol=1e-5)


async def test_rope(b: Backend) -> None:
    x = values(3, 2, 8)
    tx, tp = await b.tensor(F32, (8, 2, 3), x), await b.tensor(I32, (3,), [0, 1, 7])
    result = (await b.compute(b.graph.rope(tx, tp, 8)))[0]
    angle = np.array([0, 1, 7])[:, None, None] * 10000.0 ** (-np.arange(4) / 4)
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)
    expected = np.stack([turned.real, turned.imag], -1).reshape(x.shape)
    assert np.allclose(result, expected, rtol=1e-4, atol=1e-5)


async def test_attention_in_one_op_and_in_steps(b: Backend) -> None:
    q, k, v = values(4, 3, 64), values(2, 7, 64, seed=2), values(2, 7, 64, seed=3)
    mask = np.where(np.arange(7) > np.arange(3)[:, None] + 4, -np.inf, 0).astype(np.float16)
    g = b.graph
    tq = await b.tensor(F32, (64, 3, 4), q)
    tk, tv = await b.tensor(F16, (64, 7, 2), k), await b.tensor(F16, (64, 7, 2), v)
    tm = await b.tensor(F16, (7, 3), mask)
    flash = g.flash_attn_ext(tq, tk, tv, tm, 0.125)
    scores = g.soft_max_ext(g.mul_mat(tk, tq), tm, 0.125, 0)
    steps = g.mul_mat(g.cont(g.transpose(tv)), scores)
    one, many = await b.compute(flash, steps)
    kk, vv = (np.repeat(z.astype(np.float16).astype(np.float32), 2, 0) for z in (k, v))
    expected = soft_max(q @ kk.swapaxes(1, 2) * 0.125 + mask) @ vv
    assert np.allclose(many[0], expected, atol=4e-3)
    assert np.allclose(one[0].transpose(1, 0, 2), expected, atol=4e-3)


async def test_patches_of_an_image(b: Backend) -> None:
    image, kernel = values(2, 5, 6), values(4, 2, 3, 3, seed=2)
    ti = await b.tensor(F32, (6, 5, 2), image)
    tk = await b.tensor(F32, (3, 3, 2, 4), kernel)
    g = b.graph
    patches = g.im2col(tk, ti, (1, 1), (1, 1), (1, 1), type=F32)
    rows = g.reshape(patches, patches.ne[0], patches.ne[1] * patches.ne[2])
    result = (await b.compute(g.mul_mat(g.reshape(tk, 18, 4), rows)))[0, 0]
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (1, 2))
    expected = np.einsum("chwyx,ocyx->hwo", windows, kernel).reshape(30, 4)
    assert np.allclose(result, expected, rtol=1e-4, atol=1e-4)


# -- quantized weights and files


def quantized(*shape: int) -> Array:
    return np.asarray(gguf.quants.quantize(values(*shape), gguf.GGMLQuantizationType.Q4_0))


async def test_rows_that_are_no_multiple_of_512(b: Backend) -> None:
    # For these the server is asked how much room they need, and told to prepare them.
    blocks = quantized(4, 96)
    w = await b.tensor(GgmlType.Q4_0, (96, 4), blocks)
    assert np.array_equal((await b.download(w))[0, 0], blocks)
    at = await b.tensor(I32, (3,), [3, 0, 3])
    result = (await b.compute(b.graph.get_rows(w, at)))[0, 0]
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_0)[[3, 0, 3]]
    assert np.allclose(result, expected, atol=1e-6)


async def test_a_gguf_file(b: Backend, tmp_path: Any) -> None:
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "test")
    blocks = quantized(4, 64)
    writer.add_tensor("w.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("b.bias", values(4, 3))
    writer.add_tensor("not.wanted", values(5))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = await load_gguf(b, path, wanted=lambda name: name != "not.wanted")
    assert loaded.keys() == {"w.weight", "b.bias"}
    weight, bias = loaded["w.weight"], loaded["b.bias"]
    assert (weight.type, weight.ne, weight.name) == (GgmlType.Q4_0, (64, 4, 1, 1), "w.weight")
    assert (bias.type, bias.ne) == (F32, (3, 4, 1, 1))
    assert weight.buffer == bias.buffer
    assert np.array_equal((await b.download(weight))[0, 0], blocks)
    assert np.array_equal((await b.download(bias))[0, 0], values(4, 3))


@pytest.mark.parametrize("type_", [GgmlType.Q1_0, GgmlType.Q2_0], ids=lambda t: t.name)
async def test_a_gguf_file_of_types_the_package_lacks(
    b: Backend, type_: GgmlType, tmp_path: Path
) -> None:
    """Uploaded as it is, and read by the server as what it says."""
    columns, rows, info = 256, 5, TYPE_INFO[type_]
    random = np.random.default_rng(6)
    blocks = random.integers(0, 256, (rows * columns // info.block_size, info.type_size), np.uint8)
    # Each block begins with its scale.
    blocks[:, :2] = random.uniform(0.5, 2, (len(blocks), 1)).astype(np.float16).view(np.uint8)
    path = write(tmp_path / "new.gguf", {"w.weight": (type_, (columns, rows), blocks.tobytes())})
    weight = (await load_gguf(b, path))["w.weight"]
    assert (await b.download(weight)).tobytes() == blocks.tobytes()
    taken = b.graph.get_rows(weight, await b.tensor(I32, (2,), [4, 0]))
    expected = to_f32(type_, blocks.reshape(rows, -1))[[4, 0]]
    assert np.array_equal((await b.compute(taken))[0, 0], expected)


@pytest.mark.upstream
async def test_who_gives_up_waiting_disturbs_nobody(tmp_path: Path) -> None:
    """Who waits for a server that serves one at a time may leave: others are served as before."""
    port = free_port()
    command = upstream_command(port, "-t", "1")
    if command is None:
        pytest.skip("no ggml-rpc-server: run python -m tools.upstream")
    with Process(command, tmp_path / "log") as server:
        server.wait_until(lambda: listens(port), 20.0, "listening socket")
        async with await connect("127.0.0.1", port):
            with pytest.raises(TimeoutError):
                await connect("127.0.0.1", port, timeout=0.5)
        # Its turn was before this one's.
        async with await connect("127.0.0.1", port) as connection:
            await connection.get_alignment()
        assert server.alive, server.log
