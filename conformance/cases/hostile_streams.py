"""9.70 to 9.73: noise, and connections without end."""

from __future__ import annotations

import random
import struct

from conformance.cases.attacks import Attack
from conformance.cases.groups import HOSTILE
from conformance.suite import Closed, Context, Peer, RemoteBuffer
from conformance.suite.tensors import Fields
from protocol.commands import Command


@HOSTILE.case(
    70,
    sends="30 connections of random bytes, without HELLO",
    expects="the connection is closed, unless the bytes happen to be a start",
    source="ggml-rpc.cpp rpc_serve_client ('Expected HELLO command'), since 1.0",
    hostile=True,
)
def noise_instead_of_hello(c: Context) -> None:
    """The port is open to whoever finds it."""
    rng = random.Random(c.seed)
    for i in range(30):
        peer = c.connect(f"noise {i}", hello=False)
        first = rng.choice([n for n in range(256) if n != Command.HELLO])
        peer.send_bytes(bytes([first]) + rng.randbytes(rng.randint(8, 300)))
        c.expect(peer.closed_by_server(), f"connection {i} stays open")
        peer.close()


@HOSTILE.case(
    71,
    sends="30 connections of HELLO, then random commands with random payloads of the right size",
    expects="the server lives",
    source="open in the protocol: what each means is chance",
    hostile=True,
    deadline=60.0,
)
def noise_in_the_right_sizes(c: Context) -> None:
    """Random handles, addresses, types and shapes: all that a server must not trust."""
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
    72,
    sends="60 graphs with nothing wrong, each with one random word changed",
    expects="each is computed or refused; the server lives",
    source="open in the protocol: what each means is chance",
    hostile=True,
    deadline=60.0,
)
def graphs_with_a_wrong_word(c: Context) -> None:
    """Mostly sound is what gets furthest into a server."""
    rng = random.Random(c.seed)
    attack: Attack | None = None
    for _ in range(60):
        attack = attack or Attack(c)
        payload = bytearray(attack.sound())
        at = rng.randrange(0, len(payload) - 3)
        word = rng.choice((0, 1, 0x7F, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, rng.getrandbits(32)))
        struct.pack_into("<I", payload, at, word)
        attack.send_payload(bytes(payload))
        if attack.peer.outcome(Command.GRAPH_COMPUTE).closed:
            attack.peer.close()
            attack = None
    if attack is not None:
        attack.peer.close()


@HOSTILE.case(
    73,
    sends="200 connections that are made and closed, with and without HELLO",
    expects="the next client is served",
    source="ggml-rpc.cpp ggml_backend_rpc_start_server: accepts for ever, since 1.0",
    hostile=True,
)
def connections_that_come_and_go(c: Context) -> None:
    """Each costs the server a descriptor, which it has to give back."""
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
