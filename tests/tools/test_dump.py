"""tools.dump as its users see it: lines, trees, bytes, graphs, JSON, figures, files, exit codes."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from protocol.commands import Command
from protocol.dialects import DIALECTS
from protocol.ggml.ops import Op
from protocol.observe.conversation import Side
from protocol.split import VERSION
from tests.protocol.transcripts import (
    full_session,
    link_session,
    member_session,
    session,
    split_session,
)
from tests.protocol.turns import BASE, answer, hello, request, small_graph, tensor_fields
from tests.tools.packets import connection_frames, cut, pcap_bytes, write_pcapng
from tools.bench import dump as bench
from tools.capture.errors import MissingToolError
from tools.capture.files import read_capture
from tools.dump import graphs, progress
from tools.dump.__main__ import main
from tools.dump.extract import INDEX, Extractor
from tools.dump.filters import Filters
from tools.dump.screen import Screen, duration_text, printable
from tools.record.frames import Address
from tools.serving.processes import PROJECT

NEWEST = DIALECTS[0]
WEIGHT = bytes(i * 3 % 256 for i in range(300_000))


def decode_steps(count: int) -> list[tuple[Side, bytes]]:
    """A model of one weight, uploaded in two pieces, and some tokens."""
    weight = tensor_fields(NEWEST, "blk.0.attn_q.weight", (300, 250, 1, 1))
    inputs = tensor_fields(NEWEST, "RPC0[x]#inp#0", (8, 1, 1, 1), data=BASE + 400_000)
    result = tensor_fields(NEWEST, "result_output", (4, 1, 1, 1), Op.MUL_MAT, data=BASE + 500_000)
    turns = hello(NEWEST)
    for at in (0, 200_000):
        fields = {"tensor": weight, "cache_flag": 0, "offset": at}
        turns.append(request(NEWEST, Command.SET_TENSOR, fields, WEIGHT[at : at + 200_000]))
    hashed = tensor_fields(NEWEST, "output.weight", (8, 8, 1, 1))
    fields = {"tensor": hashed, "offset": 0, "hash": 0xABCDEF}
    turns.append(request(NEWEST, Command.SET_TENSOR_HASH, fields))
    turns.append(answer(NEWEST, Command.SET_TENSOR_HASH, {"result": 1}))
    for i in range(count):
        fields = {"tensor": inputs, "cache_flag": 0, "offset": 0}
        turns.append(request(NEWEST, Command.SET_TENSOR, fields, bytes(32)))
        if i == 0:
            turns.append(request(NEWEST, Command.GRAPH_COMPUTE, {}, small_graph(NEWEST)))
        else:
            turns.append(request(NEWEST, Command.GRAPH_RECOMPUTE, {"device": 0}))
        for at in (0, 8):
            fields = {"tensor": result, "offset": at, "size": 8}
            turns.append(request(NEWEST, Command.GET_TENSOR, fields))
            turns.append(answer(NEWEST, Command.GET_TENSOR, bytes(8)))
    late = tensor_fields(NEWEST, "written.later", (8, 1, 1, 1))
    fields = {"tensor": late, "cache_flag": 0, "offset": 0}
    return [*turns, request(NEWEST, Command.SET_TENSOR, fields, bytes(32))]


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pcapng(
        tmp_path_factory.mktemp("captures") / "steps.pcapng", connection_frames(decode_steps(4))
    )


def dump(capsys: pytest.CaptureFixture[str], *arguments: str | Path | int) -> tuple[int, str, str]:
    code = main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    return code, out, err


def test_a_line_for_each_message(capture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = dump(capsys, capture)
    assert (code, err) == (0, "")
    lines = [line[12:].split(" ", 1) for line in out.splitlines()]
    texts = [line.split(None, 1)[1].split(" (after")[0].split(" (took")[0] for _, line in lines]
    assert texts[:9] == [
        "10.0.0.2:40000 to 10.0.0.1:50052",
        "HELLO",
        "HELLO = protocol 7.0.0",
        "SET_TENSOR 'blk.0.attn_q.weight' F32 300x250 195.3 KiB at 0 of 300000",
        "SET_TENSOR 'blk.0.attn_q.weight' F32 300x250 97.7 KiB at 200000 of 300000",
        "SET_TENSOR_HASH 'output.weight' F32 8x8 hash 0xabcdef",
        "SET_TENSOR_HASH = result 1",
        "SET_TENSOR 'RPC0[x]#inp#0' F32 8 32 B",
        "GRAPH_COMPUTE graph 1, 2 nodes, 4 tensors",
    ]
    assert texts[9:11] == [
        "GET_TENSOR MUL_MAT 'result_output' F32 4 8 B at 0 of 16",
        "GET_TENSOR = 8 B",
    ]
    assert texts[-1] == "closed; protocol 7.0.0"
    assert out.count("(after 10 us)") >= 4
    assert "\x1b" not in out


def test_whole_messages_and_their_bytes(capture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = dump(capsys, capture, "-v", "--hex", "--command", "set_tensor_hash")
    assert code == 0
    assert "        name: 'output.weight'" in out
    assert "        ne: [8, 8, 1, 1]" in out
    assert "000000  07 " in out
    assert any(
        line.endswith("hash = 0xabcdef") and "ef cd ab 00" in line for line in out.splitlines()
    )


def test_filters(capture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = dump(capsys, capture, "--tensor", "result", "--json")
    kinds = Counter(
        (e["command"], e["kind"]) for e in map(json.loads, out.splitlines())
        if e["event"] == "message"
    )  # fmt: skip
    assert kinds == {("GET_TENSOR", "request"): 8, ("GET_TENSOR", "answer"): 8}
    _, out, _ = dump(capsys, capture, "--command", "HELLO,GRAPH_COMPUTE", "--tensor", "*")
    assert "HELLO" not in out
    assert "GRAPH_COMPUTE" in out
    _, out, _ = dump(capsys, capture, "--client", "10.9.9.9")
    assert out == ""
    for wanted in ("10.0.0.2", "10.0.0.2:40000"):
        _, out, _ = dump(capsys, capture, "--client", wanted, "--connection", "1")
        assert len(out.splitlines()) == len(decode_steps(4)) + 2


def test_json(capture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = dump(capsys, capture, "--json", "-v")
    objects = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [o["event"] for o in objects] == ["opened", *["message"] * (len(objects) - 2), "closed"]
    upload = objects[3]
    assert upload["fields"]["tensor"]["name"] == "blk.0.attn_q.weight"
    assert upload["fields"]["tensor"]["type"] == "F32"
    assert upload["body_size"] == 200_000
    assert upload["end"] - upload["start"] == 200_000 + 9 + 305
    graph = next(o["graph"] for o in objects if "graph" in o)
    assert [(t["name"], t["op"], t["node"]) for t in graph["graph"]] == [
        ("w", "NONE", None), ("x", "NONE", None), ("y", "MUL_MAT", 0), ("z", "GLU REGLU", 1),
    ]  # fmt: skip
    received = [o for o in objects if o.get("kind") == "answer"]
    assert all(o["latency"] == pytest.approx(1e-5, abs=5e-6) for o in received)
    assert objects[-1]["unanswered"] == []


def test_figures(capture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = dump(capsys, capture, "--stats", "--json")
    figures = json.loads(out)
    assert code == 0
    assert figures["commands"]["SET_TENSOR"]["requests"] == 7
    assert figures["commands"]["GET_TENSOR"]["received"] == 8 * 16
    assert figures["commands"]["GET_TENSOR"]["p50"] == pytest.approx(1e-5, abs=5e-6)
    assert set(figures["steps"]) == {"1 GRAPH_COMPUTE", "1 GRAPH_RECOMPUTE"}
    step = figures["steps"]["1 GRAPH_RECOMPUTE"]
    assert (step["count"], step["requests"], step["round_trips"]) == (3, 4, 2)
    turns = decode_steps(4)[-7:-1]
    assert step["sent"] == sum(len(data) for side, data in turns if side is Side.CLIENT)
    assert step["received"] == 32
    code, out, _ = dump(capsys, capture, "--stats")
    assert "SET_TENSOR" in out
    assert "1 GRAPH_RECOMPUTE" in out


def test_a_graph_as_text_and_for_graphviz(
    capture: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = dump(capsys, capture, "--graph", 1)
    assert code == 0
    assert out.splitlines()[1:] == [
        "    0  MUL_MAT    y  F32 4 <- w (F32 8x4), x (F32 8)",
        "    1  GLU REGLU  z  F32 2 <- y",
    ]
    code, out, _ = dump(capsys, capture, "--graph", 1, "--format", "dot")
    assert out.startswith("digraph")
    assert out.count(" -> ") == 3
    assert '[label="1: GLU REGLU\\nz\\nF32 2", shape=box];' in out
    code, out, err = dump(capsys, capture, "--graph", 2)
    assert (code, out, err) == (1, "", "there are 1 graphs, not 2\n")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    code, out, err = dump(capsys, capture, "--graph", 1, "--format", "svg")
    assert (code, out) == (1, "")
    assert "apt install graphviz" in err


def test_graphviz_is_given_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a program in dot's place: it isn't installed everywhere."""
    program = tmp_path / "dot"
    program.write_text('#!/bin/sh\necho "<svg>$1"; cat\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert graphs.draw("digraph {}\n") == "<svg>-Tsvg\ndigraph {}\n"
    program.write_text("#!/bin/sh\necho bad >&2; exit 3\n")
    with pytest.raises(MissingToolError, match="dot failed: bad"):
        graphs.draw("digraph {}\n")


def test_weights_are_extracted(
    capture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = dump(capsys, capture, "--extract", tmp_path / "weights")
    assert code == 0
    assert "2 tensors, 300000 bytes; 1 complete; 1 that the server had in its cache" in err
    index = json.loads((tmp_path / "weights" / INDEX).read_text())
    weight, cached = index["tensors"]
    assert weight["complete"]
    assert (tmp_path / "weights" / weight["file"]).read_bytes() == WEIGHT
    assert (cached["name"], cached["file"], cached["hash"]) == (
        "output.weight", None, "0000000000abcdef",
    )  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "weights").iterdir()) == [
        "blk.0.attn_q.weight.bin", INDEX,
    ]  # fmt: skip


def test_names_off_the_wire_are_no_paths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = hello(NEWEST)
    for i, name in enumerate(
        ["../../escaped", "/etc/x", "...", "index.json", "a/b", "a_b", "\x1b[2J"]
    ):
        fields = {
            "tensor": tensor_fields(NEWEST, name, (4, 1, 1, 1)), "cache_flag": 0, "offset": 0,
        }  # fmt: skip
        turns.append(request(NEWEST, Command.SET_TENSOR, fields, bytes([i] * 16)))
    # More bytes than the tensor has: not for this file.
    fields["offset"] = 1 << 40
    turns.append(request(NEWEST, Command.SET_TENSOR, fields, bytes(16)))
    path = write_pcapng(tmp_path / "names.pcapng", connection_frames(turns))
    folder = tmp_path / "out" / "deep"
    code, _, _ = dump(capsys, path, "--extract", folder)
    assert code == 0
    tensors = json.loads((folder / INDEX).read_text())["tensors"]
    assert len({t["file"] for t in tensors}) == 7
    for i, tensor in enumerate(tensors):
        assert (folder / tensor["file"]).read_bytes() == bytes([i] * 16)
    assert len(list(folder.iterdir())) == 8
    assert len(list(tmp_path.rglob("*"))) == 8 + 3
    _, out, _ = dump(capsys, path)
    assert "\x1b" not in out


def test_sizes_and_names_that_are_meant_to_hurt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Offsets that no file has are left out; thousands of names alike are numbered at once."""
    turns = hello(NEWEST)
    huge = tensor_fields(NEWEST, "huge", (4, (1 << 32) - 1, (1 << 32) - 1, 1))
    huge["nb"] = [4, (1 << 32) - 1, (1 << 32) - 1, 4]
    for offset in (1 << 63, (1 << 63) - 16, 1 << 62):
        fields = {"tensor": huge, "cache_flag": 0, "offset": offset}
        turns.append(request(NEWEST, Command.SET_TENSOR, fields, bytes(16)))
    for i in range(300):
        same = tensor_fields(NEWEST, "/?"[i % 2] * 3, (4, 1 + i, 1, 1))
        fields = {"tensor": same, "cache_flag": 0, "offset": 0}
        turns.append(request(NEWEST, Command.SET_TENSOR, fields, bytes([i % 256] * 16)))
    path = write_pcapng(tmp_path / "hurt.pcapng", connection_frames(turns))
    code, _, err = dump(capsys, path, "--extract", tmp_path / "out")
    assert code == 0, err
    tensors = json.loads((tmp_path / "out" / INDEX).read_text())["tensors"]
    assert len({t["file"] for t in tensors}) == len(tensors) == 300
    assert tensors[-1]["file"] == "___~300.bin"


def test_names_alike_are_numbered_without_a_search(tmp_path: Path) -> None:
    extractor = Extractor(tmp_path, Filters())
    tried = []

    class Names(set[str]):
        def __contains__(self, name: object) -> bool:
            tried.append(name)
            return super().__contains__(name)

    extractor._names = Names()
    for _ in range(500):
        extractor._file_name("alike")
    assert len(tried) <= 1000


def test_a_session_is_saved(
    capture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = list(read_capture(capture))
    web = connection_frames(
        [(Side.CLIENT, b"GET / HTTP/1.1\r\n\r\n")],
        client=Address("10.0.0.2", 41000),
        server=Address("10.0.0.1", 80),
    )
    mixed = write_pcapng(tmp_path / "mixed.pcapng", sorted([*frames, *web], key=lambda f: f.time))
    saved = tmp_path / "saved.pcapng"
    code, _, err = dump(capsys, mixed, "--save-session", saved)
    assert code == 0
    assert f"{len(frames)} packets of 1 connections" in err
    assert [f.data for f in read_capture(saved)] == [f.data for f in frames]


def test_several_connections_and_the_split_extension(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = connection_frames(split_session(NEWEST))
    second = connection_frames(
        full_session(DIALECTS[-1]), client=Address("10.0.0.3", 40001), start=1000.001
    )
    path = write_pcapng(tmp_path / "two.pcapng", sorted([*first, *second], key=lambda f: f.time))
    code, out, _ = dump(capsys, path)
    assert code == 0
    assert f"HELLO = protocol 7.0.0 split extension {VERSION}" in out
    assert "SPLIT_RUN outputs of step 2, 16 B" in out
    assert "#2   -- closed; protocol 1.0.0" in out
    code, out, _ = dump(capsys, path, "-v", "--hex")
    assert code == 0
    code, out, _ = dump(capsys, path, "--json", "-v")
    assert {o["connection"] for o in map(json.loads, out.splitlines())} == {1, 2}


def test_members_of_a_group_and_their_links(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = connection_frames(member_session(NEWEST, "part 0 hung up"))
    swaps = [(Side.CLIENT, bytes(64)), (Side.SERVER, bytes(16))]
    second = connection_frames(
        link_session(NEWEST, swaps), client=Address("10.0.0.3", 40001), start=1000.001
    )
    path = write_pcapng(tmp_path / "two.pcapng", sorted([*first, *second], key=lambda f: f.time))
    code, out, _ = dump(capsys, path)
    assert code == 0
    assert "number 1 n_parts 2 of 127.0.0.1:9 (to be reached), 10.0.0.1:50052" in out
    assert "2 steps, 2 nodes, 4 tensors, 2 swaps" in out
    assert "SPLIT_RUN outputs of step 2, 22 B [the program failed: part 0 hung up]" in out
    assert "-> SPLIT_JOIN swaps, 64 B" in out
    assert "<- SPLIT_JOIN swaps, 16 B" in out
    code, out, _ = dump(capsys, path, "--stats", "--json")
    totals = json.loads(out)["commands"]["SPLIT_JOIN"]
    assert (totals["sent"], totals["received"]) == (9 + 36 + 64, 9 + 16)
    assert dump(capsys, path, "-v", "--hex")[0] == 0


def test_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [*full_session(NEWEST, 20_000, 15_000), *session(NEWEST, 20_000, 15_000)]
    frames = connection_frames(turns)
    lossy = [f for i, f in enumerate(frames) if i % 13 or i < 5]
    code, out, _ = dump(capsys, write_pcapng(tmp_path / "lossy.pcapng", lossy))
    assert code == 0
    assert "not seen]" in out
    assert "bytes missing from the" in out
    assert "passed over" in out
    code, out, _ = dump(capsys, write_pcapng(tmp_path / "lossy.pcapng", lossy), "--stats")
    assert "interruptions" in out
    late = write_pcapng(tmp_path / "late.pcapng", frames[6:])
    code, out, _ = dump(capsys, late, "--port", 50052, "--protocol", "7.0")
    assert code == 0
    assert "its start was not captured" in out
    short = write_pcapng(tmp_path / "short.pcapng", [cut(f, 200) for f in frames])
    code, out, _ = dump(capsys, short)
    assert code == 0
    assert "cut short by the capture" in out
    shuffled = [*frames[:6], frames[8], frames[6], frames[7], frames[7], *frames[9:]]
    code, out, _ = dump(capsys, write_pcapng(tmp_path / "shuffled.pcapng", shuffled))
    assert code == 0
    assert "out of order" in out
    assert "repeated" in out


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nothing = tmp_path / "nothing.pcap"
    nothing.write_bytes(pcap_bytes(connection_frames([(Side.CLIENT, b"GET / HTTP/1.1\r\n\r\n")])))
    code, out, err = dump(capsys, nothing)
    assert (code, out) == (1, "")
    assert err == "no ggml RPC found: 1 TCP connections were seen\n"
    _, _, err = dump(capsys, nothing, "-p", 7)
    assert err == "no ggml RPC found: no TCP was seen on port 7\n"
    garbage = tmp_path / "garbage"
    garbage.write_bytes(b"no capture at all")
    code, _, err = dump(capsys, garbage)
    assert (code, err) == (1, "neither pcap nor pcapng: the file doesn't begin like one\n")
    code, _, err = dump(capsys, tmp_path / "absent.pcap")
    assert code == 1
    assert "No such file" in err
    code, _, err = dump(capsys, nothing, "--extract", garbage / "below")
    assert code == 1
    for wrong in (
        [],
        [str(nothing), "--live", "lo"],
        [str(nothing), "--command", "NONSENSE"],
        [str(nothing), "--format", "svg"],
        [str(nothing), "--graph", "0"],
        [str(nothing), "--hex", "--json"],
        [str(nothing), "--protocol", "9.9"],
        [str(nothing), "--port", "70000"],
    ):
        with pytest.raises(SystemExit) as stopped:
            main(wrong)
        assert stopped.value.code == 2
    capsys.readouterr()


def test_a_file_cut_off_is_read_to_its_end(
    capture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.pcapng"
    content = capture.read_bytes()
    short.write_bytes(content[: len(content) // 2])
    code, out, err = dump(capsys, short)
    assert code == 0
    assert err == "the capture ends within a packet\n"
    assert "within SET_TENSOR" in out
    damaged = tmp_path / "damaged.pcapng"
    damaged.write_bytes(content[:20_000] + b"\xff" * 100 + content[20_100:])
    code, out, err = dump(capsys, damaged)
    assert "HELLO" in out
    assert code == 0


def test_from_a_pipe_as_it_comes(capture: Path) -> None:
    """Lines appear while the other end of the pipe is open."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.dump", "-"],
        cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    content = pcap_bytes(list(read_capture(capture)))
    process.stdin.write(content[:3000])
    process.stdin.flush()
    first = [process.stdout.readline() for _ in range(3)]
    assert b"HELLO = protocol 7.0.0" in first[2]
    process.stdin.write(content[3000:])
    process.stdin.close()
    assert b"GRAPH_COMPUTE" in process.stdout.read()
    assert process.wait(60) == 0


def test_a_reader_that_leaves_early(capture: Path) -> None:
    program = f"{sys.executable} -m tools.dump {capture} --hex -v | head -1"
    done = subprocess.run(program, shell=True, cwd=PROJECT, capture_output=True, text=True)
    assert (len(done.stdout.splitlines()), done.stderr) == (1, "")


def test_without_the_extra_it_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['dpkt'] = None; sys.argv = ['dump', *sys.argv[1:]];"
        "import runpy; runpy.run_module('tools.dump', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "x.pcap"], cwd=PROJECT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.strip().endswith("pip install 'ggml-rpc-server[tools]'")
    done = subprocess.run(
        [sys.executable, "-c", program, "--help"], cwd=PROJECT, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "tcpdump -i lo" in done.stdout


# -- the terminal -----------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colours_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert Screen(Terminal()).style("x", "command") == "\x1b[1mx\x1b[0m"
    assert Screen(io.StringIO()).style("x", "command") == "x"
    assert Screen(io.StringIO(), "always").style("x", "command") != "x"
    assert Screen(Terminal(), "never").style("x", "command") == "x"
    monkeypatch.setenv("NO_COLOR", "1")
    assert Screen(Terminal()).style("x", "command") == "x"


def test_texts_for_people() -> None:
    assert [duration_text(s) for s in (3e-6, 0.00123, 0.5, 12.345)] == [
        "3 us", "1.23 ms", "500.00 ms", "12.35 s",
    ]  # fmt: skip
    assert printable("a\x1b[31mb\nä") == "a\\x1b[31mb\\x0aä"


# -- listening --------------------------------------------------------------------------------


@pytest.fixture
def fake_tcpdump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in tcpdump's place: the real one takes privileges."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder / "tcpdump"


def test_listening_through_tcpdump(
    fake_tcpdump: Path, capture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_tcpdump.write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/given\ncat {capture}\n'
        "echo 3 packets dropped by kernel >&2\n"
    )
    fake_tcpdump.chmod(0o755)
    code, out, err = dump(capsys, "--live", "lo", "--port", 50052)
    assert code == 0
    assert "GRAPH_COMPUTE" in out
    assert err.startswith("listening on lo")
    assert "3 packets came too fast" in err
    given = (tmp_path / "given").read_text()
    assert "-i lo" in given
    assert given.rstrip().endswith("-U -w - tcp port 50052")


def test_an_interrupt_ends_listening(fake_tcpdump: Path, capture: Path) -> None:
    """What was captured until then is read and told about to the end."""
    fake_tcpdump.write_text(
        f"#!/bin/sh\ntrap 'echo 1 packet dropped by kernel >&2; exit 0' TERM\n"
        f"cat {capture}\nwhile :; do sleep 0.1; done\n"
    )
    fake_tcpdump.chmod(0o755)
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.dump", "--live", "lo"],
        cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    while "GRAPH_COMPUTE" not in (line := process.stdout.readline()):
        assert line
    process.send_signal(signal.SIGINT)
    # Not communicate(): it does not see what readline() has read ahead.
    assert process.stderr is not None
    with process.stdout, process.stderr:
        assert "closed; protocol 7.0.0" in process.stdout.read()
        assert "1 packets came too fast" in process.stderr.read()
    assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("tcpdump: lo: You don't have permission to perform this capture", "CAP_NET_RAW"),
        ("tcpdump: nope: No such device exists", "nope: tcpdump: nope: No such device exists"),
    ],
)
def test_why_it_cannot_listen(
    fake_tcpdump: Path, said: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_tcpdump.write_text(f'#!/bin/sh\necho "{said}" >&2\nexit 1\n')
    fake_tcpdump.chmod(0o755)
    code, out, err = dump(capsys, "--live", "nope")
    assert (code, out) == (1, "")
    assert expected in err


def test_listening_without_tcpdump(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    code, _, err = dump(capsys, "--live", "lo")
    assert code == 1
    assert "apt install tcpdump" in err


# -- large captures ---------------------------------------------------------------------------


def test_a_large_capture_is_counted_with_a_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What tools.bench.dump measures, once; the bar goes to the terminal of stderr."""
    path, converted = tmp_path / "large.pcapng", tmp_path / "large.pcap"
    bench.write_pcapng(path, 1, 65475)
    bench.convert_to_pcap(path, converted)
    terminal = Terminal()
    monkeypatch.setattr(progress, "_FROM_BYTES", 1 << 20)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    for file in (path, converted):
        assert main([str(file), "--stats", "--json"]) == 0
        figures = json.loads(capsys.readouterr().out)
        assert figures["commands"]["SET_TENSOR"]["requests"] == 1
        assert figures["commands"]["SET_TENSOR"]["sent"] == (32 << 20) + 9 + 305
        assert not figures["missing_bytes"]
    assert "large.pcapng" in terminal.getvalue()
