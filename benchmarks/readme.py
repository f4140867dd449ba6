"""Writes README.md's tables and its plot from what was measured, so that both say the same.

    python -m prunelm.benchmarks.readme [--demo runs/demo]

With --demo, a finished demo's results.json becomes results/demo.json first.
"""

import argparse
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prunelm.benchmarks.gpu_goals import GOALS, shown
from prunelm.benchmarks.gpu_goals import steps as steps_of
from prunelm.data.files import replace_file
from prunelm.study.machine import one_line
from prunelm.study.plots import COLORS, MARKERS, PLOTS, STYLE, svg
from prunelm.study.report import COLUMNS, lead
from prunelm.study.results import DENSE, Results, load_results

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
PLOT = "wer"
ROWS = (1, 8, 64)  # M of the kernels' table


def markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; all columns but the first are right-aligned."""
    rule = ["---", *["---:"] * (len(heading) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (heading, rule, *rows))


def demo(results: Results) -> str:
    """The demo's own table."""
    dense = results.row(DENSE)
    shown = [c for c in COLUMNS if c.heading not in ("vs dense", "Step ms", "Plain torch")]
    rows = [
        [row.name.replace("|", "\\|"), *(column.text(row, dense) for column in shown)]
        for row in results.rows
    ]
    table = markdown(["Model", *(f"{c.heading} ({c.help})" for c in shown)], rows)
    return (
        f"`prunelm demo`: {lead(results)[:1].lower()}{lead(results)[1:]} "
        f"{one_line(dict(results.machine))}.\n\n{table}"
    )


def break_even(rows: Sequence[Mapping[str, Any]]) -> str:
    """Speed of 16x4 blocks over dense against the share of blocks that is stored, as an <svg>."""
    import matplotlib
    from matplotlib.figure import Figure

    shown = [r for r in rows if r["block"] == "16x4" and r["N"] == r["K"] == 1024]
    data = io.BytesIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "break-even"}):
        figure = Figure(figsize=(5.4, 3.7), layout="constrained")
        ax = figure.add_subplot()
        for i, M in enumerate(sorted({r["M"] for r in shown})):
            points = sorted((100 * (1 - r["sparsity"]), r["speedup"]) for r in shown if r["M"] == M)
            ax.plot(*zip(*points, strict=True), color=COLORS[i], marker=MARKERS[i], ms=5, lw=1.6,
                    label=f"M = {M}")  # fmt: skip
        ends = [100 * (1 - r["sparsity"]) for r in shown]
        ax.plot([min(ends), max(ends)], [100 / min(ends), 100 / max(ends)], color="#7b8794", lw=1,
                ls=(0, (4, 3)), label="in proportion")  # fmt: skip
        ax.axhline(1, color="#1f2933", lw=1.2)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ticks = sorted(set(ends))
        ax.set_xticks(ticks, [f"{tick:.0f} %" for tick in ticks])
        ax.set_xticks([], minor=True)
        ax.set_yticks([0.5, 1, 2, 4, 8, 16, 32], ["0.5", "1", "2", "4", "8", "16", "32"])
        ax.set_xlabel("blocks stored")
        ax.set_ylabel("speed over torch's dense linear")
        ax.legend()
        figure.savefig(data, format="svg", metadata={"Date": None}, transparent=True)
    text = data.getvalue()
    return on_white(text[text.index(b"<svg") :].decode())


def on_white(plot: str) -> str:
    """An <svg> that is readable on dark pages too."""
    return plot.replace("<svg ", '<svg style="background:white" ', 1)


def kernels(devices: Mapping[str, Mapping[str, Any]]) -> str:
    """Speed of the linear ops over torch's dense one, and of decoding, one part per device."""
    return "\n\n".join(part for name in devices for part in _device(name, devices[name]) if part)


def gpu(found: Mapping[str, Any]) -> list[str]:
    """What a card's kernels reach beside what they are to reach, and a model's steps."""
    first = next(iter(found.values()))
    goals = [shown(goal) for goals_of in GOALS for goal in goals_of(found)]
    rows = [
        [goal["what"], *(_number(goal[name]) for name in ("asked", "warm", "cold"))]
        for goal in goals
        if goal["cases"]
    ]
    heading = ["bfloat16, 4096 x 4096", "asked", "data in the L2", "not in it"]
    about = f"Speed over torch's best: {first['machine']}; commit {first['commit']}."
    parts = [f"{about}\n\n{markdown(heading, rows)}"] if rows else []
    steps = [
        [row["model"], *(_number(row[name]) for name in ("us", "roof_us", "eager_us"))]
        for row in steps_of(found)
        if row["rows"] == 32
    ]
    if steps:
        heading = ["a step of 32 rows, us", "as one graph", "sum of rooflines", "eager"]
        parts.append(markdown(heading, steps))
    return parts


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _device(name: str, found: Mapping[str, Any]) -> list[str]:
    if name.startswith("nvidia-"):
        return gpu(found) if found else []
    blocks = found.get("block_sparse_linear, 1 threads")
    ranks = found.get("low_rank_linear, 1 threads")
    decoding = found.get("decoding, 1 threads")
    heading = ["weight 1024 x 1024, float32", *(f"M = {M}" for M in ROWS)]
    rows: list[list[str]] = []
    parts = []
    if blocks:
        square = [r for r in blocks["rows"] if r["N"] == r["K"] == 1024 and r["sparsity"]]
        for block in ("16x4", "16x16"):
            for sparsity in (0.5, 0.75, 0.9, 0.95):
                same = [r for r in square if r["block"] == block and r["sparsity"] == sparsity]
                label = f"{block} blocks, {100 * sparsity:.0f} % zeros"
                rows += _row(label, same, lambda r: f"{r['speedup']:.1f}x")
    if ranks:
        square = [r for r in ranks["rows"] if r["N"] == r["K"] == 1024]
        for rank in sorted({r["R"] for r in square}):
            same = [r for r in square if r["R"] == rank]
            label = f"rank {rank} (over two linears)"
            rows += _row(label, same, lambda r: f"{r['over_dense']:.1f}x ({r['over_two']:.1f}x)")
    if rows:
        first = blocks or ranks
        about = f"{first['machine']}; 1 thread, medians, commit {first['commit']}."
        parts.append(
            f"Speed over `torch.nn.functional.linear`: {about}\n\n" + markdown(heading, rows)
        )
    if (RESULTS / f"{name}.svg").is_file():
        parts.append(f"![Speed of 16x4 blocks over dense](benchmarks/results/{name}.svg)")
    if decoding:
        lines = [
            [
                r["search"],
                f"{r['ms']:.0f}",
                f"{1 / r['rtf']:.0f}",
                f"{r['lm_share']:.0%}" if "lm_share" in r else "",
            ]
            for r in decoding["rows"]
        ]
        parts.append(
            f"Decoding {decoding['audio_seconds']:.0f} s of speech from the encoder's output on, "
            f"beam {decoding['beam']}, {decoding['vocabulary']} tokens, a 3M language model; "
            "*no cache* runs the language model over the whole prefix each time, as icefall:\n\n"
            + markdown(["search", "ms", "times real time", "spent in the LM"], lines)
        )  # fmt: skip
    return parts


def _row(
    name: str, same: Sequence[Mapping[str, Any]], text: Callable[[Mapping[str, Any]], str]
) -> list[list[str]]:
    found = {r["M"]: r for r in same}
    return [[name, *(text(found[M]) for M in ROWS)]] if found.keys() >= set(ROWS) else []


def devices() -> dict[str, Any]:
    """What was measured on each device, by the name of its file."""
    paths = sorted(RESULTS.glob("*.json"))
    return {path.stem: json.loads(path.read_text()) for path in paths if path.stem != "demo"}


def regions() -> dict[str, str]:
    """What belongs between `<!-- results: NAME -->` and `<!-- end -->`."""
    found = {"kernels": kernels(devices())}
    if (RESULTS / "demo.json").is_file():
        found["demo"] = demo(load_results(RESULTS / "demo.json"))
    return found


def filled(text: str) -> str:
    """README's text with its regions made anew."""
    for name, content in regions().items():
        begin = f"<!-- results: {name} -->\n"
        pattern = re.compile(re.escape(begin) + ".*?(?=<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"README.md: expected a line {begin.strip()!r}, found none")
        body = f"{content}\n" if content else ""
        text = pattern.sub(lambda _, new=begin + body: new, text)
    return text


def main(words: Sequence[str] | None = None) -> None:
    """Fills README.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--demo", type=Path, help="folder of a finished demo")
    options = parser.parse_args(words)
    if options.demo is not None:
        results = load_results(options.demo / "results.json")
        with replace_file(RESULTS / "demo.json") as temporary:
            temporary.write_text((options.demo / "results.json").read_text())
        plot = next(plot for plot in PLOTS if plot.name == PLOT)
        with replace_file(RESULTS / "demo.svg") as temporary:
            temporary.write_text(on_white(svg(plot, results)))
    for name, found in devices().items():
        blocks = found.get("block_sparse_linear, 1 threads", {"rows": []})
        if any(row["block"] == "16x4" and row["sparsity"] == 0 for row in blocks["rows"]):
            with replace_file(RESULTS / f"{name}.svg") as temporary:
                temporary.write_text(break_even(blocks["rows"]))
    readme = ROOT / "README.md"
    with replace_file(readme) as temporary:
        temporary.write_text(filled(readme.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{readme}: written")


if __name__ == "__main__":
    main()
