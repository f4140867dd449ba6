"""`prunelm demo`, `prunelm study` and `prunelm report`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.status import Status

from prunelm.cli.arguments import Commas, Sizes
from prunelm.cli.pruning import set_threads
from prunelm.study.demo import demo_grid, run_study, study_grid
from prunelm.study.grid import LINES, Progress
from prunelm.study.report import text_table, write_report
from prunelm.study.results import read_results


def demo(
    out: Path = Path("runs/demo"),
    data: Path | None = None,
    lm: Path | None = None,
    recogniser: Path | None = None,
    corpus: Path | None = None,
    text: Path | None = None,
    targets: Sizes = "50%,35%,25%",
    steps: int = 60,
    lr: float = 1e-3,
    lm_weight: float | Literal["auto"] = "auto",
    token_reward: float | Literal["auto"] = "auto",
    beam: int = 4,
    threads: int | None = None,
) -> None:
    """Prunes by three methods to several sizes, decodes with fusion, prints and saves the report.

    Args:
        out: folder for the results; a stopped run goes on in it.
        data: a folder of your own with lm/, recogniser/, test.tsv, valid.txt and recovery.txt;
            by default the one that comes with the package.
        lm: folder of a language model, in place of lm/ in data.
        recogniser: folder of a recogniser, in place of recogniser/ in data.
        corpus: manifest of utterances, in place of test.tsv in data.
        text: sentences to heal with, in place of recovery.txt in data.
        targets: sizes, falling, with commas between them.
        steps: of recovery, for each size.
        lr: highest learning rate of the recovery.
        lm_weight: of the LM in fusion; auto: as chosen for the models before, else on valid.tsv
            in data, 0.3 without it.
        token_reward: added for each token; auto: as chosen likewise, 0 without valid.tsv.
        beam: hypotheses kept by the search.
        threads: of torch; by default its own choice.
    """
    set_threads(threads)
    with shown_progress() as progress:
        path = run_study(
            out, demo_grid(_parts(targets), steps, lr), title="prunelm demo",
            lm_weight=_number(lm_weight), token_reward=_number(token_reward), beam=beam,
            data=data, lm=lm, recogniser=recogniser, corpus=corpus, text=text, progress=progress,
        )  # fmt: skip
    _show(out, path)


def study(
    out: Path,
    preset: Literal["laptop", "paper"] = "laptop",
    data: Path | None = None,
    lm: Path | None = None,
    recogniser: Path | None = None,
    corpus: Path | None = None,
    text: Path | None = None,
    targets: Sizes = "",
    seeds: Commas = "",
    steps: int | None = None,
    lm_weight: float | Literal["auto"] = "auto",
    token_reward: float | Literal["auto"] = "auto",
    beam: int = 4,
    threads: int | None = None,
) -> None:
    """Runs a grid of methods, criteria, schedules, sizes and seeds; finished cells are skipped.

    Args:
        out: folder for the results; a stopped run goes on in it.
        preset: laptop (36 cells, about an hour on the shipped models) or paper (the grid of
            arXiv 2310.03424 as far as it is here, for an LM of your own and a large machine).
        data: a folder, as for demo.
        lm: a folder, as for demo.
        recogniser: a folder, as for demo.
        corpus: a manifest, as for demo.
        text: a file, as for demo.
        targets: sizes in place of the preset's, with commas between them.
        seeds: whole numbers in place of the preset's, with commas between them.
        steps: of recovery, in place of the preset's.
        lm_weight: as for demo.
        token_reward: as for demo.
        beam: hypotheses kept by the search.
        threads: of torch; by default its own choice.
    """
    set_threads(threads)
    try:
        numbers = tuple(int(part) for part in _parts(seeds))
    except ValueError:
        raise ValueError(f"seeds: expected whole numbers, got {seeds!r}") from None
    grid = study_grid(preset, targets=_parts(targets), seeds=numbers, steps=steps)
    with shown_progress() as progress:
        progress.say(f"{grid.size} cells in {out}")
        path = run_study(
            out, grid, lm_weight=_number(lm_weight), token_reward=_number(token_reward), beam=beam,
            data=data, lm=lm, recogniser=recogniser, corpus=corpus, text=text, progress=progress,
        )  # fmt: skip
    _show(out, path)


def report(folder: Path) -> None:
    """Prints the table of a study, and writes its report.html and results.json anew.

    Args:
        folder: the folder where demo or study put their results.
    """
    _show(folder, write_report(folder))


class Terminal:
    """Lines as they come, and below them what is under way."""

    def __init__(self, status: Status) -> None:
        self.status = status

    def say(self, text: str) -> None:
        """Prints a line above the status."""
        self.status.console.print(text, markup=False, highlight=False)

    def doing(self, text: str) -> None:
        """Shows it beside the spinner."""
        self.status.update(text.replace("[", r"\["))


@contextmanager
def shown_progress() -> Iterator[Progress]:
    """A spinner on a terminal, plain lines elsewhere."""
    console = Console()
    if not console.is_terminal:
        yield LINES
        return
    with console.status("") as status:
        yield Terminal(status)


def _show(folder: Path, path: Path) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)  # a file has no edge to wrap at
    console.print(text_table(read_results(folder), console.width))
    print(f"report: {path}")


def _parts(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _number(value: float | Literal["auto"]) -> float | None:
    return None if value == "auto" else value
