"""What a model's file says of it, read from the header alone: sizes, layers, heads, products."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from client.gguf_file import GgufFile
from protocol.ggml.types import GgmlType, row_size

_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"


@dataclass(frozen=True, slots=True)
class WeightProduct:
    """Products that a token takes of weights of one shape: ``count`` in all layers together."""

    type: GgmlType
    columns: int
    rows: int
    count: float

    @property
    def nbytes(self) -> int:
        """Return the bytes of one such weight, as far as a token reads it."""
        return row_size(self.type, self.columns) * self.rows


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model as far as its speed is concerned.

    ``weight_bytes`` go to the devices, ``token_bytes`` of them are read for each token: of a
    mixture of experts those in use; ``output_bytes`` among these only for the last token of a
    prompt. ``cache_bytes`` are those of one position in the KV cache.
    """

    name: str
    layers: int
    width: int
    ffn_width: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    weight_bytes: int
    token_bytes: int
    cache_bytes: int
    products: tuple[WeightProduct, ...]
    output_bytes: int = 0

    @classmethod
    def read(cls, path: str | PathLike[str]) -> ModelShape:
        """Read the header of a file, or of all parts of a model that is in several.

        Raises OSError, and ValueError for what is no GGUF of a language model.
        """
        files = [GgufFile(p) for p in _parts(Path(path))]
        fields = _Fields(files[0])
        tensors = {name: t for file in files for name, t in file.tensors.items()}
        tied = _OUTPUT not in tensors
        layers = fields.number("block_count")
        width = fields.number("embedding_length")
        heads = max(1, fields.number("attention.head_count", 1))
        kv_heads = max(1, fields.number("attention.head_count_kv", heads))
        head_width = fields.number("attention.key_length", width // heads)
        value_width = fields.number("attention.value_length", head_width)
        experts = fields.number("expert_count", 0)
        in_use = fields.number("expert_used_count", experts)
        if layers < 1 or width < 1 or not any(len(t.ne) > 1 for t in tensors.values()):
            raise ValueError(f"{path} holds no layers of a language model")
        whole, products, vocabulary = 0, Counter[tuple[GgmlType, int, int]](), 0
        ffn_width = 0
        for name, t in tensors.items():
            if name == _EMBEDDING:
                # llama.cpp looks tokens up on its own side; as the output it is on the device too.
                vocabulary = t.ne[1]
                if not tied:
                    continue
            whole += t.data.nbytes
            if len(t.ne) < 2 or not name.endswith(".weight"):
                continue
            matrices = (in_use if experts and "_exps" in name else t.ne[2]) if len(t.ne) > 2 else 1
            products[t.type, t.ne[0], t.ne[1] * matrices] += 1
            if "ffn_up" in name:
                ffn_width = max(ffn_width, t.ne[1] * matrices)
        output = tensors.get(_EMBEDDING if tied else _OUTPUT)
        made = tuple(WeightProduct(*shape, count) for shape, count in products.items())
        return cls(
            name=Path(path).name,
            layers=layers,
            width=width,
            ffn_width=ffn_width or 4 * width,
            heads=heads,
            kv_heads=kv_heads,
            head_width=head_width,
            vocabulary=vocabulary,
            weight_bytes=whole,
            token_bytes=int(sum(p.nbytes * p.count for p in made)),
            cache_bytes=2 * layers * kv_heads * (head_width + value_width),
            products=made,
            output_bytes=output.data.nbytes if output is not None else 0,
        )


class _Fields:
    """The metadata of the model's architecture."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._architecture = str(self._get("general.architecture") or "")

    def _get(self, key: str) -> Any:
        field = self._file.fields.get(key)
        return None if field is None else field.contents()

    def number(self, key: str, default: int = 0) -> int:
        """Return a number; of one for each layer the largest."""
        value = self._get(f"{self._architecture}.{key}")
        if isinstance(value, list):
            value = max((v for v in value if isinstance(v, int)), default=None)
        return int(value) if isinstance(value, int | float) else default


def _parts(path: Path) -> list[Path]:
    """Return the files of a model, the named one first. Raises ValueError if one is missing."""
    found = _PART.search(path.name)
    if found is None:
        return [path]
    stem, count = path.name[: found.start()], int(found[2])
    names = [path.with_name(f"{stem}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    missing = [p.name for p in names if not p.exists()]
    if missing:
        raise ValueError(f"{path.name} is one of {count} files; {missing[0]} is not beside it")
    return names
