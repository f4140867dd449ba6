"""The main job end to end: prune by three methods to three sizes, decode with fusion, report."""

import time
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
from prunelm.study.report import write_report
from prunelm.study.testbed import open_testbed
from prunelm.study.tuning import choose_searches, searches_before

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
    methods: dict[str, Method] = {"Blocks 16x4": Blocks(16, 4)}
    return Grid(
        methods={
            **methods,
            "Heads | Neurons": Heads() | Neurons(multiple_of=8),
            "LowRank": LowRank(multiple_of=8),
        },
        targets=targets,
        criteria=(Taylor(batches=8),),
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
        methods = {"Heads | Neurons": structured, "Blocks 16x4": Blocks(16, 4)}
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
    reward: float | None = None,
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
        weight, reward: of the LM in fusion and of each token; None: chosen on the validation
            utterances, 0.3 and 0 without them.
        data: a folder laid out as `testbed` tells; None: the shipped one.
        lm, recogniser, corpus, text: in place of the folder's own.
        measuring: all but the searches.
        progress: is told about each thing done.

    Returns:
        the path of report.html.
    """
    started = time.perf_counter()
    bed = open_testbed(
        shipped() if data is None else data, lm=lm, recogniser=recogniser, corpus=corpus, text=text
    )
    before = searches_before(out) if weight is None and reward is None else None
    searches = before or choose_searches(bed, beam, weight, reward, progress)
    measuring = replace(measuring, alone=searches.alone, fused=searches.fused)
    run_grid(bed, grid, out, title=title, measuring=measuring, progress=progress)
    path = write_report(out)
    progress.say(f"all in {time.perf_counter() - started:.0f} s")
    return path
