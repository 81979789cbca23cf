"""The arithmetic and the outputs of tools.bench, and a small run of the real thing."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.gguf_file import GgufFile
from tools import models, upstream
from tools.arguments import numbers
from tools.bench import llama, micro, picture, report, slots
from tools.bench.__main__ import main
from tools.bench.results import (
    OURS,
    SERVERS,
    UPSTREAM,
    BenchResult,
    Figure,
    ResultTable,
    Sample,
)
from tools.bench.servers import serving
from tools.serving.processes import ProgramError

SVG = "{http://www.w3.org/2000/svg}"


def figure(ours: list[float], theirs: list[float], *, more: bool = True) -> Figure:
    return Figure("speed", "GB/s", more, {OURS: ours, UPSTREAM: theirs})


def result(*figures: Figure, title: str = "a model") -> BenchResult:
    return BenchResult(
        {"cores": 2}, {"ours": "1.0"}, {"rounds": 3}, [ResultTable(title, list(figures))]
    )


# -- arithmetic


def test_the_ratio_is_taken_round_by_round() -> None:
    # The machine became ten times slower: the medians' ratio would be 30 / 100.
    made = figure([200.0, 30.0, 20.0], [100.0, 10.0, 400.0])
    assert made.ratios == [2.0, 3.0, 0.05]
    assert made.ratio == 2.0
    assert made.median(OURS) == 30.0


def test_what_is_better_depends_on_the_figure() -> None:
    assert figure([2.0], [4.0]).times_better == 0.5
    assert figure([2.0], [4.0], more=False).times_better == 2.0


def test_rounds_of_unequal_number_have_no_ratio() -> None:
    with pytest.raises(ValueError, match="shorter"):
        _ = figure([1.0, 2.0], [1.0]).ratios


def test_a_table_gathers_rounds_in_the_order_of_the_figures() -> None:
    table = ResultTable("t")
    for value in (1.0, 2.0):
        for server in SERVERS:
            table.add(server, [Sample("b", "s", False, value), Sample("a", "s", False, 3 * value)])
    assert [f.name for f in table.figures] == ["b", "a"]
    assert table.figures[1].samples == {OURS: [3.0, 6.0], UPSTREAM: [3.0, 6.0]}
    assert not table.figures[0].more


@pytest.mark.parametrize(
    ("value", "shown"), [(1234.5, "1234"), (99.94, "99.9"), (1.234, "1.23"), (0.0123, "0.012")]
)
def test_numbers_have_three_digits_that_count(value: float, shown: str) -> None:
    assert report.number(value) == shown


# -- outputs


positive = st.floats(1e-6, 1e9)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=5), st.text(), st.booleans())
def test_json_keeps_everything(
    tmp_path_factory: pytest.TempPathFactory,
    pairs: list[tuple[float, float]],
    title: str,
    more: bool,
) -> None:
    ours, theirs = (list(column) for column in zip(*pairs, strict=True))
    made = result(figure(ours, theirs, more=more), title=title)
    path = tmp_path_factory.getbasetemp() / "bench.json"
    made.save(path)
    assert BenchResult.load(path) == made


def test_tables_show_medians_ratio_and_range() -> None:
    made = result(figure([2.0, 6.0, 4.0], [2.0, 2.0, 2.0]), figure([1.0], [4.0], more=False))
    row = ("speed, GB/s", "4.00", "2.00", "2.00", "1.00..3.00", "more")
    assert report.cells(made.tables[0].figures[0]) == row
    title, header, first, second = report.text(made).splitlines()
    assert title == "a model"
    assert tuple(first.split("  ")[0:1]) == row[:1]
    assert first.split()[-5:] == list(row[1:])
    assert second.split()[-1] == "less"
    assert len(header) == len(first) == len(second)


def test_markdown_has_a_cell_for_each_column() -> None:
    made = result(figure([2.0], [2.0]))
    lines = [line for line in report.markdown(made).splitlines() if line.startswith("|")]
    assert len(lines) == 3
    assert {line.count("|") for line in lines} == {7}


def bars(made: BenchResult) -> Iterator[tuple[str, float, float]]:
    """Kind, left and right of each bar."""
    for rect in ElementTree.fromstring(picture.svg(made)).iter(f"{SVG}rect"):
        if rect.get("class") in ("ahead", "behind"):
            left = float(rect.get("x", ""))
            yield str(rect.get("class")), left, left + float(rect.get("width", ""))


def test_the_picture_has_twice_and_half_on_the_two_sides_of_one() -> None:
    made = result(figure([2.0], [1.0]), figure([1.0], [2.0]), figure([1.0], [2.0], more=False))
    root = ElementTree.fromstring(picture.svg(made))
    (one,) = {float(e.get("x1", "")) for e in root.iter(f"{SVG}line") if e.get("class") == "one"}
    twice, half, fast = bars(made)
    assert (twice[0], half[0], fast[0]) == ("ahead", "behind", "ahead")
    assert twice == fast
    assert twice[1] == half[2] == one
    assert twice[2] - one == pytest.approx(one - half[1], abs=0.2)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(positive, positive), min_size=1, max_size=20))
def test_the_picture_stays_within_its_frame(pairs: list[tuple[float, float]]) -> None:
    made = result(*(figure([ours], [theirs]) for ours, theirs in pairs))
    root = ElementTree.fromstring(picture.svg(made))
    _, _, width, height = map(float, root.get("viewBox", "").split())
    shown = list(bars(made))
    assert len(shown) == len(pairs)
    assert all(0 <= left < right <= width for _, left, right in shown)
    assert all(0 < float(text.get("y", "")) < height for text in root.iter(f"{SVG}text"))


def test_the_picture_escapes_names_and_needs_no_other_file() -> None:
    made = result(figure([1.0], [1.0]), title="<Q4 & Q8>")
    text = picture.svg(made)
    root = ElementTree.fromstring(text)
    assert "<Q4 & Q8>" in [element.text for element in root.iter(f"{SVG}text")]
    assert "prefers-color-scheme: dark" in text
    assert "href" not in text
    assert "url(" not in text


# -- llama.cpp's outputs


def test_llama_bench_tests_are_named_by_tokens_and_depth() -> None:
    tests = [
        {"n_prompt": 512, "n_gen": 0, "n_depth": 0, "avg_ts": 100.0},
        {"n_prompt": 0, "n_gen": 32, "n_depth": 4096, "avg_ts": 10.0},
    ]
    assert llama.bench_samples(tests) == [
        Sample("pp512", "tokens/s", True, 100.0),
        Sample("tg32 at depth 4096", "tokens/s", True, 10.0),
    ]


def test_load_time_is_read_off_the_log() -> None:
    log = "0.00.008.195 I load the model\n1.02.352.984 I generate: n_ctx = 512, n_batch = 2048\n"
    assert llama.load_seconds(log) == pytest.approx(62.352984)
    with pytest.raises(ProgramError, match="load the model"):
        llama.load_seconds(log.splitlines()[0])


def test_depths_have_commas_between() -> None:
    assert numbers("0,4096") == (0, 4096)
    with pytest.raises(argparse.ArgumentTypeError):
        numbers("0;1")


# -- what is uploaded


@pytest.mark.slow
def test_a_large_model_has_all_its_layers_and_about_its_size(tmp_path: Path) -> None:
    size = 130 << 20
    path = models.write_large_model(tmp_path / "large.gguf", size)
    assert path.stat().st_size == pytest.approx(size, rel=0.05)
    file = GgufFile(path)
    assert file.fields["llama.block_count"].contents() == 2
    assert {"blk.0.ffn_up.weight", "blk.1.ffn_up.weight", "output.weight"} <= file.tensors.keys()
    assert [file.name for file in tmp_path.iterdir()] == ["large.gguf"]
    # A server that keeps what it has by its content has all of them.
    matrices = [t.data.tobytes() for t in file.tensors.values() if len(t.ne) > 1]
    assert len(set(matrices)) == len(matrices)


def test_tensors_to_upload_are_as_many_as_are_needed() -> None:
    tensors = list(micro.model_tensors(100 << 20))
    sizes = [tensor.nbytes for tensor in tensors]
    assert sum(sizes) >= 100 << 20
    assert sum(sizes[:-9]) < 100 << 20


# -- the real thing


def test_every_part_is_measured_of_this_server() -> None:
    options = micro.MicroOptions(
        round_trips=20, upload_bytes=1, download_bytes=1, nodes=10, reruns=3, new_graphs=2
    )
    with serving(OURS, 1) as running:
        samples = micro.measure(running.port, running.process.child.pid, options)
        assert running.memory()[0].value > 1
    assert [sample.name for sample in samples] == [
        "round trip",
        "upload, new memory",
        "upload, same memory",
        "download",
        "read of 128 bytes",
        "graph again, 1 node",
        "graph again, 10 nodes",
        "new graph, 10 nodes",
    ]
    assert all(sample.value > 0 for sample in samples)


def test_a_model_that_is_missing_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "nowhere.gguf", "--upload", "0"]) == 1
    assert "nowhere.gguf" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.upstream
@pytest.mark.skipif(
    not all(map(upstream.find_program, ("ggml-rpc-server", "llama-bench", "llama-completion"))),
    reason="llama.cpp's programs are not built: run python -m tools.upstream",
)
@pytest.mark.slow
def test_a_run_of_both_servers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = models.write_model(tmp_path, "llama-gqa", "F16")
    kept, drawn = tmp_path / "result.json", tmp_path / "result.svg"
    words = f"--model {model} -p 8 -n 2 -d 0,16 -r 1 --rounds 1 --flash --upload 1 --json {kept}"
    assert main(words.split()) == 0
    made = BenchResult.load(kept)
    by_itself, of_model = made.tables
    assert [f.name for f in of_model.figures] == [
        "load",
        "first token",
        "pp8",
        "tg2",
        "pp8 at depth 16",
        "tg2 at depth 16",
        "peak memory",
    ]
    for made_of in (*by_itself.figures, *of_model.figures):
        for server in SERVERS:
            (value,) = made_of.samples[server]
            assert value > 0
    shown = capsys.readouterr().out
    assert main(["--show", str(kept), "--picture", str(drawn)]) == 0
    assert capsys.readouterr().out == shown
    ElementTree.parse(drawn)


def test_users_ask_the_same_each_time() -> None:
    asked = slots.questions(4)
    assert asked == slots.questions(4)
    assert len({q.prompt for q in asked}) == len(asked) == 20
    assert all(5 <= len(q.prompt.split()) <= 120 and 10 <= q.tokens <= 60 for q in asked)
