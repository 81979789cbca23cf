"""The properties themselves: of this project's readers, of live servers, and of searches."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from conformance.__main__ import main
from conformance.differential.compare import CaseMemory
from conformance.differential.explore import Mismatch
from conformance.differential.runner import Image
from conformance.properties import codecs, damage, graphs, messages
from conformance.properties.codecs import Damage
from conformance.properties.evaluate import evaluate
from conformance.properties.findings import Finding, explore, replay, spoken
from conformance.properties.memory import ModelBuffer, ModelGraph, Range
from conformance.properties.programs import MAX_NODES, build, programs
from conformance.properties.properties import (
    DAMAGE,
    GRAPHS,
    PROPERTIES,
    SESSIONS,
    PropertyTarget,
)
from conformance.properties.search import search
from conformance.properties.session import Violation
from conformance.properties.steps import (
    ActionKind,
    ActionSequence,
    sessions,
    step_kinds,
)
from conformance.suite.target import Target as Server
from protocol.commands import Command
from protocol.dialects import DIALECTS, Answer, Dialect, find_dialects
from protocol.errors import ProtocolError
from protocol.ggml.ops import VIEWS, TensorFlag
from protocol.split import with_split
from tests.addresses import coming_from
from tests.parameters import mostly_slow
from tests.server.process import ServerProcess, running
from tools.serving.processes import PATIENCE

OWN = codecs.OwnCodec()
ALL = [*DIALECTS, with_split(DIALECTS[0])]
NEWEST = DIALECTS[0]


def in_every_dialect(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test for each dialect, with so many examples of what it draws."""

    def of(test: Callable[..., None]) -> Callable[..., None]:
        drawing = settings(max_examples=examples, deadline=None)(given(data=st.data())(test))
        ids = [f"{d.name}-{len(d.commands)}" for d in ALL]
        by_name: Callable[..., None] = pytest.mark.parametrize("dialect", ALL, ids=ids)(drawing)
        return by_name

    return of


# -- messages --------------------------------------------------------------------------------------


@in_every_dialect(examples=4)
def test_requests_of_every_command_are_read_as_written(
    dialect: Dialect, data: st.DataObject
) -> None:
    for command in dialect.commands:
        if command is not Command.HELLO:
            request = data.draw(messages.requests(dialect, command))
            codecs.check_request_round_trip(OWN, dialect, request)


@in_every_dialect(examples=4)
def test_answers_to_every_command_are_read(dialect: Dialect, data: st.DataObject) -> None:
    for command, spec in dialect.commands.items():
        if spec.answer is not Answer.NEVER and command is not Command.HELLO:
            reply = data.draw(messages.replies(dialect, command))
            codecs.check_reply_round_trip(OWN, dialect, reply)


@in_every_dialect(examples=15)
def test_segments_and_damage(dialect: Dialect, data: st.DataObject) -> None:
    lengths = data.draw(codecs.segmentations())
    harm = data.draw(codecs.damages())
    asked = data.draw(st.lists(messages.requests(dialect), min_size=1, max_size=4))
    codecs.check_request_segments(OWN, dialect, asked, lengths)
    codecs.check_damaged_requests(OWN, dialect, asked, harm, lengths)
    answered = data.draw(st.lists(messages.replies(dialect), min_size=1, max_size=5))
    codecs.check_reply_segments(OWN, dialect, answered, lengths)
    codecs.check_damaged_replies(OWN, dialect, answered, harm, lengths)


class Careless(codecs.OwnCodec):
    """Loses what is left over of a segment."""

    def read_requests(self, dialect: Dialect, segments: object) -> list[codecs.Seen]:
        assert isinstance(segments, list)
        return [
            seen
            for segment in segments
            for seen in super(Careless, self).read_requests(dialect, [segment])
        ]


def test_a_codec_that_is_wrong_is_found() -> None:
    def attempt(value: tuple[list[messages.DrawnRequest], tuple[int, ...]]) -> None:
        try:
            codecs.check_request_segments(Careless(), NEWEST, *value)
        except ProtocolError as error:
            raise AssertionError(str(error)) from None

    values = st.tuples(
        st.lists(messages.requests(NEWEST, Command.FREE_BUFFER), min_size=1, max_size=3),
        codecs.segmentations(),
    )
    found = search(values, attempt, 50, seed=1).found
    assert found is not None
    asked, lengths = found.value
    assert len(asked) == 1
    assert sum(lengths) < 17


@pytest.mark.parametrize("kind", ["flip", "truncate", "remove", "insert", "repeat"])
def test_damage_changes_bytes(kind: str) -> None:
    stream = bytes(range(200))
    assert Damage(kind, 77, 3).apply(stream) != stream
    assert Damage(kind, 77, 3).apply(b"") == b""


# -- values as JSON, models ------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_values_are_the_same_after_json(data: st.DataObject) -> None:
    session = data.draw(sessions(NEWEST))
    assert ActionSequence.from_json(json.loads(json.dumps(session.to_json()))) == session
    stream = data.draw(damage.streams(NEWEST))
    again = damage.DamagedStream.from_json(json.loads(json.dumps(stream.to_json())))
    assert [r.encode(NEWEST) for r in again.requests] == [r.encode(NEWEST) for r in stream.requests]
    assert again.damage == stream.damage


def test_steps_are_what_a_dialect_can_do() -> None:
    oldest, newest = step_kinds(DIALECTS[-1]), step_kinds(NEWEST)
    assert set(newest) == set(ActionKind)
    assert set(newest) - set(oldest) == {ActionKind.MEMSET, ActionKind.RERUN}


def test_model_of_a_graph() -> None:
    buffer = ModelBuffer(1, 0x1000, bytearray(64))
    x, y = Range(buffer, 0, 4), Range(buffer, 16, 4)
    x.store(np.array([1, 2, 3, np.nan], np.float32))
    y.store(np.array([10, 20, 30, 40], np.float32))
    # ADD of both into the third range, which is the 8th float on.
    graph = ModelGraph([x, y], [0 | 0 << 3 | 1 << 6 | 8 << 10])
    graph.run()
    assert Range(buffer, 32, 3).load().tolist() == [11, 22, 33]
    same = bytearray(buffer.data)
    assert buffer.difference(bytes(same)) == ""
    # Which bits a NaN has is the server's business; that it is one is not.
    same[44:48] = np.array([-np.nan], np.float32).tobytes()
    assert buffer.difference(bytes(same)) == ""
    same[44:48] = bytes(4)
    assert "byte 46" in buffer.difference(bytes(same))


@settings(max_examples=20, deadline=None)
@given(programs())
def test_any_words_are_a_graph(words: tuple[int, ...]) -> None:
    case = build(words)
    assert 1 <= len(case.graph.nodes) <= MAX_NODES + 4
    assert build(words).describe() == case.describe()
    for dialect in (NEWEST, *find_dialects("3.6.1")):
        assert case.graph.encode(dialect)


def computed(words: tuple[int, ...]) -> tuple[object, Image, CaseMemory]:
    """A graph with the memory that numpy makes of it."""
    case = build(words)
    image = Image.of(case)
    memory = CaseMemory(image.data.copy(), image.offsets)
    for t in case.graph.nodes:
        if t.op not in VIEWS:
            sources = [memory.array(s) for s in t.src if s is not None and s is not t]
            memory.array(t)[...] = evaluate(t, sources).values
    return case, image, memory


@settings(max_examples=25, deadline=None)
@given(words=programs(60), which=st.integers(0, 1000))
def test_a_wrong_element_is_found_at_its_node(words: tuple[int, ...], which: int) -> None:
    case, image, memory = computed(words)
    graphs.check(case, image, memory)  # type: ignore[arg-type]
    writers = graphs.last_writers(case, image)  # type: ignore[arg-type]
    wanted = sorted(set(writers[writers >= 0].tolist()))
    # A graph may be all views.
    assume(wanted)
    number = wanted[which % len(wanted)]
    node = case.graph.nodes[number]  # type: ignore[attr-defined]
    if not node.flags & TensorFlag.OUTPUT:
        return
    at = int(np.flatnonzero(writers == number)[0]) & ~3
    memory.image[at : at + 4] = np.array([3e30], np.float32).view(np.uint8)[:4]
    with pytest.raises(Mismatch, match=rf"node {number}, {node.op} "):
        graphs.check(case, image, memory)  # type: ignore[arg-type]


def test_a_write_beside_a_tensor_is_found() -> None:
    case, image, memory = computed((65, 66))
    memory.image[-1] ^= 1
    with pytest.raises(Mismatch, match="wrote outside its tensors"):
        graphs.check(case, image, memory)  # type: ignore[arg-type]


# -- searches --------------------------------------------------------------------------------------


def test_a_search_finds_the_smallest_and_repeats_itself() -> None:
    def attempt(numbers: list[int]) -> None:
        if sum(numbers) >= 1000:
            raise AssertionError("too much")

    values = st.lists(st.integers(0, 600))
    runs = [search(values, attempt, 200, seed=3) for _ in range(2)]
    assert runs[0].found == runs[1].found
    assert runs[0].found is not None
    assert sum(runs[0].found.value) == 1000
    assert runs[0].found.reason == "too much"
    assert search(values, lambda numbers: None, 25, seed=3).examples == 25


# -- live servers ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    cache = {"LLAMA_CACHE": str(tmp_path_factory.mktemp("cache"))}
    with running("--threads", "1", "-d", "CPU", "--cache", env=cache) as started:
        yield started
        assert started.alive, started.log
        assert "internal error" not in started.log


def targets(server: ServerProcess, wanted: Sequence[Dialect]) -> list[PropertyTarget]:
    return list(spoken(Server(("127.0.0.1", server.port)), wanted, PATIENCE))


@pytest.fixture(scope="module")
def newest(server: ServerProcess) -> PropertyTarget:
    """The server as a client of the newest version sees it."""
    [target] = targets(server, DIALECTS[:1])
    return target


_SPOKEN = ("7.0.0", "5.1.0", "4.0.3", "3.6.1", "3.0.0", "1.0.0")


@pytest.mark.parametrize(("name", "examples"), [("sessions", 12), ("graphs", 3), ("damage", 6)])
@pytest.mark.parametrize("version", mostly_slow(_SPOKEN, quick=2))
def test_server_keeps_the_properties(
    server: ServerProcess, version: str, name: str, examples: int
) -> None:
    # A client of another version at the same address would have to wait.
    with coming_from(2 + _SPOKEN.index(version)):
        [target] = targets(server, find_dialects(version)[:1])
        done, finding = explore(target, PROPERTIES[name], examples, seed=0)
    assert finding is None, finding.text()
    assert done.examples == examples


@pytest.mark.slow
def test_every_version_is_found_at_one_address(server: ServerProcess) -> None:
    """The server is asked once what it is."""
    found = targets(server, DIALECTS)
    assert [t.dialect.name for t in found] == [
        "7.0.0", "6.0.0", "5.1.0", "5.0.0", "4.0.3", "3.6.1", "3.5.0", "3.0.0", "2.0.0-90", "1.0.0",
    ]  # fmt: skip
    assert all(p.fits(t) for p in (SESSIONS, DAMAGE, GRAPHS) for t in found)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    words = [sys.executable, "-m", "tests.conformance.faulty", "--fault", "recompute-does-nothing"]
    words += ["-t", "1", "--port", "{port}", "--log-level", "error"]
    server = Server(command=" ".join(words))
    server.ensure(0.0)
    yield server
    server.close()


def test_a_fault_is_found_shrunk_kept_and_repeated(
    faulty: Server,
    newest: PropertyTarget,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (target,) = spoken(faulty, find_dialects("7"), PATIENCE)
    done, finding = explore(target, SESSIONS, 300, seed=0)
    assert finding is not None
    assert done.examples < 300
    # A buffer with something in it, a graph that changes it, its second run.
    kinds = [s.kind for s in finding.value.steps]
    assert len(kinds) <= 5
    assert kinds[0] is ActionKind.ALLOC
    assert kinds[-1] is ActionKind.RERUN
    assert kinds.count(ActionKind.GRAPH) == 1
    assert finding.value.clients == 1
    assert "(rerun)" in finding.reason
    text = finding.text()
    assert "client 0 > GRAPH_RECOMPUTE" in text
    assert "1004000000" in text

    path = finding.save(tmp_path)
    loaded = Finding.loads(path.read_text())
    assert loaded.value == finding.value
    assert loaded.messages == finding.messages
    again = replay(target, loaded)
    assert again is not None
    assert again.reason == finding.reason
    assert newest.dialect is target.dialect
    assert replay(newest, loaded) is None
    # As it is done on the command line.
    for address, status in ((target.address, 1), (newest.address, 0)):
        endpoint = "{}:{}".format(*address)
        assert main(["--endpoint", endpoint, "--replay", str(path)]) == status
    assert "all is well" in capsys.readouterr().out


def test_a_finding_of_something_else_is_refused(tmp_path: Path) -> None:
    for text in ("{}", '{"property": "none"}', '{"property": "sessions", "messages": 7}'):
        with pytest.raises(ValueError, match="finding"):
            Finding.loads(text)


def test_which_versions_tell_their_ops(newest: PropertyTarget) -> None:
    """Clients of 4.0.0 to 4.0.2 get the answer 4.0.3: their ops can't be told in every graph."""
    assert all(p.fits(newest) for p in (SESSIONS, DAMAGE, GRAPHS))
    taken = replace(newest.facts, dialect=DIALECTS[5], version=(4, 0, 3))
    assert not GRAPHS.fits(replace(newest, facts=taken))
    told = replace(newest.facts, dialect=DIALECTS[5], version=(4, 0, 2))
    assert GRAPHS.fits(replace(newest, facts=told))


def test_a_violation_names_the_step_and_the_bytes(newest: PropertyTarget) -> None:
    """A model that expects something else than the server does."""
    from conformance.properties.session import SequencePlayer

    class Wrong(SequencePlayer):
        def _compare(self) -> None:
            for client in self._clients:
                for buffer in client.buffers[:1]:
                    buffer.data[17] ^= 1
            super()._compare()

    session = ActionSequence.from_json(
        {
            "clients": 1,
            "every": 1,
            "cuts": [],
            "steps": [{"kind": "alloc", "client": 0, "size": 99}],
        }
    )
    with newest.context() as context, pytest.raises(Violation) as caught:
        Wrong(context, session).play()
    assert str(caught.value).startswith("after step 0 (alloc): client 0: buffer 0 of 100 bytes")
    assert "byte 17 is 0x00, expected 0x01 (1 of 100 bytes differ" in str(caught.value)
