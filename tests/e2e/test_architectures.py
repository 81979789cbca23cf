"""Logits through the server are the local ones: every architecture, cache type, adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.e2e import llama
from tests.e2e.conftest import StartLlamaServer
from tests.e2e.logits import Request, compute, nmse
from tests.e2e.test_generation import PLAIN_PROMPTS
from tools import models

TEXT = (llama.DATA / "harbour.txt").read_text()
BOUND = 1e-4
# Past the sliding window of the models that have one.
TOKENS, SINGLE = 72, 8


def errors(requests: list[Request], rpc: str) -> list[float]:
    """The NMSE of each request's logits through the server, over all its tokens."""
    expected = compute(requests)
    actual = compute([replace(request, rpc=rpc) for request in requests])
    # A flat or broken answer must not pass by being equal to itself.
    assert all(np.isfinite(logits).all() and logits.std() > 1 for logits in expected)
    return [nmse(*pair) for pair in zip(actual, expected, strict=True)]


@pytest.mark.parametrize("weight_type", ["F16", "Q8_0", "Q4_K_M"])
@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_logits_with_and_without_flash_attention(
    architecture: str, weight_type: str, rpc: str, model_folder: Path
) -> None:
    model = llama.random_model(model_folder, architecture, weight_type)
    requests = [
        Request(str(model), TEXT, TOKENS, SINGLE, flash_attention=setting)
        for setting in ("off", "on")
    ]
    assert max(errors(requests, rpc)) < BOUND


@pytest.mark.parametrize("cache_type", ["q8_0", "q4_0", "q5_1"])
def test_logits_with_a_quantized_kv_cache(cache_type: str, rpc: str, model_folder: Path) -> None:
    model = llama.random_model(model_folder, "llama-gqa", "F16")
    plain = Request(str(model), TEXT, TOKENS, SINGLE, flash_attention="on")
    request = replace(plain, cache_k=cache_type, cache_v=cache_type)
    exact, quantized = compute([plain, request])
    assert nmse(quantized, exact) > BOUND / 10, "the cache type made no difference"
    assert max(errors([request], rpc)) < BOUND


@pytest.mark.parametrize("weight_type", ["F16", "Q8_0"])
def test_logits_with_a_lora_adapter(
    weight_type: str, rpc: str, model_folder: Path, tmp_path: Path
) -> None:
    model = llama.random_model(model_folder, "llama-gqa", weight_type)
    adapter = models.write_lora(model, tmp_path / "adapter.gguf")
    plain = Request(str(model), TEXT, TOKENS, SINGLE)
    request = replace(plain, lora=str(adapter))
    without, adapted = compute([plain, request])
    assert nmse(adapted, without) > 0.01, "the adapter made no difference"
    assert max(errors([request], rpc)) < BOUND


@pytest.mark.parametrize("cache_type", ["q8_0", "q4_0"])
def test_text_with_a_quantized_kv_cache(
    cache_type: str, rpc: str, llama_server: StartLlamaServer
) -> None:
    model = llama.smollm2(llama.SMOLLM2_TYPE)
    options = ("-ctk", cache_type, "-ctv", cache_type, "-fa", "on")
    prompt = PLAIN_PROMPTS[0]
    expected = llama_server(model, *options).generate(prompt, 32)
    actual = llama_server(model, *options, rpc=rpc).generate(prompt, 32)
    gap = llama.gap_where_different(expected, actual)
    assert gap is None or gap < llama.NEAR_TIE


def test_embeddings(rpc: str, llama_server: StartLlamaServer) -> None:
    model = llama.smollm2(llama.SMOLLM2_TYPE)
    options = ("--embedding", "--pooling", "mean")
    local, remote = llama_server(model, *options), llama_server(model, *options, rpc=rpc)
    texts = ("The men look at the sky.", "Interest rates rose by half a point in March.")
    expected = [np.array(local.embed(text), np.float32) for text in texts]
    actual = [np.array(remote.embed(text), np.float32) for text in texts]
    assert nmse(expected[1], expected[0]) > 0.01, "two texts have the same embedding"
    for pair in zip(actual, expected, strict=True):
        assert nmse(*pair) < BOUND
