"""Every kept input of every target is run again, without a fuzzer; and the targets can fail."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest

from protocol.graph_payload import decode_graph
from protocol.receive_buffer import ReceiveBuffer
from rpc_server.graph.parse import parse_graph
from tests.fuzz import graphs, inputs, seeds, streams
from tests.fuzz.__main__ import _summary, main
from tests.fuzz.graphs import GraphInput
from tests.fuzz.minimise import edges
from tests.fuzz.targets import TARGETS, Target

# Of a megabyte that all of them may take together.
_MOST_BYTES = 1 << 20


@pytest.mark.parametrize(
    "target", [t for t in TARGETS.values() if t.name != "run"], ids=lambda t: t.name
)
def test_kept_inputs(target: Target) -> None:
    kept = inputs.read(target.corpus)
    assert kept
    for data in kept.values():
        target.run(data)


@pytest.mark.slow
def test_kept_graphs_run() -> None:
    # In a process of its own: what this looks for ends the process.
    command = [sys.executable, "-m", "tests.fuzz", "run", "--replay", str(TARGETS["run"].corpus)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == len(inputs.read(TARGETS["run"].corpus))


def test_the_corpus_is_small() -> None:
    kept = [data for t in TARGETS.values() for data in inputs.read(t.corpus).values()]
    assert sum(map(len, kept)) < _MOST_BYTES


# -- seeds and damage


def test_seeds_are_valid_graphs() -> None:
    for data in seeds.graph_inputs(60, 3):
        given = GraphInput.decode(data)
        assert given is not None
        assert given.encode() == data
        payload = decode_graph(given.payload, given.dialect)
        parsed = parse_graph(payload, given.dialect, graphs.nowhere(given).get)
        graphs.planner().build(parsed)


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda t: t.name)
def test_damage_changes_inputs_and_keeps_them_small(target: Target) -> None:
    chosen, valid = random.Random(4), target.seeds(40, 4)
    small = [data for data in valid if len(data) <= target.largest]

    def reversed_bytes(data: bytes, largest: int) -> bytes:
        return data[::-1][:largest]

    changed = [target.damage(d, target.largest, chosen, reversed_bytes, small) for d in small]
    differ = sum(a != b for a, b in zip(changed, small, strict=True))
    assert differ > len(small) * 0.8
    for data in changed:
        assert len(data) <= target.largest + graphs.HEAD_BYTES
        if target.name != "run":
            target.run(data)


# -- targets find faults


def _lossy_take(self: ReceiveBuffer, n: int) -> bytes:
    """As ReceiveBuffer.take, but the last byte is lost unless more has arrived already."""
    whole = bytes(self._view[self._start : self._start + n])
    self._start += n
    return whole if len(self) else whole[:-1] + b"\0"


def test_a_reader_that_depends_on_segments_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    hello = bytes((14,)) + (24).to_bytes(8, "little") + b"c" * 24
    count = bytes((15,)) + bytes(8)
    whole = [bytes((0, seed)) + hello + count for seed in range(1, 20)]
    assert all(map(streams.requests, whole))
    monkeypatch.setattr(ReceiveBuffer, "take", _lossy_take)
    with pytest.raises(streams.BrokenPromise, match="in segments"):
        list(map(streams.requests, whole))


def test_a_parser_that_lets_tensors_out_of_their_buffers_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = seeds.graph_inputs(5, 1)[0]
    assert graphs.graph(data)
    monkeypatch.setattr(
        "rpc_server.graph.parse._addresses", lambda wire, *_: wire["data"].astype(np.int64)
    )
    with pytest.raises(streams.BrokenPromise, match="outside its buffer"):
        graphs.graph(data)


def test_edges_tell_inputs_apart() -> None:
    short, graph = b"\0", seeds.graph_inputs(5, 1)[0]
    assert edges(graphs.graph, short) < edges(graphs.graph, graph)


# -- the program


def test_targets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(TARGETS)


def test_an_unknown_target_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["nothing"])
    assert "requests, answers" in capsys.readouterr().err


def test_what_a_run_did_is_read_from_its_log() -> None:
    log = (
        "#512\tpulse  cov: 100 ft: 200 corp: 30/4Kb exec/s: 256 rss: 70Mb\n"
        "#1000\tDONE   cov: 119 ft: 503 corp: 107/174Kb lim: 8192 exec/s: 500 rss: 90Mb\n"
        "stat::number_of_executed_units: 1000\n"
        "stat::average_exec_per_sec:     500\n"
        "stat::peak_rss_mb:              91\n"
    )
    expected = "1000 executions, 500/s, 119 edges, 503 features, 107 inputs, 91 MiB"
    assert _summary(log.splitlines(keepends=True)) == expected
    assert _summary([]) == "no statistics"
