"""Every logit of a prompt, computed by llama.cpp's own library, on the CPU or over RPC.

    python -m tests.e2e.logits REQUESTS.json RESULTS.npz

llama.cpp's programs print text or a few probabilities. A bound on the error of all logits needs
the library's C interface, which this file declares as far as it is used, for build
``LIBRARY_BUILD``. It runs as a program of its own: llama.cpp ends its process where a server
goes away, and that must not be the process that runs the tests.

REQUESTS.json is a list of ``Request`` objects; RESULTS.npz has an array ``0``, ``1``, ... for
each, F32 [tokens, vocabulary].
"""

from __future__ import annotations

import ctypes as c
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tools import upstream

LIBRARY_BUILD = 11434
THREADS = 2

CACHE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q5_0": 6, "q5_1": 7, "q8_0": 8}
_FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}


@dataclass(frozen=True)
class Request:
    """One run of a model over a text.

    ``text`` is cut after ``tokens`` tokens. All but the last ``single`` of them go through the
    model in one batch, the last ones each alone, as when text is generated. ``rpc`` is the
    address of a server that gets all layers; None computes on this machine's CPU.
    """

    model: str
    text: str
    tokens: int
    single: int
    rpc: str | None = None
    flash_attention: str = "off"
    cache_k: str = "f16"
    cache_v: str = "f16"
    lora: str | None = None


def compute(requests: Sequence[Request], timeout: float = 240) -> list[npt.NDArray[np.float32]]:
    """Runs requests in a new process; for each, F32 [tokens, vocabulary].

    Raises RuntimeError with the end of the process's log when it fails.
    """
    with tempfile.TemporaryDirectory() as scratch:
        asked, answered = Path(scratch, "requests.json"), Path(scratch, "results.npz")
        asked.write_text(json.dumps([asdict(request) for request in requests]))
        done = subprocess.run(
            [sys.executable, "-m", "tests.e2e.logits", asked, answered],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
        if done.returncode:
            tail = "\n".join(done.stderr.splitlines()[-20:])
            raise RuntimeError(f"libllama ended with status {done.returncode}:\n{tail}")
        with np.load(answered) as results:
            return [results[str(index)] for index in range(len(requests))]


def nmse(measured: npt.NDArray[np.float32], expected: npt.NDArray[np.float32]) -> float:
    """Mean squared error over the mean square of what is expected."""
    wanted = expected.astype(np.float64)
    return float(np.mean((measured - wanted) ** 2) / np.mean(wanted**2))


def _fields(*groups: tuple[Any, str]) -> list[tuple[str, Any]]:
    """A structure's fields from types, each with the names that have it, in their order."""
    return [(name, type_) for type_, names in groups for name in names.split()]


class _ModelParams(c.Structure):
    _fields_ = _fields(
        (c.POINTER(c.c_void_p), "devices"),
        (c.c_void_p, "tensor_buft_overrides"),
        (c.c_int32, "n_gpu_layers"),
        (c.c_int, "split_mode load_mode lazy_mode"),
        (c.c_int32, "main_gpu"),
        (c.c_void_p, "tensor_split progress_callback progress_callback_user_data kv_overrides"),
        (c.c_bool, "vocab_only check_tensors use_extra_bufts no_host no_alloc load_mtp"),
    )


class _ContextParams(c.Structure):
    _fields_ = _fields(
        (c.c_uint32, "n_ctx n_batch n_ubatch n_seq_max"),
        (c.c_uint32, "n_rs_seq n_outputs_max n_outputs_max_per_seq"),
        (c.c_int32, "n_threads n_threads_batch"),
        (c.c_int, "ctx_type rope_scaling_type pooling_type attention_type flash_attn_type"),
        (c.c_float, "rope_freq_base rope_freq_scale yarn_ext_factor yarn_attn_factor"),
        (c.c_float, "yarn_beta_fast yarn_beta_slow"),
        (c.c_uint32, "yarn_orig_ctx"),
        (c.c_float, "defrag_thold"),
        (c.c_void_p, "cb_eval cb_eval_user_data"),
        (c.c_int, "type_k type_v"),
        (c.c_void_p, "abort_callback abort_callback_data"),
        (c.c_bool, "embeddings offload_kqv no_perf op_offload swa_full kv_unified"),
        (c.c_void_p, "samplers"),
        (c.c_size_t, "n_samplers"),
        (c.c_void_p, "ctx_other"),
    )


class _Batch(c.Structure):
    _fields_ = [
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", c.POINTER(c.c_float)),
        ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)),
        ("seq_id", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),
    ]


# Library, function, result, arguments.
_FUNCTIONS: tuple[tuple[str, str, Any, list[Any]], ...] = (
    ("llama", "llama_backend_init", None, []),
    ("llama", "llama_model_default_params", _ModelParams, []),
    ("llama", "llama_context_default_params", _ContextParams, []),
    ("llama", "llama_model_load_from_file", c.c_void_p, [c.c_char_p, _ModelParams]),
    ("llama", "llama_model_free", None, [c.c_void_p]),
    ("llama", "llama_init_from_model", c.c_void_p, [c.c_void_p, _ContextParams]),
    ("llama", "llama_free", None, [c.c_void_p]),
    ("llama", "llama_model_get_vocab", c.c_void_p, [c.c_void_p]),
    ("llama", "llama_vocab_n_tokens", c.c_int32, [c.c_void_p]),
    (
        "llama",
        "llama_tokenize",
        c.c_int32,
        [
            c.c_void_p,
            c.c_char_p,
            c.c_int32,
            c.POINTER(c.c_int32),
            c.c_int32,
            c.c_bool,
            c.c_bool,
        ],
    ),
    ("llama", "llama_batch_init", _Batch, [c.c_int32, c.c_int32, c.c_int32]),
    ("llama", "llama_batch_free", None, [_Batch]),
    ("llama", "llama_decode", c.c_int32, [c.c_void_p, _Batch]),
    ("llama", "llama_get_logits", c.POINTER(c.c_float), [c.c_void_p]),
    ("llama", "llama_adapter_lora_init", c.c_void_p, [c.c_void_p, c.c_char_p]),
    (
        "llama",
        "llama_set_adapters_lora",
        c.c_int32,
        [c.c_void_p, c.POINTER(c.c_void_p), c.c_size_t, c.POINTER(c.c_float)],
    ),
    ("ggml-rpc", "ggml_backend_rpc_add_server", c.c_void_p, [c.c_char_p]),
    ("ggml-base", "ggml_backend_reg_dev_count", c.c_size_t, [c.c_void_p]),
    ("ggml-base", "ggml_backend_reg_dev_get", c.c_void_p, [c.c_void_p, c.c_size_t]),
    ("ggml", "ggml_backend_register", None, [c.c_void_p]),
)


def _load_library() -> dict[str, Any]:
    """The functions by name, typed. Raises RuntimeError where this isn't the library declared."""
    folder = upstream.bin_dir(LIBRARY_BUILD)
    libraries = {
        name: c.CDLL(str(folder / f"lib{name}.so"))
        for name in ("ggml-base", "ggml", "ggml-rpc", "llama")
    }
    functions: dict[str, Any] = {}
    for library, name, result, arguments in _FUNCTIONS:
        function = getattr(libraries[library], name)
        function.restype, function.argtypes = result, arguments
        functions[name] = function
    functions["llama_backend_init"]()
    # A changed struct would shift these documented defaults.
    model, context = (
        functions["llama_model_default_params"](),
        functions["llama_context_default_params"](),
    )
    as_declared = (
        (context.n_ctx, context.n_batch, context.n_ubatch) == (512, 2048, 512)
        and (context.type_k, context.type_v) == (1, 1)
        and (context.flash_attn_type, context.offload_kqv) == (-1, True)
        and (model.n_gpu_layers, model.use_extra_bufts) == (-1, True)
    )
    if not as_declared:
        raise RuntimeError(f"libllama's structs are not those of build {LIBRARY_BUILD}")
    return functions


def _devices(lib: dict[str, Any], address: str | None) -> Any:
    """A null-terminated list: a server's devices, or none at all for the CPU."""
    if address is None:
        return (c.c_void_p * 1)()
    registry = lib["ggml_backend_rpc_add_server"](address.encode())
    if not registry:
        raise RuntimeError(f"no RPC server at {address}")
    lib["ggml_backend_register"](registry)
    count = lib["ggml_backend_reg_dev_count"](registry)
    found = [lib["ggml_backend_reg_dev_get"](registry, index) for index in range(count)]
    return (c.c_void_p * (count + 1))(*found)


def _tokens(lib: dict[str, Any], vocabulary: int, text: str, count: int) -> list[int]:
    encoded = text.encode()
    space = (c.c_int32 * (len(encoded) + 8))()
    found = lib["llama_tokenize"](vocabulary, encoded, len(encoded), space, len(space), True, False)
    if found < count:
        raise RuntimeError(f"the text has {found} tokens, {count} are asked for")
    return list(space[:count])


def _set_lora(lib: dict[str, Any], model: int, context: int, path: str) -> None:
    adapter = lib["llama_adapter_lora_init"](model, path.encode())
    if not adapter:
        raise RuntimeError(f"can't load the adapter {path}")
    status = lib["llama_set_adapters_lora"](
        context, (c.c_void_p * 1)(adapter), 1, (c.c_float * 1)(1.0)
    )
    if status:
        raise RuntimeError(f"llama_set_adapters_lora returned {status}")


def _decode(lib: dict[str, Any], context: int, tokens: list[int], start: int, width: int) -> Any:
    """Puts tokens through the model in one batch; F32 [tokens, width]."""
    batch = lib["llama_batch_init"](len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for index, token in enumerate(tokens):
            batch.token[index] = token
            batch.pos[index] = start + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = 1
        status = lib["llama_decode"](context, batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        values = lib["llama_get_logits"](context)
        return np.ctypeslib.as_array(values, shape=(len(tokens), width)).copy()
    finally:
        lib["llama_batch_free"](batch)


def _run(lib: dict[str, Any], request: Request, devices: Any) -> npt.NDArray[np.float32]:
    params = lib["llama_model_default_params"]()
    params.devices = c.cast(devices, c.POINTER(c.c_void_p))
    params.n_gpu_layers = 0 if request.rpc is None else 99
    # No repacked weights on the CPU: an RPC device has none, and they are computed otherwise.
    params.use_extra_bufts = False
    model = lib["llama_model_load_from_file"](request.model.encode(), params)
    if not model:
        raise RuntimeError(f"can't load {request.model}")
    options = lib["llama_context_default_params"]()
    options.n_ctx = 512
    options.n_threads = options.n_threads_batch = THREADS
    options.flash_attn_type = _FLASH_ATTENTION[request.flash_attention]
    options.type_k = CACHE_TYPES[request.cache_k]
    options.type_v = CACHE_TYPES[request.cache_v]
    context = lib["llama_init_from_model"](model, options)
    if not context:
        raise RuntimeError(f"no context with these options: {request}")
    if request.lora:
        _set_lora(lib, model, context, request.lora)
    vocabulary = lib["llama_model_get_vocab"](model)
    width = lib["llama_vocab_n_tokens"](vocabulary)
    tokens = _tokens(lib, vocabulary, request.text, request.tokens)
    first = request.tokens - request.single
    steps = [tokens[:first], *([token] for token in tokens[first:])]
    rows, start = [], 0
    for step in steps:
        rows.append(_decode(lib, context, step, start, width))
        start += len(step)
    lib["llama_free"](context)
    lib["llama_model_free"](model)
    return np.concatenate(rows)


def main(asked: Path, answered: Path) -> None:
    """Answers a file of requests with a file of logits."""
    lib = _load_library()
    devices: dict[str | None, Any] = {}
    results: dict[str, npt.NDArray[np.float32]] = {}
    for index, values in enumerate(json.loads(asked.read_text())):
        request = Request(**values)
        if request.rpc not in devices:
            devices[request.rpc] = _devices(lib, request.rpc)
        results[str(index)] = _run(lib, request, devices[request.rpc])
    np.savez(answered, **results)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
