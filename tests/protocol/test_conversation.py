"""A connection read from outside: the same events however it is cut, and never an exception."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.commands import Command
from protocol.dialects import DIALECTS, Answer, Dialect, compatible_dialects
from protocol.observe.annotate import annotate, describe
from protocol.observe.conversation import Conversation, dialect_of_version
from protocol.observe.events import Event, Failure, MessageKind, ObservedMessage, Side, SkippedBytes
from tests.protocol.transcripts import (
    events_of,
    full_session,
    link_session,
    member_session,
    session,
    split_session,
    summary,
)
from tests.protocol.turns import answer, hello, request, small_graph, tensor_fields

NEWEST = DIALECTS[0]


def messages(events: list[Event]) -> list[ObservedMessage]:
    found = [event for event in events if isinstance(event, ObservedMessage)]
    assert found == events
    return found


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda d: d.name)
def test_every_command_of_every_dialect(dialect: Dialect) -> None:
    conversation = Conversation()
    events = messages(events_of(conversation, full_session(dialect)))
    assert conversation.dialect is dialect
    assert conversation.version == dialect.version
    kinds = Counter((e.command, e.kind) for e in events)
    for command, spec in dialect.commands.items():
        assert kinds.pop((command, MessageKind.REQUEST)) == 1
        if spec.answer is not Answer.NEVER:
            assert kinds.pop((command, MessageKind.ANSWER)) == 1
    assert not kinds
    assert not conversation.unanswered
    for event in events:
        assert event.missing == 0
        assert event.problem == ""
        if event.kind is MessageKind.ANSWER:
            assert event.request is not None
            assert event.request.number == event.number
            assert event.request.command == event.command
    # Offsets of each side join without holes.
    for side in Side:
        at = 0
        for event in events:
            if event.side is side:
                assert event.start == at
                assert len(event.data) == event.size
                at = event.end


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(DIALECTS),
    st.lists(st.integers(1, 3000), min_size=1, max_size=8),
    st.integers(0, 200),
)
def test_segments_do_not_matter(dialect: Dialect, cuts: list[int], keep: int) -> None:
    turns = full_session(dialect, upload=128, download=96)
    whole = events_of(Conversation(keep=keep), turns)
    assert summary(events_of(Conversation(keep=keep), turns, cuts)) == summary(whole)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=6))
def test_a_program_and_its_run(cuts: list[int]) -> None:
    turns = split_session(NEWEST)
    conversation = Conversation()
    events = messages(events_of(conversation, turns, cuts))
    run = [e for e in events if e.command is Command.SPLIT_RUN]
    assert [(e.kind, e.step, e.body_size) for e in run] == [
        (MessageKind.REQUEST, 0, 0),
        (MessageKind.INPUTS, 1, 32),
        (MessageKind.OUTPUTS, 1, 16),
        (MessageKind.INPUTS, 2, 32),
        (MessageKind.OUTPUTS, 2, 16),
    ]
    assert [bytes(e.body or b"")[0] for e in run[1:]] == [0, 100, 32, 116]
    assert not conversation.unanswered


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=6), st.booleans())
def test_a_program_with_swaps(cuts: list[int], failing: bool) -> None:
    """Its outputs have sizes, and one that fails says why instead of the next."""
    turns = member_session(NEWEST, "part 0 hung up" if failing else "")
    conversation = Conversation()
    events = messages(events_of(conversation, turns, cuts))
    given = [e for e in events if e.kind is MessageKind.OUTPUTS]
    assert [(e.step, e.body_size) for e in given] == [(1, 24), (2, 22 if failing else 24)]
    said = "the program failed: part 0 hung up"
    assert [e.problem for e in given] == ["", said if failing else ""]
    assert not conversation.unanswered
    (program,) = [e for e in events if e.graph is not None]
    assert "2 swaps" in describe(program)
    paths = [span.path for span in annotate(program)]
    assert paths[-3:] == ["swaps[1].step", "swaps[1].ids[0]", "swaps[1].ids[1]"]
    (peers, *_) = [e for e in events if e.command is Command.SPLIT_PEERS]
    assert "of 127.0.0.1:9 (to be reached), 10.0.0.1:50052" in describe(peers)


_SWAPS = [
    (Side.SERVER, bytes(range(200))),
    (Side.CLIENT, bytes(range(100, 250))),
    (Side.SERVER, bytes(range(17))),
]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=6))
def test_what_is_on_a_link_is_told_as_it_comes(cuts: list[int]) -> None:
    events = messages(events_of(Conversation(), link_session(NEWEST, _SWAPS), cuts))
    swapped = [e for e in events if e.kind is MessageKind.SWAPS]
    for side in Side:
        sent = b"".join(data for s, data in _SWAPS if s is side)
        assert b"".join(bytes(e.body or b"") for e in swapped if e.side is side) == sent
    assert {e.number for e in swapped} == {1}
    assert {e.latency for e in swapped} == {None}
    assert describe(swapped[0]).startswith("SPLIT_JOIN swaps, ")


def test_what_follows_a_join_waits_for_its_answer() -> None:
    """The client's side may be seen first."""
    turns = link_session(NEWEST, _SWAPS)
    conversation, events = Conversation(), []
    for side in (Side.CLIENT, Side.SERVER):
        events += conversation.feed(side, b"".join(data for s, data in turns if s is side))
    swapped = [e for e in messages(events) if e.kind is MessageKind.SWAPS]
    assert sum(e.body_size for e in swapped) == 367


def test_a_hole_in_a_link_is_told() -> None:
    conversation = Conversation()
    for side, data in link_session(NEWEST, []):
        conversation.feed(side, data)
    conversation.feed(Side.CLIENT, bytes(10))
    (hole,) = conversation.gap(Side.CLIENT, 7)
    assert isinstance(hole, SkippedBytes)
    assert hole.size == 7
    (after,) = conversation.feed(Side.CLIENT, bytes(5))
    assert isinstance(after, ObservedMessage)
    assert (after.kind, after.body_size, after.start) == (MessageKind.SWAPS, 5, hole.end)


def test_one_side_first() -> None:
    """What one side sent is held until the other's bytes tell what it is."""
    turns = full_session(NEWEST)
    events = []
    conversation = Conversation()
    for side in (Side.CLIENT, Side.SERVER):
        events += conversation.feed(side, b"".join(data for s, data in turns if s is side))
    events += conversation.close()
    expected = summary(events_of(Conversation(), turns))
    assert sorted(map(str, summary(events))) == sorted(map(str, expected))
    server_first = Conversation()
    assert not server_first.feed(Side.SERVER, b"".join(d for s, d in turns if s is Side.SERVER))
    found = server_first.feed(Side.CLIENT, b"".join(d for s, d in turns if s is Side.CLIENT))
    assert sorted(map(str, summary(found))) == sorted(map(str, expected))


def test_large_data_are_handed_on_and_not_kept() -> None:
    size = 300_000
    got = bytearray(size)

    def sink(message: ObservedMessage, at: int, chunk: bytes | bytearray | memoryview) -> None:
        assert message.command in (Command.SET_TENSOR, Command.GET_TENSOR)
        if message.command is Command.SET_TENSOR:
            got[at : at + len(chunk)] = chunk

    turns = full_session(NEWEST, upload=size, download=size)
    conversation = Conversation(keep=1000, sink=sink)
    events = messages(events_of(conversation, turns, [1448]))
    upload = next(e for e in events if e.command is Command.SET_TENSOR)
    assert upload.body is None
    assert upload.body_size == size
    sent = next(data for _, data in turns if len(data) > size)
    assert bytes(got) == sent[-size:]
    assert upload.fields.tensor.name.rstrip(b"\0") == b"blk.0.attn_q.weight"
    download = next(
        e for e in events if e.command is Command.GET_TENSOR and e.kind is MessageKind.ANSWER
    )
    assert download.body is None
    assert download.body_size == size


def test_times() -> None:
    conversation = Conversation()
    (side, first), (_, second) = hello(NEWEST)
    conversation.feed(side, first[:5], 10.0)
    [asked] = conversation.feed(side, first[5:], 11.0)
    conversation.feed(Side.SERVER, second[:20], 12.0)
    [said] = conversation.feed(Side.SERVER, second[20:], 13.5)
    assert isinstance(asked, ObservedMessage)
    assert isinstance(said, ObservedMessage)
    assert (asked.started, asked.ended) == (10.0, 11.0)
    assert (said.started, said.ended) == (12.0, 13.5)
    assert said.latency == 2.5
    two = request(NEWEST, Command.DEVICE_COUNT, {})[1]
    [one, other] = conversation.feed(side, two + two[:3], 20.0) + conversation.feed(
        side, two[3:], 21.0
    )
    assert isinstance(one, ObservedMessage)
    assert isinstance(other, ObservedMessage)
    assert (one.started, one.ended, other.started, other.ended) == (20.0, 20.0, 20.0, 21.0)


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ((3, 6, 0), (3, 6, 0)),
        ((2, 0, 0), (2, 0, 0)),
        ((3, 6, 1), (3, 6, 1)),
        ((3, 5, 0), (3, 5, 0)),
        ((3, 4, 2), (3, 0, 0)),
        ((4, 0, 9), (4, 0, 3)),
        ((4, 0, 2), (4, 0, 2)),
        ((5, 1, 0), (5, 1, 0)),
        ((7, 3, 1), (7, 0, 0)),
        ((8, 0, 0), None),
    ],
)
def test_the_version_answered_tells_the_dialect(
    version: tuple[int, int, int], expected: tuple[int, int, int] | None
) -> None:
    found = dialect_of_version(version, 0 if version[0] < 4 else 24)
    assert (found and found.version) == expected


def test_the_graph_tells_how_ops_are_numbered() -> None:
    """A server that serves all of 4.0, or of 2.0, answers one; the client may be another."""
    for dialect in DIALECTS:
        served = compatible_dialects(dialect)[-1]
        conversation = Conversation()
        turns = [*hello(served), request(dialect, Command.GRAPH_COMPUTE, {}, small_graph(dialect))]
        events = messages(events_of(conversation, turns))
        assert events[-1].dialect.ops == dialect.ops


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda d: d.name)
def test_long_names_are_found_out(dialect: Dialect) -> None:
    wide = dialect.with_names(128)
    # Whole tensors of 64 bytes, as clients upload them first.
    events = messages(events_of(Conversation(), full_session(wide, upload=64, download=64)))
    graphs = [
        e for e in events if e.command is Command.GRAPH_COMPUTE and e.kind is MessageKind.REQUEST
    ]
    assert graphs
    assert graphs[0].graph is not None
    assert all(e.dialect.tensor_size == 360 and not e.problem for e in graphs)
    assert [name.rstrip(b"\0") for name in graphs[0].graph.tensors["name"]] == [
        b"w",
        b"x",
        b"y",
        b"z",
    ]


# -- streams that are not whole ---------------------------------------------------------------


def _mutable_stream(dialect: Dialect) -> list[tuple[Side, bytes]]:
    return full_session(dialect, upload=40, download=40)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(DIALECTS), st.booleans())
def test_a_flipped_bit_is_an_event_and_no_exception(
    data: st.DataObject, dialect: Dialect, split: bool
) -> None:
    turns = split_session(NEWEST) if split else _mutable_stream(dialect)
    i = data.draw(st.integers(0, len(turns) - 1))
    side, content = turns[i]
    at = data.draw(st.integers(0, len(content) * 8 - 1))
    broken = bytearray(content)
    broken[at // 8] ^= 1 << at % 8
    joined = data.draw(st.booleans())
    turns[i] = side, bytes(broken)
    events = events_of(Conversation(joined=joined), turns)
    for event in events:
        assert isinstance(event, ObservedMessage | Failure | SkippedBytes)
    # Every byte is in a message, skipped, or behind a failure.
    for side in Side:
        total = sum(len(d) for s, d in turns if s is side)
        at = 0
        for event in events:
            if event.side is not side:
                continue
            if isinstance(event, Failure):
                assert event.offset == at
                at = total
                break
            assert event.start == at
            at = event.end
        assert at == total


@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from(DIALECTS))
def test_a_truncated_stream_is_told(data: st.DataObject, dialect: Dialect) -> None:
    turns = _mutable_stream(dialect)
    i = data.draw(st.integers(0, len(turns) - 1))
    side, content = turns[i]
    n = data.draw(st.integers(1, len(content) - 1))
    conversation = Conversation()
    events = events_of(conversation, [*turns[:i], (side, content[:n])])
    whole = summary(events_of(Conversation(), turns[:i]))
    assert summary(events)[: len(whole)] == whole
    failures = [e for e in events if isinstance(e, Failure)]
    assert [f.side for f in failures] == [side]
    assert "ends" in failures[0].text


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=600), st.binary(max_size=200), st.booleans())
def test_garbage_is_an_event_and_no_exception(client: bytes, server: bytes, joined: bool) -> None:
    conversation = Conversation(joined=joined)
    events = conversation.feed(Side.CLIENT, client) + conversation.feed(Side.SERVER, server)
    events += conversation.close()
    assert bool(events) == bool(client or server)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(DIALECTS[:1] + DIALECTS[8:10]))
def test_a_connection_joined_in_its_middle(data: st.DataObject, dialect: Dialect) -> None:
    """Whatever was missed: what is found are messages of the session, in order."""
    turns = session(dialect) * 2
    whole = summary(events_of(Conversation(dialect), turns))
    skipped = data.draw(st.integers(0, len(turns) // 2))
    side, content = turns[skipped]
    inside = data.draw(st.integers(0, len(content) - 1))
    events = events_of(Conversation(dialect), [(side, content[inside:]), *turns[skipped + 1 :]])
    assert not [e for e in events if isinstance(e, Failure)]
    known = {(row[0], row[1], row[5], row[8]) for row in whole if isinstance(row[0], MessageKind)}
    found = [e for e in events if isinstance(e, ObservedMessage)]
    for event in found:
        assert (event.kind, event.command, event.head, bytes(event.body or b"")) in known
    # The second time round all of it is read.
    requests = sum(s is Side.CLIENT for s, _ in turns[len(turns) // 2 :])
    assert sum(e.kind is MessageKind.REQUEST for e in found) >= requests - 1
    answers = sum(s is Side.SERVER for s, _ in turns[len(turns) // 2 :])
    assert sum(e.kind is MessageKind.ANSWER for e in found) >= answers - 1


def test_the_dialect_of_a_joined_connection_is_guessed() -> None:
    turns = session(NEWEST) * 2
    conversation = Conversation(joined=True)
    events = events_of(conversation, [(turns[0][0], turns[0][1][3:]), *turns[1:]])
    assert conversation.dialect is NEWEST
    assert sum(isinstance(e, ObservedMessage) for e in events) >= len(turns) / 2
    older = next(d for d in DIALECTS if d.version == (3, 0, 0))
    conversation = Conversation(joined=True)
    turns = session(older) * 2
    events_of(conversation, [(turns[0][0], turns[0][1][3:]), *turns[1:]])
    assert conversation.dialect is not None


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_hole_costs_what_is_in_it(data: st.DataObject) -> None:
    """A hole of known length in either side: the rest is read on as before."""
    turns = [*full_session(NEWEST, 5000, 5000), *session(NEWEST, 5000, 5000)]
    side = data.draw(st.sampled_from(list(Side)))
    sizes = [len(d) for s, d in turns if s is side]
    total = sum(sizes)
    start = data.draw(st.integers(sizes[0], total - 1))
    end = data.draw(st.integers(start + 1, min(total, start + 9000)))
    conversation = Conversation()
    events: list[Event] = []
    at = 0
    for sender, content in turns:
        if sender is not side:
            events += conversation.feed(sender, content)
            continue
        low, high = max(0, start - at), min(len(content), end - at)
        if low >= high:
            events += conversation.feed(sender, content)
        else:
            events += conversation.feed(sender, content[:low])
            events += conversation.gap(sender, high - low)
            events += conversation.feed(sender, content[high:])
        at += len(content)
    events += conversation.close()
    assert not [e for e in events if isinstance(e, Failure)]
    whole = messages(events_of(Conversation(), turns))
    found = [e for e in events if isinstance(e, ObservedMessage)]
    if side is Side.SERVER:
        # All sizes are known: nothing but the content of what is in the hole is missed.
        assert len(found) == len(whole)
        assert sum(e.missing for e in found) <= end - start
        for ours, theirs in zip(found, whole, strict=True):
            if not ours.missing:
                assert summary([ours]) == summary([theirs])
    for event in found:
        if not event.missing:
            assert any(
                event.kind is w.kind and event.start == w.start and event.data == w.data
                for w in whole
            )


def test_a_hole_in_an_upload_is_counted() -> None:
    turns = full_session(NEWEST, upload=50_000)
    at = next(i for i, (_, d) in enumerate(turns) if len(d) > 50_000)
    conversation = Conversation()
    events = messages(events_of_parts(conversation, turns, at, 20_000, 30_000))
    upload = next(e for e in events if e.command is Command.SET_TENSOR)
    assert (upload.missing, upload.body_size, upload.body) == (10_000, 50_000, None)


def events_of_parts(
    conversation: Conversation, turns: list[tuple[Side, bytes]], at: int, start: int, end: int
) -> list[Event]:
    events: list[Event] = []
    for i, (side, content) in enumerate(turns):
        if i != at:
            events += conversation.feed(side, content)
            continue
        events += conversation.feed(side, content[:start])
        events += conversation.gap(side, end - start)
        events += conversation.feed(side, content[end:])
    return events + conversation.close()


def test_answers_that_are_due_before_a_hole_are_paired() -> None:
    """A hole swallows a request: what was asked before it is answered first, then what isn't known,
    then what was asked after it."""
    asked = [request(NEWEST, Command.GET_TENSOR, _get(n)) for n in (16, 20, 24)]
    said = [answer(NEWEST, Command.GET_TENSOR, bytes([n]) * n) for n in (16, 20, 24)]
    conversation = Conversation()
    events = []
    for side, data in [*hello(NEWEST), asked[0]]:
        events += conversation.feed(side, data)
    events += conversation.gap(Side.CLIENT, len(asked[1][1]))
    for side, data in [said[0], said[1], asked[2], said[2]]:
        events += conversation.feed(side, data)
    events += conversation.close()
    answers = [
        e for e in events if isinstance(e, ObservedMessage) and e.kind is MessageKind.ANSWER
    ][1:]
    assert [(e.body_size, e.number) for e in answers] == [(16, 1), (24, 2)]
    assert [(e.side, e.size) for e in events if isinstance(e, SkippedBytes)] == [
        (Side.CLIENT, len(asked[1][1])),
        (Side.SERVER, len(said[1][1])),
    ]


@pytest.mark.parametrize("seen", range(9, 9 + 312))
def test_a_hole_within_a_request_costs_that_request(seen: int) -> None:
    """Its frame tells how long it is and its answer how much it asked for."""
    first = request(NEWEST, Command.GET_TENSOR, _get(16))[1]
    assert len(first) == 9 + 312
    conversation = Conversation()
    events = []
    for side, data in hello(NEWEST):
        events += conversation.feed(side, data)
    events += conversation.feed(Side.CLIENT, first[:seen])
    events += conversation.gap(Side.CLIENT, len(first) - seen)
    rest = [
        answer(NEWEST, Command.GET_TENSOR, bytes(16)),
        request(NEWEST, Command.DEVICE_COUNT, {}),
        answer(NEWEST, Command.DEVICE_COUNT, {"device_count": 1}),
    ]
    for side, data in rest:
        events += conversation.feed(side, data)
    events += conversation.close()
    found = messages(events)[2:]
    assert [(m.kind, m.command) for m in found] == [
        (MessageKind.REQUEST, Command.GET_TENSOR),
        (MessageKind.ANSWER, Command.GET_TENSOR),
        (MessageKind.REQUEST, Command.DEVICE_COUNT),
        (MessageKind.ANSWER, Command.DEVICE_COUNT),
    ]
    assert found[0].fields is None
    assert (found[0].missing, found[0].size) == (len(first) - seen, len(first))
    assert found[0].head == first[:seen]
    assert found[1].body_size == 16
    assert describe(found[0]).startswith("GET_TENSOR of 321 B")
    assert sum(s.end - s.start for s in annotate(found[0])) == len(first)


def test_the_version_is_read_though_the_rest_of_the_answer_is_missing() -> None:
    """As in captures of the first 96 bytes of packets."""
    [(_, asked), (_, said)] = hello(DIALECTS[1])
    conversation = Conversation()
    conversation.feed(Side.CLIENT, asked)
    conversation.feed(Side.SERVER, said[:-6])
    [found] = conversation.gap(Side.SERVER, 6)
    assert isinstance(found, ObservedMessage)
    assert found.fields is None
    assert conversation.dialect is DIALECTS[1]
    assert conversation.version == DIALECTS[1].version


def test_what_only_looks_like_a_frame_is_passed_over() -> None:
    """The frame of a request, but no tensor behind it."""
    asked = request(NEWEST, Command.GET_TENSOR, _get(16))[1]
    false = asked[:9] + b"\xa5" * (len(asked) - 9)
    conversation = Conversation(NEWEST)
    events = conversation.feed(Side.CLIENT, false + asked) + conversation.close()
    assert [type(e) for e in events] == [SkippedBytes, ObservedMessage]
    assert isinstance(events[0], SkippedBytes)
    assert events[0].size == len(false)


def test_a_wrong_answer_ends_the_servers_side_only() -> None:
    turns = hello(NEWEST)
    turns += [
        request(NEWEST, Command.GET_TENSOR, _get(16)),
        answer(NEWEST, Command.GET_TENSOR, bytes(12)),
        request(NEWEST, Command.DEVICE_COUNT, {}),
        answer(NEWEST, Command.DEVICE_COUNT, {"device_count": 1}),
    ]
    events = events_of(Conversation(), turns)
    [failure] = [e for e in events if isinstance(e, Failure)]
    assert failure.side is Side.SERVER
    assert failure.text == "the answer to GET_TENSOR has 12 bytes, not 16"
    assert failure.offset == len(turns[1][1])
    assert [e.command for e in events if isinstance(e, ObservedMessage)][-1] is Command.DEVICE_COUNT


def _get(size: int) -> dict[str, Any]:
    return {"tensor": tensor_fields(NEWEST, "t"), "offset": 0, "size": size}


def test_a_version_that_is_not_known() -> None:
    turns = hello(NEWEST)
    data = bytearray(turns[1][1])
    data[8] = 9
    events = events_of(Conversation(), [turns[0], (Side.SERVER, bytes(data))])
    texts = [e.text for e in events if isinstance(e, Failure)]
    assert texts == ["the server speaks protocol 9.0.0, which is not known here"] * 2


def test_a_client_alone() -> None:
    """A capture of one direction: the dialect is guessed, nothing is answered."""
    turns = [t for t in full_session(NEWEST) if t[0] is Side.CLIENT]
    conversation = Conversation()
    found = messages(events_of(conversation, turns))
    assert len(found) == len(NEWEST.commands)
    assert conversation.dialect is NEWEST
