"""The report's plots: perplexity, WER and latency against size, WER against latency."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prunelm.study.results import DENSE, NO_LM, Results, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's colours without yellow: they stay apart for colour-blind readers and in print.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#5b5b5b")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK = "#1f2933"
GREY = "#7b8794"
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.edgecolor": "#cbd2d9",
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "grid.linewidth": 0.8,
    "xtick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.color": GREY,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


@dataclass(frozen=True)
class Plot:
    """One plot: a heading, a sentence that says how to read it, and what draws it."""

    name: str
    heading: str
    caption: str
    draw: Callable[["Axes", Results], None]
    needs: tuple[str, ...]

    def drawable(self, results: Results) -> bool:
        """Whether at least two rows have the numbers that it shows."""
        return sum(_has(row, self.needs) for row in results.rows) > 1


def svg(plot: Plot, results: Results) -> str:
    """The plot as an <svg> element without prolog, to be put into a page."""
    text = _saved(plot, results, format="svg", metadata={"Date": None}, transparent=True)
    return text[text.index(b"<svg") :].decode()


def png(plot: Plot, results: Results) -> bytes:
    """The plot as a PNG file at twice the screen's resolution."""
    return _saved(plot, results, format="png", dpi=192)


def _saved(plot: Plot, results: Results, **how: Any) -> bytes:
    import matplotlib
    from matplotlib.figure import Figure

    # The salt makes ids that repeat from run to run and differ between the plots of a page.
    style: Any = {**STYLE, "svg.hashsalt": plot.name}
    data = io.BytesIO()
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.4, 3.7), layout="constrained")  # no pyplot: no global state
        plot.draw(figure.add_subplot(), results)
        figure.savefig(data, **how)
    return data.getvalue()


def draw_perplexity(ax: "Axes", results: Results) -> None:
    """Perplexity per word against parameters."""
    _curves(ax, results, "parameters", "perplexity")
    _star(ax, results.row(DENSE), "parameters", "perplexity")
    _level(ax, results.row(DENSE), "perplexity", "dense", "-")
    _size_axis(ax, results)
    _maybe_log(ax, [row.perplexity for row in results.rows if row.perplexity])
    ax.set_ylabel("perplexity per word")
    _legend(ax)


def draw_wer(ax: "Axes", results: Results) -> None:
    """WER with its 95 % interval against parameters."""
    series = results.series()
    for i, rows in enumerate(series.values()):
        # Side by side, because intervals of one size would hide each other.
        shift = 1.0 + 0.035 * (i - (len(series) - 1) / 2)
        for row in rows:
            if row.wer is not None and row.wer_low is not None and row.wer_high is not None:
                x = row.parameters * shift
                ax.plot([x, x], [100 * row.wer_low, 100 * row.wer_high], color=_color(i), lw=1.4,
                        alpha=0.45, solid_capstyle="round")  # fmt: skip
        points = [(r.parameters * shift, 100 * r.wer) for r in rows if r.wer is not None]
        _line(ax, i, points, rows[0].series)
    _star(ax, results.row(DENSE), "parameters", "wer", 100)
    _level(ax, results.row(NO_LM), "wer", "no LM", (0, (4, 3)), 100)
    _level(ax, results.row(DENSE), "wer", "dense", "-", 100)
    _size_axis(ax, results)
    ax.set_ylabel("word error rate (%), 95 % interval")
    _legend(ax)


def draw_latency(ax: "Axes", results: Results) -> None:
    """Time of an LM step over the dense model's, against size, with and without the kernels."""
    for i, rows in enumerate(results.series().values()):
        plain = [(r.parameters, time) for r in rows if (time := r.relative("torch_latency_ms"))]
        if plain:
            ax.plot(*zip(*plain, strict=True), color=_color(i), lw=1.1, ls=(0, (2, 2)),
                    marker=_marker(i), ms=5, mfc="white", alpha=0.75)  # fmt: skip
        points = [(r.parameters, time) for r in rows if (time := r.relative("latency_ms"))]
        _line(ax, i, points, rows[0].series)
    dense = results.row(DENSE)
    ax.axhline(1, color=INK, lw=1.2, label="dense", zorder=1.5)
    if dense is not None:
        _point(ax, dense.parameters, 1)
    _size_axis(ax, results)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("time of one LM step, dense = 1")
    if any(row.relative("torch_latency_ms") for row in results.rows if row.target):
        ax.plot([], [], color=GREY, lw=1.1, ls=(0, (2, 2)), marker="o", ms=5, mfc="white",
                label="same, plain torch")  # fmt: skip
    _legend(ax)


def draw_trade(ax: "Axes", results: Results) -> None:
    """WER against the time of an LM step over the dense model's: lower left is better."""
    for i, rows in enumerate(results.series().values()):
        points = [
            (row, (time, 100 * row.wer))
            for row in rows
            if (time := row.relative("latency_ms")) is not None and row.wer is not None
        ]
        _line(ax, i, [point for _, point in points], rows[0].series)
        for row, point in points:
            # In turn below and above, so that labels of neighbouring curves stay apart.
            below = i % 2 == 0
            ax.annotate(row.target, point, xytext=(0, -7 if below else 6), ha="center",
                        textcoords="offset points", va="top" if below else "bottom",
                        fontsize=7.5, color=_color(i))  # fmt: skip
    dense = results.row(DENSE)
    if dense is not None and dense.wer is not None:
        _point(ax, 1, 100 * dense.wer, "dense")
    _level(ax, results.row(NO_LM), "wer", "no LM", (0, (4, 3)), 100)
    ax.set_xlim(left=0)
    ax.set_xlabel("time of one LM step, dense = 1")
    ax.set_ylabel("word error rate (%)")
    _legend(ax)


PLOTS = (
    Plot(
        "perplexity",
        "Perplexity against size",
        "How well each language model predicts unseen sentences. Lower is better; the line is the "
        "model before pruning.",
        draw_perplexity,
        ("perplexity",),
    ),
    Plot(
        "wer",
        "Word error rate against size",
        "What the recogniser gets wrong with each model's help. Bars are 95 % bootstrap intervals "
        "over utterances; where two overlap widely, this test set cannot tell the two apart.",
        draw_wer,
        ("wer",),
    ),
    Plot(
        "latency",
        "Time of an LM step against size",
        "Each model timed in turn with the dense one on plain torch. Hollow: the same pruned "
        "model on plain torch too, without prunelm's kernels.",
        draw_latency,
        ("latency_ms", "dense_latency_ms"),
    ),
    Plot(
        "trade",
        "Word error rate against time",
        "The bargain itself: lower left is better. The dashed line costs nothing, the star is the "
        "model before pruning.",
        draw_trade,
        ("latency_ms", "dense_latency_ms", "wer"),
    ),
)


def _has(row: Row, names: Sequence[str]) -> bool:
    return all(getattr(row, name) is not None for name in names)


def _color(i: int) -> str:
    return COLORS[i % len(COLORS)]


def _marker(i: int) -> str:
    return MARKERS[(i + i // len(COLORS)) % len(MARKERS)]


def _curves(ax: "Axes", results: Results, x: str, y: str) -> None:
    for i, rows in enumerate(results.series().values()):
        points = [(getattr(r, x), getattr(r, y)) for r in rows if _has(r, (x, y))]
        _line(ax, i, points, rows[0].series)


def _line(ax: "Axes", i: int, points: Sequence[tuple[float, float]], label: str) -> None:
    if points:
        ax.plot(*zip(*points, strict=True), color=_color(i), marker=_marker(i), ms=5.5, lw=1.7,
                mec="white", mew=0.8, label=label)  # fmt: skip


def _star(ax: "Axes", row: Row | None, x: str, y: str, scale: float = 1.0) -> None:
    if row is not None and _has(row, (x, y)):
        _point(ax, getattr(row, x), scale * getattr(row, y))


def _point(ax: "Axes", x: float, y: float, label: str | None = None) -> None:
    ax.plot([x], [y], marker="*", ms=11, color=INK, lw=0, mec="white", mew=0.8, label=label)


def _level(
    ax: "Axes", row: Row | None, name: str, label: str, style: Any, scale: float = 1.0
) -> None:
    value = getattr(row, name) if row is not None else None
    if value is not None:
        color = INK if label == "dense" else GREY
        ax.axhline(scale * value, color=color, lw=1.2, ls=style, label=label, zorder=1.5)


def _size_axis(ax: "Axes", results: Results) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    sizes = sorted({row.parameters for row in results.rows if row.parameters})
    ax.set_xscale("log")
    kept: list[int] = []
    for size in sizes:  # a tick per size, but none that would be printed over its neighbour
        if not kept or size > 1.12 * kept[-1]:
            kept.append(size)
    ax.xaxis.set_major_locator(FixedLocator(kept))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: count(x)))
    if sizes:
        ax.set_xlim(sizes[0] / 1.12, sizes[-1] * 1.12)
    ax.set_xlabel("parameters")


def _maybe_log(ax: "Axes", values: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if values and max(values) > 4 * min(values):
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(10, (1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())


def _legend(ax: "Axes") -> None:
    handles, labels = ax.get_legend_handles_labels()
    if labels:
        # Above the axes: a study has curves everywhere inside them.
        ax.legend(handles, labels, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2,
                  borderaxespad=0.2, columnspacing=1.4, handlelength=2.2)  # fmt: skip


def count(number: float) -> str:
    """A number of parameters or operations as people say it: 950, 47k, 1.26M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            scaled = number / unit
            return f"{scaled:.3g}{name}" if scaled < 100 else f"{scaled:.0f}{name}"
    return f"{number:.0f}"
