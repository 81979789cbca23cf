"""The kernels of the CPU device by name.

Lowerings choose kernels from here. Nothing in this file needs the compiler: a kernel is the name of
a function in ``kernels/``, which another process compiles if its code is not on disk already.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from pathlib import Path

from protocol.ggml.ops import GluOp, UnaryOp
from protocol.ggml.types import DECODABLE, GgmlType
from rpc_server.devices.cpu.kernels.interface.codes import Binary, Function, Norm
from rpc_server.devices.cpu.kernels.interface.isa import Isa
from rpc_server.devices.cpu.kernels.interface.layout import (
    CODED,
    PRODUCT_TYPES,
    RowForm,
    in_halves,
    in_pairs,
    product_form,
)
from rpc_server.devices.cpu.machine import available_cores
from rpc_server.native.folder import Folder, cache_base, fingerprint
from rpc_server.native.library import Library
from rpc_server.native.routine import Constant, Routine

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[2]
# What compiled code is made of, each folder whole: the kernels, what they know of ggml, and the
# compiler.
COMPILED = (_HERE / "kernels", _ROOT / "protocol/ggml", _ROOT / "rpc_server/native")

# Compilers beside this process: each takes a core for seconds and 200 MiB.
_MOST_COMPILERS = 8

_library: Library | None = None
_library_lock = threading.Lock()


def library() -> Library:
    """Return the compiled kernels of this process."""
    global _library
    with _library_lock:
        if _library is None:
            folder = Folder(cache_base(), fingerprint(COMPILED))
            _library = Library(folder, min(available_cores(), _MOST_COMPILERS))
        return _library


def end_compilers() -> None:
    """End compiling before the process ends: nobody is to wait for a kernel any more."""
    with _library_lock:
        if _library is not None:
            _library.close()


class Kernel(Routine):
    """A kernel, see ``record``, or another routine in compiled code."""

    @property
    def address(self) -> int:
        """Address of the compiled function; waits if it has to be compiled. CompileError."""
        return library().address(self)


def _one(path: str) -> Kernel:
    module, _, name = path.partition(".")
    return Kernel(f"rpc_server.devices.cpu.kernels.{module}", name)


def _family(path: str) -> Callable[..., Kernel]:
    """A function of constants that gives the kernel made with them."""
    whole = _one(path)

    @functools.cache
    def made(*constants: Constant) -> Kernel:
        plain = tuple(None if c is None else int(c) for c in constants)
        return Kernel(whole.module, whole.name, plain)

    return made


# -- what is not a node of a graph -----------------------------------------------------------------

# Runs the records of a plan; see ``executor``.
run_records = _one("run.run_records")
# The loops of planning; see ``assembly``.
place_scratch = _one("planning.place_scratch")
fill_records = _one("planning.fill_records")
schedule_records = _one("planning.schedule_records")
# Its result has a bit for each Isa that compiled code may use.
instruction_sets = _one("vector.instruction_sets")
# FNV-1a 64 of (address, size), begun with a value.
fnv1a = _one("hashing.fnv1a")
# The same of 8 rows at once.
fnv1a_lanes = _one("hashing.fnv1a_lanes")

# Of the exchanges of a split model.
stream_send = _one("stream.stream_send")
stream_receive = _one("stream.stream_receive")
stream_swap = _one("stream.stream_swap")
# They take as long as the other end does.
TRANSFERS = frozenset((stream_send, stream_receive, stream_swap))

# -- products --------------------------------------------------------------------------------------

product_kernel = _family("matmul.product_kernel")
few_columns_kernel = _family("matmul.few_columns_kernel")
_PRODUCT = "rpc_server.devices.cpu.kernels.matmul", "product_kernel"
# Of sets that multiply floats besides, what does the same with all others and with these.
_WITHOUT_FLOATS = {Isa.FP16FML: Isa.DOTPROD, Isa.AVX512_BF16: Isa.AVX512_VNNI}
_WITH_FLOATS = {Isa.I8MM: Isa.FP16FML}


def product_of(type_: GgmlType, isa: Isa) -> Kernel:
    """Return the product of a weight type on an instruction set."""
    # Of what sets differ in by one type alone, other types have one kernel.
    floats = in_pairs(type_, isa) or in_halves(type_, isa)
    return product_kernel(type_, (_WITH_FLOATS if floats else _WITHOUT_FLOATS).get(isa, isa))


def baseline_of(kernel: Kernel) -> Kernel | None:
    """Return what does a kernel's work until that is compiled, and is compiled far sooner.

    None where there is no such kernel. It takes the same records.
    """
    if (kernel.module, kernel.name) == _PRODUCT:
        return few_columns_kernel(*kernel.constants)
    return None


route_columns = _one("matmul.route_columns")
_quantize_rows, _round_rows = _one("activations.quantize_rows"), _one("activations.round_rows")
CONVERTERS: dict[RowForm, Kernel] = {
    form: _quantize_rows if form in CODED else _round_rows for form in RowForm
}

# -- copies and rows -------------------------------------------------------------------------------

copy_same_type = _one("copy.copy_same_type")
copy_strided = _one("copy.copy_strided")
# From a type to a type.
convert_kernel = _family("copy.convert_kernel")
repeat = _one("copy.repeat")
pad = _one("copy.pad")
# Of a type.
get_rows_kernel = _family("rows.get_rows_kernel")
# Of a quantized type, None for any float type.
set_rows_kernel = _family("rows.set_rows_kernel")
add_id = _one("rows.add_id")

# -- elements --------------------------------------------------------------------------------------

# Of a UnaryOp or Function, and whether all is F32.
unary_kernel = _family("elementwise.unary_kernel")
trigonometric_kernel = _family("elementwise.trigonometric_kernel")
# Of a Binary, or a GluOp, and whether all is F32.
binary_kernel = _family("elementwise.binary_kernel")
glu_kernel = _family("elementwise.glu_kernel")

# -- rows ------------------------------------------------------------------------------------------

norm_kernel = _family("norm.norm_kernel")
group_norm = _one("norm.group_norm")
soft_max = _one("softmax.soft_max")
diagonal_mask = _one("softmax.diagonal_mask")
sum_rows = _one("reduce.sum_rows")
sum_all = _one("reduce.sum_all")
cumulative_sum = _one("reduce.cumulative_sum")
argmax = _one("reduce.argmax")
argsort = _one("reduce.argsort")
top_k = _one("reduce.top_k")

# -- attention -------------------------------------------------------------------------------------

rope_table = _one("rope.rope_table")
# Of whether the members of a pair are neighbours.
rope_kernel = _family("rope.rope_kernel")
# Of the types of keys and values.
attention_kernel = _family("attention.attention_kernel")
merge_attention = _one("attention.merge_attention")


# -- ahead of a graph ------------------------------------------------------------------------------

# What no graph can do without, what takes longest to compile first.
ALWAYS = (run_records, instruction_sets, fill_records)
# What language models are made of besides their weights; what takes longest to compile first.
_USUAL = (
    *ALWAYS,
    # Keys and values are F16.
    attention_kernel(GgmlType.F16, GgmlType.F16),
    place_scratch,
    schedule_records,
    norm_kernel(Norm.RMS_NORM),
    glu_kernel(GluOp.SWIGLU, True),
    rope_kernel(False),
    rope_kernel(True),
    rope_table,
    set_rows_kernel(None),
    _round_rows,
    binary_kernel(Binary.ADD, True),
    binary_kernel(Binary.MUL, True),
    merge_attention,
    # A prompt's last tokens are all that becomes logits.
    get_rows_kernel(GgmlType.F32),
)
# Attention without its own op.
_ATTENTION = (soft_max, copy_strided, copy_same_type, convert_kernel(GgmlType.F32, GgmlType.F16))


# Types of weights, the most common first: those of Q4_K_M. Rows that aren't of whole blocks of 256
# have Q5_0, Q5_1 or Q8_0 instead of a K type; what chooses experts is F32.
_FIRST_WEIGHTS = (GgmlType.Q4_K, GgmlType.Q6_K, GgmlType.Q8_0, GgmlType.Q5_0)
_COMMON_WEIGHTS = (
    GgmlType.F16,
    GgmlType.Q4_0,
    GgmlType.Q5_K,
    GgmlType.Q5_1,
    GgmlType.F32,
    GgmlType.BF16,
    GgmlType.Q4_1,
    GgmlType.MXFP4,
)
# What a cache may be kept in, beside F16.
_CACHES = (GgmlType.Q8_0, GgmlType.Q4_0)
# What some families of models have and others don't.
_FAMILIES = (
    unary_kernel(Function.SCALE, True),
    binary_kernel(Binary.DIV, True),
    norm_kernel(Norm.NORM),
    glu_kernel(GluOp.GEGLU, True),
    glu_kernel(GluOp.SWIGLU_OAI, True),
    unary_kernel(UnaryOp.GELU, True),
    unary_kernel(UnaryOp.SILU, True),
    unary_kernel(UnaryOp.SIGMOID, True),
    unary_kernel(UnaryOp.TANH, True),
    unary_kernel(Function.CLAMP, True),
    route_columns,
    argsort,
    sum_rows,
    add_id,
)


def first_kernels(isa: Isa) -> list[Kernel]:
    """Return what the model that is likely to come first can do without least."""
    wanted = [*ALWAYS]
    for type_ in _FIRST_WEIGHTS:
        wanted += _product_kernels(type_, isa)
    wanted.append(attention_kernel(GgmlType.F16, GgmlType.F16))
    return list(dict.fromkeys(wanted))


def common_kernels(isa: Isa) -> list[Kernel]:
    """Return what most language models need, the most wanted first."""
    wanted = [*first_kernels(isa), *_USUAL]
    for type_ in (*_FIRST_WEIGHTS, *_COMMON_WEIGHTS):
        wanted += _kernels_of(type_, isa)
    wanted += [*_ATTENTION, *_FAMILIES]
    for type_ in _CACHES:
        wanted += [attention_kernel(type_, type_), set_rows_kernel(type_)]
    return list(dict.fromkeys(wanted))


def _product_kernels(type_: GgmlType, isa: Isa) -> list[Kernel]:
    """Return what multiplies weights of one type."""
    if type_ not in PRODUCT_TYPES:
        return []
    return [product_of(type_, isa), CONVERTERS[product_form(type_, isa)]]


def baseline_of_weights(type_: GgmlType, isa: Isa) -> list[Kernel]:
    """Return what multiplies weights of one type until the kernel for that is compiled."""
    return [baseline_of(kernel) or kernel for kernel in _product_kernels(type_, isa)]


def _kernels_of(type_: GgmlType, isa: Isa) -> list[Kernel]:
    """Return what reads weights of one type."""
    own = _product_kernels(type_, isa)
    if type_ in DECODABLE:
        own.append(get_rows_kernel(type_))
    return own


def kernels_of_weights(type_: GgmlType, isa: Isa) -> list[Kernel]:
    """Return kernels that a graph with weights of ``type_`` is likely to need, its own first."""
    return [*_kernels_of(type_, isa), *_USUAL, product_of(GgmlType.F16, isa), *_ATTENTION]
