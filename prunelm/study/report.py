"""Turns results into one HTML file that needs nothing else, and into a table on the terminal."""

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

from prunelm.data.files import replace_file
from prunelm.study.machine import one_line
from prunelm.study.plots import PLOTS, count, svg
from prunelm.study.results import DENSE, NO_LM, Results, Row, read_results, save_results

if TYPE_CHECKING:
    from rich.table import Table

NOTHING, MINUS, TIMES = "\u2013", "\u2212", "\u00d7"


@dataclass(frozen=True)
class Column:
    """One column: `text` says a row's value, `best` gives the number of which least is best."""

    heading: str
    help: str
    text: Callable[[Row, Row | None], str]
    best: Callable[[Row], float | None] | None = None


def _size(row: Row, dense: Row | None) -> str:
    if not row.parameters:
        return NOTHING
    share = f" ({row.parameters / dense.parameters:.0%})" if dense and row.target else ""
    return count(row.parameters) + share


def _wer(row: Row, dense: Row | None) -> str:
    if row.wer is None:
        return NOTHING
    if row.wer_low is None or row.wer_high is None:
        return f"{100 * row.wer:.1f}"
    return f"{100 * row.wer:.1f} [{100 * row.wer_low:.1f}, {100 * row.wer_high:.1f}]"


def _against_dense(row: Row, dense: Row | None) -> str:
    if not dense or dense.wer is None or row.wer is None or row.series == DENSE:
        return NOTHING
    points = round(100 * (row.wer - dense.wer), 1)
    return f"{points:+.1f}".replace("-", MINUS) if points else "0.0"


def _percent(fraction: float | None) -> str:
    return NOTHING if fraction is None else f"{100 * fraction:.1f} %"


def _latency(row: Row, dense: Row | None) -> str:
    return NOTHING if row.latency_ms is None else f"{row.latency_ms:.2f}"


def _speedup(row: Row, dense: Row | None) -> str:
    return NOTHING if row.speedup is None or not row.target else f"{row.speedup:.2f}{TIMES}"


def _plain(row: Row, dense: Row | None) -> str:
    return NOTHING if row.torch_latency_ms is None else f"{row.torch_latency_ms:.2f}"


def _perplexity(row: Row, dense: Row | None) -> str:
    if row.perplexity is None:
        return NOTHING
    return f"{row.perplexity:.1f}" if row.perplexity < 1000 else f"{row.perplexity:.3g}"


def _flops(row: Row, dense: Row | None) -> str:
    return NOTHING if row.flops is None else count(row.flops)


COLUMNS = (
    Column("Parameters", "of the dense", _size),
    Column("Perplexity", "per word", _perplexity, lambda row: row.perplexity),
    Column("WER % [95 %]", "with fusion", _wer, lambda row: row.wer),
    Column("vs dense", "points of WER", _against_dense),
    Column("FLOPs", "per token", _flops),
    Column("Step ms", "with prunelm", _latency),
    Column("Plain torch", "same model, ms", _plain),
    Column("Speed-up", "over dense", _speedup, lambda row: row.relative("latency_ms")),
)


NARROW = ("Plain torch", "vs dense", "Step ms", "FLOPs", "Speed-up", "Perplexity")
"""Headings that a terminal's table leaves out where it must, in this order."""


def write_report(folder: Path | str) -> Path:
    """Writes results.json and report.html into a study's folder, from what is finished there.

    Returns:
        the path of report.html.
    """
    results = read_results(folder)
    save_results(folder, results)
    path = Path(folder) / "report.html"
    with replace_file(path) as temporary:
        temporary.write_text(page(results), encoding="utf-8")
    return path


def page(results: Results) -> str:
    """The whole report as HTML: style, table and plots are inside, nothing is loaded."""
    source = resources.files("prunelm.study").joinpath("report.template.html")
    template = Template(source.read_text(encoding="utf-8"))
    drawn = [plot for plot in PLOTS if plot.drawable(results)]
    plots = "\n".join(
        f"<figure><figcaption><h3>{plot.heading}</h3></figcaption>{svg(plot, results)}"
        f"<p>{plot.caption}</p></figure>"
        for plot in drawn
    )
    return template.substitute(
        title=html.escape(results.title),
        lead=html.escape(lead(results)),
        tiles="\n".join(_tile(*tile) for tile in tiles(results)),
        table=html_table(results),
        plots=plots,
        machine=html.escape(one_line(dict(results.machine))),
        facts=_facts(results.study),
        settings=_settings(results),
    )


def lead(results: Results) -> str:
    """One sentence on what was measured."""
    row = results.row(DENSE) or results.rows[0]
    parts = [f"{len(results.rows)} models measured"]
    if row.words:
        parts.append(f"on {row.words:,} spoken words")
    if row.parameters:
        parts.append(f"starting from a language model of {count(row.parameters)} parameters")
    return " ".join(parts[:2]) + (", " + parts[2] if len(parts) > 2 else "") + "."


def tiles(results: Results) -> list[tuple[str, str, str]]:
    """(value, what it is, what to compare it with): what a reader should see first."""
    no_lm, dense = results.row(NO_LM), results.row(DENSE)
    shown = []
    if no_lm and dense and no_lm.wer and dense.wer is not None:
        change = (dense.wer - no_lm.wer) / no_lm.wer
        relative = f"{100 * change:+.0f} % relative".replace("-", MINUS)
        shown.append((_percent(dense.wer), "WER with the dense LM",
                      f"{_percent(no_lm.wer)} without LM, {relative}"))  # fmt: skip
    pruned = [row for row in results.rows if row.target and row.wer is not None]
    for target in sorted({row.target for row in pruned}, key=lambda t: -_largest(pruned, t))[:3]:
        best = min((r for r in pruned if r.target == target), key=_by_validation)
        speed = f", step {best.speedup:.1f}{TIMES} as fast" if best.speedup else ""
        why = "" if best.valid_perplexity is None else ", best on validation text"
        shown.append((_percent(best.wer), f"WER at {target}", f"{best.series}{why}{speed}"))
    return shown


def html_table(results: Results) -> str:
    """The table as HTML; the best of each size is bold."""
    dense = results.row(DENSE)
    head = "".join(f"<th>{c.heading}<small>{c.help}</small></th>" for c in COLUMNS)
    lines = [f"<table><thead><tr><th>Model</th>{head}</tr></thead><tbody>"]
    last = None
    for row in results.rows:
        group = row.series if row.target else ""
        kind = ' class="first"' if last is not None and group != last else ""
        last = group
        cells = "".join(
            f"<td{' class=best' if _is_best(column, row, results.rows) else ''}>"
            f"{html.escape(column.text(row, dense))}</td>"
            for column in COLUMNS
        )
        lines.append(f"<tr{kind}><th>{html.escape(row.name)}</th>{cells}</tr>")
    return "\n".join([*lines, "</tbody></table>"])


def text_table(results: Results, width: int) -> "Table":
    """The table for a terminal of `width` characters; columns that do not fit are left out.

    Parameters and WER always stay; in a very narrow one names wrap.
    """
    from rich.console import Console

    console = Console(width=10_000)
    columns = list(COLUMNS)
    table = _text_table(results, columns)
    for heading in NARROW:
        if console.measure(table).maximum <= width:
            break
        columns = [column for column in columns if column.heading != heading]
        table = _text_table(results, columns)
    return table


def _text_table(results: Results, columns: Sequence[Column]) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    dense = results.row(DENSE)
    left_out = [column.heading for column in COLUMNS if column not in columns]
    caption = f"not shown for want of width: {', '.join(left_out)}" if left_out else None
    table = Table(
        title=results.title, title_justify="left", caption=caption, caption_justify="left",
        box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False,
    )  # fmt: skip
    table.add_column("Model", overflow="fold", min_width=12)
    for column in columns:
        heading = f"{column.heading}\n[dim]{column.help}[/dim]"
        table.add_column(heading, justify="right", no_wrap=True)
    last = None
    for row in results.rows:
        group = row.series if row.target else ""
        if last is not None and group != last:
            table.add_section()
        last = group
        table.add_row(
            row.name,
            *(
                Text(c.text(row, dense), "bold" if _is_best(c, row, results.rows) else "")
                for c in columns
            ),
        )
    return table


def _is_best(column: Column, row: Row, rows: Sequence[Row]) -> bool:
    rivals = [r for r in rows if r.target == row.target]
    if column.best is None or not row.target or len(rivals) < 2:
        return False
    values = [value for r in rivals if (value := column.best(r)) is not None]
    return column.best(row) is not None and column.best(row) == min(values)


def _by_validation(row: Row) -> tuple[float, float]:
    # Without a number to choose by, the largest: never the test set's best.
    return row.valid_perplexity or 0.0, -float(row.parameters)


def _largest(rows: Sequence[Row], target: str) -> int:
    return max(row.parameters for row in rows if row.target == target)


def _tile(value: str, what: str, compare: str) -> str:
    value, what, compare = (html.escape(text) for text in (value, what, compare))
    return f'<div class="tile"><b>{value}</b><span>{what}</span><small>{compare}</small></div>'


def _fact(name: str) -> str:
    return " ".join("LM" if word == "lm" else word for word in name.split("_"))


def _facts(study: Mapping[str, object]) -> str:
    return "\n".join(
        f"<dt>{html.escape(_fact(name))}</dt><dd>{html.escape(str(value))}</dd>"
        for name, value in study.items()
    )


def _settings(results: Results) -> str:
    lines = []
    for row in results.rows:
        told = ", ".join(f"{name} {value}" for name, value in row.settings.items())
        took = ", ".join(f"{name} {value:.0f} s" for name, value in row.seconds.items())
        if told or took:
            lines.append(
                f"<tr><th>{html.escape(row.name)}</th><td>{html.escape(told)}</td>"
                f"<td>{html.escape(took)}</td></tr>"
            )
    return "\n".join(lines)
