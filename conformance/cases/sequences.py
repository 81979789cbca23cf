"""12.50 to 12.80: dry runs, cut graphs, tokens one after the other, slots, adapters, embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from conformance.cases.caches import CELLS, WIDTH, Cache, attended, caches, mask_of
from conformance.cases.groups import SEQUENCES
from conformance.suite import Context, Peer, tensor
from conformance.suite.arrays import PRODUCT_BOUND, Array, Bench, close, same, values, weights
from conformance.suite.probe import cacheable
from protocol.commands import Command
from protocol.ggml.types import GgmlType
from protocol.graph_payload import encode_graph
from protocol.tensor import Tensor

F32, F16, I32 = GgmlType.F32, GgmlType.F16, GgmlType.I32
_CLIENTS = "tests/data/captures/clients/"
_AGAIN = (Command.GRAPH_RECOMPUTE,)


# -- connections -----------------------------------------------------------------------------------


def _doubles(c: Context, peer: Peer, what: str) -> None:
    """Fail unless the connection computes."""
    b = Bench(peer)
    x = values(64, seed=1)
    (found,) = b.compute(b.g.scale(b.leaf(x), 2.0))
    same(c, found, 2 * x, what)


def _asks(peer: Peer, commands: Sequence[Command]) -> None:
    for command in commands:
        if command in peer.dialect.commands:
            peer.call(command)


@SEQUENCES.case(50, source=f"{_CLIENTS}fit: connections 1 to 7")
def dry_run_then_the_real_one(c: Context) -> None:
    """llama.cpp looks at a device on connections of their own, and then loads the model.

    Sends: eight connections of one question or two each, then one that computes
    Expects: answers, and the result
    """
    memory, sizes = (Command.GET_DEVICE_MEMORY,), (Command.GET_ALIGNMENT, Command.GET_MAX_SIZE)
    for asked in ((Command.DEVICE_COUNT,), memory, memory, sizes, memory, memory, sizes, memory):
        peer = c.connect()
        _asks(peer, asked)
        peer.close()
    _doubles(c, c.connect(), "the result of the real run")


@SEQUENCES.case(51, source=f"{_CLIENTS}fit: connection 7")
def sizes_asked_and_nothing_made(c: Context) -> None:
    """A dry run asks for sizes of tensors without a buffer and allocates none of them.

    Sends: GET_ALLOC_SIZE of 200 tensors that lie nowhere, GET_DEVICE_MEMORY before and after
    Expects: sizes, and as much memory free as before
    """
    peer = c.connect()
    total = peer.call(Command.GET_DEVICE_MEMORY).total_mem
    for rows in range(1, 201):
        size = peer.call(Command.GET_ALLOC_SIZE, tensor=tensor(1, (64, rows))).alloc_size
        c.expect(size >= 256 * rows, f"{size} bytes for {256 * rows}")
    c.equal(peer.call(Command.GET_DEVICE_MEMORY).total_mem, total, "the total")
    peer.alloc(1 << 20)


@SEQUENCES.case(52, source=f"{_CLIENTS}fit: GET_DEVICE_MEMORY on connection 7, then its end")
def session_between_others(c: Context) -> None:
    """A run is many connections: what the last one left is no part of the next.

    Sends: five sessions that allocate, compute and leave, one that only asks between each
    Expects: each computes by its own memory
    """
    for _ in range(5):
        peer = c.connect()
        _doubles(c, peer, "a session's result")
        peer.ping()
        peer.close()
        peer = c.connect()
        _asks(peer, (Command.GET_DEVICE_MEMORY,))
        peer.close()


@SEQUENCES.case(53, source=f"{_CLIENTS}speculative: two models on one connection")
def two_models_on_one_connection(c: Context) -> None:
    """A draft model has buffers of its own, and its graphs come in turn with the other's.

    Sends: weights of two models, five times a graph of one and a graph of the other
    Expects: each graph's products are of its own weights
    """
    peer = c.connect()
    models = [Bench(peer), Bench(peer)]
    made = []
    for seed, b in enumerate(models):
        raw, numbers = weights(F16, WIDTH, 32 + seed, seed)
        made.append((b.leaf(raw, F16, (WIDTH, 32 + seed)), numbers))
    for step in range(5):
        x = values(1 + step % 2 * 3, WIDTH, seed=step)
        for b, (w, numbers) in zip(models, made, strict=True):
            (found,) = b.compute(b.g.mul_mat(w, b.leaf(x, ne=(WIDTH, len(x)))))
            expected = x.astype(np.float64) @ numbers.T
            close(c, found, expected, f"step {step}", PRODUCT_BOUND)


# -- graphs that were cut --------------------------------------------------------------------------


def _only(b: Bench, outputs: Sequence[Tensor], change: Callable[[Any], None] | None = None) -> None:
    """Run the last node of a graph alone, the others sent along as what they are."""
    graph = b.build(outputs)
    payload = graph.payload(b.peer.dialect)
    payload.nodes = payload.nodes[-1:]
    if change is not None:
        payload.tensors = payload.tensors.copy()
        change(payload.tensors)
    b.send(encode_graph(payload, b.peer.dialect))


@SEQUENCES.case(55, source="ggml-rpc.cpp add_tensor: what a node reads is sent with all it reads")
def graph_with_all_its_ancestors(c: Context) -> None:
    """A scheduler cuts graphs; what was computed elsewhere comes with its op, and is not a node.

    Sends: a graph of one node whose source has an op and sources, and was uploaded
    Expects: the node computed from what was uploaded; its source not computed
    """
    b = Bench(c.connect())
    x, given = values(64, seed=2), values(64, seed=3)
    before = b.g.sqr(b.leaf(x))
    last = b.g.neg(before)
    b.build([last])
    b.set(before, given)
    _only(b, [last])
    same(c, b.get(last), -given, "the node")
    same(c, b.get(before), given, "its source")


@SEQUENCES.case(56, source="ggml-rpc.cpp serialize_tensor: buffer 0 for what isn't on this server")
def ancestors_on_another_server(c: Context) -> None:
    """Of a node's source this server has the memory, of what that was made of another one.

    Sends: a graph of one node; the sources of its source have neither buffer nor data
    Expects: the node computed
    """
    b = Bench(c.connect())
    given = values(64, seed=4)
    before = b.g.add(b.leaf(values(64, seed=5)), b.leaf(values(64, seed=6)))
    last = b.g.scale(before, 3.0)
    b.build([last])
    b.set(before, given)

    def elsewhere(tensors: Any) -> None:
        leaves = np.isin(tensors["id"], [s.id for s in before.src if s is not None])
        tensors["buffer"][leaves] = tensors["data"][leaves] = 0

    _only(b, [last], elsewhere)
    same(c, b.get(last), np.float32(3) * given, "the node")


@SEQUENCES.case(57, source="ggml-backend.cpp ggml_backend_sched_split_graph")
def graph_in_two_parts(c: Context) -> None:
    """The second part of a cut graph names nodes of the first as sources.

    Sends: a chain of six nodes, the first three as one graph, all six with three nodes as the next
    Expects: the whole chain's result
    """
    b = Bench(c.connect())
    x = values(64, seed=7)
    chain = [b.g.neg(b.leaf(x))]
    for i in range(5):
        chain.append(b.g.scale(chain[-1], 1.0 + i))
    b.send(b.build([chain[2]]).encode(b.peer.dialect))
    payload = b.build([chain[-1]]).payload(b.peer.dialect)
    payload.nodes = payload.nodes[3:]
    b.send(encode_graph(payload, b.peer.dialect))
    close(c, b.get(chain[-1]), -120 * x.astype(np.float64), "the chain's end")


@SEQUENCES.case(58, source=f"{_CLIENTS}tensor: graphs of one computed node")
def one_node_a_graph(c: Context) -> None:
    """A client that splits a model over devices itself sends it in the smallest pieces.

    Sends: a chain of 24 nodes, each as a graph of its own that carries all before it
    Expects: the whole chain's result
    """
    b = Bench(c.connect())
    x = np.abs(values(48, seed=8))
    t, expected = b.leaf(x), x
    for i in range(24):
        t = b.g.neg(t) if i % 2 else b.g.add(t, t)
        expected = -expected if i % 2 else expected + expected
        _only(b, [t])
    same(c, b.get(t), expected, "the chain's end")


@SEQUENCES.case(59, source=f"{_CLIENTS}tensor; ggml-backend-meta.cpp")
def products_of_half_a_weight(c: Context) -> None:
    """Two devices have half the columns of a weight each; the client adds their products.

    Sends: a one-node graph each for the left and the right half of a product, then their sum
    Expects: the whole product
    """
    raw, numbers = weights(F32, WIDTH, 32, 9)
    x = values(3, WIDTH, seed=10)
    b = Bench(c.connect())
    parts = []
    for half in (slice(0, WIDTH // 2), slice(WIDTH // 2, WIDTH)):
        product = b.g.mul_mat(b.leaf(numbers[:, half]), b.leaf(x[:, half]))
        _only(b, [product])
        parts.append(product)
    total = b.g.add(*parts)
    _only(b, [total])
    close(c, b.get(total), x.astype(np.float64) @ numbers.T, "the sum", PRODUCT_BOUND)
    c.expect(len(raw) == 4 * WIDTH * 32, "the weight's size")


@SEQUENCES.case(60, source=f"{_CLIENTS}tensor: nodes of 0x12 without the compute flag")
def part_without_rows(c: Context) -> None:
    """A device without rows of a small weight gets its nodes with a dimension of 0.

    Sends: a graph whose first nodes have no elements, and one that has
    Expects: the one computed, and the connection goes on
    """
    b = Bench(c.connect())
    g, x = b.g, values(4, WIDTH, seed=11)
    nothing = g.mul_mat(b.leaf(b"", F16, (WIDTH, 0)), b.leaf(x))
    real = g.neg(b.leaf(x))
    _, found = b.compute(g.scale(nothing, 2.0), real)
    same(c, found, -x, "the node that has elements")


# -- tokens one after the other --------------------------------------------------------------------


class _Step:
    """A layer that stores a token in a cache and multiplies: its inputs, its logits."""

    def __init__(self, b: Bench, type: GgmlType = F16) -> None:
        self.b = b
        raw, self.numbers = weights(type, WIDTH, 40, 12)
        self.w = b.leaf(raw, type, (WIDTH, 40))
        self.x = b.leaf(values(1, WIDTH, seed=0))
        self.logits = b.g.mul_mat(self.w, b.g.rms_norm(self.x, 1e-6))

    def expected(self, x: Array) -> Array:
        norm = x / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True) + 1e-6)
        return np.asarray(norm @ self.numbers.T.astype(np.float64))


@SEQUENCES.case(
    61, source=f"{_CLIENTS}slots: SET_TENSOR, GRAPH_RECOMPUTE, GET_TENSOR", needs=_AGAIN
)
def tokens_by_running_again(c: Context) -> None:
    """Each token is inputs, the last graph again, and its logits.

    Sends: a graph, then eight times SET_TENSOR, GRAPH_RECOMPUTE and GET_TENSOR
    Expects: the logits of each input
    """
    step = _Step(Bench(c.connect()))
    b = step.b
    b.compute(step.logits)
    for seed in range(1, 9):
        x = values(1, WIDTH, seed=seed)
        b.set(step.x, x)
        b.peer.call(Command.GRAPH_RECOMPUTE)
        close(c, b.get(step.logits), step.expected(x), f"token {seed}", PRODUCT_BOUND)


@SEQUENCES.case(62, source=f"{_CLIENTS}slots: requests that one segment holds", needs=_AGAIN)
def tokens_in_one_write(c: Context) -> None:
    """From 6.0 on a client waits for nothing but its logits.

    Sends: SET_TENSOR, GRAPH_RECOMPUTE and GET_TENSOR of eight tokens in one write
    Expects: eight answers, each the logits of its own input
    """
    step = _Step(Bench(c.connect()))
    b, peer = step.b, step.b.peer
    b.compute(step.logits)
    inputs = [values(1, WIDTH, seed=20 + i) for i in range(8)]
    wire, out = b._wire(step.x), b._wire(step.logits)
    stream = b"".join(
        peer.message(Command.SET_TENSOR, x.tobytes(), tensor=wire)
        + peer.message(Command.GRAPH_RECOMPUTE)
        + peer.message(Command.GET_TENSOR, tensor=out, size=160)
        for x in inputs
    )
    peer.send_bytes(stream, command="eight tokens")
    for i, x in enumerate(inputs):
        peer.answer(Command.SET_TENSOR)
        peer.answer(Command.GRAPH_RECOMPUTE)
        found = np.frombuffer(peer.answer(Command.GET_TENSOR), np.float32)
        close(c, found, step.expected(x), f"token {i}", PRODUCT_BOUND)


@SEQUENCES.case(63, source="clients up to protocol 3.4, which have no GRAPH_RECOMPUTE")
def tokens_by_whole_graphs(c: Context) -> None:
    """Older clients send the same graph again for each token.

    Sends: the same graph eight times, other inputs before each
    Expects: the logits of each input
    """
    step = _Step(Bench(c.connect()))
    b = step.b
    payload = b.build([step.logits]).encode(b.peer.dialect)
    for seed in range(30, 38):
        x = values(1, WIDTH, seed=seed)
        b.set(step.x, x)
        b.send(payload)
        close(c, b.get(step.logits), step.expected(x), f"token {seed}", PRODUCT_BOUND)


@SEQUENCES.case(64, source=f"{_CLIENTS}parallel: graphs of several sizes in turn", needs=_AGAIN)
def prompts_between_tokens(c: Context) -> None:
    """A server of several users has a prompt between tokens: another graph, then the first again.

    Sends: a graph of one token, of four, of one again, and GRAPH_RECOMPUTE of that
    Expects: each result of its own inputs
    """
    b = Bench(c.connect())
    raw, numbers = weights(F16, WIDTH, 40, 13)
    w = b.leaf(raw, F16, (WIDTH, 40))
    one, four = b.leaf(values(1, WIDTH, seed=40)), b.leaf(values(4, WIDTH, seed=41))
    short, long = b.g.mul_mat(w, one), b.g.mul_mat(w, four)
    for t, seed, count in ((short, 40, 1), (long, 41, 4), (short, 40, 1)):
        (found,) = b.compute(t)
        expected = values(count, WIDTH, seed=seed).astype(np.float64) @ numbers.T
        close(c, found, expected, f"{count} tokens", PRODUCT_BOUND)
    x = values(1, WIDTH, seed=42)
    b.set(one, x)
    b.peer.call(Command.GRAPH_RECOMPUTE)
    close(c, b.get(short), x.astype(np.float64) @ numbers.T, "the last graph again", PRODUCT_BOUND)


def _rows_of(c: Context, picked: Sequence[int], what: str) -> None:
    """Expects: logits of these tokens in this order"""
    b = Bench(c.connect())
    raw, numbers = weights(F16, WIDTH, 40, 14)
    x = values(7, WIDTH, seed=43)
    rows = b.g.get_rows(b.leaf(x), b.leaf(np.array(picked, np.int32), I32))
    (found,) = b.compute(b.g.mul_mat(b.leaf(raw, F16, (WIDTH, 40)), rows))
    expected = x[list(picked)].astype(np.float64) @ numbers.T
    close(c, found, expected, what, PRODUCT_BOUND)


for _number, _name, _picked, _which, _why in (
    (65, "logits-of-the-last-token", (6,), "of the last", "A prompt's other logits nobody reads."),
    (
        66, "logits-of-drafted-tokens", (3, 4, 5, 6), "of the last four",
        "A draft of several tokens is checked by one graph.",
    ),
    (
        67, "logits-of-several-slots", (0, 2, 6), "of tokens of three slots, in the middle too,",
        "Each slot of a batch has a token whose logits count.",
    ),
):  # fmt: skip
    _sends = f"a batch of seven tokens, GET_ROWS {_which} by index, and their product"
    _source = f"{_CLIENTS}speculative, parallel: out_ids"
    _case = SEQUENCES.case(_number, name=_name, sends=_sends, source=_source, why=_why)
    _case(partial(_rows_of, picked=_picked, what=_name))


# -- slots -----------------------------------------------------------------------------------------


def _attention(b: Bench, keys: Cache, content: Cache, q: Array, mask: Array) -> Array:
    g = b.g
    scores = g.soft_max_ext(g.mul_mat(keys.tensor, b.leaf(q)), b.leaf(mask), WIDTH**-0.5, 0.0)
    return b.compute(g.mul_mat(g.cont(g.transpose(content.tensor)), scores))[0]


@SEQUENCES.case(68, source=f"{_CLIENTS}parallel: attn_inp_kq_mask of three sequences")
def slots_that_share_a_cache(c: Context) -> None:
    """Sequences of one cache are kept apart by the mask alone.

    Sends: attention of tokens of three sequences over one cache, cells of each in no order
    Expects: each token's result of its own sequence's cells
    """
    b, keys, content = caches(c, F32)
    owner, position = np.arange(CELLS) * 7 % 3, np.arange(CELLS) // 3
    mask = mask_of(np.array([15, 9, 20]), position, (np.arange(3), owner))
    q = values(3, WIDTH, seed=50)
    found = _attention(b, keys, content, q, mask)
    expected = attended(q, keys.numbers, content.numbers, mask)
    close(c, found, expected, "attention", PRODUCT_BOUND)


@SEQUENCES.case(69, source=f"{_CLIENTS}speculative: tokens that were refused; seq_rm")
def drafted_token_taken_back(c: Context) -> None:
    """A token that was refused is overwritten in its cell; nothing of it may stay.

    Sends: SET_TENSOR of a cell, attention, another one into the same cell, attention again
    Expects: the second result as if the first token had never been
    """
    b, keys, content = caches(c, F32)
    q, mask = values(1, WIDTH, seed=51), mask_of(np.array([10]), np.arange(CELLS))
    now = keys.numbers.copy()
    for seed in (52, 53):
        now[10] = values(WIDTH, seed=seed)
        b.peer.set(b._wire(keys.tensor), now[10].tobytes(), 10 * keys.row)
        found = _attention(b, keys, content, q, mask)
        close(c, found, attended(q, now, content.numbers, mask), f"token {seed}", PRODUCT_BOUND)


@SEQUENCES.case(70, source=f"{_CLIENTS}slots: BUFFER_CLEAR of the cache's buffer")
def cleared_cache(c: Context) -> None:
    """Cells that nobody filled are multiplied by 0, so they must hold numbers.

    Sends: BUFFER_CLEAR of a cache's buffer, some cells, attention that sees these alone
    Expects: attention over these cells
    """
    b, keys, content = caches(c, F32)
    for buffer in b.places:
        b.peer.call(Command.BUFFER_CLEAR, remote_ptr=buffer.handle, value=0)
    k, v = values(5, WIDTH, seed=54), values(5, WIDTH, seed=55)
    for cache, rows in ((keys, k), (content, v)):
        b.peer.set(b._wire(cache.tensor), rows.tobytes())
    q, mask = values(2, WIDTH, seed=56), mask_of(np.array([3, 4]), np.arange(CELLS))
    found = _attention(b, keys, content, q, mask)
    close(c, found, attended(q, k, v, mask[:, :5]), "attention", PRODUCT_BOUND)


# -- adapters and embeddings -----------------------------------------------------------------------


def _adapted(c: Context, type: GgmlType, *, replaced: bool = False) -> None:
    """An adapter is four nodes for each product, in any type of weights.

    Expects: their sum
    """
    b = Bench(c.connect())
    raw, base = weights(type, WIDTH, 48, 15)
    down, up = values(4, WIDTH, seed=60), values(48, 4, seed=61)
    x = values(3, WIDTH, seed=62)
    g, low, given = b.g, b.leaf(down), b.leaf(x)
    extra = g.scale(g.mul_mat(b.leaf(up), g.mul_mat(low, given)), 0.5)
    total = g.add(g.mul_mat(b.leaf(raw, type, (WIDTH, 48)), given), extra)
    (found,) = b.compute(total)
    if replaced:
        down = values(4, WIDTH, seed=63)
        b.set(low, down)
        b.peer.call(Command.GRAPH_RECOMPUTE)
        found = b.get(total)
    wide = x.astype(np.float64)
    expected = wide @ base.T + 0.5 * (wide @ down.T) @ up.T
    close(c, found, expected, "the adapted product", PRODUCT_BOUND)


for _number, _type in enumerate((F16, F32, GgmlType.Q8_0, GgmlType.Q4_0), 71):
    _name = f"adapter-beside-{_type.name.lower().replace('_', '')}"
    _sends = f"a product of {_type.name} weights, and of an adapter's two, scaled and added"
    _source = f"{_CLIENTS}lora; llama-graph.cpp build_lora_mm"
    _case = SEQUENCES.case(_number, name=_name, sends=_sends, source=_source)
    _case(partial(_adapted, type=_type))


@SEQUENCES.case(75, source=f"{_CLIENTS}lora", needs=_AGAIN)
def adapter_replaced(c: Context) -> None:
    """An adapter's weights may change while the graph stays.

    Sends: an adapted product, SET_TENSOR of the adapter, GRAPH_RECOMPUTE
    Expects: the product by the new adapter
    """
    _adapted(c, F16, replaced=True)


def _pooled(c: Context, mean: bool, picked: int) -> None:
    """An embedding model ends in this instead of logits.

    Expects: the normalized vector
    """
    b = Bench(c.connect())
    x = values(6, WIDTH, seed=64)
    g, tokens = b.g, b.leaf(x)
    if mean:
        # llama.cpp multiplies by a matrix of 1 / n.
        weights_ = b.leaf(np.full((1, 6), 1 / 6, np.float32))
        pooled = g.mul_mat(g.cont(g.transpose(tokens)), weights_)
        expected = x.astype(np.float64).mean(0)
    else:
        pooled = g.get_rows(tokens, b.leaf(np.array([picked], np.int32), I32))
        expected = x[picked].astype(np.float64)
    norm = g.rms_norm(pooled, 1e-6)
    (found,) = b.compute(norm)
    expected = expected / np.sqrt((expected**2).mean() + 1e-6)
    close(c, found.reshape(-1), expected, "the embedding", PRODUCT_BOUND)


for _number, _name, _mean, _token, _how in (
    (76, "embedding-by-the-mean", True, 0, "by a product with 1 / n"),
    (77, "embedding-of-the-first-token", False, 0, "by GET_ROWS of the first"),
    (78, "embedding-of-the-last-token", False, 5, "by GET_ROWS of the last"),
):
    _sends = f"six tokens made one {_how}, and RMS_NORM of that"
    _source = f"{_CLIENTS}embeddings; llama-graph.cpp build_pooling"
    _case = SEQUENCES.case(_number, name=_name, sends=_sends, source=_source)
    _case(partial(_pooled, mean=_mean, picked=_token))


# -- weights by their hash -------------------------------------------------------------------------


@SEQUENCES.case(
    79, source="ggml-rpc.cpp ggml_backend_rpc_buffer_set_tensor", cache=True, deadline=60.0
)
def model_loaded_twice(c: Context) -> None:
    """A second run offers what the first one uploaded, and computes with what the server has.

    Sends: a hash that is not known, the data, a graph; on the next connection the hash alone
    Expects: result 0, then 1, and both times the same result of the graph
    """
    tail = values(16, seed=70).tobytes()
    content, digest = cacheable(c.dialect, tail)
    results = []
    for _ in range(2):
        b = Bench(c.connect())
        w = b.g.new_tensor(F32, (len(content) // 4,))
        view = b.g.view_1d(w, 16, len(content) // 4 * 4 - 64)
        total = b.g.neg(view)
        b.build([total])
        offered = {**b._wire(w), "name": b"blk.0.weight"}
        known = b.peer.call(Command.SET_TENSOR_HASH, tensor=offered, hash=digest).result
        if not known:
            b.peer.set(offered, content[: w.nbytes], cache_flag=1)
        results.append((known, b.compute(total)[0]))
        b.peer.close()
    c.equal(results[1][0], 1, "the result of the second offer")
    same(c, results[1][1], results[0][1], "the graph's result")


@SEQUENCES.case(80, source="ggml-rpc.cpp ggml_backend_rpc_buffer_set_tensor")
def weights_that_nobody_has(c: Context) -> None:
    """Most offers are of what the server never saw; the data follow at once.

    Sends: SET_TENSOR_HASH that misses and SET_TENSOR, for four weights, then their products
    Expects: 0 each time, and the products
    """
    b = Bench(c.connect())
    x, made = values(2, WIDTH, seed=71), []
    for seed in range(4):
        raw, numbers = weights(F16, WIDTH, 24, 80 + seed)
        w = b.leaf(bytes(len(raw)), F16, (WIDTH, 24))
        made.append((w, raw, numbers))
    products = [b.g.mul_mat(w, b.leaf(x)) for w, _, _ in made]
    b.build(products)
    for i, (w, raw, _) in enumerate(made):
        digest = int.from_bytes(np.random.default_rng(i).bytes(8), "little")
        answer = b.peer.call(Command.SET_TENSOR_HASH, tensor=b._wire(w), hash=digest)
        c.equal(answer.result, 0, "the result")
        b.set(w, raw)
    for found, (_, _, numbers) in zip(b.compute(*products), made, strict=True):
        close(c, found, x.astype(np.float64) @ numbers.T, "a product", PRODUCT_BOUND)
