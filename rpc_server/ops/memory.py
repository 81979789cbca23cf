"""Ops that only describe memory, and those that copy whole tensors into place.

Sources may lie in the result's own memory: what is read is copied, or numpy sees the overlap.
"""

from __future__ import annotations

from typing import Any

from protocol.ggml.ops import VIEWS, Op
from protocol.ggml.types import DECODABLE, FLOATS, TYPE_INFO, GgmlType, nbytes
from protocol.tensor import Tensor
from rpc_server.ops import checks
from rpc_server.ops.arrays import NATIVE, ArrayContext
from rpc_server.ops.checks import F32_ONLY, I32_ONLY
from rpc_server.ops.shards import Propagated, Shards, in_whole_blocks
from rpc_server.ops.table import contract, reference, require, source
from rpc_server.types import ENCODABLE

_ALL = frozenset(GgmlType)
_PLAIN = frozenset(NATIVE)


@contract(*VIEWS, is_view=True)
def _describes_memory(t: Tensor) -> None:
    """Extents are the parser's to check; what is read through a view, its reader's."""


# -- DUP, CONT, CPY --------------------------------------------------------------------------------


def _convertible(source_type: GgmlType, result_type: GgmlType) -> bool:
    if source_type is result_type:
        return True
    if source_type in FLOATS:
        return result_type in ENCODABLE | I32_ONLY
    if source_type is GgmlType.I32 or TYPE_INFO[source_type].quantized:
        return result_type is GgmlType.F32 and source_type in DECODABLE | I32_ONLY
    return False


def _copy_shard(node: Tensor, shards: Shards) -> Propagated | None:
    # A copy into another tensor writes memory that is whole here; ggml_cast and ggml_cont don't.
    if node.src[1] is not None or node.view_src is not None:
        return None
    source, shard = node.src[0], shards[0]
    if source is None or shard is None or source.ne != node.ne or not in_whole_blocks(node, shard):
        return None
    return Propagated(shard)


# CPY names its destination as a second source; the node itself is a view of it.
@contract(Op.DUP, Op.CONT, Op.CPY, shard_rule=_copy_shard)
def _copy_contract(t: Tensor) -> None:
    s = source(t, 0)
    require(_convertible(s.type, t.type), f"no conversion from {s.type.name} to {t.type.name}")
    require(s.nelements == t.nelements, f"source 0 has {s.nelements} elements")
    checks.blocks(s, "source 0")
    checks.distinct(t, "the result")


@reference(Op.DUP, Op.CONT, Op.CPY)
def _copy(ctx: ArrayContext, t: Tensor) -> None:
    """Elements in memory order of indices: shapes may differ, counts don't."""
    s = source(t, 0)
    if s.type is t.type:
        target = ctx.view(t)
        target[...] = ctx.view(s).reshape(target.shape)
    else:
        ctx.store(t, ctx.f32(s).reshape(t.ne[::-1]))


# -- SET, ACC: source 1 goes into a part of the result ---------------------------------------------


def _part(t: Tensor) -> Tensor:
    """The part of the result that source 1 covers: its strides and offset are op_params."""
    s = source(t, 1)
    return Tensor(
        id=0,
        name=f"part of {t.name}",
        type=t.type,
        op=Op.VIEW,
        ne=s.ne,
        nb=(t.type_size, t.param_i32(0), t.param_i32(1), t.param_i32(2)),
        address=t.address + t.param_i32(3),
    )


def _set_contract(t: Tensor) -> None:
    checks.of_type(t, {GgmlType.F32, GgmlType.I32} if t.op is Op.SET else F32_ONLY, "the result")
    checks.contiguous(t, "the result")
    whole = checks.source(t, 0, {t.type})
    checks.contiguous(whole, "source 0")
    checks.shape(whole, t.ne, "source 0")
    s = checks.source(t, 1, {t.type})
    strides = t.op_params[:4]
    require(
        all(word >= 0 and word % t.type_size == 0 for word in strides),
        f"offset or strides {strides} are not whole elements",
    )
    end = strides[3] + nbytes(t.type, s.ne, (t.type_size, *strides[:3]))
    require(end <= t.nbytes, f"source 1 would end at byte {end} of {t.nbytes}")
    part = _part(t)
    checks.distinct(part, "the part to write")


def _with_source_0(ctx: ArrayContext, t: Tensor) -> Any:
    """The result's part for source 1, after source 0 is in the rest (op_params[4]: it is)."""
    if not t.param_i32(4):
        ctx.view(t)[...] = ctx.view(source(t, 0))
    return ctx.view(_part(t))


contract(Op.SET)(_set_contract)
contract(Op.ACC)(_set_contract)


@reference(Op.SET)
def _set(ctx: ArrayContext, t: Tensor) -> None:
    values = ctx.xp.array(ctx.view(source(t, 1)))
    _with_source_0(ctx, t)[...] = values


@reference(Op.ACC)
def _acc(ctx: ArrayContext, t: Tensor) -> None:
    values = ctx.xp.array(ctx.view(source(t, 1)))
    part = _with_source_0(ctx, t)
    part[...] = part + values


# -- CONCAT, REPEAT, REPEAT_BACK -------------------------------------------------------------------


@contract(Op.CONCAT)
def _concat_contract(t: Tensor) -> None:
    dim = t.param_i32(0)
    require(0 <= dim < 4, f"no dimension {dim}")
    a = checks.source(t, 0, {t.type}, dense=False)
    b = checks.source(t, 1, {t.type}, dense=False)
    ne = list(a.ne)
    ne[dim] = b.ne[dim]
    checks.shape(b, ne, "source 1")
    ne[dim] += a.ne[dim]
    checks.shape(t, ne, "the result")
    checks.distinct(t, "the result")


@reference(Op.CONCAT)
def _concat(ctx: ArrayContext, t: Tensor) -> None:
    parts = [ctx.view(source(t, i)) for i in (0, 1)]
    ctx.view(t)[...] = ctx.xp.concatenate(parts, axis=3 - t.param_i32(0))


@contract(Op.REPEAT)
def _repeat_contract(t: Tensor) -> None:
    checks.of_type(t, _PLAIN, "the result")
    s = checks.source(t, 0, {t.type}, dense=False)
    require(s.can_repeat_to(t), "the result is not whole copies of source 0")
    checks.distinct(t, "the result")


@reference(Op.REPEAT)
def _repeat(ctx: ArrayContext, t: Tensor) -> None:
    s = source(t, 0)
    times = [n // m for n, m in zip(t.ne, s.ne, strict=True)]
    ctx.view(t)[...] = ctx.xp.tile(ctx.view(s), times[::-1])


@contract(Op.REPEAT_BACK)
def _repeat_back_contract(t: Tensor) -> None:
    checks.of_type(t, F32_ONLY, "the result")
    s = checks.source(t, 0, F32_ONLY, dense=False)
    require(t.can_repeat_to(s), "source 0 is not whole copies of the result")
    checks.distinct(s, "source 0")
    checks.distinct(t, "the result")


@reference(Op.REPEAT_BACK)
def _repeat_back(ctx: ArrayContext, t: Tensor) -> None:
    s = source(t, 0)
    # Each dimension as (copies, elements): the copies are summed away.
    shape = [n for m, k in zip(s.ne[::-1], t.ne[::-1], strict=True) for n in (m // k, k)]
    ctx.view(t)[...] = ctx.f32(s).reshape(shape).sum(axis=(0, 2, 4, 6))
