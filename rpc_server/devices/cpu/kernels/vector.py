"""Vector code for the dot products: an emitter over llvmlite, and the one instruction that matters.

Kernels of matrix products are loops whose bodies are vectors of 4-byte groups; here are the few
operations that they are built of. Everything is generic vector IR, which LLVM cuts to any
processor's registers, but :meth:`Emit.dot4`: multiplying bytes and adding them up in fours has an
instruction of its own on most processors and no spelling in IR, so it is chosen by Isa.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils
from numba.core.registry import cpu_target

from rpc_server.devices.cpu.kernels.interface.isa import Isa
from rpc_server.devices.cpu.kernels.interface.layout import LANES
from rpc_server.native.source import routine

__all__ = ["LANES"]

_I8_MOST = (1 << 7) - 1
_I16_MOST = (1 << 15) - 1
I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()


class _BFloatType(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite doesn't name; values get it by a bitcast."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloatType)

    def __hash__(self) -> int:
        return hash(_BFloatType)


BF16 = _BFloatType()

_NEEDS: dict[Isa, tuple[str, ...]] = {
    Isa.GENERIC: (),
    Isa.NEON: ("neon",),
    Isa.DOTPROD: ("neon", "dotprod"),
    Isa.FP16FML: ("neon", "dotprod", "fp16fml"),
    Isa.I8MM: ("neon", "dotprod", "fp16fml", "i8mm"),
    Isa.AVX2: ("avx2", "fma"),
    Isa.AVX_VNNI: ("avx2", "fma", "avxvnni"),
    Isa.AVX512: ("avx2", "fma", "avx512f", "avx512bw", "avx512vl"),
    Isa.AVX512_VNNI: ("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512vnni"),
    Isa.AVX512_BF16: (
        *("avx2", "fma", "avx512f", "avx512bw", "avx512vl"),
        *("avx512vnni", "avx512bf16"),
    ),
}

# What a kernel for processors without AVX-512 is compiled without, wherever that is done: it shall
# be the code that such a processor runs. Of LLVM's features, how their names begin.
_WITHOUT: dict[Isa, tuple[str, ...]] = {
    Isa.AVX2: ("avx512", "avx10", "amx", "avxvnni"),
    Isa.AVX_VNNI: ("avx512", "avx10", "amx"),
}


def left_out(isa: Isa) -> tuple[str, ...]:
    """Return how features begin that code for an instruction set may not use."""
    return _WITHOUT.get(isa, ())


def _compilable() -> list[Isa]:
    """Return what code compiled here may use."""
    # Not what the processor has but what numba compiles for: its settings may switch features off,
    # and LLVM ends the process over an instruction that it was told not to use.
    features = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
    return [i for i, needs in _NEEDS.items() if all(f"+{n}" in features for n in needs)]


_TRIPLE, _MODEL, _ = cpu_target.target_context.codegen().magic_tuple()

# Whether this processor reads ahead of a thread that goes through memory from front to back better
# by itself than when it is told what to fetch. AMD's do: told, a core of a Zen 4 reads a third of
# what it reads by itself.
FETCHES_AHEAD = _MODEL.startswith("znver")
# Whether it is told. ARM's are not: upstream's code doesn't either, and none was at hand.
IS_TOLD = not FETCHES_AHEAD and _TRIPLE.startswith("x86_64")

_COMPILABLE = sum(1 << isa for isa in _compilable())


@routine
def instruction_sets():  # type: ignore[no-untyped-def]
    """Return a bit for each Isa that compiled code may use, for processes without a compiler."""
    return _COMPILABLE


def vector(element: ir.Type, n: int) -> ir.VectorType:
    return ir.VectorType(element, n)


class Emit:
    """Emits code at the end of ``builder``'s block. Addresses are i64 values, counts too."""

    def __init__(self, builder: Any, isa: Isa) -> None:
        self.b = builder
        self.isa = isa

    # -- values

    def i64(self, value: int) -> ir.Constant:
        return ir.Constant(I64, value)

    def constant(self, element: ir.Type, values: int | float | Sequence[Any], n: int) -> Any:
        """Return a vector constant: ``n`` times a number, or ``n`` numbers."""
        listed = list(values) if isinstance(values, Sequence) else [values] * n
        return ir.Constant(vector(element, n), listed)

    def splat(self, value: Any, n: int) -> Any:
        """Return ``value`` in each of ``n`` lanes."""
        kind = vector(value.type, n)
        one = self.b.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
        return self.shuffle(one, [0] * n)

    def shuffle(self, a: Any, order: Sequence[int], b: Any = None) -> Any:
        """Return lanes ``order`` of ``a``, counted on into ``b``."""
        second = ir.Constant(a.type, ir.Undefined) if b is None else b
        index = ir.Constant(vector(I32, len(order)), list(order))
        return self.b.shuffle_vector(a, second, index)

    def concat(self, a: Any, b: Any) -> Any:
        return self.shuffle(a, range(2 * a.type.count), b)

    def lane(self, value: Any, i: int) -> Any:
        """Return lane ``i``; a scalar is its own only lane."""
        if not isinstance(value.type, ir.VectorType):
            return value
        return self.b.extract_element(value, ir.Constant(I32, i))

    def like(self, value: Any, number: int | float) -> Any:
        """Return ``number`` in the type of ``value``, scalar or vector."""
        if isinstance(value.type, ir.VectorType):
            return self.constant(value.type.element, number, value.type.count)
        return ir.Constant(value.type, number)

    # -- memory

    def at(self, address: Any, offset: int) -> Any:
        return self.b.add(address, self.i64(offset)) if offset else address

    def load(self, address: Any, kind: ir.Type, offset: int = 0) -> Any:
        pointer = self.b.inttoptr(self.at(address, offset), kind.as_pointer())
        return self.b.load(pointer, align=1)

    def store(self, value: Any, address: Any, offset: int = 0) -> None:
        pointer = self.b.inttoptr(self.at(address, offset), value.type.as_pointer())
        self.b.store(value, pointer, align=1)

    def load_part(self, address: Any, kind: ir.VectorType, n: Any) -> Any:
        """Return the first ``n`` (i64) lanes from memory, zeros elsewhere."""
        slot = cgutils.alloca_once(self.b, kind)
        self.b.store(ir.Constant(kind, None), slot)
        self._copy(self.b.ptrtoint(slot, I64), address, kind.element, n)
        return self.b.load(slot)

    def store_part(self, value: Any, address: Any, n: Any) -> None:
        """Store the first ``n`` (i64) lanes."""
        whole = self.b.icmp_signed("==", n, self.i64(value.type.count))
        with self.b.if_else(whole, likely=True) as (then, otherwise):
            with then:
                self.store(value, address)
            with otherwise:
                slot = cgutils.alloca_once(self.b, value.type)
                self.b.store(value, slot)
                self._copy(address, self.b.ptrtoint(slot, I64), value.type.element, n)

    def _copy(self, to: Any, source: Any, element: ir.Type, n: Any) -> None:
        size = self.i64({F32: 4, F16: 2, I16: 2}[element])

        def body(i: Any, _: list[Any]) -> list[Any]:
            offset = self.b.mul(i, size)
            value = self.load(self.b.add(source, offset), element)
            self.store(value, self.b.add(to, offset))
            return []

        self.loop(self.i64(0), n, 1, [], body)

    def unknown(self, value: Any) -> Any:
        """Return ``value`` (i64) without LLVM knowing that: it unrolls no loop that ends there.

        Of an unrolled one it loads everything ahead, and spills what there are no registers for.
        """
        return self.b.asm(ir.FunctionType(I64, [I64]), "", "=r,0", [value], False)

    def prefetch(self, address: Any, size: int) -> None:
        """Ask for the cache lines of ``size`` bytes, which need not be there."""
        # To read, into all levels of the cache.
        hints = [ir.Constant(I32, hint) for hint in (0, 3, 1)]
        for offset in range(0, size, 64):
            pointer = self.b.inttoptr(self.at(address, offset), I8.as_pointer())
            # Without a suffix LLVM finds its own spelling.
            self._call("llvm.prefetch", ir.VoidType(), [pointer, *hints])

    # -- arithmetic

    def _call(self, name: str, result: ir.Type, args: Sequence[Any], **flags: Any) -> Any:
        signature = ir.FunctionType(result, [a.type for a in args])
        function = cgutils.get_or_insert_function(self.b.module, signature, name)
        return self.b.call(function, args, **flags)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """Return a * b + c, fused where the processor can."""
        return self._call(f"llvm.fmuladd.{_suffix(a.type)}", a.type, [a, b, c])

    def fma_wide(self, a: Any, b: Any, c: Any) -> Any:
        """Return a * b + c of floats of any type and F32; of two vectors of F16 each is exact."""
        halves = self.isa.is_arm and self.isa >= Isa.FP16FML
        if not halves or {_element(v.type) for v in (a, b)} != {F16}:
            return self.fma(self.widen(a), self.widen(b), c)
        totals = self._parts(c, 4)
        for i, eights in enumerate(zip(self._parts(a, 8), self._parts(b, 8), strict=True)):
            for half, name in enumerate(("fmlal", "fmlal2")):
                total = totals[2 * i + half]
                name = f"llvm.aarch64.neon.{name}.v4f32.v8f16"
                totals[2 * i + half] = self._call(name, total.type, [total, *eights])
        return self.joined(totals)

    def call_vector(self, name: str, *args: Any) -> Any:
        """Return an LLVM intrinsic of one overloaded type."""
        return self._call(f"llvm.{name}.{_suffix(args[0].type)}", args[0].type, args)

    def absolute(self, value: Any) -> Any:
        """Return magnitudes of integers; that of the lowest is right as an unsigned number."""
        name = f"llvm.abs.{_suffix(value.type)}"
        return self._call(name, value.type, [value, ir.Constant(I1, 0)])

    def to_int(self, value: Any) -> Any:
        """Convert floats to I32, towards zero; NaN becomes 0 and what is too large the nearest."""
        kind = vector(I32, value.type.count)
        return self._call(f"llvm.fptosi.sat.{_suffix(kind)}.{_suffix(value.type)}", kind, [value])

    def fold(self, value: Any, combine: Callable[[Any, Any], Any]) -> Any:
        """Combine lanes of a vector to one by a tree; a scalar as it is."""
        if not isinstance(value.type, ir.VectorType):
            return value
        width = value.type.count
        while width > 1:
            width //= 2
            low = self.shuffle(value, range(width))
            value = combine(low, self.shuffle(value, range(width, 2 * width)))
        return self.lane(value, 0)

    def sum(self, value: Any) -> Any:
        add = self.b.fadd if _element(value.type) == F32 else self.b.add
        return self.fold(value, add)

    def shift_right(self, value: Any, bits: int) -> Any:
        """Shift right, unsigned."""
        return self.b.lshr(value, self.like(value, bits)) if bits else value

    def shift_left(self, value: Any, bits: int) -> Any:
        return self.b.shl(value, self.like(value, bits)) if bits else value

    def and_(self, value: Any, mask: int) -> Any:
        return self.b.and_(value, self.like(value, mask))

    def widen(self, value: Any) -> Any:
        """Convert F16, BF16 (as I16) or F32 values to F32."""
        element = _element(value.type)
        if element == F32:
            return value
        n = value.type.count if isinstance(value.type, ir.VectorType) else 0
        wide = vector(F32, n) if n else F32
        if element == F16:
            return self.b.fpext(value, wide)
        bits = self.b.zext(value, vector(I32, n) if n else I32)
        return self.b.bitcast(self.shift_left(bits, 16), wide)

    def look_up(self, table: Sequence[int], index: Any) -> Any:
        """Return the bytes of a 16-entry table by the bytes of ``index``, which are below 16."""
        n = index.type.count
        if self.isa.is_arm:
            entries = self.constant(I8, table, 16)
            kind, name = vector(I8, 16), "llvm.aarch64.neon.tbl1.v16i8"
            found = [self._call(name, kind, [entries, part]) for part in self._parts(index, 16)]
            return self.joined(found)
        if self.isa >= Isa.AVX2 and n in (32, 64):
            # Each 16 bytes have a table of their own.
            entries = self.constant(I8, [*table] * (n // 16), n)
            narrow, wide = "llvm.x86.avx2.pshuf.b", "llvm.x86.avx512.pshuf.b.512"
            return self._by_halves(narrow, wide, I8, entries, index)
        # A tree of choices by the index's bits.
        values = [self.constant(I8, entry, n) for entry in table]
        for bit in range(4):
            mask = self.constant(I8, 1 << bit, n)
            chosen = self.b.icmp_signed("!=", self.b.and_(index, mask), self.like(index, 0))
            values = [
                self.b.select(chosen, values[i + 1], values[i]) for i in range(0, len(values), 2)
            ]
        return values[0]

    def bits(self, word: Any) -> Any:
        """Return whether each bit of an I32 is set, the lowest first, as I1[32]."""
        if not self.isa.is_arm:
            return self.b.bitcast(word, vector(I1, 32))
        # No register of these holds a bit for each lane: a lane looks at its bit of its byte.
        spread = self.shuffle(self.b.bitcast(word, vector(I8, 4)), [i // 8 for i in range(32)])
        mask = self.constant(I8, [1 << i % 8 for i in range(32)], 32)
        return self.b.icmp_signed("!=", self.b.and_(spread, mask), self.like(spread, 0))

    def centres(self, largest: int) -> bool:
        """Return whether products take codes of at most ``largest`` less 128, as signed bytes.

        ARM multiplies bytes that both have signs; codes up to 127 are the same either way.
        """
        return self.isa.is_arm and largest > _I8_MOST

    def centred(self, codes: Any) -> Any:
        """Return codes (I8) less 128."""
        return self.b.xor(codes, self.like(codes, -128))

    def dot4(self, total: Any, codes: Any, values: Any, largest: int) -> Any:
        """Return ``total`` plus products of bytes, summed in groups of four.

        ``total`` I32[n], ``codes`` unsigned I8[4 * n] of at most ``largest`` (signed ones where
        they are centred), ``values`` signed I8[4 * n] above -128; n is 8 or 16.
        """
        n = total.type.count
        ints, words = vector(I32, n), vector(I16, 2 * n)
        if self._has_sdot:
            operands = zip(
                self._parts(total, 4),
                self._parts(codes, 16),
                self._parts(values, 16),
                strict=True,
            )
            return self.joined([self._sdot(*parts) for parts in operands])
        if self.isa == Isa.NEON:
            return self.add_pairs(total, self.pairs(codes, values))
        if n == 16 and self.isa == Isa.AVX_VNNI:
            halves = []
            for at in (0, 1):
                total_, codes_, values_ = (self._half(v, at) for v in (total, codes, values))
                halves.append(self.dot4(total_, codes_, values_, largest))
            return self.concat(*halves)
        if self.isa == Isa.AVX_VNNI or self.isa >= Isa.AVX512_VNNI:
            name = f"llvm.x86.avx512.vpdpbusd.{32 * n}"
            args = [self.b.bitcast(codes, ints), self.b.bitcast(values, ints)]
            return self._call(name, ints, [total, *args])
        if self.isa == Isa.GENERIC:
            return self._dot4_generic(total, codes, values)
        if largest <= 127:
            return self.add_pairs(total, self.pairs(codes, values))
        c, v = self.b.bitcast(codes, words), self.b.bitcast(values, words)
        eight = self.constant(I16, 8, 2 * n)
        even = [self.and_(c, 255), self.b.ashr(self.b.shl(v, eight), eight)]
        odd = [self.b.lshr(c, eight), self.b.ashr(v, eight)]
        total = self.b.add(total, self._by_words(*even))
        return self.b.add(total, self._by_words(*odd))

    def pairs_that_add_up(self, largest: int) -> int:
        """Return how many results of :meth:`pairs` can be added in 16 bits; 0 without such."""
        # On AVX2, and on AVX-512 before it had an instruction for all of it; so on NEON.
        if self.isa not in (Isa.NEON, Isa.AVX2, Isa.AVX512):
            return 0
        return _I16_MOST // (2 * _I8_MOST * self._size(largest))

    def _size(self, largest: int) -> int:
        """Return the largest magnitude of codes as they are multiplied."""
        return _I8_MOST + 1 if self.centres(largest) else largest

    def pairs(self, codes: Any, values: Any) -> Any:
        """Multiply bytes and sum pairs of products, as I16.

        ``codes`` are at most 127 (or 128: 2 * 128 * 127 still fits), ``values`` above -128.
        """
        if self.isa == Isa.NEON:
            return self.joined(
                [
                    self._call("llvm.aarch64.neon.addp.v8i16", vector(I16, 8), products)
                    for products in self._pairwise(self._smull(codes, values))
                ]
            )
        narrow, wide = "llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx512.pmaddubs.w.512"
        return self._by_halves(narrow, wide, I16, codes, values)

    def add_pairs(self, total: Any, pairs: Any) -> Any:
        """Add sums of two neighbours of ``pairs`` (I16) to ``total`` (I32)."""
        if self.isa == Isa.NEON:
            sums = [self._saddlp(part) for part in self._parts(pairs, 8)]
            return self.b.add(total, self.joined(sums))
        return self.b.add(total, self._by_words(pairs, self.like(pairs, 1)))

    def sum_products(self, codes: Any, values: Any, largest: int) -> Any:
        """Return products of 16 or 32 bytes as four sums (I32), whichever are in which.

        ``codes`` and ``values`` are as for :meth:`dot4`. On ARM.
        """
        total = self.constant(I32, 0, 4)
        if self._has_sdot:
            for parts in zip(self._parts(codes, 16), self._parts(values, 16), strict=True):
                total = self._sdot(total, *parts)
            return total
        products = self._smull(codes, values)
        most = _I16_MOST // (_I8_MOST * self._size(largest))
        for first in range(0, len(products), most):
            short, *others = products[first : first + most]
            for product in others:
                short = self.b.add(short, product)
            total = self.b.add(total, self._saddlp(short))
        return total

    def _parts(self, value: Any, lanes: int) -> list[Any]:
        """Cut a vector into some of ``lanes``."""
        count = value.type.count
        if count == lanes:
            return [value]
        return [self.shuffle(value, range(at, at + lanes)) for at in range(0, count, lanes)]

    def joined(self, parts: Sequence[Any]) -> Any:
        """Put vectors behind each other, of which there are 1, 2, 4, ..."""
        while len(parts) > 1:
            parts = [self.concat(a, b) for a, b in self._pairwise(parts)]
        return parts[0]

    def _pairwise(self, parts: Sequence[Any]) -> list[tuple[Any, Any]]:
        return list(zip(parts[::2], parts[1::2], strict=True))

    @property
    def _has_sdot(self) -> bool:
        return self.isa.is_arm and self.isa >= Isa.DOTPROD

    def _sdot(self, total: Any, a: Any, b: Any) -> Any:
        """``total`` (I32[4]) plus products of signed bytes, summed in fours."""
        return self._call("llvm.aarch64.neon.sdot.v4i32.v16i8", total.type, [total, a, b])

    def smmla(self, total: Any, a: Any, b: Any) -> Any:
        """Add to ``total`` (I32[4]) products of two rows with two columns, eight signed bytes each.

        ``a`` and ``b`` (I8[16]) hold these behind each other; the second lane is of the first row
        and the second column. On I8MM.
        """
        return self._call("llvm.aarch64.neon.smmla.v4i32.v16i8", total.type, [total, a, b])

    def _smull(self, a: Any, b: Any) -> list[Any]:
        """Products of signed bytes, I16[8] each. On ARM."""
        operands = zip(self._parts(a, 8), self._parts(b, 8), strict=True)
        name, kind = "llvm.aarch64.neon.smull.v8i16", vector(I16, 8)
        return [self._call(name, kind, parts) for parts in operands]

    def _saddlp(self, value: Any) -> Any:
        """Sums of neighbours of an I16[8] as I32[4]. On ARM."""
        name = "llvm.aarch64.neon.saddlp.v4i32.v8i16"
        return self._call(name, vector(I32, 4), [value])

    def sign(self, values: Any, signs: Any) -> Any:
        """Multiply ``values`` (I8, above -128) by the sign of ``signs``: -1, 0 or 1. On AVX2."""
        return self._by_halves("llvm.x86.avx2.psign.b", None, I8, values, signs)

    def _by_words(self, a: Any, b: Any) -> Any:
        narrow, wide = "llvm.x86.avx2.pmadd.wd", "llvm.x86.avx512.pmaddw.d.512"
        return self._by_halves(narrow, wide, I32, a, b)

    def _half(self, value: Any, which: int) -> Any:
        n = value.type.count // 2
        return self.shuffle(value, range(n * which, n * (which + 1)))

    def _by_halves(self, narrow: str, wide: str | None, element: ir.Type, a: Any, b: Any) -> Any:
        """An instruction of 32 bytes, for 64 as two where the set has no ``wide`` one."""
        size = a.type.count * a.type.element.width // 8
        if size == 64 and (wide is None or self.isa < Isa.AVX512):
            halves = [
                self._by_halves(narrow, wide, element, self._half(a, at), self._half(b, at))
                for at in (0, 1)
            ]
            return self.concat(*halves)
        name = wide if size == 64 else narrow
        return self._call(str(name), vector(element, size * 8 // element.width), [a, b])

    def dot_bf16(self, total: Any, a: Any, b: Any) -> Any:
        """Add products of BF16, summed in pairs, to ``total`` (F32[16]). On AVX512_BF16.

        A pair is an I32: ``a`` and ``b`` are I32[16].
        """
        pairs = [self.b.bitcast(value, vector(BF16, 32)) for value in (a, b)]
        return self._call("llvm.x86.avx512bf16.dpbf16ps.512", total.type, [total, *pairs])

    def _dot4_generic(self, total: Any, codes: Any, values: Any) -> Any:
        n = total.type.count
        c, v = self.b.bitcast(codes, total.type), self.b.bitcast(values, total.type)
        for byte in range(4):
            code = self.and_(self.shift_right(c, 8 * byte), 255)
            top = self.constant(I32, 24, n)
            value = self.b.ashr(self.shift_left(v, 24 - 8 * byte), top)
            total = self.b.add(total, self.b.mul(code, value))
        return total

    def transpose(self, rows: Sequence[Any]) -> list[Any]:
        """Transpose 16 vectors of 8 lanes to 8 vectors of 16 lanes."""
        pairs = [self.concat(rows[i], rows[i + 8]) for i in range(8)]
        # Each half is an 8 x 8 matrix: three rounds swap blocks of 4, 2 and 1 across the diagonal.
        for size in (4, 2, 1):
            swapped = list(pairs)
            for i in range(8):
                if i & size:
                    continue
                a, b = pairs[i], pairs[i + size]
                low, high = [], []
                for lane in range(16):
                    if lane & size:
                        low.append(16 + lane - size)
                        high.append(16 + lane)
                    else:
                        low.append(lane)
                        high.append(lane + size)
                swapped[i] = self.shuffle(a, low, b)
                swapped[i + size] = self.shuffle(a, high, b)
            pairs = swapped
        return pairs

    def transpose_short(self, rows: Sequence[Any]) -> list[Any]:
        """Transpose 16 vectors of 4 lanes to 4 vectors of 16 lanes."""
        # Each quarter is a 4 x 4 matrix of every fourth row.
        wide = [
            self.concat(self.concat(rows[i], rows[i + 4]), self.concat(rows[i + 8], rows[i + 12]))
            for i in range(4)
        ]

        def woven(a: Any, b: Any, size: int) -> list[Any]:
            """Of each quarter ``size`` lanes of a, then of b, and so on."""
            halves: list[list[int]] = [[], []]
            for quarter, half, at in itertools.product(range(4), range(2), range(0, 2, size)):
                first = 4 * quarter + 2 * half + at
                halves[half] += [*range(first, first + size), *range(16 + first, 16 + first + size)]
            return [self.shuffle(a, order, b) for order in halves]

        low, high = woven(wide[0], wide[1], 1), woven(wide[2], wide[3], 1)
        return [v for a, b in zip(low, high, strict=True) for v in woven(a, b, 2)]

    # -- control

    def loop(
        self,
        start: Any,
        stop: Any,
        step: int,
        carried: Sequence[Any],
        body: Callable[[Any, list[Any]], Sequence[Any]],
    ) -> list[Any]:
        """Emit ``for i in range(start, stop, step): carried = body(i, carried)``.

        Returns the last ``carried``.
        """
        b = self.b
        before = b.block
        head, inside, after = (b.append_basic_block(n) for n in ("head", "inside", "after"))
        b.branch(head)
        b.position_at_end(head)
        index = b.phi(I64)
        index.add_incoming(start, before)
        values = [b.phi(v.type) for v in carried]
        for phi, value in zip(values, carried, strict=True):
            phi.add_incoming(value, before)
        b.cbranch(b.icmp_signed("<", index, stop), inside, after)
        b.position_at_end(inside)
        new = body(index, values)
        index.add_incoming(b.add(index, self.i64(step)), b.block)
        for phi, value in zip(values, new, strict=True):
            phi.add_incoming(value, b.block)
        b.branch(head)
        b.position_at_end(after)
        return list(values)


def _element(kind: ir.Type) -> ir.Type:
    return kind.element if isinstance(kind, ir.VectorType) else kind


def _suffix(kind: ir.Type) -> str:
    """Return how LLVM names an overload of this type."""
    element = _element(kind)
    name = {F32: "f32", F16: "f16"}.get(element) or f"i{element.width}"
    return f"v{kind.count}{name}" if isinstance(kind, ir.VectorType) else name
