"""Records: the arguments of a kernel as words, the same for all devices, and what statuses say."""

from __future__ import annotations

from collections.abc import Sequence

from protocol.messages import MAX_PARAM_WORDS
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
from rpc_server.devices.planning.scratch import Labelled

# What a status says of the node whose kernel returned it.
STATUS_TEXT: dict[int, str] = {Status.INDEX_OUT_OF_RANGE: "an index in its data is out of range"}


_NO_TENSOR = (0,) * SLOT_WORDS


def record_words(
    kernel: Labelled,
    tensors: Sequence[Tensor | None],
    op_params: Sequence[int],
    extra: Sequence[int],
) -> list[int]:
    """Return the words of a record of ``kernel``.

    Raises ValueError if there are more tensors than slots, or too many parameters or extra words.
    """
    if len(tensors) > N_SLOTS or len(op_params) > MAX_PARAM_WORDS or len(extra) > N_EXTRA:
        raise ValueError(f"record of {kernel.label}: too many slots, parameters or extra words")
    words: list[int] = []
    for t in tensors:
        words += _NO_TENSOR if t is None else (t.address, int(t.type), *t.ne, *t.nb)
    words += [0] * (PARAM_WORD - len(words))
    words += op_params
    words += [0] * (EXTRA_WORD - len(words))
    words += extra
    words += [0] * (RECORD_WORDS - len(words))
    return words
