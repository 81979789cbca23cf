"""Logits through the server are the local ones: every architecture, cache type, adapter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tests.e2e import llama
from tests.e2e.conftest import StartLlamaServer
from tests.e2e.logits import Request, compute, nmse
from tests.e2e.test_generation import PLAIN_PROMPTS
from tools import models

TEXT = (llama.DATA / "harbour.txt").read_text()
BOUND = 1e-4
# Chance: two equally good roundings don't cost exactly the same.
SLACK = 1.1
Logits = npt.NDArray[np.float32]
# Past the sliding window of the models that have one.
TOKENS, SINGLE = 72, 8


def both(requests: list[Request], rpc: str) -> list[tuple[Logits, Logits]]:
    """The logits of each request, through the server and computed here."""
    expected = compute(requests)
    actual = compute([replace(request, rpc=rpc) for request in requests])
    # A flat or broken answer must not pass by being equal to itself.
    assert all(np.isfinite(logits).all() and logits.std() > 1 for logits in expected)
    return list(zip(actual, expected, strict=True))


@pytest.mark.parametrize("weight_type", ["F16", "F32"])
@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_logits_with_and_without_flash_attention(
    architecture: str, weight_type: str, rpc: str, model_folder: Path
) -> None:
    model = llama.random_model(model_folder, architecture, weight_type)
    requests = [
        Request(str(model), TEXT, TOKENS, SINGLE, flash_attention=setting)
        for setting in ("off", "on")
    ]
    for actual, expected in both(requests, rpc):
        assert nmse(actual, expected) < BOUND


@pytest.mark.parametrize("weight_type", ["Q8_0", "Q4_0", "Q4_K_M"])
@pytest.mark.parametrize("architecture", models.ARCHITECTURES)
def test_quantized_weights_cost_no_more_than_locally(
    architecture: str, weight_type: str, rpc: str, model_folder: Path
) -> None:
    """Against the same weights in F32, computed here.

    Products with quantized weights round activations to 8 bits. A sum in another order, or a
    batch of another size, then moves some by a whole step: local runs differ among themselves
    by more than BOUND. What can be asked is that the rounding costs no more than it does here,
    for the median token: where two experts are nearly level, rounding picks one, and that token's
    logits are others. Half of the tokens come in one batch, half alone, so both ways must be right.
    """
    model = llama.random_model(model_folder, architecture, weight_type)
    unrounded = llama.quantize(model, model_folder, "F32")
    request = Request(str(model), TEXT, TOKENS, TOKENS // 2, flash_attention="on")
    ((actual, expected),) = both([request], rpc)
    (exact,) = compute([replace(request, model=str(unrounded))])
    here, there = (
        np.median([nmse(*pair) for pair in zip(logits, exact, strict=True)])
        for logits in (expected, actual)
    )
    assert there < SLACK * here + BOUND


@pytest.mark.parametrize("cache_type", ["q8_0", "q4_0", "q5_1"])
def test_a_quantized_kv_cache_costs_no_more_than_locally(
    cache_type: str, rpc: str, model_folder: Path
) -> None:
    model = llama.random_model(model_folder, "llama-gqa", "F16")
    plain = Request(str(model), TEXT, TOKENS, SINGLE, flash_attention="on")
    request = replace(plain, cache_k=cache_type, cache_v=cache_type)
    ((actual, expected),) = both([request], rpc)
    (exact,) = compute([replace(plain, cache_k="f32", cache_v="f32")])
    cost = nmse(expected, exact)
    assert cost > BOUND / 2, "the cache type made no difference"
    assert nmse(actual, exact) < SLACK * cost + BOUND
    # And the error is largely the same: that of the codes in the cache.
    assert nmse(actual, expected) < cost


def test_logits_with_a_lora_adapter(rpc: str, model_folder: Path, tmp_path: Path) -> None:
    model = llama.random_model(model_folder, "llama-gqa", "F16")
    adapter = models.write_lora(model, tmp_path / "adapter.gguf")
    plain = Request(str(model), TEXT, TOKENS, SINGLE)
    (without,) = compute([plain])
    ((actual, expected),) = both([replace(plain, lora=str(adapter))], rpc)
    assert nmse(expected, without) > 0.01, "the adapter made no difference"
    assert nmse(actual, expected) < BOUND


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
    model = llama.smollm2("F16")
    options = ("--embedding", "--pooling", "mean")
    local, remote = llama_server(model, *options), llama_server(model, *options, rpc=rpc)
    texts = ("The men look at the sky.", "Interest rates rose by half a point in March.")
    expected = [np.array(local.embed(text), np.float32) for text in texts]
    actual = [np.array(remote.embed(text), np.float32) for text in texts]
    assert nmse(expected[1], expected[0]) > 0.01, "two texts have the same embedding"
    for pair in zip(actual, expected, strict=True):
        assert nmse(*pair) < BOUND
