"""The report says what the rows say, loads nothing, and refuses folders that hold no results."""

import functools
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from prunelm.study import results as r
from prunelm.study.plots import PLOTS, count, png
from prunelm.study.report import page, text_table, tiles, write_report


def wer(rate: float) -> dict[str, float | int]:
    return {"wer": rate, "wer_low": rate - 0.01, "wer_high": rate + 0.02, "errors": 1, "words": 9}


def made_up() -> r.Results:
    rows = [
        r.Row(r.DENSE, "", 1000, perplexity=40.0, flops=2e3, latency_ms=2.0, dense_latency_ms=2.0,
              **wer(0.20)),
        r.Row(r.NO_LM, "", 0, **wer(0.30)),
    ]  # fmt: skip
    for series, rate in (("Heads | Neurons", 0.22), ("LowRank<x>", 0.21)):
        for target, share in (("25%", 0.25), ("50%", 0.5)):
            latency = 2 * share + (0.5 if series[0] == "H" else 0)
            rows.append(
                r.Row(series, target, int(1000 * share), perplexity=40 / share, flops=2e3 * share,
                      latency_ms=latency, torch_latency_ms=2.1, dense_latency_ms=2.0,
                      settings={"criterion": "Taylor(order=1)"}, seconds={"prune": 1.5},
                      **wer(rate + 0.02 / share))
            )  # fmt: skip
    return r.Results("made up", {"utterances": 3}, {"processor": "a <b>"}, r.in_order(rows))


@functools.cache
def made_up_page() -> str:
    return page(made_up())


def written(folder: Path) -> Path:
    results = made_up()
    r.open_study(folder, results.title, results.study)
    for i, row in enumerate(results.rows):
        r.write_row(folder, f"cell{i}", row)
    return folder


class Tags(HTMLParser):
    """Checks that tags nest, and collects tags, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.cells: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


def test_page_is_whole_and_loads_nothing() -> None:
    text = made_up_page()
    tags = Tags(text)
    assert text.count("<svg") == len(PLOTS) == 4
    for tag, name, value in tags.attributes:
        assert name not in ("src", "srcset") and tag not in ("script", "link", "img")
        assert name not in ("href", "xlink:href") or value.startswith("#")
    assert not re.findall(r"url\((?!#)|@import", text)
    assert "a <b>" not in text and "a &lt;b&gt;" in text
    assert "LowRank<x>" not in text


def test_table_says_the_numbers() -> None:
    cells = Tags(made_up_page()).cells
    at = cells.index("LowRank<x>, 25%")
    assert cells[at + 1 : at + 9] == [
        "250 (25%)", "160.0", "29.0 [28.0, 31.0]", "+9.0", "500", "0.50", "2.10", "4.00\u00d7"
    ]  # fmt: skip
    assert cells[cells.index(r.NO_LM) + 4] == "+10.0"
    assert [c for c in cells if c in (r.NO_LM, r.DENSE) or c.endswith("0%")][:2] == [
        r.NO_LM, r.DENSE
    ]  # fmt: skip


def test_terminal_table_has_every_row_and_its_brackets() -> None:
    shown = io.StringIO()
    Console(width=200, file=shown).print(text_table(made_up(), 200))
    text = shown.getvalue()
    assert "[24.0, 27.0]" in text and "[28.0, 31.0]" in text
    assert all(row.name in text for row in made_up().rows)


@pytest.mark.parametrize("width", [60, 80, 100, 120, 160])
def test_terminal_table_is_whole_at_any_width(width: int) -> None:
    shown = io.StringIO()
    Console(width=width, file=shown).print(text_table(made_up(), width))
    text = shown.getvalue()
    assert all(len(line) <= width for line in text.splitlines()) and "\u2026" not in text
    assert "[28.0, 31.0]" in text and "250 (25%)" in text
    assert ("4.00\u00d7" in text) == (width >= 80)
    assert ("not shown for want of width" in text) == ("Plain torch" not in text.split("not")[0])


def test_report_is_made_of_what_is_finished(tmp_path: Path) -> None:
    path = write_report(written(tmp_path))
    assert path.read_text() == page(r.read_results(tmp_path))
    assert r.read_results(tmp_path).rows == made_up().rows
    saved = json.loads((tmp_path / "results.json").read_text())
    assert [row["target"] for row in saved["rows"]] == ["", "", "50%", "25%", "50%", "25%"]


def test_few_numbers_make_a_report_too() -> None:
    rows = (r.Row(r.DENSE, "", 10, perplexity=3.0), r.Row("Blocks", "50%", 5, perplexity=4.0))
    text = page(r.Results("no speech", {}, {}, rows))
    assert text.count("<svg") == 1
    Tags(text)


@pytest.mark.parametrize("plot", PLOTS, ids=lambda plot: plot.name)
def test_plots_save_as_png(plot) -> None:
    assert png(plot, made_up())[:4] == b"\x89PNG"


def test_bad_folders_get_one_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a folder of results"):
        write_report(tmp_path)
    r.open_study(tmp_path, "t", {"lm": "a"})
    with pytest.raises(ValueError, match="expected at least one finished cell"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="expected a study with lm 'b', got one with 'a'"):
        r.open_study(tmp_path, "t", {"lm": "b"})
    written(tmp_path / "whole")
    (tmp_path / "whole" / "cells" / "cell1.json").write_text('{"format": 1, "seri')
    with pytest.raises(ValueError, match=r"cell1\.json: expected JSON, got a file cut short"):
        write_report(tmp_path / "whole")
    assert not (tmp_path / "whole" / "report.html").exists()


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        r.write_row(tmp_path, "x", r.Row("a", "b", 1, perplexity=float("nan")))
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1k"), (733_196, "733k"), (2_934_784, "2.93M"), (2e10, "20G")],
)
def test_counts_read_as_people_say_them(number: float, text: str) -> None:
    assert count(number) == text


def test_tiles_choose_on_validation_text_only() -> None:
    rows = [
        r.Row(r.DENSE, "", 100, valid_perplexity=9.0, **wer(0.20)),
        r.Row(r.NO_LM, "", 0, **wer(0.40)),
        r.Row("A", "50%", 50, valid_perplexity=11.0, **wer(0.10)),
        r.Row("B", "50%", 50, valid_perplexity=10.0, **wer(0.30)),
    ]
    shown = tiles(r.Results("t", {}, {}, r.in_order(rows)))
    assert shown[0] == ("20.0 %", "WER with the dense LM", "40.0 % without LM, \u221250 % relative")
    assert shown[1] == ("30.0 %", "WER at 50%", "B, best on validation text")


def test_rows_of_other_types_are_named(tmp_path: Path) -> None:
    written(tmp_path)
    path = tmp_path / "cells" / "cell1.json"
    values = json.loads(path.read_text())
    for name, value, message in (
        ("series", 3, "expected series as text, got 3"),
        ("parameters", "many", "expected parameters as a whole number, got 'many'"),
        ("parameters", 1.5, "expected parameters as a whole number, got 1.5"),
        ("perplexity", math.nan, "expected perplexity as a number, got nan"),
        ("wer", 10**400, "expected wer as a number, got 1000"),
        ("seconds", {"prune": "long"}, "expected seconds of prune as a number, got 'long'"),
        ("settings", [], "expected settings as an object, got []"),
        ("other", 1, "expected no field other, got one"),
    ):
        path.write_text(json.dumps({**values, name: value}))
        with pytest.raises(ValueError, match=re.escape(f"cell1.json: {message}")) as caught:
            r.read_results(tmp_path)
        assert len(str(caught.value)) <= 500
    path.write_text(json.dumps({k: v for k, v in values.items() if k != "seed"}))
    with pytest.raises(ValueError, match=r"cell1.json: expected the field seed, got none"):
        r.read_results(tmp_path)
    path.write_text(json.dumps(values))
    study = tmp_path / "study.json"
    study.write_text(json.dumps({**json.loads(study.read_text()), "title": None}))
    with pytest.raises(ValueError, match=r"study.json: expected title as text, got None"):
        r.read_results(tmp_path)
