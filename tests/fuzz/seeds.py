"""Valid inputs, from which the fuzzer starts and to which damage is done."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from conformance.differential.case import GraphCase
from conformance.differential.values import ValueKind
from protocol.codec import codec
from protocol.commands import Command
from protocol.dialects import DIALECTS, Answer, Body, Dialect
from protocol.ggml.ops import VIEWS
from protocol.ggml.types import GgmlType
from protocol.graph_payload import GraphPayload, decode_graph, encode_graph
from protocol.requests import encode_frame
from protocol.responses import encode_size
from protocol.split import ProgramStep, encode_program
from protocol.tensor import Tensor
from rpc_server.graph.parse import Resolve
from tests.fuzz.graphs import (
    CONTENTS,
    MAX_BUFFERS,
    GraphInput,
    handle,
    nowhere,
    wire_base,
)
from tests.fuzz.streams import SPOKEN
from tests.guard.cases import any_case, chains, draw_cases
from tests.guard.mapping import PAGE

F32, F16, BF16, I32, I64 = (
    GgmlType.F32, GgmlType.F16, GgmlType.BF16, GgmlType.I32, GgmlType.I64,
)  # fmt: skip

# Of each buffer what is in it, as an index of CONTENTS, and its size.
Buffers = tuple[tuple[int, int], ...]
# A fifth of the cases are chains of several families.
_CHAINS = 5

# What a root holds by the type of its elements.
_CONTENT = {F32: "normal", F16: "float16", BF16: "float16", I32: "int32", I64: "int64"}


def cases(count: int, seed: int) -> list[GraphCase]:
    """Cases of all families, some chained."""
    return draw_cases(any_case(), count, seed) + draw_cases(chains(), count // _CHAINS, seed)


def _placed(case: GraphCase) -> Buffers | None:
    """Put each root into a buffer of its size; None if there are too many or too large ones."""
    roots = case.graph.roots
    if len(roots) > MAX_BUFFERS or any(root.nbytes >= 1 << 24 for root in roots):
        return None
    buffers = []
    for i, root in enumerate(roots):
        root.place(handle(i), wire_base(i) + -root.nbytes % PAGE)
        what = _CONTENT.get(root.type, "random")
        fill = case.fills.get(root)
        if fill is not None and fill.kind is ValueKind.SPECIAL:
            what = "special"
        buffers.append((CONTENTS.index(what), root.nbytes))
    return tuple(buffers)


def _placed_cases(count: int, seed: int) -> Iterator[tuple[GraphCase, Buffers]]:
    for case in cases(count, seed):
        if (buffers := _placed(case)) is not None:
            yield case, buffers


def newest_graphs(count: int, seed: int) -> Iterator[tuple[GraphPayload, Resolve]]:
    """Those of :func:`graph_inputs` in the newest dialect, and where their buffers lie."""
    for data in graph_inputs(count, seed):
        given = GraphInput.decode(data)
        assert given is not None
        if given.dialect is DIALECTS[0]:
            yield decode_graph(given.payload, given.dialect), nowhere(given).get


def graph_inputs(count: int, seed: int) -> list[bytes]:
    """Graphs of the newest dialect, and of older ones that have their ops."""
    chosen = random.Random(seed)
    made = []
    for case, buffers in _placed_cases(count, seed):
        spoken = chosen.choice((0, 0, chosen.randrange(len(DIALECTS))))
        try:
            payload = case.graph.payload(SPOKEN[spoken])
        except ValueError:
            spoken, payload = 0, case.graph.payload(SPOKEN[0])
        made.append(GraphInput(spoken, buffers, encode_graph(payload, SPOKEN[spoken])).encode())
    return made


def program_inputs(count: int, seed: int) -> list[bytes]:
    """Programs that take a graph's dense leaves, compute it in one or two steps, give its ends."""
    chosen = random.Random(seed)
    made = []
    for case, buffers in _placed_cases(count, seed):
        leaves = [t.id for t in case.graph.leaves if t.nbytes]
        nodes = [t.id for t in case.graph.nodes]
        ends = [t.id for t, _ in case.outputs if t.nbytes and t.contiguous and _computed(t)]
        cut = chosen.randint(0, len(nodes))
        steps = [
            ProgramStep(tuple(leaves), tuple(nodes[:cut]), ()),
            ProgramStep((), tuple(nodes[cut:]), tuple(ends)),
        ]
        if not cut:
            steps = [ProgramStep(tuple(leaves), tuple(nodes), tuple(ends))]
        tensors = case.graph.payload(SPOKEN[0]).tensors
        made.append(GraphInput(len(DIALECTS), buffers, encode_program(steps, tensors)).encode())
    return made


def _computed(t: Tensor) -> bool:
    return t.op not in VIEWS


def _fields(declaration: object, chosen: random.Random) -> bytes:
    """A message of random fields: small numbers mostly, some bytes anything."""
    size = codec(declaration).size
    data = np.zeros(size, np.uint8)
    for _ in range(chosen.randint(0, 8)):
        if size:
            data[chosen.randrange(size)] = chosen.randrange(256)
    return data.tobytes()


def _request(dialect: Dialect, command: Command, chosen: random.Random) -> bytes:
    spec = dialect.commands[command]
    payload = _fields(spec.request, chosen)
    if spec.body is not Body.NONE:
        payload += chosen.randbytes(chosen.choice((0, 1, 7, 300, 5000, 9000)))
    return encode_frame(command, len(payload)) + payload


def _in_all_dialects(
    count: int, seed: int, make: Callable[[Dialect, random.Random], bytes]
) -> list[bytes]:
    """What is made in each dialect in turn, behind a byte for the dialect and any one."""
    chosen = random.Random(seed)
    made = []
    for i in range(count):
        spoken = i % len(SPOKEN)
        stream = make(SPOKEN[spoken], chosen)
        made.append(bytes((spoken, chosen.randrange(256))) + stream)
    return made


def _requests(dialect: Dialect, chosen: random.Random) -> bytes:
    rest = [c for c in dialect.commands if c is not Command.HELLO]
    stream = _request(dialect, Command.HELLO, chosen)
    for command in chosen.choices(rest, k=chosen.randint(0, 6)):
        stream += _request(dialect, command, chosen)
    return stream


def _answers(dialect: Dialect, chosen: random.Random) -> bytes:
    # The target says what a byte stands for.
    from tests.fuzz.streams import expectations

    codes = chosen.randbytes(chosen.randint(0, 6))
    stream = bytes((len(codes),)) + codes
    for command, place, raw in expectations(codes, dialect):
        spec = dialect.commands[command]
        data = spec.answer is Answer.DATA
        body = chosen.randbytes(len(place or b"")) if data else _fields(spec.response, chosen)
        stream += body if raw else encode_size(len(body)) + body
    return stream


def request_inputs(count: int, seed: int) -> list[bytes]:
    """Streams of whole messages in all dialects."""
    return _in_all_dialects(count, seed, _requests)


def answer_inputs(count: int, seed: int) -> list[bytes]:
    """What servers answer to some requests in all dialects."""
    return _in_all_dialects(count, seed, _answers)


Seeds = Callable[[int, int], Sequence[bytes]]
