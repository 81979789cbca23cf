"""Advice before an upload: the header of a model, the formula, and which arrangement is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from client.backend import Backend
from client.model_header import ModelShape, WeightProduct
from client.split.advice import (
    BATCH,
    CARD_SECONDS,
    EXCHANGE_SECONDS,
    Arrangement,
    Box,
    Kind,
    advise,
    cuts_heads,
    exchanges,
    predict,
)
from client.split.model_speed import ServerSample, time_sample
from protocol.ggml.types import GgmlType
from tests.server.process import running
from tools.models import write_model

GB = 1e9
# 8 GB of 32 layers, of which a token reads all.
MODEL = ModelShape(
    name="model", layers=32, width=4096, ffn_width=11008, heads=32, kv_heads=8, head_width=128,
    vocabulary=32000, weight_bytes=int(8 * GB), token_bytes=int(8 * GB), cache_bytes=131072,
    products=(WeightProduct(GgmlType.Q8_0, 4096, 4096, 1),),
)  # fmt: skip
BOX = Box("a", 64 << 30, 20 * GB, 400 * GB, 0.3e-3, 0.12 * GB)
TWO = [BOX, replace(BOX, endpoint="b")]


def of(kind: str, parts: tuple[int, ...], home: int | None, boxes: list[Box]) -> float:
    arrangement = Arrangement(kind, parts, home)  # type: ignore[arg-type]
    return predict(MODEL, boxes, arrangement, context=4096).seconds_per_token


def test_the_example_of_the_document() -> None:
    """8 GB on two boxes of 20 GB/s: 400 ms alone, 200 ms and 64 round trips over both."""
    alone, both = of("alone", (0,), None, TWO), of("tensor", (0, 1), 0, TWO)
    assert alone == pytest.approx(0.400 * 1.05, rel=0.05)
    assert both == pytest.approx(0.219 + 0.05 * 0.4, rel=0.1)
    (best, *_) = advise(MODEL, TWO)
    assert best.arrangement.kind == "tensor"
    assert best.fits
    assert set(best.arrangement.parts) == {0, 1}


# Of docs/split.md, measured: round trips (us) and rates (bytes/s), and milliseconds a token of the
# 1.1 GB model with `local` and one worker, in `row` and in `tensor`. One server alone took 85.
MEASURED = {
    "the relay alone": ((138, 152), 12.5e9, (72.1, 50.5)),
    "0.1 ms, 1 Gbit/s": ((431, 420), 0.125e9, (98.4, 62.6)),
    "0.25 ms, 1 Gbit/s": ((656, 674), 0.125e9, (119.1, 73.8)),
    "1 ms, 1 Gbit/s": ((2178, 2181), 0.125e9, (233.6, 131.1)),
    "0.1 ms, 10 Gbit/s": ((433, 429), 1.25e9, (87.0, 58.5)),
    "0.25 ms, 10 Gbit/s": ((663, 688), 1.25e9, (107.3, 69.0)),
    "1 ms, 10 Gbit/s": ((2181, 2168), 1.25e9, (220.4, 125.9)),
}
ALONE = 85.0


def test_predictions_are_those_of_the_document() -> None:
    """Most within 20% of what was measured, and the best arrangement of each network is named."""
    size = 1164247040
    model = replace(
        MODEL, layers=18, width=2048, ffn_width=8192, kv_heads=8, head_width=64, vocabulary=512,
        weight_bytes=size, token_bytes=size,
    )  # fmt: skip
    # The least graph, and seven requests with inputs before it.
    rest, graph, handling = 1.0e-3, 0.25e-3, 35e-6
    home = replace(
        BOX, decode=size / (ALONE * 1e-3 - rest - graph - 7 * handling), rest=rest, graph=graph,
        round_trip=70e-6, handling=handling, link=2e9,
    )  # fmt: skip
    document = (Path(__file__).parents[2] / "docs/split.md").read_text()
    close = 0
    for network, (trips, link, measured) in MEASURED.items():
        times = {"alone": ALONE}
        found = {"alone": predict(model, [home], Arrangement("alone", (0,)), context=256)}
        for kind, trip, ms in zip(("row", "tensor"), trips, measured, strict=True):
            worker = replace(home, endpoint="b", round_trip=trip * 1e-6, link=link)
            arrangement = Arrangement(kind, (0, 1), 0)  # type: ignore[arg-type]
            found[kind] = predict(
                model, [home, worker], arrangement, context=256, shares=(0.5, 0.5)
            )
            times[kind] = ms
        predicted = {kind: 1e3 * p.seconds_per_token for kind, p in found.items()}
        assert predicted["alone"] == pytest.approx(ALONE, rel=1e-3)
        assert min(predicted, key=predicted.__getitem__) == min(times, key=times.__getitem__)
        close += sum(abs(predicted[k] / times[k] - 1) <= 0.2 for k in ("row", "tensor"))
        row = [f"{x:.1f}" for k in ("row", "tensor") for x in (times[k], predicted[k])]
        assert f"| {network} | {' | '.join(row)} |" in document
    assert close == 13


def test_a_small_model_stays_on_one_box() -> None:
    small = replace(MODEL, weight_bytes=int(0.3 * GB), token_bytes=int(0.3 * GB))
    assert advise(small, TWO)[0].arrangement.kind == "alone"


def test_a_slow_network_takes_layers_for_what_fits_no_box() -> None:
    boxes = [replace(b, free=6 << 30, round_trip=20e-3) for b in TWO]
    best = advise(MODEL, boxes)[0]
    assert best.arrangement.kind == "layers"
    assert best.fits
    alone = next(p for p in advise(MODEL, boxes) if p.arrangement.kind == "alone")
    assert not alone.fits
    assert alone.limit == "memory"


def test_what_does_not_fit_comes_last_and_says_how_much_is_missing() -> None:
    boxes = [replace(b, free=1 << 30) for b in TWO]
    found = advise(MODEL, boxes)
    assert not any(p.fits for p in found)
    assert [p.missing for p in found] == sorted(p.missing for p in found)
    assert found[0].missing > 2 << 30


def test_round_trips_are_what_limits_a_far_away_worker() -> None:
    boxes = [BOX, replace(BOX, endpoint="b", round_trip=10e-3)]
    arrangement = Arrangement("row", (0, 1), 0)
    assert predict(MODEL, boxes, arrangement, context=4096).limit == "round trips"


def test_a_faster_box_gets_more() -> None:
    boxes = [replace(BOX, decode=30 * GB), replace(BOX, endpoint="b", decode=10 * GB)]
    found = predict(MODEL, boxes, Arrangement("row", (0, 1), 0), context=4096)
    assert found.shares[0] > 0.7
    assert sum(found.shares) == pytest.approx(1)


def test_programs_at_both_ends_are_no_part_of_an_exchange() -> None:
    """They handle requests; an exchange passes them by."""
    away = replace(BOX, endpoint="b", round_trip=0.5e-3, handling=0.1e-3)
    near = replace(BOX, round_trip=0.2e-3, handling=0.1e-3)
    slower = of("row", (0, 1), 0, [near, replace(away, handling=0.0)])
    assert slower - of("row", (0, 1), 0, [near, away]) == pytest.approx(129 * 0.2e-3)


def test_workers_share_the_coordinators_cable() -> None:
    boxes = [replace(BOX, endpoint=name, link=1e6) for name in "abc"]
    both, own = (
        predict(MODEL, boxes, Arrangement("row", (0, 1, 2), 0), context=4096, one_cable=one)
        for one in (True, False)
    )
    client = 4 * MODEL.vocabulary / 1e6
    assert both.terms["network"] - client == pytest.approx(2 * (own.terms["network"] - client))


def test_servers_that_share_a_core_bring_nothing_together() -> None:
    a = replace(BOX, beside={"b": 1.0}, round_trip=0.0)
    b = replace(BOX, endpoint="b", beside={"a": 1.0}, round_trip=0.0)
    assert a.slowed([a, b]) == 2.0
    shared = predict(MODEL, [a, b], Arrangement("row", (0, 1), 0), context=4096)
    assert shared.terms["bandwidth"] == pytest.approx(0.4)
    # What computes alone is as fast as it is.
    assert of("alone", (0,), None, [a, b]) == pytest.approx(0.42, rel=0.01)
    assert advise(MODEL, [a, b])[0].arrangement.kind == "alone"


def test_what_slows_one_column_need_not_slow_many() -> None:
    """Two cores share the memory's bandwidth, which a prompt doesn't wait for."""
    slowed = [
        replace(box, beside={other.endpoint: 1.0}, round_trip=0.0)
        for box, other in zip(TWO, reversed(TWO), strict=True)
    ]
    free = [replace(b, beside={}) for b in slowed]
    both = [replace(b, beside_prompt=b.beside) for b in slowed]
    decode, alike, prompts = (
        predict(MODEL, boxes, Arrangement("tensor", (0, 1), 0), context=4096)
        for boxes in (slowed, free, both)
    )
    assert decode.terms["bandwidth"] == pytest.approx(2 * alike.terms["bandwidth"])
    assert decode.seconds_per_prompt_token == alike.seconds_per_prompt_token
    more = prompts.seconds_per_prompt_token - alike.seconds_per_prompt_token
    products = 0.5 * (MODEL.token_bytes - MODEL.output_bytes) / BOX.prompt
    ends = exchanges(MODEL, "tensor", [0.5, 0.5]) * EXCHANGE_SECONDS / BATCH
    assert more == pytest.approx(products + ends)


def test_a_third_beside_one_of_two_gets_no_share_worth_it() -> None:
    """Shares are by what each is able to do while the others compute."""
    boxes = [
        replace(BOX, beside={"c": 1.0}),
        replace(BOX, endpoint="b"),
        replace(BOX, endpoint="c", beside={"a": 1.0}),
    ]
    shares = predict(MODEL, boxes, Arrangement("row", (0, 1, 2), 0), context=4096).shares
    assert shares[1] == pytest.approx(0.5, abs=0.05)


def test_the_rest_of_a_token_is_what_was_measured() -> None:
    measured = replace(BOX, rest=0.05, rest_prompt=0.004, graph=0.002)
    found = predict(MODEL, [measured], Arrangement("alone", (0,)), context=4096)
    assert found.terms["no products"] == 0.05
    assert found.terms["round trips"] == 0.002
    prompt = MODEL.token_bytes / measured.prompt + 0.004
    assert found.seconds_per_prompt_token == pytest.approx(prompt, rel=1e-3)


def test_servers_in_a_row_are_cold() -> None:
    """Each has waited for the others; one alone hasn't."""
    cold = [replace(b, cold=0.001) for b in TWO]
    assert of("layers", (0, 1), None, cold) == pytest.approx(
        of("layers", (0, 1), None, TWO) + 0.002
    )
    assert of("alone", (0,), None, cold) == of("alone", (0,), None, TWO)


def test_results_of_a_prompt_go_out_meanwhile() -> None:
    """In row mode a third of the wire's time, or half of the products' time if that is less."""

    def seconds(link: float) -> float:
        boxes = [replace(b, link=link, round_trip=0.0, rest_prompt=0.0) for b in TWO]
        found = predict(MODEL, boxes, Arrangement("row", (0, 1), 0), context=4096)
        return found.seconds_per_prompt_token

    products = MODEL.token_bytes / 2 / BOX.prompt
    trips = seconds(1e15) - products
    wire = [(seconds(0.12 * GB * 2**n) - products - trips) * 2**n for n in range(6)]
    # Slow links: all but half the products' time; fast ones: two thirds.
    assert wire[-1] < wire[0]
    assert wire[-1] * 1.5 == pytest.approx(wire[0] + products / 2, rel=0.01)


def test_the_output_is_for_the_last_token_of_a_prompt() -> None:
    half = replace(MODEL, output_bytes=MODEL.token_bytes // 2)
    whole, without = (
        predict(m, [replace(BOX, rest_prompt=0.0)], Arrangement("alone", (0,)), context=4096)
        for m in (MODEL, half)
    )
    assert without.seconds_per_prompt_token < 0.51 * whole.seconds_per_prompt_token
    assert without.seconds_per_token == whole.seconds_per_token


def test_upstreams_servers_do_not_coordinate() -> None:
    boxes = [replace(b, splits=False) for b in TWO]
    assert {p.arrangement.kind for p in advise(MODEL, boxes)} == {"alone", "layers"}


def test_exchanges_as_they_were_counted() -> None:
    """SmolLM2 (30 layers, 3 key/value heads) takes 61 in tensor mode, 18 layers of 8 heads 37."""
    smol = replace(MODEL, layers=30, heads=9, kv_heads=3, head_width=64)
    assert cuts_heads(smol, [1, 1])
    assert cuts_heads(smol, [0.27, 0.47, 0.26])
    assert exchanges(smol, "tensor", [1, 1]) == 61
    # Keys and values would be cut in whole heads, queries wouldn't.
    uneven = replace(smol, heads=6, kv_heads=2)
    assert not cuts_heads(uneven, [0.4, 0.6])
    assert exchanges(uneven, "tensor", [0.4, 0.6]) == 91
    other = replace(MODEL, layers=18)
    assert exchanges(other, "tensor", [1, 1]) == 37
    assert exchanges(other, "row", [1, 1]) == 73


@pytest.mark.parametrize("architecture", ["llama-gqa", "llama-moe", "gemma2"])
def test_the_header_of_a_model(tmp_path: Path, architecture: str) -> None:
    path = write_model(tmp_path, architecture, "Q8_0")
    shape = ModelShape.read(path)
    assert shape.layers == 2
    assert shape.width == 256
    assert 0 < shape.token_bytes <= shape.weight_bytes <= path.stat().st_size
    assert 0 < shape.output_bytes < shape.token_bytes
    # Of a mixture of experts a token reads some.
    assert (shape.token_bytes < 0.9 * shape.weight_bytes) == (architecture == "llama-moe")


def test_what_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "x-00001-of-00002.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="not beside it"):
        ModelShape.read(path)
    other = tmp_path / "x.gguf"
    other.write_bytes(b"no model at all")
    with pytest.raises(ValueError, match=r"."):
        ModelShape.read(other)


async def test_a_server_is_timed_with_the_models_own_products(tmp_path: Path) -> None:
    shape = ModelShape.read(write_model(tmp_path, "llama-gqa", "Q8_0"))
    with running("-t", "1", "--mem", "256") as server:
        async with Backend.connect("127.0.0.1", server.port) as backend:
            before = await backend.connection.get_device_memory()
            sample = await ServerSample.make(backend, shape)
            speed = await time_sample(sample, shape)
            await sample.close()
            assert await backend.connection.get_device_memory() == before
    assert speed.decode > 0
    assert speed.prompt > 0
    assert speed.rest is not None
    assert speed.rest_prompt is not None
    assert min(speed.rest, speed.rest_prompt) > 0
    assert abs(speed.answer) > 1e-6


def test_linked_parts_wait_for_one_way_instead_of_two() -> None:
    """One exchange a token, and two swaps a layer; only in tensor mode, and if all can."""
    model = replace(MODEL, layers=18, kv_heads=8)
    linked = [replace(b, links=True) for b in TWO]
    assert exchanges(model, "tensor", [1, 1], linked=True) == 1
    assert exchanges(replace(model, kv_heads=3), "tensor", [1, 1], linked=True) == 19

    def found(boxes: list[Box], kind: Kind = "tensor") -> dict[str, float]:
        return predict(model, boxes, Arrangement(kind, (0, 1), 0), context=4096).terms

    trip = BOX.round_trip + EXCHANGE_SECONDS
    assert found(TWO)["round trips"] == pytest.approx(37 * trip)
    assert found(linked)["round trips"] == pytest.approx(19 * trip)
    assert found(linked)["network"] < found(TWO)["network"]
    assert found([linked[0], TWO[1]]) == found(TWO)
    assert found(linked, "row") == found(TWO, "row")


def test_parts_that_share_a_core_wait_for_one_another_between_products() -> None:
    """Linked parts all compute what lies between sums, and send and receive them."""
    parts = [
        replace(box, links=True, rest=1e-3, beside_prompt={other.endpoint: 1.0})
        for box, other in zip(TWO, reversed(TWO), strict=True)
    ]
    own = [replace(b, beside_prompt={}) for b in parts]

    def terms(boxes: list[Box], kind: Kind) -> dict[str, float]:
        return predict(MODEL, boxes, Arrangement(kind, (0, 1), 0), context=4096).terms

    def longer(kind: Kind, term: str) -> float:
        return terms(parts, kind)[term] - terms(own, kind)[term]

    assert longer("tensor", "the coordinator alone") == pytest.approx(1e-3)
    # The coordinator does it by itself.
    assert longer("row", "the coordinator alone") == 0
    n = exchanges(MODEL, "row", [0.5, 0.5])
    assert longer("row", "round trips") == pytest.approx(n * EXCHANGE_SECONDS)


def test_an_exchange_with_a_card_costs_more() -> None:
    """Also with one of the coordinator's own; its processors take part without any."""
    model = replace(MODEL, layers=18, kv_heads=8)
    card = replace(BOX, endpoint="b", card="cuda0")

    def trips(boxes: list[Box], parts: tuple[int, ...] = (0, 1)) -> float:
        return predict(model, boxes, Arrangement("tensor", parts, 0), context=4096).terms[
            "round trips"
        ]

    far = BOX.round_trip + EXCHANGE_SECONDS
    assert trips([BOX, card]) == pytest.approx(37 * (far + CARD_SECONDS))
    assert trips([replace(card, endpoint="a"), TWO[1]]) == pytest.approx(37 * far)
    near = replace(card, endpoint="a", round_trip=0.0)
    assert trips([near, replace(TWO[1], round_trip=0.0)]) == pytest.approx(
        37 * (EXCHANGE_SECONDS + CARD_SECONDS)
    )
    assert [BOX.own_part, card.own_part] == ["local", "cuda0"]
