"""tools.bench.compare: the files it writes, what it reads of dllama, its table, a real run."""

from __future__ import annotations

import argparse
import json
import shutil
import struct
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from client.gguf_file import GgufFile
from protocol.ggml.types import GgmlType
from tools import models, upstream
from tools.bench.compare import __main__ as compare
from tools.bench.compare import dllama
from tools.bench.compare.dllama import TokenRates
from tools.bench.compare.model_file import ConversionError, Converted, convert
from tools.bench.cores import OtherWork, busy_seconds, on_core
from tools.serving.processes import ProgramError

SHAPE = models.Architecture(
    "llama", 1, 64, heads=4, kv_heads=2, head_width=16, ffn_width=96, vocabulary=600
)

# Whole key/value heads for each of two nodes, in rows that both can cut.
WIDE = models.Architecture("llama", 1, 256, heads=4, kv_heads=2, ffn_width=512)


def llama(folder: Path, weight_type: str = "Q4_0", shape: models.Architecture = SHAPE) -> Path:
    """A llama of two layers that are the same."""
    return models.write_large_model(folder / "m.gguf", 48_000, weight_type, shape)


def header(data: bytes, magic: int) -> tuple[dict[int, int], int]:
    """The keys of a header with their values, and where it ends."""
    found, length = struct.unpack_from("<ii", data)
    assert found == magic
    words = struct.unpack_from(f"<{(length - 8) // 4}i", data, 8)
    return dict(zip(words[::2], words[1::2], strict=True)), length


# -- the files


def test_a_model_of_q4_0_keeps_its_bytes(tmp_path: Path) -> None:
    source = llama(tmp_path)
    tensors = GgufFile(source).tensors
    layers = sum(name.endswith("attn_q.weight") for name in tensors)
    made = convert(source, tmp_path)
    assert (made.requantized, made.bos) == (0, "<s>")
    data = made.model.read_bytes()
    keys, at = header(data, 0x0A00ABCD)
    assert keys == {
        **{0: 0, 1: 0xABCD00, 2: 64, 3: 96, 4: layers, 5: 4, 6: 2, 9: 600, 10: 512},
        **{11: 1, 12: 10000, 13: 2, 19: 16, 20: 6},
    }
    order = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_down", "ffn_up"]
    names = ["token_embd.weight"]
    for n in range(layers):
        names += [f"blk.{n}.{name}.weight" for name in (*order, "attn_norm", "ffn_norm")]
    for name in (*names, "output_norm.weight", "output.weight"):
        tensor = tensors[name]
        expected = tensor.data.tobytes()
        if name == "token_embd.weight":
            rows = tensor.data.reshape(600, -1)
            expected = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType.Q4_0).tobytes()
        assert data[at : at + len(expected)] == expected, name
        at += len(expected)
    assert at == len(data)


def test_other_weights_are_quantized(tmp_path: Path) -> None:
    source = llama(tmp_path, "F16", replace(SHAPE, tied_output=True))
    tensors = GgufFile(source).tensors
    made = convert(source, tmp_path)
    # Seven a layer, and the embeddings once more as output.
    layers = sum(name.endswith("attn_q.weight") for name in tensors)
    assert made.requantized == 7 * layers + 1
    last = made.model.read_bytes()[-600 * 2 * 18 :]
    blocks = np.frombuffer(last, np.uint8).reshape(600, -1)
    values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_0)
    table = tensors["token_embd.weight"]
    assert table.type == GgmlType.F16
    exact = table.data.view(np.float16).reshape(600, 64).astype(np.float32)
    step = np.abs(exact).reshape(-1, 32).max(axis=1) / 8
    assert (np.abs(values - exact).reshape(-1, 32).max(axis=1) <= 1.01 * step).all()


def test_tokens_are_bytes(tmp_path: Path) -> None:
    made = convert(llama(tmp_path), tmp_path)
    data = made.vocabulary.read_bytes()
    keys, at = header(data, 0x00567124)
    assert keys == {0: 1, 1: 600, 2: keys[2], 3: 1, 9: 1, 10: 1}
    assert struct.unpack_from("<i", data, at) == (2,)
    at += 4
    pieces = []
    for _ in range(600):
        _, length = struct.unpack_from("<fi", data, at)
        pieces.append(data[at + 8 : at + 8 + length])
        at += 8 + length
    assert at == len(data)
    assert max(map(len, pieces)) == keys[2]
    assert pieces[3 + 0x41] == b"A"
    assert b" the" in pieces
    assert len(set(pieces[3 + 256 :])) == 600 - 3 - 256


def test_tokens_of_byte_pairs(tmp_path: Path) -> None:
    source = GgufFile(llama(tmp_path))
    writer = gguf.GGUFWriter(tmp_path / "bpe.gguf", "llama")
    for key, field in source.fields.items():
        if key.startswith("llama."):
            writer.add_key_value(key, field.contents(), field.types[0])
    writer.add_tokenizer_model("gpt2")
    tokens = ["<|end|>", "Ġa", "Ċ", "é"] + [f"t{n}" for n in range(596)]
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * 599)
    writer.add_eos_token_id(0)
    for name, tensor in source.tensors.items():
        rows = tensor.data.reshape(tensor.ne[-1], -1) if len(tensor.ne) > 1 else tensor.data
        kind = gguf.GGMLQuantizationType(int(tensor.type))
        values = rows.view(np.float32) if len(tensor.ne) == 1 else rows
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    made = convert(tmp_path / "bpe.gguf", tmp_path)
    data = made.vocabulary.read_bytes()
    keys, at = header(data, 0x00567124)
    # Without a token that begins texts, the one that ends them does.
    assert (keys[3], made.bos) == (0, "<|end|>")
    at += 4
    found = []
    for _ in range(4):
        score, length = struct.unpack_from("<fi", data, at)
        found.append((score, data[at + 8 : at + 8 + length]))
        at += 8 + length
    assert found == [(0.0, b"<|end|>"), (-1.0, b" a"), (-2.0, b"\n"), (-3.0, b"\xe9")]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("qwen3", "architecture is qwen3"),
        ("llama-moe", "ffn_down_exps"),
    ],
)
def test_what_it_can_not_run_is_refused(name: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=why):
        convert(models.write_model(tmp_path, name), tmp_path)


# -- dllama


PROGRAM = """\
    #!{python}
    import socket, sys
    words = sys.argv[1:]
    if words[0] == "worker":
        server = socket.create_server(("127.0.0.1", int(words[words.index("--port") + 1])))
        server.accept()[0].recv(1)
        sys.exit()
    if "--workers" in words:
        host, port = words[words.index("--workers") + 1].split(":")
        socket.create_connection((host, int(port))).sendall(b"x")
    prompt = words[words.index("--prompt") + 1]
    if prompt == "99":
        sys.exit("no such model")
    for piece in "a", "~", "b | c", " d":
        print(f"🔶 Pred    1 ms Sync    0 ms | Sent     0 kB Recv     0 kB | {{piece}}")
    if not prompt:
        sys.exit()
    print("Evaluation")
    print("   nBatches: 32")
    print(f"   tokens/s: {{len(prompt)}}.50 (12.30 ms/tok)")
    print("Prediction")
    print("    nTokens: 8")
    print(f"   tokens/s: {{words[words.index('--steps') + 1]}}.25 (1.00 ms/tok)")
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """Prints as dllama does, on one node and on two."""
    path = tmp_path / "dllama"
    path.write_text(textwrap.dedent(PROGRAM).format(python=sys.executable))
    path.chmod(0o755)
    return path


FILES = Converted(Path("m.m"), Path("m.t"), 0, "<s>")


@pytest.mark.parametrize("nodes", [1, 2])
def test_speeds_are_read(program: Path, nodes: int) -> None:
    assert dllama.measure(program, FILES, nodes, 16, 8) == TokenRates(16.5, 24.25)


def test_its_text_is_read(program: Path) -> None:
    assert dllama.text_from_bos(program, FILES, 4) == "ab | c d"


def test_a_program_that_fails(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ProgramError, match="tell its speed"):
        dllama.measure(program, FILES, 1, 0, 1)
    program.write_text(f"#!{sys.executable}\nimport sys; print('why'); sys.exit(3)\n")
    with pytest.raises(ProgramError, match=r"(?s)ended with 3.*why"):
        dllama.measure(program, FILES, 1, 1, 1)


def test_it_is_built_in_its_folder(tmp_path: Path) -> None:
    with pytest.raises(ProgramError, match="no Makefile"):
        dllama.build(tmp_path)
    if not shutil.which("make"):
        pytest.skip("no make")
    makefile = tmp_path / "Makefile"
    makefile.write_text("dllama:\n\techo > dllama\n")
    assert dllama.build(tmp_path) == tmp_path.resolve() / "dllama"
    assert dllama.version(tmp_path) == "unknown"
    (tmp_path / "dllama").unlink()
    makefile.write_text("dllama:\n\t@echo no compiler >&2; false\n")
    with pytest.raises(ProgramError, match="no compiler"):
        dllama.build(tmp_path)


# -- the table


def options(**values: object) -> argparse.Namespace:
    return argparse.Namespace(**{"nodes": (1, 2), "prompt": 8, "generate": 4, **values})


def test_rows_follow_what_is_there() -> None:
    rows = compare.plan(options(), Path("dllama"), FILES)
    assert sum("distributed-llama" in row.name for row in rows) == 2
    assert {row.nodes for row in compare.plan(options(nodes=[2]), None, None)} == {2}
    assert compare.BASE in [row.name for row in compare.plan(options(), None, None)]
    assert len({row.name for row in rows}) == len(rows)


def test_ratios_are_taken_within_a_round() -> None:
    speeds = {compare.BASE: [10.0, 1.0, 4.0], "other": [20.0, 3.0, 4.0]}
    taken: list[str] = []

    def measure(name: str) -> TokenRates:
        taken.append(name)
        return TokenRates(100.0, speeds[name][taken.count(name) - 1])

    rows = [
        compare.ComparisonRow(compare.BASE, 1, lambda: measure(compare.BASE)),
        compare.ComparisonRow("other", 2, lambda: measure("other")),
    ]
    kept: list[int] = []
    measured = compare.run(rows, 3, lambda found: kept.append(len(found["other"].other)))
    assert kept == [0, 1, 2, 2, 2, 3]
    # Neither always comes second.
    assert taken[:4] == [compare.BASE, "other", "other", compare.BASE]
    text = compare.table(rows, measured)
    assert "| other | 4.00 | 3.00 to 20.0 | 2.00 (1.00 to 3.00) | 100 |" in text
    assert text.count("| Two nodes |") == 1
    assert "| - |" in compare.table(rows[1:], {"other": measured["other"]})


# -- cores


def test_children_run_on_one_core() -> None:
    code = "import os; print(len(os.sched_getaffinity(0)))"
    with on_core(1):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "1"


def test_what_the_system_counts_as_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sysconf", lambda name: 100)
    text = "cpu  100 20 300 9999 50 6 7 8 0 0\ncpu0 1 2 3\n"
    assert busy_seconds(text) == 4.41
    with OtherWork() as other:
        pass
    assert other.cores >= 0


# -- a real run


@pytest.mark.slow
@pytest.mark.upstream
def test_a_small_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if upstream.find_program("llama-bench") is None:
        pytest.skip("no llama-bench: python -m tools.upstream")
    model = models.write_large_model(tmp_path / "m.gguf", 1 << 20, "Q4_0", WIDE)
    words = ["--model", str(model), "-p", "8", "-n", "4", "--rounds", "1"]
    assert compare.main([*words, "--json", str(tmp_path / "r.json")]) == 0
    assert "| upstream, `-sm tensor` over two servers |" in capsys.readouterr().out
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert len(rows) == 10
    assert all(values["generate"][0] > 0 for values in rows.values())


def test_no_such_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["--distributed-llama", str(tmp_path)]) == 1
    assert "no Makefile" in capsys.readouterr().err
