"""Records: the arguments of a kernel as words, the same for all devices, and what statuses say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from protocol.tensor import Tensor
from rpc_server.devices.cpu.kernels.interface.abi import (
    EXTRA_WORD,
    N_EXTRA,
    N_SLOTS,
    PARAM_WORD,
    RECORD_WORDS,
    SLOT_WORDS,
    Status,
)

# What a status says of the node whose kernel returned it.
STATUS_TEXT: dict[int, str] = {Status.INDEX_OUT_OF_RANGE: "an index in its data is out of range"}


def record_words(
    label: str, tensors: Sequence[Tensor | None], op_params: Sequence[int], extra: Sequence[int]
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the words of a record; ``label`` names the kernel in the message.

    Raises ValueError if there are more tensors than slots, or too many extra words.
    """
    if len(tensors) > N_SLOTS or len(extra) > N_EXTRA:
        raise ValueError(f"record of {label}: too many slots or extra words")
    words = np.zeros(RECORD_WORDS, np.int64)
    for slot, tensor in enumerate(tensors):
        if tensor is not None:
            word = slot * SLOT_WORDS
            words[word : word + SLOT_WORDS] = (
                tensor.address,
                int(tensor.type),
                *tensor.ne,
                *tensor.nb,
            )
    words[PARAM_WORD : PARAM_WORD + 16] = op_params
    words[EXTRA_WORD : EXTRA_WORD + len(extra)] = extra
    return words
