"""What tools.bench.advice makes of its measurements; the figures here are made up."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from client.model_header import ModelShape
from client.split.advice import Arrangement, Box, predict
from tools import upstream
from tools.bench import advice
from tools.bench.advice import (
    ARRANGEMENTS,
    DIRECT,
    AdviceCase,
    Store,
    lines,
    main,
    needs,
    questions,
    summary,
    table,
    typical_boxes,
    words,
)
from tools.models import write_model

GB = 1e9
BOXES = [Box(str(i), 8 << 30, 20 * GB, 400 * GB, 50e-6, 1 * GB, graph=2e-4) for i in range(3)]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> AdviceCase:
    return AdviceCase(write_model(tmp_path_factory.mktemp("m"), "llama-gqa", "Q8_0"), DIRECT)


def measured(case: AdviceCase, off: float = 1.0) -> Store:
    """All arrangements, each ``off`` times what is predicted."""
    store, shape = Store(None), ModelShape.read(case.model)
    entry = store.entry(0, case)
    entry["boxes"].append([asdict(b) for b in BOXES])
    for arrangement in ARRANGEMENTS:
        p = predict(shape, BOXES, arrangement, context=256, batch=advice._PROMPT, one_cable=False)
        entry["rates"][words(arrangement)] = {
            "tg": off * p.tokens_per_second,
            "pp": off * p.prompt_tokens_per_second,
            "shares": list(p.shares),
        }
    return store


def test_arrangements_are_told_apart_and_none_is_twice() -> None:
    names = [words(a) for a in ARRANGEMENTS]
    assert len(set(names)) == len(names)
    assert names[0] == "alone"
    assert words(Arrangement("row", (0, 1), 0)) == "row, local+2"
    assert words(Arrangement("tensor", (1, 2), 0)) == "tensor, 2+3"
    assert [needs(a) for a in ARRANGEMENTS] == [1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3]


def test_what_is_as_predicted_has_no_error(case: AdviceCase) -> None:
    found = lines([case], measured(case))
    assert len(found) == len(ARRANGEMENTS)
    for line in found:
        assert line.decode_error == pytest.approx(0, abs=1e-9)
        assert line.prompt_error == pytest.approx(0, abs=1e-9)
    assert all(q.right and q.named == q.best for q in questions(found))
    assert "best arrangement named: 2 of 2" in summary(found)
    assert "generation 11 of 11, prompts 11 of 11" in summary(found)


def test_what_is_slower_than_predicted_is_said(case: AdviceCase) -> None:
    found = lines([case], measured(case, off=0.5))
    assert found[0].decode_error == pytest.approx(1.0)
    assert "generation 0 of 11, prompts 0 of 11" in summary(found)
    assert "| +100% |" in table(found)


def test_another_one_was_better(case: AdviceCase) -> None:
    store = measured(case)
    rates = store.rounds[0][case.name]["rates"]
    best = max(rates, key=lambda name: rates[name]["tg"])
    other = next(name for name in rates if name not in (best, "alone"))
    rates[other]["tg"] = 1.5 * rates[best]["tg"]
    asked = questions(lines([case], store))[-1]
    assert (words(asked.named.arrangement), words(asked.best.arrangement)) == (best, other)
    assert not asked.right


def test_servers_are_alike_and_networks_are_not() -> None:
    """Round trips are of this network, speeds the median over all, slowness less than that."""
    near = [replace(BOXES[0], decode=n * GB, round_trip=n * 1e-4) for n in (1, 2, 3)]
    near = [replace(b, rest=n, beside={"1": n + 1.0}) for n, b in enumerate(near)]
    far = replace(near[0], decode=9 * GB, round_trip=1e-6, rest=5.0, beside={"1": 3.0, "2": 1.0})
    far = replace(far, beside_prompt={"1": 2.0})
    (found,) = typical_boxes([[asdict(b)] for b in near], [[asdict(far)]])
    assert found.decode == 2.5 * GB
    assert found.round_trip == 1e-4
    assert found.rest == 1.5
    assert found.beside == {"1": 1.0, "2": 0.0}
    assert found.beside_prompt == {"1": 0.0}


def test_it_goes_on_where_it_was_ended(
    case: AdviceCase, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of the first round is there: nothing is started."""
    file = tmp_path / "advice.json"
    told = {"machine": {}, "versions": {}, "rounds": measured(case).rounds}
    file.write_text(json.dumps(told))
    words = ["--model", str(case.model), "--json", str(file), "--rounds", "1"]
    if upstream.find_program("llama-bench") is None:
        pytest.skip("needs llama.cpp: python -m tools.upstream")
    assert main(words) == 0
    assert "best arrangement named: 2 of 2" in capsys.readouterr().out
