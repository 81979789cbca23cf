"""10: the split extension (protocol/split.py): groups, links and programs with swaps.

The server is one member of a group, and the case is its client and all other members: these come to
the server by SPLIT_JOIN, or are connected to by it.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from client.builder.graph import Graph, GraphBuilder
from client.split.steps import Step
from conformance.cases.groups import SPLIT
from conformance.cases.split import SOURCE
from conformance.cases.split_programs import StreamedProgram, ended, output, programs, run, scaling
from conformance.suite import Closed, Context, Peer
from conformance.suite.arrays import Array, Bench, same, values
from protocol.codec import codec
from protocol.commands import Command
from protocol.ggml.types import GgmlType
from protocol.requests import FRAME
from protocol.responses import encode_size
from protocol.split import (
    MAX_PARTS,
    SECRET_SIZE,
    ProgramSwap,
    caps_version,
    decode_report,
    encode_program,
    peers_fields,
    report_size,
    split_caps,
    split_commands,
)
from protocol.tensor import Tensor

F32 = GgmlType.F32

_NEEDS = (Command.SPLIT_PEERS, Command.SPLIT_JOIN)
# How long a member is waited for where it comes, and where it doesn't, seconds.
_PATIENCE, _IMPATIENCE = 20.0, 0.5
# How long nothing may come from a server that has something to say only later.
_MEANWHILE = 0.2
# More than sockets hold: who sends so much has to receive meanwhile.
_MUCH = 4 << 20
_Part = tuple[str, int, bool]


def adding(
    g: GraphBuilder, number: int, n_parts: int, n: int, rounds: int = 1
) -> tuple[list[Step], Graph]:
    """Return steps that double ``n`` F32 and add them to what other members have, again and again.

    Member ``number`` of ``n_parts`` computes them; all tensors are in the graph, to be placed.
    """
    x = g.new_tensor(F32, (n,), "x")
    current, ends = x, []
    for _ in range(rounds):
        own = g.scale(current, 2.0)
        terms = [own if i == number else g.new_tensor(F32, (n,), f"of {i}") for i in range(n_parts)]
        ends.append((own, tuple(terms)))
        current = terms[0]
        for term in terms[1:]:
            current = g.add(current, term)
    # Additions come behind the swap that they are of.
    whole = g.build([*(own for own, _ in ends), current])
    left = list(whole.nodes)
    inputs: tuple[Tensor, ...] = (x,)
    steps: list[Step] = []
    for end, swap in [*ends, (current, ())]:
        at = left.index(end) + 1
        tensors, uses = (whole.tensors, whole.use_counts) if not steps else ((), ())
        outputs = () if swap else (current,)
        steps.append(Step(inputs, Graph(tuple(left[:at]), tensors, uses), outputs, swap))
        left, inputs = left[at:], ()
    return steps, whole


@dataclass(slots=True)
class _Member:
    """The server as member ``number`` of a group of ``n_parts``, as its client sees it."""

    c: Context
    b: Bench
    secret: bytes
    number: int
    n_parts: int

    def join(self, number: int) -> Peer:
        """Come to the server as another member; return the link."""
        link = self.c.connect(f"part {number}", split=True)
        answer = link.call(Command.SPLIT_JOIN, secret=self.secret, number=number)
        self.c.equal(answer.result, 1, f"the answer to SPLIT_JOIN of part {number}")
        return link

    def adding(self, n: int, rounds: int = 1) -> StreamedProgram:
        """Return a program as :func:`adding` has it, placed and not sent."""
        steps, whole = adding(self.b.g, self.number, self.n_parts, n, rounds)
        self.b.place(whole)
        return StreamedProgram(self.b, steps)

    def summed(self, n: int) -> Array:
        """Receive an output of ``n`` F32, which comes after its size."""
        size = int.from_bytes(self.b.peer.read_bytes(8), "little")
        self.c.equal(size, 4 * n, "the size before the output")
        return output(self.b, n)

    def report(self) -> str:
        """Receive why a program failed; the connection has to end behind that."""
        head = self.b.peer.read_bytes(8)
        size = report_size(head)
        self.c.expect(size > 0, f"a size of {head.hex()} instead of a report")
        text = decode_report(head + self.b.peer.read_bytes(size - 8))
        self.c.expect(bool(text.strip()), "a report without a text")
        ended(self.c, self.b.peer)
        return text


def _enter(peer: Peer, secret: bytes, number: int, parts: Sequence[_Part], seconds: float) -> str:
    """Ask a server to become a member; return why it can't be, '' if it is."""
    answer = peer.call(Command.SPLIT_PEERS, **peers_fields(secret, seconds, number, parts))
    return _reason(answer)


def _reason(answer: Any) -> str:
    """Return what an answer to SPLIT_PEERS says, '' for success."""
    reason = bytes(answer.reason).split(b"\0")[0].decode(errors="replace")
    if not answer.result:
        return ""
    return reason or "(no reason)"


def _member(c: Context, number: int = 0, n_parts: int = 2, seconds: float = _PATIENCE) -> _Member:
    """Open a connection to a server that is a member of a new group. Skips where it can't be."""
    b = programs(c)
    secret = secrets.token_bytes(SECRET_SIZE)
    reason = _enter(b.peer, secret, number, [("192.0.2.1", 9, False)] * n_parts, seconds)
    if reason:
        c.skip(f"the server is no member of groups: {reason}")
    return _Member(c, b, secret, number, n_parts)


def _turned_away(c: Context, peer: Peer, secret: bytes, number: int) -> None:
    """Fail unless a server hangs up on a SPLIT_JOIN; nothing may follow one before its answer."""
    peer.send(Command.SPLIT_JOIN, secret=secret, number=number)
    try:
        answer = peer.answer(Command.SPLIT_JOIN)
    except Closed:
        return
    c.fail(f"part {number} is answered {answer.result}")


def _expected(rounds: int, *terms: Array) -> Array:
    """Return what all members have in the end, added in the order of their numbers."""
    current = list(terms)
    for _ in range(rounds):
        doubled = [np.float32(2) * x for x in current]
        total = doubled[0]
        for term in doubled[1:]:
            total = total + term
        current = [total] * len(terms)
    return current[0]


# -- groups ----------------------------------------------------------------------------------------


@SPLIT.case(70, source=SOURCE + ": Groups", needs=_NEEDS, split=True, hostile=True)
def groups_that_can_not_be(c: Context) -> None:
    """A server that looked for names would ask the network's servers whatever a client says.

    Sends: SPLIT_PEERS with a number beyond the group, of one member and of too many, without a
        secret, without patience, with a name to connect to instead of a numeric address
    Expects: the connection is closed
    """
    secret = secrets.token_bytes(SECRET_SIZE)
    sound = peers_fields(secret, _PATIENCE, 0, [("", 0, False)] * 2)
    named = [*sound["parts"][:1], {"host": b"localhost", "port": 1, "reach": 1}]
    changes: dict[str, dict[str, Any]] = {
        "number 2 of 2": {"number": 2},
        "one member": {"n_parts": 1},
        "no member": {"n_parts": 0},
        "too many members": {"n_parts": MAX_PARTS + 1},
        "no secret": {"secret": bytes(SECRET_SIZE)},
        "no patience": {"timeout_ms": 0},
        "a name": {"parts": [*named, *sound["parts"][2:]]},
    }
    for name, change in changes.items():
        peer = c.connect(name, split=True)
        peer.send(Command.SPLIT_PEERS, **{**sound, **change})
        c.refused(peer, Command.SPLIT_PEERS)
        peer.close()


@SPLIT.case(71, source=SOURCE + ": Groups", needs=_NEEDS, split=True, hostile=True)
def secret_that_nobody_handed_out(c: Context) -> None:
    """Who is let in sends numbers that are added to everybody's sums.

    Sends: SPLIT_JOIN with a secret of chance, and with none, where there is no group
    Expects: the connection is closed
    """
    for secret in (secrets.token_bytes(SECRET_SIZE), bytes(SECRET_SIZE)):
        peer = c.connect(split=True)
        _turned_away(c, peer, secret, 0)
        peer.close()


@SPLIT.case(72, source=SOURCE + ": Groups", needs=_NEEDS, split=True, concurrent=True)
def joining_a_group(c: Context) -> None:
    """A server becomes a member without a word with the others: they come by themselves.

    Sends: SPLIT_PEERS that says nobody is to be reached; SPLIT_JOIN with the secret on another
        connection; an ordinary request on the first
    Expects: result 0 and no reason; result 1; the ordinary answer
    """
    member = _member(c)
    member.join(1)
    member.b.peer.ping()


@SPLIT.case(73, source=SOURCE + ": Groups", needs=_NEEDS, split=True, concurrent=True, hostile=True)
def secret_of_another_group(c: Context) -> None:
    """One bit is as wrong as all.

    Sends: SPLIT_JOIN with a group's secret but for its last bit; then with the secret itself
    Expects: the connection is closed; result 1
    """
    member = _member(c)
    peer = c.connect("a stranger", split=True)
    nearly = member.secret[:-1] + bytes([member.secret[-1] ^ 1])
    _turned_away(c, peer, nearly, 1)
    member.join(1)


@SPLIT.case(74, source=SOURCE + ": Groups", needs=_NEEDS, split=True, concurrent=True, hostile=True)
def number_that_is_not_expected(c: Context) -> None:
    """A link belongs to one member, and its bytes go to that one's place.

    Sends: SPLIT_JOIN as the server itself, as a member that the group hasn't, and as one that is
        linked already
    Expects: the connection is closed; the link that there is goes on
    """
    member = _member(c)
    member.adding(64).send()
    link = member.join(1)
    for number in (0, 2, 1 << 31, 1):
        peer = c.connect(f"as part {number}", split=True)
        _turned_away(c, peer, member.secret, number)
        peer.close()
    _swap_once(member, link, 64)


def _swap_once(member: _Member, link: Peer, n: int, seed: int = 30) -> None:
    """Run program 0, of one round and ``n`` F32, with one other member."""
    c, own, other = member.c, values(n, seed=seed), values(n, seed=seed + 1)
    run(member.b, 0, own)
    same(c, _received(link, n), np.float32(2) * own, "what the server sends to part 1")
    link.send_bytes((np.float32(2) * other).tobytes(), command="swap")
    same(c, member.summed(n), _expected(1, own, other), "the sum")


def _received(link: Peer, n: int) -> Array:
    """Receive ``n`` F32 of a swap."""
    return np.frombuffer(link.read_bytes(4 * n), np.float32)


@SPLIT.case(75, source=SOURCE + ": Groups", needs=_NEEDS, split=True, concurrent=True, hostile=True)
def link_of_one_who_has_something_here(c: Context) -> None:
    """What a client has on a server would be nobody's once its connection is a link.

    Sends: SPLIT_JOIN on a connection that has a buffer
    Expects: the connection is closed
    """
    member = _member(c)
    peer = c.connect("has a buffer", split=True)
    peer.alloc(4096)
    _turned_away(c, peer, member.secret, 1)


@SPLIT.case(76, source=SOURCE + ": Groups", needs=_NEEDS, split=True, concurrent=True)
def group_in_the_place_of_another(c: Context) -> None:
    """A client whose members have changed begins anew.

    Sends: SPLIT_PEERS with another secret on the connection of a group that has a link
    Expects: the link ends; who shows the new secret is let in, and swaps with the server
    """
    member = _member(c)
    old = member.join(1)
    member.secret = secrets.token_bytes(SECRET_SIZE)
    parts = [("192.0.2.1", 9, False)] * 2
    c.equal(_enter(member.b.peer, member.secret, 0, parts, _PATIENCE), "", "the second group")
    c.expect(old.closed_by_server(), "the link of the first group stays open")
    member.adding(64).send()
    _swap_once(member, member.join(1), 64)


@SPLIT.case(77, source=SOURCE + ": Groups", needs=_NEEDS, split=True, concurrent=True)
def group_that_ends_with_its_client(c: Context) -> None:
    """The others get to know at once, and not when they miss a sum.

    Sends: the end of the connection that SPLIT_PEERS came on
    Expects: the links are closed
    """
    member = _member(c, n_parts=3)
    links = [member.join(1), member.join(2)]
    member.b.peer.close()
    for link in links:
        c.expect(link.closed_by_server(), f"the link of {link.name} stays open")


# -- members that are connected to -----------------------------------------------------------------


@contextlib.contextmanager
def _listening(peer: Peer) -> Iterator[tuple[socket.socket, str, int]]:
    """Listen where the server sees this machine; give the socket, its address and port."""
    host = peer.socket.getsockname()[0]
    with socket.create_server((host, 0), family=peer.socket.family) as listener:
        yield listener, host, listener.getsockname()[1]


def _take(connection: socket.socket, n: int) -> bytes:
    """Receive ``n`` bytes of a server that connects to here; less at its end."""
    data = b""
    with contextlib.suppress(OSError):
        while len(data) < n and (piece := connection.recv(n - len(data))):
            data += piece
    return data


def _as_server(c: Context, connection: socket.socket) -> tuple[bytes, int] | None:
    """Answer HELLO as a server with the extension does; return what SPLIT_JOIN says.

    None where the other end left before, as one does that was answered another version.
    """
    version = dict(zip(("major", "minor", "patch"), c.facts.version, strict=True))
    commands = {**split_commands(c.facts.split), **c.dialect.commands}
    while frame := _take(connection, FRAME.size):
        number, size = FRAME.unpack(frame)
        c.expect(number in commands, f"command {number} to another member")
        spec = commands[Command(number)]
        c.equal(size, codec(spec.request).size, f"the size of {Command(number).name}")
        fields = codec(spec.request).parse(_take(connection, size))
        if number == Command.SPLIT_JOIN:
            return bytes(fields.secret), int(fields.number)
        answer = bytes(codec(spec.response).size)
        if number == Command.HELLO:
            caps = getattr(fields, "conn_caps", b"")
            c.expect(bool(caps_version(caps)), "HELLO to another member without the mark")
            answer = codec(spec.response).build({**version, "conn_caps": split_caps(c.facts.split)})
        connection.sendall(encode_size(len(answer)) + answer)
    return None


def _accepted(
    c: Context, listener: socket.socket, client: Peer
) -> tuple[socket.socket, bytes, int] | None:
    """Wait for a server to connect and show its secret.

    None where it doesn't come, or has answered ``client`` before.
    """
    listener.settimeout(_MEANWHILE)
    end = time.monotonic() + c.patience
    while time.monotonic() < end:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            if client.silent(0.01):
                continue
            return None
        connection.settimeout(c.patience)
        joined = _as_server(c, connection)
        if joined is not None:
            return connection, *joined
        connection.close()
    return None


@SPLIT.case(78, source=SOURCE + ": Groups", needs=_NEEDS, split=True, deadline=60.0)
def member_that_is_connected_to(c: Context) -> None:
    """Of two members one comes to the other, as any client does, and says who it is.

    Sends: SPLIT_PEERS with a member to be reached, who is here; then a run with a swap
    Expects: HELLO with the extension's mark; SPLIT_JOIN with the secret and the server's number;
        once that is answered result 0; the swap on that connection
    """
    b, secret = programs(c), secrets.token_bytes(SECRET_SIZE)
    with _listening(b.peer) as (listener, host, port):
        parts = [(host, port, True), ("192.0.2.1", 9, False)]
        b.peer.send(Command.SPLIT_PEERS, **peers_fields(secret, _PATIENCE, 1, parts))
        found = _accepted(c, listener, b.peer)
        if found is None:
            reason = _reason(b.peer.answer(Command.SPLIT_PEERS))
            c.skip(f"the server does not connect to here: {reason}")
        with found[0] as link:
            c.equal(found[1:], (secret, 1), "secret and number")
            c.expect(b.peer.silent(_MEANWHILE), "SPLIT_PEERS is answered before SPLIT_JOIN is")
            link.sendall(encode_size(1) + b"\1")
            c.equal(_reason(b.peer.answer(Command.SPLIT_PEERS)), "", "the answer to SPLIT_PEERS")
            member = _Member(c, b, secret, 1, 2)
            member.adding(64).send()
            own, other = values(64, seed=32), values(64, seed=33)
            run(b, 0, own)
            got = np.frombuffer(_take(link, 256), np.float32)
            same(c, got, np.float32(2) * own, "what the server sends to part 0")
            link.sendall((np.float32(2) * other).tobytes())
            same(c, member.summed(64), _expected(1, other, own), "the sum")


@SPLIT.case(79, source=SOURCE + ": Groups", needs=_NEEDS, split=True, deadline=60.0)
def member_that_can_not_be_reached(c: Context) -> None:
    """The client adds up itself then, and a person reads why.

    Sends: SPLIT_PEERS with a member to be reached where nobody listens, and where what answers
        refuses SPLIT_JOIN
    Expects: result 1 and a reason, the connection goes on; there is no group
    """
    b, secret = programs(c), secrets.token_bytes(SECRET_SIZE)
    with _listening(b.peer) as (listener, host, port):
        listener.close()
        nobody = [(host, port, True), ("192.0.2.1", 9, False)]
        c.expect(_enter(b.peer, secret, 1, nobody, _PATIENCE) != "", "result 0 without a link")
    b.peer.ping()
    with _listening(b.peer) as (listener, host, port):
        parts = [(host, port, True), ("192.0.2.1", 9, False)]
        b.peer.send(Command.SPLIT_PEERS, **peers_fields(secret, _PATIENCE, 1, parts))
        found = _accepted(c, listener, b.peer)
        if found is not None:
            found[0].close()
        reason = _reason(b.peer.answer(Command.SPLIT_PEERS))
        c.expect(reason != "", "result 0 although SPLIT_JOIN was refused")
        c.expect(reason != "(no reason)", "result 1 without a reason")
    b.peer.ping()
    scaling(b).send()
    x = values(64, seed=34)
    run(b, 0, x)
    same(c, output(b, 64), x * 2, "a program without swaps")


# -- swaps -----------------------------------------------------------------------------------------


@SPLIT.case(80, source=SOURCE + ": Swaps", needs=_NEEDS, split=True, concurrent=True)
def sum_of_two(c: Context) -> None:
    """What members have is added in the same order everywhere: to the bit they must agree.

    Sends: a program with five swaps, run three times; of the other member what that would have
    Expects: on the link what the server has, nothing more; the sum, behind its size
    """
    for number in (0, 1):
        member = _member(c, number)
        member.adding(1000, rounds=5).send()
        link = member.join(1 - number)
        for turn in range(3):
            given = [values(1000, seed=40 + 2 * turn + i) for i in range(2)]
            run(member.b, 0, given[number])
            for done in range(1, 6):
                # What the other has after so many rounds, less the last addition.
                before = [_expected(done - 1, *given) if done > 1 else x for x in given]
                what = f"what the server sends in swap {done}"
                same(c, _received(link, 1000), np.float32(2) * before[number], what)
                link.send_bytes((np.float32(2) * before[1 - number]).tobytes(), command="swap")
            same(c, member.summed(1000), _expected(5, *given), "the sum")
            c.expect(link.silent(0.01), "more than the swaps on the link")
        member.b.peer.close()


@SPLIT.case(81, source=SOURCE + ": Swaps", needs=_NEEDS, split=True, concurrent=True)
def swap_that_came_early(c: Context) -> None:
    """Members begin when their inputs come, and one is always first.

    Sends: the other member's part of a swap in small segments, before SPLIT_RUN and behind it
    Expects: the sum
    """
    member = _member(c)
    member.adding(500).send()
    link = member.join(1)
    own, other = values(500, seed=50), values(500, seed=51)
    data = (np.float32(2) * other).tobytes()
    for early in (0, 1, 700, len(data)):
        link.send_bytes(data[:early], command="swap")
        run(member.b, 0, own)
        for at in range(early, len(data), 311):
            link.send_bytes(data[at : at + 311], command="swap")
        same(c, member.summed(500), _expected(1, own, other), f"the sum, {early} bytes before")
        same(c, _received(link, 500), np.float32(2) * own, "what the server sends")


@SPLIT.case(82, source=SOURCE + ": Swaps", needs=_NEEDS, split=True, concurrent=True, deadline=60.0)
def swap_of_more_than_sockets_hold(c: Context) -> None:
    """Both send before they have received: who doesn't receive meanwhile waits for ever.

    Sends: the other member's 16 MiB, of the server's nothing being taken until all are sent
    Expects: the sum
    """
    member = _member(c)
    member.adding(_MUCH).send()
    link = member.join(1)
    own, other = values(_MUCH, seed=52), values(_MUCH, seed=53)
    run(member.b, 0, own)
    link.send_bytes((np.float32(2) * other).tobytes(), command="swap")
    same(c, _received(link, _MUCH), np.float32(2) * own, "what the server sends")
    same(c, member.summed(_MUCH), _expected(1, own, other), "the sum")


@SPLIT.case(83, source=SOURCE + ": Swaps", needs=_NEEDS, split=True, concurrent=True)
def sum_of_three(c: Context) -> None:
    """Each pair has a link, and whichever comes last is waited for.

    Sends: a program with two swaps in a group of three; the others' parts, the last one first
    Expects: on both links the same; the sum
    """
    member = _member(c, 1, 3)
    member.adding(300, rounds=2).send()
    links = {i: member.join(i) for i in (2, 0)}
    given = [values(300, seed=60 + i) for i in range(3)]
    run(member.b, 0, given[1])
    for done in (1, 2):
        before = [_expected(done - 1, *given) if done > 1 else x for x in given]
        for i in (2, 0):
            links[i].send_bytes((np.float32(2) * before[i]).tobytes(), command="swap")
        for i, link in links.items():
            what = f"what the server sends to part {i} in swap {done}"
            same(c, _received(link, 300), np.float32(2) * before[1], what)
    same(c, member.summed(300), _expected(2, *given), "the sum")


@SPLIT.case(84, source=SOURCE + ": Swaps", needs=_NEEDS, split=True, concurrent=True)
def programs_without_swaps_beside(c: Context) -> None:
    """Only a program with swaps says the sizes of its outputs.

    Sends: in a group a program without swaps, one with, and requests between
    Expects: each as it is by itself
    """
    member = _member(c)
    b = member.b
    member.adding(64).send()
    scaling(b).send(1)
    link = member.join(1)
    for seed in (70, 72):
        x = values(64, seed=seed)
        run(b, 1, x)
        same(c, output(b, 64), x * 2, "the program without swaps")
        b.peer.ping()
        _swap_once(member, link, 64, seed)


@SPLIT.case(85, source=SOURCE + ": Swaps", needs=_NEEDS, split=True, concurrent=True, hostile=True)
def member_that_is_silent(c: Context) -> None:
    """The client is waiting, and has to be told whom for.

    Sends: a run whose other member, linked, sends nothing, and half of its part
    Expects: after the time that SPLIT_PEERS said a report instead of the output; the end of the
        connection, and of the link
    """
    for sent in (0, 128):
        member = _member(c, seconds=_IMPATIENCE)
        member.adding(64).send()
        link = member.join(1)
        run(member.b, 0, values(64, seed=74))
        link.send_bytes(bytes(sent), command="swap")
        started = time.monotonic()
        member.report()
        took = time.monotonic() - started
        c.expect(took > _IMPATIENCE / 2, f"given up after {took:.2f} s, not {_IMPATIENCE} s")
        c.expect(link.closed_by_server(), "the link stays open")


@SPLIT.case(86, source=SOURCE + ": Swaps", needs=_NEEDS, split=True, concurrent=True, hostile=True)
def member_that_goes_away(c: Context) -> None:
    """There is no need to wait for one that has ended.

    Sends: a run whose other member hangs up: before it, within its part of a swap, between two
    Expects: at once a report instead of the output, and the end of the connection
    """
    for swapped, more in ((0, 0), (0, 100), (1, 0), (1, 100)):
        member = _member(c)
        member.adding(64, rounds=2).send()
        link = member.join(1)
        run(member.b, 0, values(64, seed=75))
        for _ in range(swapped):
            link.read_bytes(256)
        link.send_bytes(bytes(256 * swapped + more), command="swap")
        link.close()
        started = time.monotonic()
        member.report()
        took = time.monotonic() - started
        c.expect(took < _PATIENCE / 2, f"told after {took:.1f} s")


@SPLIT.case(87, source=SOURCE + ": Swaps", needs=_NEEDS, split=True, concurrent=True, hostile=True)
def members_that_do_not_agree_on_sizes(c: Context) -> None:
    """Nothing on a link says where a part ends: what is missing must never be made up.

    Sends: for a swap of 64 numbers 60, then the end of the link
    Expects: a report, no output
    """
    member = _member(c)
    member.adding(64).send()
    link = member.join(1)
    run(member.b, 0, values(64, seed=76))
    link.send_bytes(bytes(240), command="swap")
    link.half_close()
    member.report()


@SPLIT.case(88, source=SOURCE + ": Swaps", needs=_NEEDS, split=True, concurrent=True, hostile=True)
def run_without_all_links(c: Context) -> None:
    """What can't be added up is not begun.

    Sends: SPLIT_RUN of a program with swaps before all members have come
    Expects: the connection is closed
    """
    member = _member(c, n_parts=3)
    member.adding(64).send()
    member.join(2)
    run(member.b, 0)
    c.refused(member.b.peer)


def _bad_swaps(
    c: Context, change: Callable[[StreamedProgram], bytes], member: _Member | None = None
) -> None:
    member = member or _member(c)
    body = change(member.adding(64))
    member.b.peer.send(Command.SPLIT_PROGRAM, body, program=0)
    c.refused(member.b.peer, Command.SPLIT_PROGRAM)
    member.b.peer.close()


def _encoded(p: StreamedProgram, *swaps: ProgramSwap) -> bytes:
    return encode_program(p.ids(), p.tensors(), swaps)


@SPLIT.case(89, source=SOURCE + ": Swaps", needs=_NEEDS, split=True, hostile=True)
def swaps_that_can_not_be(c: Context) -> None:
    """What is received goes straight to where the program says.

    Sends: programs with swaps of more members than the group has, behind a step that isn't there,
        out of order, of unknown tensors, of one twice, into one that is computed, cut short, too
        long; and one with swaps where there is no group
    Expects: the connection is closed
    """

    def swap(p: StreamedProgram) -> ProgramSwap:
        (found,) = p.swaps()
        return found

    def computed(p: StreamedProgram) -> bytes:
        own, _ = swap(p).ids
        return _encoded(p, ProgramSwap(0, (own, p.steps[1].outputs[0].id)))

    changes: tuple[Callable[[StreamedProgram], bytes], ...] = (
        lambda p: _encoded(p, ProgramSwap(0, (*swap(p).ids, swap(p).ids[1]))),
        lambda p: _encoded(p, replace(swap(p), step=2)),
        lambda p: _encoded(p, replace(swap(p), step=1), swap(p)),
        lambda p: _encoded(p, ProgramSwap(0, (swap(p).ids[0], 4711))),
        lambda p: _encoded(p, ProgramSwap(0, (swap(p).ids[0],) * 2)),
        computed,
        lambda p: p.encode()[:-1],
        lambda p: p.encode() + b"\0",
        lambda p: p.encode() + bytes(20),
    )
    for change in changes:
        _bad_swaps(c, change)
    _bad_swaps(c, lambda p: p.encode(), _Member(c, programs(c), b"", 0, 2))


@SPLIT.case(90, source=SOURCE + ": Swaps", needs=_NEEDS, split=True, hostile=True)
def swaps_over_one_another(c: Context) -> None:
    """While one is sent the other is written.

    Sends: programs whose swap brings a tensor into a part of the one that is sent, and one outside
        of its buffer
    Expects: the connection is closed
    """

    def moved(place: Callable[[Tensor, Tensor], int]) -> Callable[[StreamedProgram], bytes]:
        def change(p: StreamedProgram) -> bytes:
            own, other = p.steps[0].swap
            other.place(own.buffer, place(own, other))
            return p.encode()

        return change

    _bad_swaps(c, moved(lambda own, other: own.address + 128))
    _bad_swaps(c, moved(lambda own, other: own.address))
    _bad_swaps(c, moved(lambda own, other: other.address + (1 << 30)))


@SPLIT.case(91, source=SOURCE + ": Groups", needs=_NEEDS, split=True, concurrent=True)
def nothing_else_on_a_link(c: Context) -> None:
    """What comes on a link is numbers of a sum, whatever it looks like.

    Sends: on a link a request, which is as long as the part of a swap; then SPLIT_RUN
    Expects: no answer to it; the sum with its bytes as numbers
    """
    member = _member(c)
    link = member.join(1)
    frame = link.message(Command.DEVICE_COUNT)
    data = frame + bytes(-len(frame) % 4 or 4)
    n = len(data) // 4
    member.adding(n).send()
    link.send_bytes(data, command="swap")
    c.expect(link.silent(_MEANWHILE), "an answer on a link")
    own = values(n, seed=77)
    run(member.b, 0, own)
    same(c, _received(link, n), np.float32(2) * own, "what the server sends")
    other = np.frombuffer(data, np.float32)
    same(c, member.summed(n), np.float32(2) * own + other, "the sum")


@SPLIT.case(92, source=SOURCE + ": Groups", needs=_NEEDS, split=True, concurrent=True, hostile=True)
def program_that_outlives_its_group(c: Context) -> None:
    """A program with swaps is for the members it was made for.

    Sends: SPLIT_PEERS with another secret, SPLIT_RUN of a program that had swaps in the old group
    Expects: the connection is closed
    """
    member = _member(c)
    member.adding(64).send()
    member.join(1)
    member.secret = secrets.token_bytes(SECRET_SIZE)
    parts = [("192.0.2.1", 9, False)] * 2
    c.equal(_enter(member.b.peer, member.secret, 0, parts, _PATIENCE), "", "the second group")
    member.join(1)
    run(member.b, 0)
    c.refused(member.b.peer)
