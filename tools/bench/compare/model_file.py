"""Writes a GGUF llama as the two files that distributed-llama reads: ``.m`` and ``.t``.

Both begin with a magic number and a header of int32 keys and values, little-endian. Behind it the
model has its tensors in a fixed order without names, and the vocabulary has for each token a score,
a length and its bytes. Its Q40 blocks are those of Q4_0, and its rotary embedding turns neighbours,
as GGUF's does, so matrices of Q4_0 are the same bytes in both files.

The vocabulary is for measuring, not for chats: distributed-llama takes every token from BOS on for
a special one, so most text is spelled by single characters.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import numpy.typing as npt

from client.gguf_file import FileTensor, GgufFile
from protocol.ggml.types import GgmlType

_MODEL_MAGIC = 0x0A00ABCD
_VOCABULARY_MAGIC = 0x00567124

# Keys of the model's header, and the values that stand for something.
_VERSION, _ARCHITECTURE, _WIDTH, _FFN_WIDTH, _LAYERS, _HEADS, _KV_HEADS = range(7)
_VOCABULARY, _CONTEXT, _ACTIVATION, _ROPE_BASE, _WEIGHT_TYPE = 9, 10, 11, 12, 13
_HEAD_WIDTH, _EPSILON = 19, 20
_LLAMA, _SILU, _Q40 = 0xABCD00, 1, 2
_EPSILONS = {1e-5: 5, 1e-6: 6}

# Keys of the vocabulary's header.
_TOKENS_VERSION, _TOKENS, _LONGEST, _BOS = range(4)
_END_TOKENS, _ADD_BOS = 9, 10

# A layer's tensors in their order, and whether they are weights of a product.
_LAYER = (
    ("attn_q", True),
    ("attn_k", True),
    ("attn_v", True),
    ("attn_output", True),
    ("ffn_gate", True),
    ("ffn_down", True),
    ("ffn_up", True),
    ("attn_norm", False),
    ("ffn_norm", False),
)


class ConversionError(ValueError):
    """A model that distributed-llama can't run; the message says why."""


@dataclass(frozen=True)
class Converted:
    """The two files, how many matrices had to be quantized anew, and how GGUF writes BOS."""

    model: Path
    vocabulary: Path
    requantized: int
    bos: str


def convert(source: Path, folder: Path) -> Converted:
    """Write both files of a GGUF model into a folder.

    Raises: ConversionError; OSError; ValueError for a file that is no GGUF.
    """
    file = GgufFile(source)
    header = _model_header(file)
    model, vocabulary = folder / f"{source.stem}.m", folder / f"{source.stem}.t"
    with vocabulary.open("wb") as out:
        bos = _write_vocabulary(out, file)
    requantized = 0
    with model.open("wb") as out:
        _write_header(out, _MODEL_MAGIC, header)
        for tensor, weights in _in_order(file, header[_LAYERS]):
            if weights:
                requantized += tensor.type != GgmlType.Q4_0
                out.write(_q4_0(tensor).data)
            else:
                out.write(np.ascontiguousarray(_f32(tensor)).data)
    return Converted(model, vocabulary, requantized, bos)


def _model_header(file: GgufFile) -> dict[int, int]:
    """Return the model's header. Raises ConversionError for what it has no key for."""
    metadata = _Metadata(file)
    architecture = metadata["general.architecture"]
    if architecture != "llama":
        raise ConversionError(f"the architecture is {architecture}, not llama")
    unusual = sorted(set(file.tensors) - _expected(metadata["llama.block_count"]))
    if unusual:
        raise ConversionError(f"it has {unusual[0]}, which has no place there")
    if metadata.get("llama.rope.scaling.type", "none") != "none":
        raise ConversionError("it scales its rotary embedding")
    width, heads = metadata["llama.embedding_length"], metadata["llama.attention.head_count"]
    head_width = metadata.get("llama.attention.key_length", width // heads)
    if metadata.get("llama.rope.dimension_count", head_width) != head_width:
        raise ConversionError("it turns a part of each head only")
    epsilon = metadata["llama.attention.layer_norm_rms_epsilon"]
    exact = next((key for value, key in _EPSILONS.items() if np.isclose(epsilon, value)), None)
    if exact is None:
        raise ConversionError(f"its norms add {epsilon:g}, neither 1e-5 nor 1e-6")
    return {
        _VERSION: 0,
        _ARCHITECTURE: _LLAMA,
        _WIDTH: width,
        _FFN_WIDTH: metadata["llama.feed_forward_length"],
        _LAYERS: metadata["llama.block_count"],
        _HEADS: heads,
        _KV_HEADS: metadata.get("llama.attention.head_count_kv", heads),
        _VOCABULARY: file.tensors["token_embd.weight"].ne[1],
        _CONTEXT: metadata["llama.context_length"],
        _ACTIVATION: _SILU,
        _ROPE_BASE: int(metadata.get("llama.rope.freq_base", 10000)),
        _WEIGHT_TYPE: _Q40,
        _HEAD_WIDTH: head_width,
        _EPSILON: exact,
    }


def _expected(layers: int) -> set[str]:
    names = {f"blk.{n}.{name}.weight" for n in range(layers) for name, _ in _LAYER}
    return names | {"token_embd.weight", "output_norm.weight", "output.weight"}


def _in_order(file: GgufFile, layers: int) -> Iterator[tuple[FileTensor, bool]]:
    """Yield all tensors as the file has them; True: weights of a product."""

    def find(name: str) -> FileTensor:
        if name not in file.tensors:
            raise ConversionError(f"it has no {name}")
        return file.tensors[name]

    yield find("token_embd.weight"), False
    for number in range(layers):
        for name, weights in _LAYER:
            yield find(f"blk.{number}.{name}.weight"), weights
    yield find("output_norm.weight"), False
    # Where it is missing the embeddings serve for both.
    tied = "output.weight" not in file.tensors
    yield find("token_embd.weight" if tied else "output.weight"), True


def _f32(tensor: FileTensor) -> npt.NDArray[np.float32]:
    """Return a tensor's values, rows first."""
    rows = tensor.data.reshape(-1, tensor.data.size * tensor.ne[0] // _elements(tensor))
    kind = gguf.GGMLQuantizationType(int(tensor.type))
    values: npt.NDArray[np.float32] = gguf.quants.dequantize(rows, kind)
    return values


def _elements(tensor: FileTensor) -> int:
    return int(np.prod(tensor.ne, dtype=np.int64))


def _q4_0(tensor: FileTensor) -> npt.NDArray[np.uint8]:
    """Return a matrix in blocks of Q4_0: its own, or made from its values."""
    if tensor.ne[0] % 32:
        raise ConversionError(f"a row has {tensor.ne[0]} elements, no multiple of 32")
    if tensor.type == GgmlType.Q4_0:
        return np.ascontiguousarray(tensor.data)
    blocks = gguf.quants.quantize(_f32(tensor), gguf.GGMLQuantizationType.Q4_0)
    return np.ascontiguousarray(blocks)


def _write_header(out: BinaryIO, magic: int, header: Mapping[int, int]) -> None:
    """Write a magic number, the length of all of the header, and its keys with their values."""
    out.write(struct.pack("<ii", magic, 8 + 8 * len(header)))
    for key, value in header.items():
        out.write(struct.pack("<ii", key, value))


def _write_vocabulary(out: BinaryIO, file: GgufFile) -> str:
    """Write all tokens; returns the text of BOS."""
    metadata = _Metadata(file)
    kind = metadata["tokenizer.ggml.model"]
    if kind not in _SPELLINGS:
        raise ConversionError(f"its vocabulary is of the kind {kind}, neither llama nor gpt2")
    spell = _SPELLINGS[kind]
    types = metadata["tokenizer.ggml.token_type"]
    texts = metadata["tokenizer.ggml.tokens"]
    pieces = [spell(text, gguf.TokenType(type_)) for text, type_ in zip(texts, types, strict=True)]
    if not all(pieces):
        raise ConversionError("a token of its vocabulary is empty")
    # Merges come in the order of their results, where the file doesn't rank them otherwise.
    scores = metadata.get("tokenizer.ggml.scores", [-float(n) for n in range(len(pieces))])
    end = metadata["tokenizer.ggml.eos_token_id"]
    header = {
        _TOKENS_VERSION: 1,
        _TOKENS: len(pieces),
        _LONGEST: max(map(len, pieces)),
        _BOS: metadata.get("tokenizer.ggml.bos_token_id", end),
        _END_TOKENS: 1,
        _ADD_BOS: 1,
    }
    _write_header(out, _VOCABULARY_MAGIC, header)
    out.write(struct.pack("<i", end))
    for score, piece in zip(scores, pieces, strict=True):
        out.write(struct.pack("<fi", score, len(piece)) + piece)
    return str(texts[header[_BOS]])


def _sentencepiece(text: str, kind: gguf.TokenType) -> bytes:
    """Return the bytes of a SentencePiece token: ``<0x0A>`` is one byte, ``▁`` a space."""
    if kind == gguf.TokenType.BYTE:
        return bytes([int(text[3:5], 16)])
    return text.replace("▁", " ").encode()


def _byte_pairs(text: str, kind: gguf.TokenType) -> bytes:
    """Return the bytes of a GPT-2 token, whose every byte is written as a visible character."""
    if kind != gguf.TokenType.NORMAL:
        return text.encode()
    return bytes(_VISIBLE[character] for character in text)


def _visible() -> dict[str, int]:
    """Return the byte of each character of GPT-2's alphabet.

    Bytes that are visible in Latin-1 are themselves; the others follow from U+0100 on, in order.
    """
    itself = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(0x100) if byte not in itself)
    shifted = {chr(0x100 + n): byte for n, byte in enumerate(others)}
    return {**{chr(byte): byte for byte in itself}, **shifted}


_VISIBLE = _visible()
_SPELLINGS: dict[str, Callable[[str, gguf.TokenType], bytes]] = {
    "llama": _sentencepiece,
    "gpt2": _byte_pairs,
}


class _Metadata:
    """A file's metadata by key."""

    def __init__(self, file: GgufFile) -> None:
        self._fields = file.fields

    def __getitem__(self, key: str) -> Any:
        if key not in self._fields:
            raise ConversionError(f"it has no {key}")
        return self._fields[key].contents()

    def get(self, key: str, default: Any) -> Any:
        return self._fields[key].contents() if key in self._fields else default
