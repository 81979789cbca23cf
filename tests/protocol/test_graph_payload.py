"""GRAPH_COMPUTE's payload: what is written is read, what is cut or padded is refused."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.dialects import DIALECTS, Dialect
from protocol.errors import ProtocolError
from protocol.graph_payload import GraphPayload, decode_graph, encode_graph
from protocol.messages import RPC_TENSOR_DTYPE, RPC_TENSOR_SIZE

dialects = pytest.mark.parametrize("dialect", [DIALECTS[0], DIALECTS[-1]], ids=lambda d: d.name)


def graph(n_nodes: int, n_tensors: int, device: int = 0, seed: int = 0) -> GraphPayload:
    rng = np.random.default_rng(seed)
    tensors = np.frombuffer(rng.bytes(n_tensors * RPC_TENSOR_SIZE), RPC_TENSOR_DTYPE)
    nodes = rng.integers(0, 2**64, n_nodes, np.uint64)
    return GraphPayload(device, nodes, tensors)


@given(st.sampled_from(DIALECTS), st.integers(0, 9), st.integers(0, 9), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_round_trip(dialect: Dialect, n_nodes: int, n_tensors: int, device: int) -> None:
    sent = graph(n_nodes, n_tensors, device if dialect.graph_device else 0)
    payload = encode_graph(sent, dialect)
    head = 12 if dialect.graph_device else 8
    assert len(payload) == head + 8 * n_nodes + RPC_TENSOR_SIZE * n_tensors
    got = decode_graph(payload, dialect)
    assert got.device == sent.device
    assert got.nodes.tolist() == sent.nodes.tolist()
    assert got.tensors.tobytes() == sent.tensors.tobytes()


def test_layout() -> None:
    payload = encode_graph(graph(1, 1, device=3), DIALECTS[0])
    assert struct.unpack_from("<II", payload) == (3, 1)
    assert struct.unpack_from("<I", payload, 16) == (1,)
    assert payload[20:] == graph(1, 1).tensors.tobytes()


def test_reading_does_not_copy() -> None:
    payload = bytearray(encode_graph(graph(1, 2), DIALECTS[0]))
    got = decode_graph(payload, DIALECTS[0])
    payload[20:28] = (12345).to_bytes(8, "little")
    assert got.tensors["id"][0] == 12345


@dialects
def test_every_truncation_is_refused(dialect: Dialect) -> None:
    payload = encode_graph(graph(2, 2), dialect)
    for size in range(len(payload)):
        with pytest.raises(ProtocolError, match=f"graph of {size} bytes"):
            decode_graph(payload[:size], dialect)


@dialects
def test_bytes_behind_the_end_are_refused(dialect: Dialect) -> None:
    payload = encode_graph(graph(2, 2), dialect)
    with pytest.raises(ProtocolError, match="2 tensors take 592, 593 are left"):
        decode_graph(payload + b"\0", dialect)


@pytest.mark.parametrize("at", [4, 16])
def test_counts_that_no_memory_holds(at: int) -> None:
    payload = bytearray(encode_graph(graph(1, 1), DIALECTS[0]))
    struct.pack_into("<I", payload, at, 2**32 - 1)
    with pytest.raises(ProtocolError, match="graph of 316 bytes"):
        decode_graph(payload, DIALECTS[0])


def test_a_device_needs_a_version_with_devices() -> None:
    with pytest.raises(ValueError, match="has one device, not number 1"):
        encode_graph(graph(1, 1, device=1), DIALECTS[-1])
