"""Model files in the newest weight types, as llama-quantize writes them, read by our client."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from client.gguf_file import read_tensors
from protocol.ggml.types import GgmlType
from rpc_server.types import to_f32
from tests.e2e import llama
from tools import models


@pytest.mark.parametrize("type_", [GgmlType.Q1_0, GgmlType.Q2_0], ids=lambda t: t.name)
def test_a_model_of_a_type_the_package_gguf_lacks(
    type_: GgmlType, model_folder: Path, tmp_path: Path
) -> None:
    """Each weight is what llama-quantize itself makes of it when it goes back to F32."""
    path = llama.random_model(model_folder, "llama-gqa", type_.name)
    plain = read_tensors(llama.quantize(path, model_folder, "F32"))
    read = read_tensors(path)
    assert read.keys() == plain.keys()
    kinds = [tensor.type for tensor in read.values()]
    assert kinds.count(type_) >= len(kinds) // 2, kinds
    for name, tensor in read.items():
        assert tensor.ne == plain[name].ne
        if tensor.type is type_:
            values = to_f32(type_, tensor.data)
            assert np.array_equal(values, plain[name].data.view(np.float32)), name
    adapter = read_tensors(models.write_lora(path, tmp_path / "adapter.gguf"))
    assert "blk.0.ffn_up.weight.lora_a" in adapter
