"""The dissector shows in tshark what this project's own decoder reads."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from protocol.commands import Command
from protocol.dialects import DIALECTS
from protocol.ggml.ops import Op
from protocol.messages import RPC_TENSOR_DTYPE, RPC_TENSOR_SIZE, RpcTensor
from protocol.observe.annotate import annotate, op_text, sub_op
from protocol.observe.events import MessageKind, ObservedMessage, Side
from tests.conftest import REQUIRE_UPSTREAM
from tests.protocol.captures import NAMES, collect, collected, path_of
from tests.protocol.transcripts import link_session, member_session
from tests.tools.packets import connection_frames, write_pcapng
from tools.record.frames import Address, TcpFrames
from tools.record.pcapng import PcapngWriter
from tools.wireshark.__main__ import dissector, main
from tools.wireshark.tables import Tables, lua

TSHARK = shutil.which("tshark")
# Read to the last byte and field; of others, that every message is found.
WHOLE = [n for n in NAMES if not n.startswith("llama-")]


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dissector in a file; skips without tshark."""
    if TSHARK is None:
        reason = "no tshark: apt-get install tshark"
        if REQUIRE_UPSTREAM:
            pytest.fail(f"{reason}, although REQUIRE_UPSTREAM is set")
        pytest.skip(reason)
    path = tmp_path_factory.mktemp("wireshark") / "ggml_rpc.lua"
    assert main(["-o", str(path)]) == 0
    return path


@dataclass
class Shown:
    """One message as tshark shows it: its fields with their bytes, and those without any."""

    frame: int
    fields: list[tuple[str, str]] = field(default_factory=list)
    generated: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    # The bytes of a tensor or of outputs.
    data: str = ""

    def one(self, name: str) -> str:
        (value,) = self.generated[name]
        return value


def tshark(script: Path, capture: Path, *options: str, home: Path | None = None) -> bytes:
    assert TSHARK is not None
    # Nothing of the user's may change what is shown.
    environment = {**os.environ, "HOME": str(home or script.parent)}
    done = subprocess.run(
        [TSHARK, "-X", f"lua_script:{script}", "-r", str(capture), *options],
        capture_output=True,
        env=environment,
        timeout=60,
        check=False,
    )
    errors = done.stderr.decode()
    assert "Lua" not in errors, errors
    assert done.returncode == 0, errors
    return done.stdout


def shown(script: Path, capture: Path, *options: str) -> list[Shown]:
    """The messages of a capture as tshark sees them."""
    output = tshark(script, capture, "-T", "pdml", *options)
    return list(_messages(output))


def _messages(pdml: bytes) -> Iterator[Shown]:
    for number, packet in enumerate(ElementTree.fromstring(pdml).iter("packet"), 1):
        for proto in packet.findall("proto"):
            if proto.get("name") == "ggml_rpc":
                message = Shown(number)
                for item in proto.iter("field"):
                    _take(message, item)
                yield message


def _take(message: Shown, item: ElementTree.Element) -> None:
    name = item.get("name", "")
    if not name.startswith("ggml_rpc."):
        return
    leaf = name.removeprefix("ggml_rpc.")
    # What was worked out has no bytes of its own, or those of what it is about.
    if int(item.get("size", 0)) and item.get("value") is not None and not _is_generated(leaf):
        message.fields.append((leaf.rpartition(".")[2], item.get("value", "")))
        if leaf == "data":
            message.data += item.get("value", "")
    else:
        message.generated[leaf].append(item.get("show", ""))


def _is_generated(leaf: str) -> bool:
    return leaf in ("tensor.op_name", "tensor.function")


def expected_fields(message: ObservedMessage) -> list[tuple[str, str]]:
    """The fields of a message with their bytes, by this project's decoder."""
    data = message.data
    found: list[tuple[str, str]] = []
    for span in annotate(message):
        name = span.path.rpartition(".")[2].partition("[")[0]
        if name == "(padding)":
            continue
        found.append((name, data[span.start : span.end].hex()))
    # A request may have a size besides that of its payload.
    at = next((i for i, (name, _) in enumerate(found) if name == "size"), None)
    if at is not None and message.kind in (MessageKind.REQUEST, MessageKind.ANSWER):
        found[at] = ("payload_size", found[at][1])
    return found


def tensors_of(message: ObservedMessage) -> list[tuple[int, int]]:
    """Op and first parameter of every tensor that is shown."""
    found: list[tuple[int, int]] = []
    if message.kind is not MessageKind.REQUEST:
        return found
    for name, value in vars(message.fields).items():
        for tensor in value if name == "srcs" else (value,):
            if hasattr(tensor, "op_params"):
                found.append((tensor.op, tensor.op_params[0]))
    if message.graph is not None:
        tensors = message.graph.tensors
        found += zip(tensors["op"].tolist(), tensors["op_params"][:, 0].tolist(), strict=True)
    return found


def check(seen: list[Shown], messages: list[ObservedMessage], *, whole: bool = True) -> None:
    assert len(seen) == len(messages)
    for found, message in zip(seen, messages, strict=True):
        assert found.one("kind") == message.kind.value
        assert int(found.one("number")) == message.number
        # In a first pass HELLO is shown before it is answered.
        hello = message.kind is MessageKind.REQUEST and message.command is Command.HELLO
        assert found.generated["protocol"] == ([] if hello else [message.dialect.name])
        if message.kind is not MessageKind.REQUEST:
            assert int(found.one("command")) == message.command
            if message.kind is MessageKind.SWAPS:
                assert "time" not in found.generated
                assert found.data == bytes(message.body or b"").hex()
            else:
                assert message.latency is not None
                assert float(found.one("time")) == pytest.approx(message.latency, abs=2e-6)
        if not whole:
            continue
        assert found.fields == expected_fields(message)
        ops = [op_text(op, message.dialect) for op, _ in tensors_of(message)]
        assert found.generated["tensor.op_name"] == ops
        functions = [sub_op(Op(name), parameter, message.dialect) for name, (_, parameter) in
                     zip(ops, tensors_of(message), strict=True)]  # fmt: skip
        assert found.generated["tensor.function"] == [f for f in functions if f]


def messages_of(name: str) -> list[ObservedMessage]:
    return [message for _, message in collected(name).messages]


def joined(names: Sequence[str], path: Path) -> Path:
    """Several captures in one file: sections of pcapng follow each other. tshark starts slowly."""
    path.write_bytes(b"".join(path_of(name).read_bytes() for name in names))
    return path


def test_every_field_is_the_one_that_the_decoder_reads(script: Path, tmp_path: Path) -> None:
    seen = iter(shown(script, joined(WHOLE, tmp_path / "all.pcapng")))
    for name in WHOLE:
        messages = messages_of(name)
        check(list(itertools.islice(seen, len(messages))), messages)
    assert not list(seen)


def test_members_of_a_group_and_their_links(script: Path, tmp_path: Path) -> None:
    """Programs with swaps, what one that fails says, and the bytes on a link."""
    newest, path = DIALECTS[0], tmp_path / "group.pcapng"
    swaps = [(Side.SERVER, bytes(range(200))), (Side.CLIENT, bytes(range(50)))]
    sessions = [
        member_session(newest),
        member_session(newest, "part 0 hung up"),
        link_session(newest, swaps),
    ]
    frames = [
        frame
        for i, turns in enumerate(sessions)
        for frame in connection_frames(
            turns, client=Address("10.0.0.3", 40001 + i), start=1000.0 + i
        )
    ]
    write_pcapng(path, frames)
    messages = [message for _, message in collect(path).messages]
    assert sum(m.kind is MessageKind.SWAPS for m in messages) == 2
    check(shown(script, path), messages)


def test_every_message_is_found(script: Path, tmp_path: Path) -> None:
    names = sorted(set(NAMES) - set(WHOLE))
    output = tshark(
        script, joined(names, tmp_path / "all.pcapng"), "-T", "fields", "-Y", "ggml_rpc",
        *("-E", "aggregator=;", "-e", "ggml_rpc.command", "-e", "ggml_rpc.kind"),
        *("-e", "ggml_rpc.tensor.op_name"),
    )  # fmt: skip
    commands: list[int] = []
    kinds: list[str] = []
    ops: list[str] = []
    for line in output.decode().splitlines():
        columns = [c.split(";") if c else [] for c in line.split("\t")]
        commands += map(int, columns[0])
        kinds += columns[1]
        ops += columns[2]
    messages = [message for name in names for message in messages_of(name)]
    assert commands == [int(m.command) for m in messages]
    assert kinds == [m.kind.value for m in messages]
    assert ops == [op_text(op, m.dialect) for m in messages for op, _ in tensors_of(m)]


# -- streams cut otherwise ------------------------------------------------------------------------


def cut_anew(name: str, path: Path, sizes: tuple[int, int], seed: int = 3) -> None:
    """The capture with its segments cut at other places, sizes between the two of ``sizes``."""
    rng = random.Random(seed)
    writer = PcapngWriter(path)
    time = 0
    open_: dict[int, TcpFrames] = {}
    for connection, message in collected(name).messages:
        if connection.number not in open_:
            client = Address("10.0.0.1", 40000 + connection.number)
            open_[connection.number] = TcpFrames(client, Address("10.0.0.2", 50099))
            for frame in open_[connection.number].opened():
                writer.packet(time, *frame)
        data = message.data
        while data:
            time += 1000
            part, data = data[: (n := rng.randint(*sizes))], data[n:]
            for frame in open_[connection.number].data(message.side, part):
                writer.packet(time, *frame)
    writer.close()


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("cache-7.0.0", (1, 20)), ("split-7.0.0", (100, 3000)), ("own-1.0.0", (60000, 60000))],
)
def test_messages_may_be_cut_anywhere(
    name: str, sizes: tuple[int, int], script: Path, tmp_path: Path
) -> None:
    path = tmp_path / "cut.pcapng"
    cut_anew(name, path, sizes)
    check(shown(script, path), [message for _, message in collect(path).messages])


def test_large_data_are_shown_packet_by_packet(script: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.pcapng"
    cut_anew("split-7.0.0", path, (500, 900))
    messages = [message for _, message in collect(path).messages]
    seen = shown(script, path, "-o", "ggml_rpc.most:1000")
    large = [m for m in messages if m.body_size > 1000 and m.graph is None]
    assert {m.kind for m in large} == {MessageKind.REQUEST, MessageKind.OUTPUTS}
    found: dict[int, str] = defaultdict(str)
    for part in seen:
        found[int(part.one("number"))] += part.data
    expected: dict[int, str] = defaultdict(str)
    for m in messages:
        expected[m.number] += bytes(m.body or b"").hex() if m.graph is None else ""
    assert found == expected
    assert sum("kind" not in part.generated for part in seen) > 10
    # And what comes after them is read as ever.
    assert [int(s.one("number")) for s in seen if "kind" in s.generated] == [
        m.number for m in messages
    ]


@contextlib.contextmanager
def written_to(path: Path, port: int = 50052) -> Iterator[Callable[[int, Side, bytes], None]]:
    """A capture of one connection: what writes bytes of a side to it, with their time."""
    writer = PcapngWriter(path)
    frames = TcpFrames(Address("10.0.0.1", 40000), Address("10.0.0.2", port))
    for frame in frames.opened():
        writer.packet(0, *frame)

    def write(time: int, side: Side, data: bytes) -> None:
        for frame in frames.data(side, data):
            writer.packet(time, *frame)

    yield write
    writer.close()


def test_an_upload_of_many_megabytes(script: Path, tmp_path: Path) -> None:
    """As large as tensors are; only its head is kept together."""
    source = messages_of("own-3.6.1")
    upload = next(m for m in source if m.command.name == "SET_TENSOR")
    hello = source[:2]
    data = np.random.default_rng(0).bytes(24 << 20)
    head = bytearray(upload.head)
    head[1:9] = (len(upload.head) - 9 + len(data)).to_bytes(8, "little")
    path = tmp_path / "large.pcapng"
    sent = [(m.side, m.data) for m in hello]
    sent += [(Side.CLIENT, bytes(head) + data)]
    sent += [(m.side, m.data) for m in source if m.command.name == "GET_ALIGNMENT"]
    with written_to(path) as write:
        for i, (side, part) in enumerate(sent):
            write(i, side, part)
    output = tshark(
        script, path, "-T", "fields", "-Y", "ggml_rpc.kind", "-e", "ggml_rpc.command",
        *("-e", "ggml_rpc.kind", "-e", "ggml_rpc.data_size"),
    ).decode()  # fmt: skip
    lines = [line.split("\t") for line in output.splitlines()]
    assert [line[:2] for line in lines] == [
        ["14", "request"], ["14", "answer"], ["6", "request"], ["1", "request"], ["1", "answer"]
    ]  # fmt: skip
    assert lines[2][2] == str(len(data))


def test_a_connection_without_its_beginning(script: Path, tmp_path: Path) -> None:
    """Known by its port, and read as the version that the user names."""
    path = tmp_path / "joined.pcapng"
    messages = messages_of("own-3.6.1")
    writer = PcapngWriter(path)
    frames = TcpFrames(Address("10.0.0.1", 40000), Address("10.0.0.2", 50052))
    for i, message in enumerate(messages):
        for frame in frames.data(message.side, message.data):
            if message.command is not Command.HELLO:
                writer.packet(i * 1000, *frame)
    writer.close()
    seen = shown(script, path, "-o", "ggml_rpc.version:3.6.1")
    rest = messages[2:]
    assert [s.fields for s in seen] == [expected_fields(m) for m in rest]
    assert {s.one("protocol") for s in seen} == {"3.6.1"}


def test_what_is_not_ggml_rpc_is_left_alone(script: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.pcapng"
    parts = (b"GET / HTTP/1.1\r\n\r\n", b"\x0e", b"\x0e" + bytes(7) + b"\x01")
    with written_to(path, 8080) as write:
        for i, part in enumerate(parts):
            write(i, Side.CLIENT, part)
    assert tshark(script, path, "-Y", "ggml_rpc") == b""


def test_bytes_that_are_no_message_are_told(script: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken.pcapng"
    with written_to(path) as write:
        for message in messages_of("own-3.6.1")[:2]:
            write(1, message.side, message.data)
        write(2, Side.CLIENT, b"\xff" * 40)
    output = tshark(script, path, "-Y", "ggml_rpc.unreadable").decode()
    assert "command 255 of" in output
    assert "is no request of protocol 3.6.1" in output


def test_both_passes_show_the_same_and_the_second_the_answers(script: Path) -> None:
    """Wireshark reads a file once and shows packets afterwards, in any order."""
    options = ("-T", "fields", "-e", "frame.number", "-e", "ggml_rpc.answer_in", "-Y")
    capture = path_of("cache-7.0.0")
    twice = tshark(script, capture, "-2", *options, "ggml_rpc.answer_in")
    once = shown(script, capture)
    again = shown(script, capture, "-2")
    assert [s.fields for s in once] == [s.fields for s in again]
    pairs = {tuple(line.split("\t")) for line in twice.decode().splitlines()}
    answers = {
        (message.one("request_in"), str(message.frame))
        for message in once
        if message.one("kind") == "answer"
    }
    assert {(a, b) for a, bs in pairs for b in bs.split(",")} == answers


# -- the tables, without tshark -------------------------------------------------------------------


def test_lua_values() -> None:
    assert lua({"a": [1, True, 'x"\\'], 3: {}}) == '{a = {1, true, "x\\"\\\\"}, [3] = {}}'


def test_every_struct_version_and_op_is_in_the_tables() -> None:
    tables = Tables()
    text = tables.text()
    for dialect in DIALECTS:
        assert f'name = "{dialect.name}"' in text
        for spec in dialect.commands.values():
            assert tables.layouts[tables.layout(spec.request)]["size"] == spec.request.sizeof()
    for op in Op:
        assert f'"{op}"' in text
    tensor = tables.layouts["RpcTensor"]
    assert tensor["size"] == RPC_TENSOR_SIZE == RpcTensor.sizeof()
    offsets = {f["name"]: f["at"] for f in tensor["fields"]}
    assert offsets == {n: field[1] for n, field in (RPC_TENSOR_DTYPE.fields or {}).items()}
    assert "-- TABLES" not in dissector()


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-o", "-", "--port", "7777"]) == 0
    assert "local DEFAULT_PORT = 7777" in capsys.readouterr().out
    assert main(["-o", str(tmp_path / "no" / "where.lua")]) == 1
    assert "can't write" in capsys.readouterr().err
