"""Several llama.cpp clients on one server, and clients that die."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor

from tests.e2e import llama
from tests.e2e.conftest import Serve, StartClient, StartLlamaServer, needs_own_server
from tests.e2e.test_generation import PLAIN_PROMPTS

MEGABYTE = 1 << 20
MODEL_TYPE = llama.SMOLLM2_TYPE
PROMPTS = (
    "The history of the bicycle begins",
    "Once upon a time, in a village by the sea, there lived",
)


def test_four_slots_answer_as_one(rpc: str, llama_server: StartLlamaServer) -> None:
    model = llama.smollm2(MODEL_TYPE)
    local = llama_server(model)
    prompts = PLAIN_PROMPTS[:4]
    expected = [local.generate(prompt, 32) for prompt in prompts]
    local.stop()
    remote = llama_server(model, rpc=rpc, slots=4)
    with ThreadPoolExecutor(4) as pool:
        actual = list(pool.map(lambda prompt: remote.generate(prompt, 32), prompts))
    gaps = [llama.gap_where_different(*pair) for pair in zip(expected, actual, strict=True)]
    # Rows of a larger batch are summed in another order, so each text may part at a tie.
    assert all(gap is None or gap < llama.NEAR_TIE for gap in gaps), gaps


@needs_own_server
def test_a_second_client_beside_a_busy_llama_server(
    rpc: str, llama_server: StartLlamaServer
) -> None:
    model = llama.smollm2(MODEL_TYPE)
    alone = llama.completion(model, PROMPTS[0], 32, rpc=rpc)
    remote = llama_server(model, rpc=rpc, slots=4)
    undisturbed = remote.generate(PROMPTS[1], 96)
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(remote.generate, PROMPTS[1], 96)
        together = llama.completion(model, PROMPTS[0], 32, rpc=rpc)
        disturbed = busy.result()
    assert together == alone
    assert [token.id for token in disturbed] == [token.id for token in undisturbed]


@needs_own_server
def test_a_killed_client_leaves_no_memory_and_disturbs_nobody(
    serve: Serve, start_client: StartClient
) -> None:
    model = llama.smollm2(MODEL_TYPE)
    server = serve()
    alone = llama.completion(model, PROMPTS[0], 48, rpc=server.address)
    before = _settled(server)
    victim = start_client(model, PROMPTS[1], 400, rpc=server.address)
    victim.wait_until(lambda: len(victim.log) > 20, 60, "generated text")
    grown = server.rss() - before
    assert grown > 50 * MEGABYTE, "the client's weights should be in the server's memory"
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(llama.completion, model, PROMPTS[0], 48, rpc=server.address)
        time.sleep(0.5)
        assert victim.alive, "the client had ended before it could be killed"
        victim.kill()
        assert other.result() == alone
    server.wait_until(
        lambda: server.rss() - before < grown / 4, 20, "release of a dead client's memory"
    )
    # Clients that end as they should free what they allocated; only the killed one left buffers.
    left = r"disconnected; freed [1-9]\d* buffers"
    # It is said once the system has the memory.
    server.wait_for(left)
    assert len(re.findall(left, server.log)) == 1


@needs_own_server
def test_a_client_killed_while_it_uploads(serve: Serve, start_client: StartClient) -> None:
    # The largest of the models: its upload lasts longest.
    large = llama.smollm2("F16")
    small = llama.smollm2(MODEL_TYPE)
    server = serve()
    alone = llama.completion(small, PROMPTS[0], 8, rpc=server.address)
    # Kernels for the large one's types stay in memory: they are no part of what is looked for.
    llama.completion(large, PROMPTS[0], 2, rpc=server.address)
    before = _settled(server)
    victim = start_client(large, PROMPTS[1], 400, rpc=server.address)
    server.wait_until(lambda: server.rss() > before + 20 * MEGABYTE, 60, "upload")
    victim.kill()
    assert llama.completion(small, PROMPTS[0], 8, rpc=server.address) == alone
    server.wait_until(
        lambda: server.rss() < before + 20 * MEGABYTE, 20, "release of a dead client's memory"
    )


def _settled(server: llama.RpcServer) -> int:
    """The server's memory once it has stopped shrinking after a client left."""
    last = server.rss()
    for _ in range(50):
        time.sleep(0.2)
        now = server.rss()
        if now >= last - MEGABYTE:
            return now
        last = now
    return last
