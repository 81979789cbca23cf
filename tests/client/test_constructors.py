"""Constructors of recurrent, window and training ops and of parts: shapes, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from client.builder.graph import GraphBuilder
from client.builder.partial import Triangle
from client.builder.products import ROPE_NEOX
from client.tensors import ShapeError
from protocol.ggml.ops import Op, TensorFlag
from protocol.ggml.types import GgmlType
from protocol.tensor import Tensor

F32, F16, BF16, I32, I64, Q8_0 = (
    GgmlType.F32, GgmlType.F16, GgmlType.BF16, GgmlType.I32, GgmlType.I64, GgmlType.Q8_0,
)  # fmt: skip
Make = Callable[..., Tensor]


def all_refused(match: str, *attempts: Callable[[], Tensor]) -> None:
    for attempt in attempts:
        with pytest.raises(ShapeError, match=match):
            attempt()


@pytest.fixture
def g() -> GraphBuilder:
    return GraphBuilder()


@pytest.fixture
def t(g: GraphBuilder) -> Make:
    def make(*ne: int, type: GgmlType = F32) -> Tensor:
        return g.new_tensor(type, ne)

    return make


class TestWindows:
    def test_shapes(self, g: GraphBuilder, t: Make) -> None:
        a = g.win_part(t(3, 8, 7), 3)
        assert (a.ne, a.op_params[:3]) == ((3, 3, 3, 9), (3, 3, 3))
        back = g.win_unpart(a, 8, 7, 3)
        assert (back.ne, back.op_params[:1]) == ((3, 8, 7, 1), (3,))
        assert g.get_rel_pos(t(4, 9, type=BF16), 5, 5).type is F16
        assert g.add_rel_pos(t(9, 6, 4), t(3, 3, 2, 4), t(3, 3, 2, 4)).ne == (9, 6, 4, 1)
        inplace = g.add_rel_pos(t(9, 6, 4), t(3, 3, 2, 4), t(3, 3, 2, 4), inplace=True)
        assert (inplace.op_params[0], inplace.view_src) == (1, inplace.src[0])

    def test_refused(self, g: GraphBuilder, t: Make) -> None:
        for a in (t(3, 8, 7, 2), t(3, 8, 7, type=F16)):
            with pytest.raises(ShapeError, match="no F32 image"):
                g.win_part(a, 3)
        with pytest.raises(ShapeError, match="width 0"):
            g.win_part(t(3, 8, 7), 0)
        with pytest.raises(ShapeError, match="for 5 positions"):
            g.get_rel_pos(t(4, 8, type=F16), 5, 5)
        with pytest.raises(ShapeError, match="5 and 4 differ"):
            g.get_rel_pos(t(4, 9, type=F16), 5, 4)
        with pytest.raises(ShapeError, match="doesn't fit"):
            g.add_rel_pos(t(8, 6, 4), t(3, 3, 2, 4), t(3, 3, 2, 4))


class TestRecurrent:
    def test_shapes(self, g: GraphBuilder, t: Make) -> None:
        assert g.ssm_conv(t(7, 6, 3), t(4, 6)).ne == (6, 4, 3, 1)
        x, states = t(8, 3, 4), t(8 * 8 * 3, 2)
        for op, result in (
            (Op.RWKV_WKV6, g.rwkv_wkv6(x, x, x, t(8, 3), x, states)),
            (Op.RWKV_WKV7, g.rwkv_wkv7(x, x, x, x, x, x, states)),
            (Op.GATED_LINEAR_ATTN, g.gated_linear_attn(x, x, x, x, states, 0.5)),
        ):
            assert (result.op, result.ne) == (op, (24, 4 + 16, 1, 1))
        assert result.param_f32(0) == 0.5
        assert g.solve_tri(t(5, 5, 2), t(3, 5, 2)).ne == (3, 5, 2, 1)

    def test_scan(self, g: GraphBuilder, t: Make) -> None:
        s, x, dt, b = t(16, 4, 6, 3), t(4, 6, 5, 2), t(6, 5, 2), t(16, 2, 5, 2)
        ids = t(2, type=I32)
        result = g.ssm_scan(s, x, dt, t(1, 6), b, b, ids, 3)
        assert result.ne == (4 * 6 * 5 * 2 + 3 * 16 * 4 * 6 * 2, 1, 1, 1)
        assert result.op_params[0] == 3
        for match, sources in (
            ("3 snapshots with", (s, x, dt, t(16, 6), b, b, ids, 3)),
            ("0 snapshots", (s, x, dt, t(1, 6), b, b, ids, 0)),
            ("for 16 elements", (s, x, dt, t(2, 6), b, b, ids)),
            ("differ", (s, x, dt, t(1, 6), b, t(16, 3, 5, 2), ids)),
            ("is not 2", (s, x, dt, t(1, 6), b, b, t(3, type=I32))),
            ("no I32 vector", (s, x, dt, t(1, 6), b, b, t(2))),
            ("is not 6x5x2x1", (s, x, t(6, 5, 1), t(1, 6), b, b, ids)),
        ):
            with pytest.raises(ShapeError, match=match):
                g.ssm_scan(*sources)

    def test_delta_net(self, g: GraphBuilder, t: Make) -> None:
        v, one, states = t(8, 4, 5, 2), t(1, 4, 5, 2), t(8, 8, 4, 2)
        q = t(8, 2, 5, 2)
        result = g.gated_delta_net(q, q, v, one, one, states, 3)
        assert (result.ne, result.op_params[0]) == ((32, 5 * 2 + 3 * 8 * 2, 1, 1), 3)
        for match, sources in (
            ("for 8 elements", (q, q, v, t(2, 4, 5, 2), one, states)),
            ("is not 1", (q, q, v, one, v, states)),
            ("is not 8x8x4x2", (q, q, v, one, one, t(8, 8, 4, 1))),
            ("is not F32", (q, q, v, one, one, t(8, 8, 4, 2, type=F16))),
            ("not contiguous", (g.transpose(t(2, 8, 5, 2)), q, v, one, one, states)),
        ):
            with pytest.raises(ShapeError, match=match):
                g.gated_delta_net(*sources)

    def test_refused(self, g: GraphBuilder, t: Make) -> None:
        with pytest.raises(ShapeError, match="don't fit"):
            g.ssm_conv(t(3, 6), t(5, 6))
        with pytest.raises(ShapeError, match="don't fit"):
            g.solve_tri(t(5, 4), t(3, 5))
        for options in ({"lower": False}, {"left": False}, {"uni": True}):
            with pytest.raises(ShapeError, match="only lower, left and not uni"):
                g.solve_tri(t(5, 5), t(3, 5), **options)
        x = t(8, 3, 4)
        with pytest.raises(ShapeError, match="has not 384 elements"):
            g.gated_linear_attn(x, x, x, x, t(8 * 8 * 2, 2), 1.0)
        with pytest.raises(ShapeError, match="is not 8x3x4"):
            g.rwkv_wkv7(x, x, x, x, x, t(8, 3, 5), t(8 * 8 * 3, 2))


class TestDeepSeek:
    def test_indexer(self, g: GraphBuilder, t: Make) -> None:
        q, w = t(32, 3, 5, 4), t(3, 5, 1, 4)
        k, mask = t(32, 1, 7, 4, type=Q8_0), t(7, 5, 1, 2, type=F16)
        assert g.lightning_indexer(q, k, w, mask).ne == (7, 5, 1, 4)
        for sources in (
            (q, t(32, 2, 7, 4), w, mask),
            (q, k, t(3, 5, 2, 4), mask),
            (q, k, w, t(7, 5, 1, 3, type=F16)),
            (q, k, w, t(7, 5, 1, 2)),
            (t(32, 3, 5, 4, type=F16), k, w, mask),
        ):
            with pytest.raises(ShapeError, match="LIGHTNING_INDEXER"):
                g.lightning_indexer(*sources)

    def test_hyper_connections(self, g: GraphBuilder, t: Make) -> None:
        comb = g.dsv4_hc_comb(t(24, 9), t(3), t(24), 0.5, 20)
        assert (comb.ne, comb.op_params[1]) == ((4, 4, 9, 1), 20)
        x = t(16, 4, 9)
        assert g.dsv4_hc_pre(x, t(4, 9)).op_params[1] == 0
        gated = g.dsv4_hc_pre_gated(x, x, 0.5)
        assert (gated.ne, gated.param_f32(0), gated.op_params[1]) == ((16, 9, 1, 1), 0.5, 1)
        assert g.dsv4_hc_post(t(16, 9), x, t(4, 9)).src[3] is None
        assert g.dsv4_hc_post(t(16, 9), x, t(4, 9), comb).ne == (16, 4, 9, 1)
        all_refused(
            "DSV4_HC",
            lambda: g.dsv4_hc_comb(t(24, 9), t(2), t(24), 0.5, 20),
            lambda: g.dsv4_hc_comb(t(24, 9), t(3), t(24), 0.5, 0),
            lambda: g.dsv4_hc_comb(t(15, 9), t(3), t(15), 0.5, 1),
            lambda: g.dsv4_hc_pre(x, x),
            lambda: g.dsv4_hc_pre_gated(x, t(4, 9), 1.0),
            lambda: g.dsv4_hc_post(t(16, 8), x, t(4, 9)),
            lambda: g.dsv4_hc_post(t(16, 9), x, t(4, 9), t(4, 4, 8)),
        )


class TestTraining:
    def test_losses(self, g: GraphBuilder, t: Make) -> None:
        a, b = t(8, 5), t(8, 5)
        assert g.cross_entropy_loss(a, b).ne == (1, 1, 1, 1)
        assert g.cross_entropy_loss_back(t(1), a, b).ne == a.ne
        equal = g.count_equal(t(8, 5, type=I32), t(8, 5, type=I32))
        assert (equal.type, equal.ne) == (I64, (1, 1, 1, 1))
        all_refused(
            "differ in shape",
            lambda: g.cross_entropy_loss(a, t(8, 4)),
            lambda: g.cross_entropy_loss_back(t(1), a, t(8, 4)),
            lambda: g.count_equal(a, t(8, 4)),
        )
        with pytest.raises(ShapeError, match="more than one element"):
            g.cross_entropy_loss_back(t(2), a, b)

    def test_optimizers(self, g: GraphBuilder, t: Make) -> None:
        a = t(8, 5)
        with pytest.raises(ShapeError, match="not marked as a parameter"):
            g.opt_step_sgd(a, t(8, 5), t(2))
        assert g.set_param(a) is a
        assert a.flags & TensorFlag.PARAM
        step = g.opt_step_adamw(a, t(8, 5), t(8, 5), t(8, 5), t(7))
        assert (step.op, step.view_src, step.ne) == (Op.OPT_STEP_ADAMW, a, a.ne)
        # A parameter is among the nodes of a graph, as in ggml.
        assert a in g.build(g.opt_step_sgd(a, t(8, 5), t(2))).nodes
        with pytest.raises(ShapeError, match="are not 7 F32"):
            g.opt_step_adamw(a, t(8, 5), t(8, 5), t(8, 5), t(6))
        with pytest.raises(ShapeError, match="differ in shape"):
            g.opt_step_adamw(a, t(8, 5), t(8, 4), t(8, 5), t(7))
        with pytest.raises(ShapeError, match="is computed"):
            g.set_param(step)

    def test_gradients(self, g: GraphBuilder, t: Make) -> None:
        a = t(8, 6, 4)
        assert g.silu_back(a, a).op is Op.SILU_BACK
        assert g.rms_norm_back(a, a, 0.25).param_f32(0) == 0.25
        back = g.soft_max_ext_back(a, a, 0.5, 0.0, inplace=True)
        assert (back.view_src, back.param_f32(0)) == (a, 0.5)
        positions = t(4, type=I32)
        turned = g.rope_ext(a, positions, None, 6, ROPE_NEOX, 64, freq_scale=0.5)
        back = g.rope_ext_back(a, positions, None, 6, ROPE_NEOX, 64, freq_scale=0.5)
        assert (back.op, back.op_params) == (Op.ROPE_BACK, turned.op_params)
        assert g.repeat_back(a, t(4, 3)).ne == (4, 3, 1, 1)
        with pytest.raises(ShapeError, match="can't be repeated"):
            g.repeat_back(a, t(3, 3))
        rows = g.get_rows_back(t(8, 3, type=F16), t(3, type=I32), t(8, 9, type=F16))
        assert (rows.type, rows.ne, rows.src[2:]) == (F32, (8, 9, 1, 1), (None,) * 8)
        all_refused(
            "get_rows_back",
            lambda: g.get_rows_back(a, t(3, type=I32), t(8, 9)),
            lambda: g.get_rows_back(t(8, 3), t(3), t(8, 9)),
            lambda: g.get_rows_back(t(8, 3), t(3, type=I32), t(7, 9)),
        )


class TestParts:
    def test_set_and_acc(self, g: GraphBuilder, t: Make) -> None:
        a, b = t(8, 6, 4), t(4, 3)
        assert g.set(a, b, 1, 2, 3, 4).op_params[:5] == (1, 2, 3, 4, 0)
        assert g.set_1d(a, b, 16).op_params[:5] == (32, 192, 768, 16, 0)
        assert g.set_2d(a, b, 64, 16).op_params[:5] == (64, 192, 768, 16, 0)
        inplace = g.acc(a, b, 32, 192, 768, 8, inplace=True)
        assert (inplace.op_params[:5], inplace.view_src) == ((32, 192, 768, 8, 1), a)
        all_refused("offset", lambda: g.set_1d(a, b, 1 << 30))
        all_refused("more elements", lambda: g.set_1d(b, a, 0))
        all_refused("not F32", lambda: g.acc(a, t(4, 3, type=F16), 1, 2, 3, 4))
        all_refused("not contiguous", lambda: g.acc(g.transpose(a), b, 1, 2, 3, 4))

    def test_small_ones(self, g: GraphBuilder, t: Make) -> None:
        assert g.add1(t(8, 6, type=F16), t(1)).type is F16
        assert g.add_cast(t(32, 6, type=Q8_0), t(32, 6), F32).type is F32
        assert g.diag(t(5, 1, 3)).ne == (5, 5, 3, 1)
        assert g.tri(t(5, 5), Triangle.LOWER).op_params[0] == 3
        assert g.diag_mask_zero(t(5, 5), 2).op_params[0] == 2
        all_refused("more than one element", lambda: g.add1(t(8, 6), t(2)))
        all_refused("evenly", lambda: g.add1(g.transpose(t(8, 6)), t(1)))
        all_refused("neither quantized", lambda: g.add_cast(t(8, 6), t(8, 6), F32))
        all_refused("can't be repeated", lambda: g.add_cast(t(8, 6, type=F16), t(4, 6), F32))
        all_refused("more than one row", lambda: g.diag(t(5, 2)))
        all_refused("square", lambda: g.tri(t(5, 4), Triangle.UPPER))
