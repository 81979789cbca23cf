"""Writes small GGUF models with random weights, one for each architecture a server must compute.

    python -m tools.models DIR                  # every architecture, F16 and Q8_0
    python -m tools.models DIR --only qwen3 --only gemma2
    python -m tools.models smollm2              # none of these: download SmolLM2 for the tests
    python -m tools.models list|index|verify    # what a server with --models has, see on_disk.py

A model here answers nonsense, but computes every operation its architecture is made of. Weights
come from a fixed seed, scaled so that activations stay near one through the layers and logits
spread by a few units: an error then shows in the logits, and is not hidden by a flat output.
Every row length is a multiple of 256, so llama.cpp can quantize a model to any type, K-quants
included. The vocabulary is made of all bytes and some English fragments.

Also here, for tests that need them: a random LoRA adapter for any model file.
"""

from __future__ import annotations

import itertools
import string
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from client.gguf_file import GgufFile
from tools import on_disk, smollm2
from tools.arguments import command_line

Array = npt.NDArray[np.float32]

VOCABULARY_SIZE = 512
CONTEXT_LENGTH = 512
# Weight types a model file is written in: the matrices' type, by the name in the file's name.
WEIGHT_TYPES: dict[str, gguf.GGMLQuantizationType] = {
    "F16": gguf.GGMLQuantizationType.F16,
    "F32": gguf.GGMLQuantizationType.F32,
    "Q8_0": gguf.GGMLQuantizationType.Q8_0,
    "Q4_0": gguf.GGMLQuantizationType.Q4_0,
}


@dataclass(frozen=True)
class Architecture:
    """The shape of one model, and what sets its architecture apart from plain llama.

    ``name``: llama.cpp's name of the architecture. ``query_gain`` scales the query projection:
    above one it makes attention choose between tokens instead of averaging them.
    """

    name: str
    layers: int = 2
    width: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_width: int = 64
    ffn_width: int = 512
    experts: int = 0
    experts_used: int = 0
    query_gain: float = 2.0
    tied_output: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    qkv_bias: bool = False
    vocabulary: int = VOCABULARY_SIZE
    # One fused q, k, v matrix, layer norms with biases, and no gate in the FFN.
    falcon: bool = False
    metadata: Mapping[str, float | int | Sequence[bool]] = field(default_factory=dict)


# As small as llama.cpp takes it: for recording what is sent. Quantizes to types of 32 elements.
TINY = Architecture(
    "llama", layers=1, width=64, heads=2, kv_heads=1, head_width=32, ffn_width=96, vocabulary=32
)

ARCHITECTURES: dict[str, Architecture] = {
    "llama-gqa": Architecture("llama", heads=8, kv_heads=2, head_width=32),
    "llama-mqa": Architecture("llama", heads=4, kv_heads=1),
    "falcon-mqa": Architecture("falcon", heads=4, kv_heads=1, falcon=True),
    "qwen2": Architecture("qwen2", qkv_bias=True),
    # The heads together are wider than the model, as in Qwen3's small sizes.
    "qwen3": Architecture("qwen3", heads=4, head_width=128, qk_norm=True),
    "qwen3moe": Architecture(
        "qwen3moe", heads=4, ffn_width=256, experts=8, experts_used=3, qk_norm=True
    ),
    "llama-moe": Architecture("llama", ffn_width=256, experts=4, experts_used=2),
    # Softcaps low enough, and a window short enough, to matter within a short test.
    "gemma2": Architecture(
        "gemma2",
        tied_output=True,
        post_norms=True,
        metadata={
            "attention.sliding_window": 32,
            "attn_logit_softcapping": 10.0,
            "final_logit_softcapping": 6.0,
        },
    ),
    "gemma3": Architecture(
        "gemma3",
        layers=3,
        kv_heads=1,
        tied_output=True,
        post_norms=True,
        qk_norm=True,
        metadata={
            "attention.sliding_window": 32,
            "attention.sliding_window_pattern": (True, False, True),
            "rope.freq_base_swa": 10000.0,
        },
    ),
}


def model_path(folder: Path, architecture: str, weight_type: str) -> Path:
    """Return where ``write_model`` puts a model, or would."""
    return folder / f"random-{architecture}-{weight_type}.gguf"


def write_model(folder: Path, architecture: str, weight_type: str = "F16") -> Path:
    """Write one model and return its path.

    ``architecture``: a key of ARCHITECTURES; ``weight_type``: a key of WEIGHT_TYPES. The same
    arguments always give the same file.
    """
    shape = ARCHITECTURES[architecture]
    path = model_path(folder, architecture, weight_type)
    _write(path, architecture, shape, _encoded(architecture, shape, weight_type))
    return path


def write_tiny_model(path: Path, ffn_width: int = 96) -> Path:
    """Write TINY, a llama of some ten kilobytes; it knows lower-case letters only.

    Its matrices are F16, so that two servers compute the same but for a little, but the last one,
    Q8_0: llama.cpp treats quantized ones in a way of its own.
    """
    shape = replace(TINY, ffn_width=ffn_width)
    tensors = _encoded("llama-tiny", shape, "F16")
    tensors["output.weight"] = _encoded("llama-tiny", shape, "Q8_0")["output.weight"]
    _write(path, "llama-tiny", shape, tensors)
    return path


# Layers as those of real models: one of a billion parameters, one of seven, and TinyLlama, whose
# vocabulary is a twentieth of what a token reads.
LARGE = Architecture("llama", 1, 2048, heads=32, kv_heads=8, ffn_width=8192)
WIDE = Architecture(
    "llama", 1, 4096, heads=32, kv_heads=32, head_width=128, ffn_width=11008, query_gain=1.0
)
TINYLLAMA = Architecture(
    "llama", 1, 2048, heads=32, kv_heads=4, ffn_width=5632, vocabulary=32000, query_gain=1.0
)
# Its 22 layers in Q4_0.
TINYLLAMA_BYTES = 520 << 20


def write_large_model(
    path: Path, nbytes: int, weight_type: str = "Q8_0", shape: Architecture = LARGE
) -> Path:
    """Write a llama of about ``nbytes`` with layers of a ``shape``.

    For measuring what moves weights: its layers have the same rows, each layer's begin with
    another one, so it is made in seconds and no two matrices have one content. It appears under its
    name in one rename, complete.
    """
    tensors = _encoded("llama-large", shape, weight_type)
    layer = {name: entry for name, entry in tensors.items() if name.startswith("blk.0.")}
    layers = max(1, round(nbytes / sum(values.nbytes for values, _ in layer.values())))
    for name, (values, kind) in layer.items():
        # A layer is a view of these.
        rows = np.concatenate([values, values[: layers - 1]]) if values.ndim > 1 else values
        for number in range(1, layers):
            part = rows[number : number + len(values)] if values.ndim > 1 else values
            tensors[name.replace("blk.0.", f"blk.{number}.")] = part, kind
    scratch = path.with_suffix(".part")
    _write(scratch, path.stem, replace(shape, layers=layers), tensors)
    return scratch.replace(path)


_Encoded = dict[str, tuple[npt.NDArray[Any], gguf.GGMLQuantizationType]]


def _encoded(name: str, shape: Architecture, weight_type: str) -> _Encoded:
    """All tensors of a model as a file holds them."""
    tensors: _Encoded = {}
    for tensor, values in _weights(name, shape).items():
        # Vectors, and the small router of a mixture, are always kept exact.
        exact = values.ndim == 1 or tensor.endswith("ffn_gate_inp.weight")
        kind = gguf.GGMLQuantizationType.F32 if exact else WEIGHT_TYPES[weight_type]
        tensors[tensor] = gguf.quants.quantize(values, kind), kind
    return tensors


def _write(path: Path, name: str, shape: Architecture, tensors: _Encoded) -> None:
    writer = gguf.GGUFWriter(path, shape.name)
    _add_metadata(writer, name, shape)
    _add_vocabulary(writer, shape.vocabulary)
    for tensor, (values, kind) in tensors.items():
        writer.add_tensor(tensor, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_lora(model: Path, path: Path, rank: int = 8, strength: float = 1.0) -> Path:
    """Write a random LoRA adapter for the attention and FFN matrices of a model file.

    ``strength`` is the size of the adapter's part of an activation beside the matrix's own, if
    that has entries near one over the root of its input's length.
    """
    file = GgufFile(model)
    architecture = file.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    random = np.random.default_rng(20240229)
    for name, tensor in file.tensors.items():
        if not name.endswith(_LORA_TARGETS):
            continue
        columns, rows = tensor.ne
        down = random.standard_normal((rank, columns)) / np.sqrt(columns)
        up = random.standard_normal((rows, rank)) * (strength / np.sqrt(rank))
        writer.add_tensor(f"{name}.lora_a", down.astype(np.float32))
        writer.add_tensor(f"{name}.lora_b", up.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_LORA_TARGETS = (
    "attn_q.weight",
    "attn_v.weight",
    "attn_output.weight",
    "ffn_up.weight",
    "ffn_down.weight",
)


def _add_metadata(writer: gguf.GGUFWriter, name: str, shape: Architecture) -> None:
    writer.add_name(f"random {name}")
    writer.add_context_length(CONTEXT_LENGTH)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn_width)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_width)
    writer.add_value_length(shape.head_width)
    writer.add_rope_dimension_count(shape.head_width)
    writer.add_rope_freq_base(10000.0)
    if shape.falcon:
        writer.add_layer_norm_eps(1e-5)
    else:
        writer.add_layer_norm_rms_eps(1e-6)
    if shape.experts:
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(shape.experts_used)
        writer.add_expert_feed_forward_length(shape.ffn_width)
    for key, value in shape.metadata.items():
        full = f"{shape.name}.{key}"
        if isinstance(value, float):
            writer.add_float32(full, value)
        elif isinstance(value, int):
            writer.add_uint32(full, value)
        else:
            writer.add_array(full, list(value))


# The tokens of bytes that aren't ASCII, behind three controls.
_LONG_BYTES = slice(3 + 0x80, 3 + 0x100)

_FRAGMENTS = """
th he in er an re on at en nd ti es or te of ed is it al ar st to nt ng se ha as ou io le ve co me
de hi ri ro ic ne ea ra ce li ch ll be ma si om ur the and ing her ere ent tha nth was eth for dth
▁a ▁b ▁c ▁d ▁e ▁f ▁h ▁i ▁l ▁m ▁n ▁o ▁p ▁r ▁s ▁t ▁w ▁th ▁the ▁an ▁and ▁to ▁of ▁in ▁is ▁it ▁wa ▁was
"""


def _pieces(size: int) -> list[tuple[str, gguf.TokenType]]:
    """A vocabulary of ``size`` tokens: whole, or of a few letters without bytes."""
    pieces: list[tuple[str, gguf.TokenType]] = [
        ("<unk>", gguf.TokenType.UNKNOWN),
        ("<s>", gguf.TokenType.CONTROL),
        ("</s>", gguf.TokenType.CONTROL),
    ]
    if size < VOCABULARY_SIZE:
        pieces += [(text, gguf.TokenType.NORMAL) for text in "▁abcdefghijklmnopqrstuvwxyz.,"]
        return pieces[:size]
    pieces += [(f"<0x{byte:02X}>", gguf.TokenType.BYTE) for byte in range(256)]
    characters = ["▁", *(chr(code) for code in range(33, 127))]
    pieces += [(text, gguf.TokenType.NORMAL) for text in characters]
    pieces += [(text, gguf.TokenType.NORMAL) for text in _FRAGMENTS.split()]
    spare = _capitals()
    pieces += [(next(spare), gguf.TokenType.NORMAL) for _ in range(size - len(pieces))]
    return pieces


def _capitals() -> Iterator[str]:
    """Yield words that no fragment spells, all different, shorter ones first."""
    yield from (a + b for a in "ABCDEFGHIJKLMNOP" for b in "QRSTUVWXYZABCDEF")
    for length in itertools.count(3):
        yield from map("".join, itertools.product(string.ascii_uppercase, repeat=length))


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """A SentencePiece vocabulary: controls, bytes, characters, fragments, then unused tokens."""
    pieces = _pieces(size)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _ in pieces])
    # Merging prefers the higher score: longer pieces first, as a trained vocabulary has it.
    writer.add_token_scores([float(len(text)) for text, _ in pieces])
    writer.add_token_types([int(kind) for _, kind in pieces])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)


def _weights(name: str, shape: Architecture) -> dict[str, Array]:
    """All tensors of a model by name, in F32, rows first as numpy has them."""
    random = np.random.default_rng(zlib.crc32(name.encode()))

    def matrix(*lengths: int, gain: float = 1.0) -> Array:
        values = random.standard_normal(lengths, dtype=np.float32)
        return (values * np.float32(gain / np.sqrt(lengths[-1]))).astype(np.float32)

    def scale(length: int) -> Array:
        return (1.0 + 0.2 * random.standard_normal(length)).astype(np.float32)

    def bias(length: int) -> Array:
        return (0.2 * random.standard_normal(length)).astype(np.float32)

    width, ffn = shape.width, shape.ffn_width
    q_width = shape.heads * shape.head_width
    kv_width = shape.kv_heads * shape.head_width
    tensors: dict[str, Array] = {}
    # A tied matrix serves as output too, so it takes the output's gain.
    tensors["token_embd.weight"] = matrix(shape.vocabulary, width, gain=3.0)
    tensors["output_norm.weight"] = scale(width)
    if shape.falcon:
        tensors["output_norm.bias"] = bias(width)
    if not shape.tied_output:
        tensors["output.weight"] = matrix(shape.vocabulary, width, gain=3.0)
    if shape.vocabulary >= VOCABULARY_SIZE:
        # Bytes of longer characters are never likely: together they would spell none, and
        # programs hold such text back.
        tensors["token_embd.weight" if shape.tied_output else "output.weight"][_LONG_BYTES] = 0
    for layer in range(shape.layers):
        block = f"blk.{layer}."
        tensors[block + "attn_norm.weight"] = scale(width)
        q = matrix(q_width, width, gain=shape.query_gain)
        k = matrix(kv_width, width)
        v = matrix(kv_width, width)
        if shape.falcon:
            tensors[block + "attn_norm.bias"] = bias(width)
            tensors[block + "attn_qkv.weight"] = np.concatenate([q, k, v])
        else:
            for letter, values in zip("qkv", (q, k, v), strict=True):
                tensors[f"{block}attn_{letter}.weight"] = values
                if shape.qkv_bias:
                    tensors[f"{block}attn_{letter}.bias"] = bias(values.shape[0])
        if shape.qk_norm:
            # The norm undoes the projection's gain, so it carries it itself.
            gain = np.float32(shape.query_gain)
            tensors[block + "attn_q_norm.weight"] = scale(shape.head_width) * gain
            tensors[block + "attn_k_norm.weight"] = scale(shape.head_width)
        tensors[block + "attn_output.weight"] = matrix(width, q_width)
        if shape.post_norms:
            tensors[block + "post_attention_norm.weight"] = scale(width)
            tensors[block + "post_ffw_norm.weight"] = scale(width)
        if not shape.falcon:
            tensors[block + "ffn_norm.weight"] = scale(width)
        if shape.experts:
            count = shape.experts
            tensors[block + "ffn_gate_inp.weight"] = matrix(count, width, gain=2.0)
            tensors[block + "ffn_gate_exps.weight"] = matrix(count, ffn, width)
            tensors[block + "ffn_up_exps.weight"] = matrix(count, ffn, width)
            tensors[block + "ffn_down_exps.weight"] = matrix(count, width, ffn)
        else:
            if not shape.falcon:
                tensors[block + "ffn_gate.weight"] = matrix(ffn, width)
            tensors[block + "ffn_up.weight"] = matrix(ffn, width)
            tensors[block + "ffn_down.weight"] = matrix(width, ffn)
    return tensors


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given and given[0] in on_disk.COMMANDS:
        return on_disk.main(given)
    parser = command_line("tools.models", __doc__)
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="where to write; or the word smollm2, see above")
    add("--only", action="append", choices=list(ARCHITECTURES), help="this one; may be repeated")
    add("--type", action="append", choices=list(WEIGHT_TYPES), help="of weights; may be repeated")
    options = parser.parse_args(given)
    if options.folder == Path("smollm2"):
        try:
            print(smollm2.fetch())
        except smollm2.ModelUnavailableError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        return 0
    options.folder.mkdir(parents=True, exist_ok=True)
    for architecture in options.only or ARCHITECTURES:
        for weight_type in options.type or ("F16", "Q8_0"):
            print(write_model(options.folder, architecture, weight_type))
    return 0


if __name__ == "__main__":
    sys.exit(main())
