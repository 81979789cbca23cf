"""The commands of the wire by name and number (``enum rpc_cmd``)."""

from __future__ import annotations

import enum


class Command(enum.IntEnum):
    """First byte of a request; numbers have never been reused.

    From 0x80 on they are this project's own (protocol.split).
    """

    ALLOC_BUFFER = 0
    GET_ALIGNMENT = 1
    GET_MAX_SIZE = 2
    BUFFER_GET_BASE = 3
    FREE_BUFFER = 4
    BUFFER_CLEAR = 5
    SET_TENSOR = 6
    SET_TENSOR_HASH = 7
    GET_TENSOR = 8
    COPY_TENSOR = 9
    GRAPH_COMPUTE = 10
    GET_DEVICE_MEMORY = 11
    INIT_TENSOR = 12
    GET_ALLOC_SIZE = 13
    HELLO = 14
    DEVICE_COUNT = 15
    GRAPH_RECOMPUTE = 16
    MEMSET_TENSOR = 17

    SPLIT_QUERY = 0x80
    SPLIT_ALLOC_BUFFER = 0x81
    SPLIT_PROGRAM = 0x82
    SPLIT_RUN = 0x83
    SPLIT_STATUS = 0x84
    SPLIT_MEMBERS = 0x85
    SPLIT_ACQUIRE = 0x86
    SPLIT_RELEASE = 0x87
    SPLIT_DESCRIBE = 0x88
    SPLIT_LOAD = 0x89
    SPLIT_PEERS = 0x8A
    SPLIT_JOIN = 0x8B
