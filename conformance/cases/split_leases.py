"""10: the split extension (protocol/split.py): who may run programs, and who a server is."""

from __future__ import annotations

from conformance.cases.groups import SPLIT
from conformance.cases.split import SOURCE
from conformance.cases.split_programs import output, programs, run, scaling
from conformance.suite import Context, Peer
from conformance.suite.arrays import same, values
from protocol.commands import Command
from protocol.split import MAX_MEMBERS

_LEASES = (Command.SPLIT_ACQUIRE, Command.SPLIT_RELEASE)
# How long nothing may come from a server that has something to say only later.
_MEANWHILE = 0.2


def _acquire(c: Context, peer: Peer, patience_ms: int = 0) -> bool:
    answer = peer.call(Command.SPLIT_ACQUIRE, patience_ms=patience_ms)
    c.expect(answer.granted in (0, 1), f"granted is {answer.granted}")
    return bool(answer.granted)


def _release(peer: Peer, keep: int = 0) -> bool:
    return bool(peer.call(Command.SPLIT_RELEASE, keep=keep).kept)


@SPLIT.case(50, source=SOURCE, needs=(Command.SPLIT_MEMBERS,), split=True)
def members(c: Context) -> None:
    """A server that splits over others must have neither itself nor one twice among them.

    Sends: SPLIT_MEMBERS on two connections
    Expects: the same numbers, none of them 0 or twice; the first is the server's own
    """
    found = []
    for _ in range(2):
        answer = c.connect(split=True).call(Command.SPLIT_MEMBERS)
        c.expect(0 < answer.n_members <= MAX_MEMBERS, f"{answer.n_members} members")
        found.append(list(answer.members[: answer.n_members]))
        c.expect(0 not in found[-1], f"a member 0: {found[-1]}")
        c.equal(len(set(found[-1])), len(found[-1]), "different members")
    c.equal(found[1], found[0], "the members told to another client")


@SPLIT.case(51, source=SOURCE, needs=_LEASES, split=True, concurrent=True)
def one_lease(c: Context) -> None:
    """Who runs programs on several servers must be able to have all of them at once.

    Sends: SPLIT_ACQUIRE by one client and by another, SPLIT_RELEASE, SPLIT_ACQUIRE again
    Expects: one client has the lease at a time, and knows who has it
    """
    one, two = c.connect("one", split=True), c.connect("two", split=True)
    for _ in range(2):
        c.expect(_acquire(c, one), "nobody has the lease, and it is not granted")
    answer = two.call(Command.SPLIT_ACQUIRE, patience_ms=50)
    c.expect(not answer.granted, "a second client has the lease as well")
    c.expect(bytes(answer.holder).strip(b"\0") != b"", "nobody is named who has it")
    c.expect(not _release(two), "who has no lease has kept it")
    c.expect(_release(one, keep=1), "a lease that nobody waits for is not kept")
    c.expect(not _acquire(c, two), "a lease that was kept is granted to another client")
    c.expect(not _release(one), "a lease that was given back is kept")
    c.expect(_acquire(c, two), "a lease that was given back is not granted")
    _release(two)


@SPLIT.case(52, source=SOURCE, needs=_LEASES, split=True, concurrent=True)
def lease_in_turn(c: Context) -> None:
    """One that never pauses must not keep another off for ever.

    Sends: SPLIT_ACQUIRE that waits, by two clients, and SPLIT_RELEASE to keep the lease
    Expects: the lease goes to who waits, first come first served
    """
    one, two, three = (c.connect(name, split=True) for name in ("one", "two", "three"))
    c.expect(_acquire(c, one), "nobody has the lease, and it is not granted")
    for peer in (two, three):
        peer.send(Command.SPLIT_ACQUIRE, patience_ms=60000)
        c.expect(peer.silent(_MEANWHILE), "an answer while another client has the lease")
    c.expect(not _release(one, keep=1), "the lease is kept although another client waits")
    c.equal(two.answer(Command.SPLIT_ACQUIRE).granted, 1, "granted to the first that waits")
    c.expect(three.silent(_MEANWHILE), "an answer to the second while the first has the lease")
    _release(two)
    c.equal(three.answer(Command.SPLIT_ACQUIRE).granted, 1, "granted to the second that waits")
    _release(three)


@SPLIT.case(53, source=SOURCE, needs=_LEASES, split=True, concurrent=True)
def lease_of_one_who_left(c: Context) -> None:
    """A coordinator that dies must not take its workers with it.

    Sends: the end of a connection that has the lease, another client waiting for it
    Expects: the lease goes on at once
    """
    one, two = c.connect("one", split=True), c.connect("two", split=True)
    c.expect(_acquire(c, one), "nobody has the lease, and it is not granted")
    two.send(Command.SPLIT_ACQUIRE, patience_ms=60000)
    c.expect(two.silent(_MEANWHILE), "an answer while another client has the lease")
    one.close()
    c.equal(two.answer(Command.SPLIT_ACQUIRE).granted, 1, "granted")
    _release(two)


@SPLIT.case(54, source=SOURCE, needs=_LEASES, split=True, concurrent=True)
def program_without_a_lease(c: Context) -> None:
    """Clients of version 1 know no leases, and share servers with those that do.

    Sends: SPLIT_RUN by a client without the lease while another has it
    Expects: it runs as soon as the other gives the lease back, and keeps it for that run only
    """
    b, other = programs(c), c.connect("other", split=True)
    scaling(b).send()
    p = values(64, seed=27)
    c.expect(_acquire(c, other), "nobody has the lease, and it is not granted")
    run(b, 0, p)
    c.expect(b.peer.silent(_MEANWHILE), "outputs while another client has the lease")
    c.expect(not _release(other, keep=1), "the lease is kept although a program waits")
    same(c, output(b, 64), p * 2, "the program's output")
    b.peer.ping()
    c.expect(_acquire(c, other, 5000), "the lease stays with who ran one program")
    _release(other)
