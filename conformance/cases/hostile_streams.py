"""9.70 to 9.73: noise, and connections without end."""

from __future__ import annotations

import random

from conformance.cases.groups import HOSTILE
from conformance.suite import Closed, Context, Peer, RemoteBuffer
from conformance.suite.tensors import Fields
from protocol.commands import Command


@HOSTILE.case(
    70, source="ggml-rpc.cpp rpc_serve_client ('Expected HELLO command'), since 1.0", hostile=True
)
def noise_instead_of_hello(c: Context) -> None:
    """The port is open to whoever finds it.

    Sends: 30 connections of random bytes, without HELLO
    Expects: the connection is closed, unless the bytes happen to be a start
    """
    rng = random.Random(c.seed)
    for i in range(30):
        peer = c.connect(f"noise {i}", hello=False)
        first = rng.choice([n for n in range(256) if n != Command.HELLO])
        peer.send_bytes(bytes([first]) + rng.randbytes(rng.randint(8, 300)))
        c.expect(peer.closed_by_server(), f"connection {i} stays open")
        peer.close()


@HOSTILE.case(
    71, source="open in the protocol: what each means is chance", hostile=True, deadline=60.0
)
def noise_in_the_right_sizes(c: Context) -> None:
    """Random handles, addresses, types and shapes: all that a server must not trust.

    Sends: 30 connections of HELLO, then random commands with random payloads of the right size
    Expects: the server lives
    """
    rng = random.Random(c.seed)
    commands = [
        command
        for command in c.dialect.commands
        if command not in (Command.HELLO, Command.ALLOC_BUFFER) and command < Command.SPLIT_QUERY
    ]
    for i in range(30):
        peer = c.connect(f"noise {i}")
        command = rng.choice(commands)
        size = len(peer.payload(command, **_anything(peer)))
        peer.send_frame(command, rng.randbytes(size + _body_size(command, rng)))
        peer.half_close()
        peer.closed_by_server()
        peer.close()


def _body_size(command: Command, rng: random.Random) -> int:
    bodies = (Command.SET_TENSOR, Command.GRAPH_COMPUTE)
    return rng.randint(0, 2000) if command in bodies else 0


def _anything(peer: Peer) -> Fields:
    """Fields for any request, to know its size."""
    nothing = RemoteBuffer(0, 0, 0, peer.dialect).leaf(0, (1,))
    return {
        "tensor": nothing,
        "src": nothing,
        "dst": nothing,
        "remote_ptr": 0,
        "size": 0,
        "hash": 0,
    }


@HOSTILE.case(
    73,
    source="ggml-rpc.cpp ggml_backend_rpc_start_server: accepts for ever, since 1.0",
    hostile=True,
)
def connections_that_come_and_go(c: Context) -> None:
    """Each costs the server a descriptor, which it has to give back.

    Sends: 200 connections that are made and closed, with and without HELLO
    Expects: the next client is served
    """
    for i in range(200):
        peer = c.connect(f"connection {i}", hello=False)
        if i % 2:
            peer.send_frame(Command.HELLO, bytes(c.dialect.hello_size))
            try:
                peer.answer(Command.HELLO)
            except Closed:
                c.fail(f"connection {i} is not served")
            peer.ping()
        peer.close()
    c.connect("next")
