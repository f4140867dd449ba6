"""The main job end to end: prune by three methods to three sizes, decode with fusion, report."""

import time
from dataclasses import replace
from importlib import resources
from pathlib import Path

from prunelm.data.runs import prepared
from prunelm.decoding.options import SearchOptions, suitable_options
from prunelm.decoding.tuning import choose_search
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
from prunelm.study.grid import LINES, Grid, Measuring, Progress, check_grid, run_grid
from prunelm.study.report import write_report
from prunelm.study.results import refuse_other_study
from prunelm.study.testbed import TestBed, open_testbed
from prunelm.training.pretrained import ChosenSearch, chosen_search, read_chosen

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
    lm_weight: float | None = None,
    token_reward: float | None = None,
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
        lm_weight, token_reward: None: as `choose_searches` says.
        data: a folder laid out as `testbed` tells; None: the shipped one.
        lm, recogniser, corpus, text: in place of the folder's own.
        measuring: all but the searches.
        progress: is told about each thing done.

    Returns:
        the path of report.html.

    Raises:
        ValueError: `out` is a model's folder, the folder of the data, or that of another study.
    """
    started = time.perf_counter()
    data = shipped() if data is None else data
    holds = "a model" if (Path(out) / "model.json").exists() else "the data"
    if holds == "a model" or Path(out).resolve() == Path(data).resolve():
        raise ValueError(f"out: expected a folder for the study alone, got {out}, with {holds}")
    bed = open_testbed(data, lm=lm, recogniser=recogniser, corpus=corpus, text=text)
    check_grid(bed, grid)
    with prepared(out):
        refuse_other_study(out, bed.facts)
        bed, alone, fused = choose_searches(bed, out, beam, lm_weight, token_reward, progress)
        measuring = replace(measuring, alone=alone, fused=fused)
        run_grid(bed, grid, out, title=title, measuring=measuring, progress=progress)
        path = write_report(out)
    progress.say(f"all in {time.perf_counter() - started:.0f} s")
    return path


def choose_searches(
    bed: TestBed,
    out: Path | str,
    beam: int,
    lm_weight: float | None,
    token_reward: float | None,
    progress: Progress,
) -> tuple[TestBed, SearchOptions, SearchOptions]:
    """The search without a language model and the one with it, each at its own best.

    What stands beside the models, or in the folder of a stopped run, was chosen on validation
    utterances before. What is missing is chosen on those of the test bed, and is the default
    where it has none.

    Args:
        out: folder of the study.
        beam: hypotheses kept.
        lm_weight, token_reward: held at this value; None: chosen.

    Returns:
        the test bed, whose models know what was chosen for them, and the two searches.
    """
    if bed.recogniser is None:
        weight, reward = 0.3 if lm_weight is None else lm_weight, token_reward or 0.0
        return bed, SearchOptions(beam, 0.0, reward), SearchOptions(beam, weight, reward)
    automatic = lm_weight is None and token_reward is None
    if automatic:
        bed = _with_chosen(bed, read_chosen(out))
    found: list[SearchOptions] = []
    for lm in (None, bed.lm):
        recogniser = bed.recogniser
        assert recogniser is not None
        held = 0.0 if lm is None else lm_weight
        before = chosen_search(recogniser, lm, beam) if automatic else None
        settled = held is not None and token_reward is not None
        if bed.valid and not settled and (before is None or before.beam != beam):
            what = "token reward without LM" if lm is None else "LM weight and token reward"
            progress.doing(f"choosing the {what} on {len(bed.valid)} validation utterances")
            choice = choose_search(
                recogniser, lm, bed.valid, beam, lm_weight=held, token_reward=token_reward
            )
            found.append(SearchOptions(beam, choice.lm_weight, choice.token_reward))
            where = f"chosen on {choice.utterances} validation utterances"
            progress.say(f"{found[-1]}: {where} (WER {100 * choice.wer:.1f} %)")
            if automatic:
                bed = _with_chosen(bed, (choice,))
            continue
        options, where = suitable_options(
            recogniser, lm, beam=beam, lm_weight=held, token_reward=token_reward
        )
        found.append(options)
        if where:
            progress.say(f"{options}: {where}")
    return bed, found[0], found[1]


def _with_chosen(bed: TestBed, chosen: tuple[ChosenSearch, ...]) -> TestBed:
    assert bed.recogniser is not None
    with_lm = tuple(each for each in chosen if each.lm)
    without = tuple(each for each in chosen if not each.lm)
    return replace(
        bed,
        lm=replace(bed.lm, chosen=(*bed.lm.chosen, *with_lm)),
        recogniser=replace(bed.recogniser, chosen=(*bed.recogniser.chosen, *without)),
    )
