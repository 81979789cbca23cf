"""A real client: one release's ggml library, driven through its C interface.

    python -m tests.e2e.ggml_client FOLDER HOST:PORT [--first CASE]

``FOLDER`` has libggml-base, libggml-cpu and libggml-rpc of that release. Each case is a graph of
known values that the library computes twice: on its own CPU backend, and on the server. What comes
out is printed as one JSON object a line::

    {"case": "add", "nmse": 0.0}

The library ends the process when the server turns it away; a case whose constructor the release
doesn't have is left out. Only one release's library fits into a process.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Node = ctypes.c_void_p
T = TypeVar("T")

F32, F16, Q4_0, Q8_0, Q4_K, I32, I64 = 0, 1, 2, 8, 12, 26, 27
_BLOCK = {Q4_0: (32, 18), Q8_0: (32, 34), Q4_K: (256, 144)}
_PREC_F32 = 10


class _InitParams(ctypes.Structure):
    _fields_ = [
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    ]


class MissingFunction(Exception):  # noqa: N818 - what is the matter
    """The release has no such function."""


class Library:
    """The three libraries of a release as one namespace of functions."""

    def __init__(self, folder: Path) -> None:
        self._parts = [
            ctypes.CDLL(str(folder / f"lib{name}.so"), ctypes.RTLD_GLOBAL)
            for name in ("ggml-base", "ggml-cpu", "ggml-rpc")
        ]
        self.init = self.function("ggml_init", Node)
        self.init.argtypes = [_InitParams]

    def function(self, name: str, restype: Any) -> Any:
        """Return a function of the C interface. Raises MissingFunction."""
        for part in self._parts:
            if hasattr(part, name):
                function = getattr(part, name)
                function.restype = restype
                return function
        raise MissingFunction(name)

    def call(self, name: str, *arguments: Any, restype: Any = Node) -> Any:
        """Call a function; ints go as int64, floats as float, text as a C string."""
        made = [_argument(a) for a in arguments]
        result = self.function(name, restype)(*made)
        return Node(result) if restype is Node else result


def _argument(value: Any) -> Any:
    if value is None:
        return Node(None)
    if isinstance(value, bool | int):
        return ctypes.c_int64(value)
    if isinstance(value, float):
        return ctypes.c_float(value)
    return value.encode() if isinstance(value, str) else value


class Builder:
    """Makes the tensors of one graph in a context without memory."""

    def __init__(self, library: Library, seed: int) -> None:
        self.library = library
        self.context = Node(library.init(_InitParams(16 << 20, None, True)))
        self._random = np.random.default_rng(seed)
        self.values: list[tuple[Node, Array]] = []

    def __getattr__(self, name: str) -> Callable[..., Node]:
        """ggml's constructors by their names: ``b.mul_mat(x, y)``."""

        def call(*arguments: Any) -> Node:
            return Node(self.library.call(f"ggml_{name}", self.context, *arguments).value)

        return call

    def leaf(self, values: Array, type: int, *ne: int) -> Node:
        """A tensor with these bytes."""
        sizes = (*ne, *[1] * (4 - len(ne)))
        made = self.new_tensor_4d(type, *sizes)
        self.values.append((made, np.ascontiguousarray(values)))
        return made

    def f32(self, *ne: int, low: float = -1.0, high: float = 1.0) -> Node:
        """A leaf of random values; the first dimension is the innermost."""
        return self.leaf(self._random.uniform(low, high, ne[::-1]).astype(np.float32), F32, *ne)

    def f16(self, *ne: int) -> Node:
        return self.leaf(self._random.uniform(-1, 1, ne[::-1]).astype(np.float16), F16, *ne)

    def ints(self, values: Any, *ne: int, type: int = I32) -> Node:
        kind = np.int32 if type == I32 else np.int64
        return self.leaf(np.asarray(values, kind), type, *ne)

    def quantized(self, type: int, *ne: int) -> Node:
        """A leaf of random quants with small scales."""
        block, size = _BLOCK[type]
        count = int(np.prod(ne)) // block
        raw = self._random.integers(0, 256, (count, size), np.uint8)
        scales = np.full((count, 2 if type == Q4_K else 1), 0.01, np.float16).view(np.uint8)
        raw[:, : scales.shape[1]] = scales
        return self.leaf(raw, type, *ne)


@dataclass(frozen=True)
class Case:
    """``build`` makes the graph's results; ``bound`` is the largest NMSE that passes."""

    build: Callable[[Builder], Node | list[Node]]
    bound: float


CASES: dict[str, Case] = {}

# Bounds are those of ggml's own tests of backends: products and attention, and all else.
_PRODUCT = 5e-4
_OTHER = 1e-7


def case(name: str, build: Callable[[Builder], Node | list[Node]], bound: float = _OTHER) -> None:
    CASES[name] = Case(build, bound)


def _with(
    value: T, build: Callable[[Builder, T], Node | list[Node]]
) -> Callable[[Builder], Node | list[Node]]:
    return lambda b: build(b, value)


def _block(b: Builder) -> list[Node]:
    """What a layer of a transformer has: settles how the client numbers its ops."""
    x = b.f32(256, 4)
    h = b.mul(b.rms_norm(x, 1e-5), b.f32(256))
    q = b.reshape_3d(b.mul_mat(b.quantized(Q8_0, 256, 256), h), 64, 4, 4)
    q = b.rope_ext(q, b.ints([0, 1, 2, 3], 4), None, 64, 0, 0, 10000.0, 1.0, 0.0, 1.0, 32.0, 1.0)
    q = b.permute(q, 0, 2, 1, 3)
    k, v = b.f16(64, 32, 4), b.f16(32, 64, 4)
    scores = b.soft_max_ext(b.mul_mat(k, q), None, 0.125, 0.0)
    mixed = b.cont(b.permute(b.mul_mat(v, scores), 0, 2, 1, 3))
    attended = b.mul_mat(b.quantized(Q4_0, 256, 256), b.reshape_2d(mixed, 256, 4))
    x = b.add(x, attended)
    gate = b.silu(b.mul_mat(b.quantized(Q4_K, 256, 512), b.norm(x, 1e-5)))
    return [b.mul(gate, b.mul_mat(b.f16(256, 512), x))]


def _conv_block(b: Builder) -> list[Node]:
    """What a block of a diffusion model or an upscaler has."""
    x = b.f32(16, 16, 8)
    h = b.conv_2d(b.f16(3, 3, 8, 16), x, 1, 1, 1, 1, 1, 1)
    h = b.add(h, b.reshape_4d(b.f32(16), 1, 1, 16, 1))
    h = b.silu(b.group_norm(h, 4, 1e-6))
    h = b.upscale(h, 2, 0)
    h = b.conv_2d(b.f16(3, 3, 16, 4), h, 1, 1, 1, 1, 1, 1)
    return [b.pad(h, 1, 2, 0, 0)]


case("block", _block, _PRODUCT)
case("convolution block", _conv_block, _PRODUCT)
for _name in ("add", "sub", "mul"):
    case(_name, _with(_name, lambda b, f: getattr(b, f)(b.f32(33, 5), b.f32(33, 5))))
case("div", lambda b: b.div(b.f32(33, 5), b.f32(33, 5, low=0.5)))
case("scale", lambda b: b.scale(b.f32(33, 5), 1.75))
for _name in ("sqr", "sin", "cos", "abs", "sgn", "neg", "step", "tanh", "elu", "relu", "sigmoid",
              "gelu", "gelu_quick", "silu", "hardswish", "hardsigmoid", "exp", "gelu_erf", "expm1",
              "softplus", "floor", "ceil", "round", "trunc"):  # fmt: skip
    case(_name, _with(_name, lambda b, f: getattr(b, f)(b.f32(33, 5, low=-3, high=3))))
for _name in ("sqrt", "log"):
    case(_name, _with(_name, lambda b, f: getattr(b, f)(b.f32(33, 5, low=0.1, high=9))))
for _name in ("sum", "sum_rows", "mean", "cumsum"):
    case(_name, _with(_name, lambda b, f: getattr(b, f)(b.f32(33, 5, low=0))))
case("argmax", lambda b: b.argmax(b.f32(33, 5)))
case("repeat", lambda b: b.repeat(b.f32(8, 1), b.f32(8, 6)))
case("concat", lambda b: b.concat(b.f32(8, 3), b.f32(8, 4), 1))
case("norm", lambda b: b.norm(b.f32(64, 5), 1e-5))
case("rms_norm", lambda b: b.rms_norm(b.f32(64, 5), 1e-5))
case("group_norm", lambda b: b.group_norm(b.f32(8, 8, 8), 2, 1e-5))
case("l2_norm", lambda b: b.l2_norm(b.f32(64, 5), 1e-5))
case("mul_mat f32", lambda b: b.mul_mat(b.f32(64, 16), b.f32(64, 3)), _PRODUCT)
case("mul_mat f16", lambda b: b.mul_mat(b.f16(64, 16), b.f32(64, 3)), _PRODUCT)
for _name, _type in (("q4_0", Q4_0), ("q8_0", Q8_0), ("q4_K", Q4_K)):
    case(
        f"mul_mat {_name}",
        _with(_type, lambda b, t: b.mul_mat(b.quantized(t, 256, 16), b.f32(256, 3))),
        _PRODUCT,
    )
case(
    "mul_mat_id",
    lambda b: b.mul_mat_id(
        b.f16(32, 8, 4), b.f32(32, 1, 3), b.ints([[0, 2], [3, 1], [2, 0]], 2, 3)
    ),
    _PRODUCT,
)
case("out_prod", lambda b: b.out_prod(b.f32(8, 5), b.f32(6, 5)), _PRODUCT)
case("acc", lambda b: b.acc(b.f32(16, 4), b.f32(4, 2), 64, 256, 256, 16))
case("set", lambda b: b.set(b.f32(16, 4), b.f32(4, 2), 64, 256, 256, 16))
case("cpy", lambda b: b.cpy(b.f32(32, 3), b.f16(32, 3)))
case("cont", lambda b: b.cont(b.transpose(b.f32(9, 7))))
case("get_rows", lambda b: b.get_rows(b.quantized(Q8_0, 64, 9), b.ints([3, 8, 0], 3)))
case(
    "set_rows",
    lambda b: b.set_rows(b.f32(32, 9), b.f32(32, 2), b.ints([7, 2], 2, type=I64)),
)
case("diag_mask_inf", lambda b: b.soft_max(b.diag_mask_inf(b.f32(8, 8), 0)))
case("soft_max", lambda b: b.soft_max_ext(b.f32(32, 4), b.f16(32, 4), 0.5, 0.0), 1e-6)
case(
    "rope",
    lambda b: b.rope_ext(
        b.f32(64, 2, 3), b.ints([0, 5, 9], 3), None, 64, 2, 0, 10000.0, 1.0, 0.0, 1.0, 32.0, 1.0
    ),
)
case("clamp", lambda b: b.clamp(b.f32(33), -0.5, 0.25))
case("conv_transpose_1d", lambda b: b.conv_transpose_1d(b.f32(3, 4, 5), b.f32(7, 5), 2, 0, 1))
case("im2col", lambda b: b.im2col(b.f16(3, 3, 4, 2), b.f32(8, 8, 4), 1, 1, 1, 1, 1, 1, True, F16))
case("conv_2d", lambda b: b.conv_2d(b.f16(3, 3, 4, 5), b.f32(8, 8, 4), 1, 1, 1, 1, 1, 1), _PRODUCT)
case(
    "conv_2d_dw_direct",
    lambda b: b.conv_2d_dw_direct(b.f32(3, 3, 1, 4), b.f32(8, 8, 4), 1, 1, 1, 1, 1, 1),
    _PRODUCT,
)
case(
    "conv_2d_direct",
    lambda b: b.conv_2d_direct(b.f16(3, 3, 4, 5), b.f32(8, 8, 4), 1, 1, 1, 1, 1, 1),
    _PRODUCT,
)
case(
    "conv_transpose_2d",
    lambda b: b.conv_transpose_2d_p0(b.f16(3, 3, 4, 5), b.f32(6, 6, 5), 2),
    _PRODUCT,
)
case("pool_1d", lambda b: b.pool_1d(b.f32(16, 3), 1, 2, 2, 0))
case("pool_2d", lambda b: b.pool_2d(b.f32(16, 8, 3), 0, 2, 2, 2, 2, 0.0, 0.0))
case("upscale nearest", lambda b: b.upscale(b.f32(5, 4, 3), 2, 0))
case("upscale bilinear", lambda b: b.upscale(b.f32(5, 4, 3), 2, 1))
case("pad", lambda b: b.pad(b.f32(5, 4, 3), 1, 2, 0, 1))
case("pad_ext", lambda b: b.pad_ext(b.f32(5, 4), 2, 1, 1, 3, 0, 0, 0, 0))
case("pad_reflect_1d", lambda b: b.pad_reflect_1d(b.f32(8, 3), 2, 3))
case("roll", lambda b: b.roll(b.f32(8, 5), 3, -1, 0, 0))
case("arange", lambda b: b.arange(1.0, 9.0, 0.5))
case("timestep_embedding", lambda b: b.timestep_embedding(b.f32(4, low=0, high=99), 32, 10000))
case("argsort", lambda b: b.argsort(b.f32(33, 5), 0))
case("leaky_relu", lambda b: b.leaky_relu(b.f32(33, 5), 0.1, False))
case("tri", lambda b: b.tri(b.f32(8, 8), 1))
case("fill", lambda b: b.fill(b.f32(8, 3), 2.5))
for _name in ("reglu", "geglu", "swiglu", "geglu_erf", "geglu_quick"):
    case(_name, _with(_name, lambda b, f: getattr(b, f)(b.f32(32, 5))))
case("swiglu_oai", lambda b: b.swiglu_oai(b.f32(32, 5), b.f32(32, 5), 1.702, 7.0))
case(
    "flash_attn_ext",
    lambda b: b.flash_attn_ext(
        b.f32(64, 3, 4), b.f16(64, 256, 2), b.f16(64, 256, 2), b.f16(256, 64), 0.125, 0.0, 0.0
    ),
    _PRODUCT,
)


class Backend:
    """One of the library's backends: its own CPU, or the server."""

    def __init__(self, library: Library, handle: Node) -> None:
        if not handle.value:
            raise SystemExit("the library has no backend for this server")
        self._library = library
        self._handle = handle

    def compute(self, made: Case, seed: int) -> list[Array]:
        """What the results of a case are, as float64. Raises MissingFunction."""
        call, builder = self._library.call, Builder(self._library, seed)
        try:
            results = made.build(builder)
            outputs = results if isinstance(results, list) else [results]
            graph = builder.new_graph()
            for output in outputs:
                call("ggml_build_forward_expand", graph, output, restype=None)
            buffer = call("ggml_backend_alloc_ctx_tensors", builder.context, self._handle)
            for tensor, values in builder.values:
                size = ctypes.c_size_t(values.nbytes)
                call("ggml_backend_tensor_set", tensor, Node(values.ctypes.data),
                     ctypes.c_size_t(0), size, restype=None)  # fmt: skip
            status = call("ggml_backend_graph_compute", self._handle, graph, restype=ctypes.c_int)
            if status:
                raise SystemExit(f"graph_compute: {status}")
            got = [self._download(output) for output in outputs]
            call("ggml_backend_buffer_free", buffer, restype=None)
            return got
        finally:
            call("ggml_free", builder.context, restype=None)

    def _download(self, tensor: Node) -> Array:
        call = self._library.call
        size = call("ggml_nbytes", tensor, restype=ctypes.c_size_t)
        raw = np.zeros(size, np.uint8)
        call("ggml_backend_tensor_get", tensor, Node(raw.ctypes.data), ctypes.c_size_t(0),
             ctypes.c_size_t(size), restype=None)  # fmt: skip
        kind = {F32: np.float32, F16: np.float16, I32: np.int32}[
            ctypes.cast(tensor, ctypes.POINTER(ctypes.c_int))[0]
        ]
        return raw.view(kind).astype(np.float64)


def nmse(expected: list[Array], actual: list[Array]) -> float:
    """The normalised mean squared error of all results together."""
    a, b = np.concatenate(expected), np.concatenate(actual)
    finite = np.isfinite(a)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return float("inf")
    error, power = np.square(a - b)[finite].sum(), np.square(a[finite]).sum()
    return float(error / power if power else error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("server")
    parser.add_argument("--only", action="append", help="this case, in the order given")
    options = parser.parse_args()
    library = Library(options.folder)
    own = Backend(library, library.call("ggml_backend_cpu_init"))
    # Before 3.0 there was one device, and no argument for it.
    server = Backend(library, library.call("ggml_backend_rpc_init", options.server, 0))
    for seed, name in enumerate(options.only or CASES):
        try:
            expected = own.compute(CASES[name], seed)
            actual = server.compute(CASES[name], seed)
        except MissingFunction:
            continue
        print(json.dumps({"case": name, "nmse": nmse(expected, actual)}), flush=True)


if __name__ == "__main__":
    main()
