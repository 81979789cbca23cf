"""10: the split extension (protocol/split.py): programs and their streams."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from client.split.steps import Step
from conformance.cases.groups import SPLIT
from conformance.cases.split import SOURCE, no_tensors, parts_of
from conformance.suite import Closed, Context, Peer
from conformance.suite.arrays import PRODUCT_BOUND, Array, Bench, close, same, values
from protocol.commands import Command
from protocol.ggml.types import GgmlType
from protocol.split import MAX_PROGRAMS, ProgramStep, ProgramSwap, encode_program
from protocol.tensor import Tensor

F32 = GgmlType.F32


@dataclass(slots=True)
class StreamedProgram:
    """Steps on one connection, their tensors placed."""

    b: Bench
    steps: list[Step]

    def tensors(self) -> Any:
        arrays = [s.graph.payload(self.b.peer.dialect).tensors for s in self.steps]
        joined = np.concatenate([*arrays, no_tensors()])
        _, first = np.unique(joined["id"], return_index=True)
        return joined[np.sort(first)]

    def ids(self) -> list[ProgramStep]:
        return [
            ProgramStep(
                tuple(t.id for t in s.inputs),
                tuple(t.id for t in s.graph.nodes),
                tuple(t.id for t in s.outputs),
            )
            for s in self.steps
        ]

    def swaps(self) -> list[ProgramSwap]:
        return [
            ProgramSwap(i, tuple(t.id for t in s.swap)) for i, s in enumerate(self.steps) if s.swap
        ]

    def encode(self) -> bytes:
        return encode_program(self.ids(), self.tensors(), self.swaps())

    def send(self, number: int = 0) -> None:
        answer = self.b.peer.call(Command.SPLIT_PROGRAM, self.encode(), program=number)
        if answer.result:
            raise AssertionError(f"SPLIT_PROGRAM is answered {answer.result}")


def _step(b: Bench, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Step:
    graph = b.g.build(outputs)
    b.place(graph)
    for t in inputs:
        if not t.placed:
            buffer = b.peer.alloc(t.nbytes)
            t.place(buffer.handle, buffer.base)
    return Step(tuple(inputs), graph, tuple(outputs))


def scaling(b: Bench, n: int = 64, factor: float = 2.0) -> StreamedProgram:
    """Return a program that multiplies ``n`` numbers."""
    x = b.g.new_tensor(F32, (n,), "x")
    return StreamedProgram(b, [_step(b, [x], [b.g.scale(x, factor)])])


def programs(c: Context) -> Bench:
    """Open a connection to a server that keeps programs. Skips where it is split itself."""
    peer = c.connect(split=True)
    if parts_of(peer) > 1:
        c.skip("a server that splits over others keeps no programs")
    return Bench(peer)


def run(b: Bench, number: int, *inputs: Array) -> None:
    """Start a program and send inputs."""
    b.peer.send_bytes(
        b.peer.message(Command.SPLIT_RUN, program=number) + b"".join(x.tobytes() for x in inputs),
        command=Command.SPLIT_RUN.name,
    )


def output(b: Bench, *shape: int) -> Array:
    """Receive an output of this shape."""
    n = int(np.prod(shape))
    return np.frombuffer(b.peer._receive(4 * n, "outputs"), np.float32).reshape(shape)


@SPLIT.case(30, source=SOURCE, split=True)
def program_of_several_steps(c: Context) -> None:
    """A layer's products: activations there, results back, nothing between them.

    Sends: a program of three steps, several inputs and outputs, run three times
    Expects: the outputs of each step in order, of each run by its own inputs
    """
    b = programs(c)
    g = b.g
    w = b.leaf(values(96, 256, seed=20))
    x, y = (g.new_tensor(F32, (256, 4), name) for name in "xy")
    first = _step(b, [x, y], [g.add(x, y), g.mul_mat(w, x), g.mul(x, y)])
    z = g.new_tensor(F32, (100,), "z")
    second = _step(b, [z], [g.sqr(z)])
    # What an earlier step computed is still there.
    third = _step(b, [], [g.scale(first.outputs[0], 3.0)])
    StreamedProgram(b, [first, second, third]).send(5)
    for seed in range(3):
        p, q, r = values(4, 256, seed=seed), values(4, 256, seed=seed + 9), values(100, seed=seed)
        run(b, 5, p, q)
        same(c, output(b, 4, 256), p + q, "step 1, ADD")
        product = p.astype(np.float64) @ values(96, 256, seed=20).T
        close(c, output(b, 4, 96), product, "step 1, MUL_MAT", PRODUCT_BOUND)
        same(c, output(b, 4, 256), p * q, "step 1, MUL")
        b.peer.send_bytes(r.tobytes(), command="inputs")
        same(c, output(b, 100), r * r, "step 2")
        same(c, output(b, 4, 256), (p + q) * np.float32(3), "step 3")
    b.peer.ping()


@SPLIT.case(31, source=SOURCE, split=True)
def everything_at_once(c: Context) -> None:
    """Where a stream ends only counting tells: what follows it is not part of it.

    Sends: SPLIT_RUN, all inputs, the next SPLIT_RUN and an ordinary request in one go
    Expects: the outputs, then the answer
    """
    b = programs(c)
    g = b.g
    x, y = g.new_tensor(F32, (64,), "x"), g.new_tensor(F32, (3000,), "y")
    StreamedProgram(b, [_step(b, [x], [g.scale(x, 2.0)]), _step(b, [y], [g.scale(y, 3.0)])]).send()
    p, q = values(64, seed=21), values(3000, seed=22)
    run = b.peer.message(Command.SPLIT_RUN, program=0) + p.tobytes() + q.tobytes()
    ask = b.peer.message(Command.GET_ALIGNMENT)
    b.peer.send_bytes(run + run + ask + run + ask, command="SPLIT_RUN and GET_ALIGNMENT")
    for runs in (2, 1):
        for _ in range(runs):
            same(c, output(b, 64), p * 2, "step 1")
            same(c, output(b, 3000), q * np.float32(3), "step 2")
        b.peer.answer(Command.GET_ALIGNMENT)


@SPLIT.case(32, source=SOURCE, split=True)
def inputs_in_any_segments(c: Context) -> None:
    """TCP keeps no boundaries.

    Sends: SPLIT_RUN and its inputs in segments of one to a few bytes
    Expects: the outputs
    """
    b = programs(c)
    scaling(b).send()
    p = values(64, seed=23)
    data = b.peer.message(Command.SPLIT_RUN, program=0) + p.tobytes()
    at, size = 0, 1
    while at < len(data):
        b.peer.send_bytes(data[at : at + size], more=at > 0, command=Command.SPLIT_RUN.name)
        at, size = at + size, size % 7 + 1
    same(c, output(b, 64), p * 2, "the output")


@SPLIT.case(33, source=SOURCE, split=True)
def number_taken_again(c: Context) -> None:
    """Numbers are few: a client reuses them.

    Sends: two programs one after the other under one number; one under the last number
    Expects: the later one runs
    """
    b = programs(c)
    p = values(64, seed=24)
    for factor in (2.0, 5.0):
        scaling(b, factor=factor).send(MAX_PROGRAMS - 1)
        run(b, MAX_PROGRAMS - 1, p)
        same(c, output(b, 64), p * np.float32(factor), f"the program that scales by {factor}")


@SPLIT.case(34, source=SOURCE, split=True)
def programs_of_nothing(c: Context) -> None:
    """A part may have no rows of any weight.

    Sends: a program without steps, and one of steps without anything
    Expects: they are over at once
    """
    b = programs(c)
    empty: list[list[ProgramStep]] = [[], [ProgramStep((), (), ())] * 3]
    for number, steps in enumerate(empty):
        body = encode_program(steps, no_tensors())
        b.peer.call(Command.SPLIT_PROGRAM, body, program=number)
        run(b, number)
        b.peer.ping()


@SPLIT.case(
    35,
    name="program-after-free",
    source=SOURCE + ": freeing a buffer that it uses ends it",
    split=True,
    hostile=True,
)
def program_whose_buffer_was_freed(c: Context) -> None:
    """It would read and write memory that is somebody else's by now.

    Sends: a program, FREE_BUFFER of a buffer that it uses, SPLIT_RUN
    Expects: the connection is closed
    """
    b = programs(c)
    made = scaling(b)
    made.send(1)
    b.peer.call(Command.FREE_BUFFER, remote_ptr=made.steps[0].inputs[0].buffer)
    run(b, 1, values(64))
    ended(c, b.peer)


def ended(c: Context, peer: Peer) -> None:
    """Fail unless the server ends the connection."""
    try:
        found = peer.closed_by_server()
    except Closed:
        found = True
    c.expect(found, "the server went on")


@SPLIT.case(36, source=SOURCE + f": numbers are 0 to {MAX_PROGRAMS - 1}", split=True, hostile=True)
def numbers_that_no_program_has(c: Context) -> None:
    """What follows a SPLIT_RUN on the stream can't be known without its program.

    Sends: SPLIT_RUN of a number without a program; SPLIT_PROGRAM of a number that is none
    Expects: the connection is closed
    """
    b = programs(c)
    scaling(b).send(1)
    run(b, 2)
    c.refused(b.peer)
    b.peer.close()
    for number in (MAX_PROGRAMS, 0xFFFFFFFF):
        b = programs(c)
        body = scaling(b).encode()
        b.peer.send(Command.SPLIT_PROGRAM, body, program=number)
        c.refused(b.peer, Command.SPLIT_PROGRAM)
        b.peer.close()


def _bad_program(c: Context, change: Callable[[StreamedProgram], bytes]) -> None:
    b = programs(c)
    body = change(scaling(b))
    b.peer.send(Command.SPLIT_PROGRAM, body, program=0)
    c.refused(b.peer, Command.SPLIT_PROGRAM)
    b.peer.close()


@SPLIT.case(37, source=SOURCE, split=True, hostile=True)
def program_of_the_wrong_size(c: Context) -> None:
    """Counts come before what they count.

    Sends: programs whose counts don't fill them: cut short, too long, counts of 2**32 - 1
    Expects: the connection is closed
    """
    for cut in (0, 3, 4, 12, 40):
        _bad_program(c, lambda p, cut=cut: p.encode()[:cut])  # type: ignore[misc]
    _bad_program(c, lambda p: p.encode()[:-1])
    _bad_program(c, lambda p: p.encode() + b"\0")
    for at in (0, 4, 8, 12):
        _bad_program(
            c,
            lambda p, at=at: (  # type: ignore[misc]
                p.encode()[:at] + b"\xff" * 4 + p.encode()[at + 4 :]
            ),
        )


@SPLIT.case(38, source=SOURCE, split=True, hostile=True)
def program_with_unknown_ids(c: Context) -> None:
    """As in a graph.

    Sends: programs that name tensors that aren't there, as input, node and output
    Expects: the connection is closed
    """
    for field in ("inputs", "nodes", "outputs"):

        def change(p: StreamedProgram, field: str = field) -> bytes:
            (step,) = p.ids()
            return encode_program([replace(step, **{field: (4711,)})], p.tensors())

        _bad_program(c, change)


@SPLIT.case(
    39,
    source=SOURCE + ": contiguous tensors with memory in buffers of the client",
    split=True,
    hostile=True,
)
def program_with_tensors_elsewhere(c: Context) -> None:
    """The bytes of the stream go straight to where they say.

    Sends: programs whose input or output lies outside its buffer, or in no buffer
    Expects: the connection is closed
    """
    for which in ("inputs", "outputs"):
        for offset in (1 << 30, -(1 << 30), None):

            def change(
                p: StreamedProgram, which: str = which, offset: int | None = offset
            ) -> bytes:
                tensors = p.tensors().copy()
                wanted = getattr(p.ids()[0], which)[0]
                i = int(np.flatnonzero(tensors["id"] == wanted)[0])
                if offset is None:
                    tensors["buffer"][i] = tensors["data"][i] = 0
                else:
                    tensors["data"][i] = int(tensors["data"][i]) + offset
                return encode_program(p.ids(), tensors)

            _bad_program(c, change)


@SPLIT.case(40, source=SOURCE, split=True, concurrent=True, hostile=True)
def program_in_another_clients_memory(c: Context) -> None:
    """A program is no way around what a graph may not.

    Sends: a program with tensors in another client's buffers
    Expects: the connection is closed
    """
    theirs = scaling(programs(c)).encode()
    b = programs(c)
    b.peer.send(Command.SPLIT_PROGRAM, theirs, program=0)
    c.refused(b.peer, Command.SPLIT_PROGRAM)


@SPLIT.case(41, source=SOURCE, split=True)
def programs_are_not_the_last_graph(c: Context) -> None:
    """A client that uses both counts on each.

    Sends: a graph, a program that runs, GRAPH_RECOMPUTE
    Expects: the graph runs again, not the program
    """
    b = programs(c)
    total = b.leaf(np.ones(16, np.float32))
    b.compute(b.g.scale(total, 2.0, inplace=True))
    scaling(b).send()
    p = values(64, seed=25)
    run(b, 0, p)
    same(c, output(b, 64), p * 2, "the program's output")
    b.peer.call(Command.GRAPH_RECOMPUTE)
    same(c, b.get(total), np.full(16, 4), "what the graph wrote")


@SPLIT.case(42, source=SOURCE, split=True, hostile=True)
def hanging_up_within_a_program(c: Context) -> None:
    """The device must not wait for an input that never comes.

    Sends: SPLIT_RUN with half of its input, then the end of the stream
    Expects: the connection is closed, and the server goes on
    """
    b = programs(c)
    scaling(b, 4096).send()
    run(b, 0, values(1000))
    b.peer.half_close()
    ended(c, b.peer)


@SPLIT.case(43, source=SOURCE, split=True)
def program_number(c: Context) -> None:
    """A layer has several programs, and a client may have many layers.

    Sends: programs under several numbers, then a SPLIT_RUN of each, not in their order
    Expects: the program of that number
    """
    b = programs(c)
    p = values(64, seed=26)
    factors = {0: 2.0, 7: 3.0, 3: 5.0, MAX_PROGRAMS - 1: 7.0}
    for number, factor in factors.items():
        scaling(b, factor=factor).send(number)
    for number in (7, 0, 3, 0, MAX_PROGRAMS - 1, 7):
        run(b, number, p)
        same(c, output(b, 64), p * np.float32(factors[number]), f"program {number}")
