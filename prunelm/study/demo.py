"""The main job end to end: prune by three methods to three sizes, decode with fusion, report."""

import time
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path

from prunelm.pruning import (
    Blocks,
    Elements,
    Finetune,
    Heads,
    Incremental,
    LowRank,
    Magnitude,
    Neurons,
    OneShot,
    Random,
    Taylor,
)
from prunelm.pruning.groups import Method
from prunelm.study.grid import LINES, Grid, Measuring, Progress, run_grid
from prunelm.study.recognition import rates_by_weight
from prunelm.study.report import write_report
from prunelm.study.results import read_json
from prunelm.study.testbed import TestBed, open_testbed

WEIGHTS = (0.1, 0.2, 0.3, 0.4, 0.5)
MEASURING = Measuring()


def shipped() -> Path:
    """The folder of the models, utterances and text that come with the package."""
    return Path(str(resources.files("prunelm").joinpath("demo")))


def demo_grid(
    targets: tuple[str, ...] = ("50%", "35%", "25%"), steps: int = 60, lr: float = 1e-3
) -> Grid:
    """Heads and neurons, blocks, and low rank, each to every size in one run.

    Args:
        targets: falling.
        steps: of recovery, for each size.
        lr: highest learning rate of the recovery.
    """
    methods: dict[str, Method] = {"Blocks 16x16": Blocks(16, 16)}
    return Grid(
        methods={
            **methods,
            "Heads | Neurons": Heads() | Neurons(multiple_of=8),
            "LowRank": LowRank(multiple_of=8),
        },
        targets=targets,
        recovery=Finetune(steps=steps, lr=lr, distill=0.5),
    )


def study_grid(
    preset: str, *, targets: tuple[str, ...] = (), seeds: tuple[int, ...] = (),
    steps: int | None = None,
) -> Grid:  # fmt: skip
    """A named grid, each size in a run of its own, so that schedules compare.

    "laptop": three methods, three criteria, two schedules, two sizes of the shipped model.
    "paper": unstructured, structured and low rank, by magnitude and by loss, at once and in rounds,
    to the sizes of arXiv 2310.03424, from a model of 20M parameters.

    Args:
        targets, seeds, steps: in place of the preset's.
    """
    structured, low_rank = Heads() | Neurons(multiple_of=8), LowRank(multiple_of=8)
    methods: dict[str, Method]
    if preset == "laptop":
        methods = {"Heads | Neurons": structured, "Blocks 16x16": Blocks(16, 16)}
        grid = Grid(
            methods={**methods, "LowRank": low_rank},
            targets=("50%", "25%"),
            criteria=(Taylor(), Magnitude(), Random()),
            schedules=(OneShot(), Incremental(rounds=4)),
            recovery=Finetune(steps=60, distill=0.5),
            ladder=False,
        )
    elif preset == "paper":
        grid = Grid(
            methods={"Elements": Elements(), "Heads | Neurons": structured, "LowRank": low_rank},
            targets=("10M", "5M", "2M"),
            criteria=(Taylor(), Magnitude()),
            schedules=(OneShot(), Incremental(rounds=8)),
            recovery=Finetune(steps=4000, lr=5e-4, distill=0.5),
            seeds=(0, 1, 2),
            ladder=False,
        )
    else:
        raise ValueError(f"preset: expected laptop or paper, got {preset!r}")
    if steps is not None:
        assert isinstance(grid.recovery, Finetune)
        grid = replace(grid, recovery=replace(grid.recovery, steps=steps))
    return replace(grid, targets=targets or grid.targets, seeds=seeds or grid.seeds)


def run_study(
    out: Path | str,
    grid: Grid,
    *,
    title: str = "prunelm study",
    weight: float | None = None,
    beam: int = 4,
    data: Path | str | None = None,
    lm: Path | None = None,
    recogniser: Path | None = None,
    corpus: Path | None = None,
    text: Path | None = None,
    measuring: Measuring = MEASURING,
    progress: Progress = LINES,
) -> Path:
    """Runs a grid, or goes on with it, and writes its report.

    Args:
        out: folder for the study; holds report.html at the end.
        weight: of the LM in fusion; None: chosen on the validation utterances, 0.3 without them.
        data: a folder laid out as `testbed` tells; None: the shipped one.
        lm, recogniser, corpus, text: in place of the folder's own.
        measuring: all but weight and beam.
        progress: is told about each thing done.

    Returns:
        the path of report.html.
    """
    started = time.perf_counter()
    bed = open_testbed(
        shipped() if data is None else data, lm=lm, recogniser=recogniser, corpus=corpus, text=text
    )
    if weight is None:
        weight = _weight_before(out) or weight_of(bed, beam, progress)
    measuring = replace(measuring, weight=weight, beam=beam)
    run_grid(bed, grid, out, title=title, measuring=measuring, progress=progress)
    path = write_report(out)
    progress.say(f"all in {time.perf_counter() - started:.0f} s")
    return path


def _weight_before(out: Path | str) -> float | None:
    """The weight that a stopped run of this study has chosen."""
    if not (Path(out) / "study.json").is_file():
        return None
    return float(read_json(Path(out) / "study.json")["study"]["lm_weight"])


def weight_of(
    bed: TestBed, beam: int, progress: Progress, weights: Sequence[float] = WEIGHTS
) -> float:
    """The LM's weight with the lowest WER on the validation utterances, 0.3 without them."""
    if not bed.valid or bed.recogniser is None:
        return Measuring().weight
    progress.doing(f"choosing the LM's weight on {len(bed.valid)} validation utterances")
    rates = rates_by_weight(bed.recogniser, bed.tokenizer, bed.valid, bed.lm, weights, beam)
    best = min(rates, key=lambda weight: rates[weight])
    tried = ", ".join(f"{weight:g}: {100 * rate:.1f} %" for weight, rate in rates.items())
    progress.say(f"LM weight {best:g}, chosen on the validation utterances ({tried})")
    return best
