"""5: graphs: what order, memory, views, ids and parameters mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from client.builder.graph import Graph
from conformance.cases.groups import GRAPHS
from conformance.suite import Context
from conformance.suite.arrays import Bench, close, same, values
from protocol.ggml.ops import TensorFlag
from protocol.ggml.types import GgmlType
from protocol.graph_payload import encode_graph

F32 = GgmlType.F32

_COMPUTE = "ggml-rpc.cpp rpc_server::graph_compute, since 1.0"
_NODE = "ggml-rpc.cpp rpc_server::create_node, since 1.0"
_TENSOR = "ggml-rpc.cpp rpc_server::deserialize_tensor, since 1.0"
_BACKEND = "ggml-cpu.c ggml_graph_compute_thread: nodes are computed in their order"


@GRAPHS.case(1, source=_COMPUTE)
def one_node(c: Context) -> None:
    """The least that a server must do.

    Sends: a graph of one ADD
    Expects: its result in its memory, its sources as they were
    """
    b = Bench(c.connect())
    x, y = values(5, 33, seed=1), values(5, 33, seed=2)
    p, q = b.leaf(x), b.leaf(y)
    (result,) = b.compute(b.g.add(p, q))
    same(c, result, x + y, "the sum")
    same(c, b.get(p), x, "the first source")
    same(c, b.get(q), y, "the second source")


@GRAPHS.case(2, source=_BACKEND)
def nodes_in_their_order(c: Context) -> None:
    """Nothing but the order says which of them comes first: neither is a source of the other.

    Sends: two nodes that write the same memory in place, in one order and in the other
    Expects: each is computed where it stands in the array of nodes
    """
    for add_first in (True, False):
        b = Bench(c.connect())
        x, y, z = values(64, seed=1), values(64, seed=2), values(64, seed=3)
        target, p, q = b.leaf(x), b.leaf(y), b.leaf(z)
        steps = [b.g.add_inplace(target, p), b.g.mul_inplace(target, q)]
        b.compute(*(steps if add_first else reversed(steps)))
        expected = (x + y) * z if add_first else x * z + y
        same(c, b.get(target), expected, f"{'ADD, MUL' if add_first else 'MUL, ADD'} in place")
        b.peer.close()


@GRAPHS.case(3, source=_NODE)
def views_are_read(c: Context) -> None:
    """A view's place is its data and nb; the offset is in both data and view_offs.

    Sends: SQR of a view: some columns of some rows of a leaf, by offset and strides
    Expects: the result of those elements
    """
    b = Bench(c.connect())
    x = values(12, 40, seed=4)
    p = b.leaf(x)
    view = b.g.view_2d(p, 17, 5, p.nb[1] * 2, 3 * p.nb[1] + 4 * 7)
    (result,) = b.compute(b.g.sqr(view))
    same(c, result, x[3:12:2, 7:24] ** 2, "SQR of the view")


@GRAPHS.case(4, source="ggml.c ggml_reshape to ggml_transpose: these nodes compute nothing")
def views_of_views(c: Context) -> None:
    """A view of a view names what that one views, with the sum of the offsets.

    Sends: a chain of RESHAPE, PERMUTE, TRANSPOSE and VIEW up to a CONT
    Expects: the elements in the order that the views make
    """
    b = Bench(c.connect())
    x = values(4, 6, 10, seed=5)
    t = b.g.reshape(b.leaf(x), 10, 3, 8)
    t = b.g.view_3d(t, 10, 3, 5, t.nb[1], t.nb[2], 2 * t.nb[2])
    t = b.g.transpose(b.g.permute(t, 1, 2, 0, 3))
    (result,) = b.compute(b.g.cont(t))
    # By dimensions from the outermost: 2, 1, 0 became 1, 0, 2, then the inner two changed places.
    same(c, result, x.reshape(8, 3, 10)[2:7].transpose(1, 2, 0).swapaxes(1, 2), "CONT of the views")


@GRAPHS.case(5, source="ggml.c ggml_cpy: the result is a view of the destination")
def views_are_written(c: Context) -> None:
    """This is how a KV cache is filled.

    Sends: CPY into a view in the middle of a leaf
    Expects: those elements written, and nothing beside them
    """
    b = Bench(c.connect())
    x, y = values(16, 8, seed=6), values(3, 8, seed=7)
    cache = b.leaf(x)
    b.compute(b.g.cpy(b.leaf(y), b.g.view_2d(cache, 8, 3, cache.nb[1], 5 * cache.nb[1])))
    expected = x.copy()
    expected[5:8] = y
    same(c, b.get(cache), expected, "the leaf")


@GRAPHS.case(6, source=_BACKEND)
def written_then_read_through_another_view(c: Context) -> None:
    """Nothing but memory connects the two nodes: neither has the other as a source.

    Sends: a graph that fills a view of a cache and reads another view of all of it
    Expects: what was just written is read
    """
    b = Bench(c.connect())
    x, y = values(16, 8, seed=8), values(2, 8, seed=9)
    cache = b.leaf(x)
    stored = b.g.cpy(b.leaf(y), b.g.view_2d(cache, 8, 2, cache.nb[1], 3 * cache.nb[1]))
    seen = b.g.scale(b.g.view_1d(cache, 128), 2.0)
    _, result = b.compute(stored, seen)
    expected = x.copy()
    expected[3:5] = y
    same(c, result, 2 * expected, "the cache, doubled")


@GRAPHS.case(7, source="ggml.c ggml_mul_inplace: the result has the memory of the first source")
def in_place(c: Context) -> None:
    """In place means that there is one memory, whoever names it.

    Sends: MUL in place, and then a node that reads the same leaf
    Expects: the leaf has the product, and the later node reads it
    """
    b = Bench(c.connect())
    x, y = values(7, 32, seed=10), values(32, seed=11)
    leaf = b.leaf(x)
    product = b.g.mul_inplace(leaf, b.leaf(y))
    _, after = b.compute(product, b.g.neg(leaf))
    same(c, b.get(leaf), x * y, "the leaf")
    same(c, after, -(x * y), "what read it afterwards")


@GRAPHS.case(8, source=_TENSOR)
def tensors_in_several_buffers(c: Context) -> None:
    """Weights, KV cache and activations have buffers of their own in every model.

    Sends: sources and results spread over four buffers
    Expects: the results
    """
    b = Bench(c.connect(), buffers=4)
    x, y, z = values(3, 64, seed=12), values(3, 64, seed=13), values(64, seed=14)
    total = b.g.add(b.leaf(x), b.leaf(y))
    product = b.g.mul(total, b.leaf(z))
    first, second = b.compute(total, product)
    same(c, first, x + y, "the sum")
    same(c, second, (x + y) * z, "the product")


@GRAPHS.case(9, source="ggml-impl.h ggml_node_has_n_uses: what is an output isn't left out")
def several_outputs(c: Context) -> None:
    """A program reads logits and embeddings of one graph; a server may leave out only the rest.

    Sends: several results that are outputs (GGML_TENSOR_FLAG_OUTPUT), of one shared source
    Expects: all of them can be read afterwards
    """
    b = Bench(c.connect())
    x, w = values(4, 48, seed=15), values(48, seed=16)
    shared = b.g.rms_norm(b.leaf(x), 1e-5)
    outputs = [shared, b.g.mul(shared, b.leaf(w)), b.g.neg(shared), b.g.sqr(shared)]
    for t in outputs:
        t.flags |= TensorFlag.OUTPUT
    norm, scaled, negated, squared = b.compute(*outputs)
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True) + 1e-5)
    close(c, norm, expected, "RMS_NORM")
    close(c, scaled, expected * w, "its product")
    close(c, negated, -expected, "its negative")
    close(c, squared, expected**2, "its square")


@GRAPHS.case(10, source="ggml-cpu.c ggml_cpu_try_fuse_ops: the two may be one")
def norm_and_scale(c: Context) -> None:
    """Servers may make one step of the two; the result has to be that of both.

    Sends: RMS_NORM and a MUL that alone reads it, as models have them
    Expects: the product
    """
    b = Bench(c.connect())
    x, w = values(4, 96, seed=17), values(96, seed=18)
    (result,) = b.compute(b.g.mul(b.g.rms_norm(b.leaf(x), 1e-5), b.leaf(w)))
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(1, keepdims=True) + 1e-5) * w
    close(c, result, expected, "the product")


@GRAPHS.case(11, source=_COMPUTE)
def empty_graph(c: Context) -> None:
    """A scheduler may find nothing to do on a device.

    Sends: a graph without nodes and without tensors
    Expects: the connection goes on
    """
    peer = c.connect()
    peer.compute([], [])
    peer.ping()


@GRAPHS.case(12, source="ggml-cpu.c ggml_compute_forward: nothing to do for these ops")
def nothing_but_views(c: Context) -> None:
    """Where a model ends in a view, such a graph is sent.

    Sends: a graph of nodes that compute nothing: RESHAPE, VIEW, PERMUTE, TRANSPOSE
    Expects: nothing changes, and the connection goes on
    """
    b = Bench(c.connect())
    x = values(6, 8, seed=19)
    leaf = b.leaf(x)
    g = b.g
    nodes = [g.reshape(leaf, 48), g.view_1d(leaf, 5, 8), g.permute(leaf, 1, 0, 2, 3)]
    b.send(b.build([*nodes, g.transpose(leaf)]).encode(b.peer.dialect))
    same(c, b.get(leaf), x, "the leaf")


@GRAPHS.case(
    13, source="ggml-cpu.c ggml_graph_compute_thread, since the flag came (2026-01), protocol 4.0"
)
def node_without_the_flag(c: Context) -> None:
    """A part of a graph that is switched off is sent all the same.

    Sends: two nodes, of which one lacks the flag GGML_TENSOR_FLAG_COMPUTE (16)
    Expects: only the other is computed
    """
    if c.dialect.version < (4, 0, 0):
        c.skip("clients from before protocol 4.0 may not know the flag")
    b = Bench(c.connect())
    x = values(16, seed=20)
    leaf = b.leaf(x)
    on, off = b.g.neg(leaf), b.g.sqr(leaf)
    graph = b.build([on, off])
    off.flags = 0
    b.set(off, bytes(off.nbytes))
    b.send(graph.encode(b.peer.dialect))
    same(c, b.get(on), -x, "the node with the flag")
    same(c, b.get(off), np.zeros(16), "the node without the flag")


def _payload(b: Bench, graph: Graph, change: Callable[[Any], Any]) -> bytes:
    """The graph's bytes with its array of tensors changed."""
    payload = graph.payload(b.peer.dialect)
    payload.tensors = change(payload.tensors)
    return encode_graph(payload, b.peer.dialect)


@GRAPHS.case(14, source=_COMPUTE + ": tensors are found by their ids")
def tensors_in_any_order(c: Context) -> None:
    """Only the array of nodes has an order.

    Sends: a graph whose array of tensors is in reversed order
    Expects: the result
    """
    b = Bench(c.connect())
    x, y = values(40, seed=21), values(40, seed=22)
    t = b.g.sqr(b.g.add(b.leaf(x), b.leaf(y)))
    b.send(_payload(b, b.build([t]), lambda tensors: tensors[::-1].copy()))
    same(c, b.get(t), (x + y) ** 2, "the result")


@GRAPHS.case(15, source="ggml-rpc.cpp serialize_tensor: ids are the client's pointers")
def ids_are_any_numbers(c: Context) -> None:
    """An id has 64 bits and no meaning but to be the same where the same tensor is meant.

    Sends: a graph whose ids are large: 2**63 and what follows it, 2**64 - 1
    Expects: the result
    """
    b = Bench(c.connect())
    x, y = values(40, seed=23), values(40, seed=24)
    p, q = b.leaf(x), b.leaf(y)
    t = b.g.sub(p, q)
    p.id, q.id, t.id = (1 << 64) - 1, 1 << 63, (1 << 63) + 1
    b.send(b.build([t]).encode(b.peer.dialect))
    same(c, b.get(t), x - y, "the difference")


@GRAPHS.case(16, source=_COMPUTE + ": ids are looked up in the same message")
def ids_mean_something_in_one_graph_only(c: Context) -> None:
    """Clients reuse the memory of their tensors, and with it the ids, for every graph.

    Sends: two graphs in which the same ids are other tensors: other ops, shapes, places
    Expects: each is what it says itself
    """
    peer = c.connect()
    x, y = values(32, seed=25), values(3, 8, seed=26)
    first, second = Bench(peer), Bench(peer)
    # Both count their ids from 1 on.
    (a,) = first.compute(first.g.neg(first.leaf(x)))
    (b,) = second.compute(second.g.sum_rows(second.leaf(y)))
    (again,) = first.compute(first.g.sqr(first.leaf(x)))
    same(c, a, -x, "the first graph")
    close(c, b, y.astype(np.float64).sum(1), "the second graph")
    same(c, again, x * x, "the third graph")


@GRAPHS.case(17, source=_COMPUTE + ": what no node names is not looked at")
def unused_tensors(c: Context) -> None:
    """Nothing says that all tensors of the array are needed.

    Sends: a graph with tensors that no node has to do with, one of them without memory
    Expects: the result
    """
    b = Bench(c.connect())
    x = values(24, seed=27)
    t = b.g.neg(b.leaf(x))
    graph = b.build([t])
    extra = b.g.new_tensor(F32, (5, 5))

    def more(tensors: Any) -> Any:
        longer = np.concatenate([tensors, tensors[:1]])
        longer["id"][-1] = extra.id
        longer["buffer"][-1] = longer["data"][-1] = 0
        return longer

    b.send(_payload(b, graph, more))
    same(c, b.get(t), -x, "the result")


@GRAPHS.case(18, source="enum ggml_op; RPC_PROTO_PATCH_VERSION counts its changes since 3.6.1")
def ops_by_this_versions_numbers(c: Context) -> None:
    """A number that is off by one is another op.

    Sends: ops whose numbers changed between versions: UNARY, GLU, PAD, ARGSORT, ROLL
    Expects: each is read by the numbering of this protocol
    """
    b = Bench(c.connect())
    x = np.random.default_rng(28).permutation(60).reshape(3, 20).astype(np.float32) - 30
    p = b.leaf(x)
    g = b.g
    expected = {
        g.neg(p): (-x, "UNARY NEG"),
        g.reglu(p): (np.maximum(x[:, :10], 0) * x[:, 10:], "GLU REGLU"),
        g.pad(p, 2, 1): (np.pad(x, ((0, 1), (0, 2))), "PAD"),
        g.argsort(p): (np.argsort(x, 1), "ARGSORT"),
        g.roll(p, 3, 1): (np.roll(x, (1, 3), (0, 1)), "ROLL"),
    }
    # The oldest releases lack some.
    outputs = [t for t in expected if t.op in c.dialect.ops]
    for t, computed in zip(outputs, b.compute(*outputs), strict=True):
        same(c, computed, *expected[t])


@GRAPHS.case(19, source="ggml.c ggml_set_op_params of each constructor")
def parameters(c: Context) -> None:
    """op_params are 16 words of 32 bits, of which each op has its own view.

    Sends: ops with parameters: SCALE, CLAMP, LEAKY_RELU, SOFT_MAX, DIAG_MASK_ZERO, CONCAT
    Expects: integers and floats are taken out of op_params as the op has them
    """
    b = Bench(c.connect())
    x, y = values(6, 8, seed=29), values(2, 8, seed=30)
    p, g = b.leaf(x), b.g
    outputs = [
        g.scale(p, -1.5),
        g.clamp(p, -0.5, 0.25),
        g.leaky_relu(p, 0.125),
        g.soft_max_ext(p, None, 0.5, 0.0),
        g.diag_mask_zero(p, 2),
        g.concat(p, b.leaf(y), 1),
    ]
    scaled, clamped, leaky, soft, masked, joined = b.compute(*outputs)
    same(c, scaled, x * np.float32(-1.5), "SCALE")
    same(c, clamped, np.clip(x, np.float32(-0.5), np.float32(0.25)), "CLAMP")
    same(c, leaky, np.where(x > 0, x, x * np.float32(0.125)), "LEAKY_RELU")
    powers = np.exp(0.5 * x.astype(np.float64))
    close(c, soft, powers / powers.sum(1, keepdims=True), "SOFT_MAX")
    same(c, masked, np.tril(x, 2), "DIAG_MASK_ZERO")
    same(c, joined, np.concatenate([x, y]), "CONCAT")
