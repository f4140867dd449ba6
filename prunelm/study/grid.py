"""A grid: every method x criterion x schedule x size x seed, each measured alike.

A cell is one pruned model. What is finished lies in the study's folder, whole; a later call with
the same arguments does the rest. Nothing here looks at the test set to choose anything.
"""

import csv
import itertools
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from prunelm.data.files import replace_file
from prunelm.data.runs import prepared, remove_work, work_folder
from prunelm.decoding.options import SearchOptions
from prunelm.decoding.transcribe import EncodedBatch, best_words, encode, search
from prunelm.metrics.flops import flops_per_token
from prunelm.metrics.perplexity import perplexity
from prunelm.metrics.speed import latency
from prunelm.metrics.wer import compare, word_error_rate
from prunelm.models.lm import TransformerLM
from prunelm.nn import accelerate
from prunelm.pruning import Finetune, OneShot, Pruner, Result, Taylor, count_parameters
from prunelm.pruning.budget import parse_target
from prunelm.pruning.groups import Criterion, Method, Schedule
from prunelm.pruning.recovery import Recovery
from prunelm.study.progress import LINES as LINES
from prunelm.study.progress import Progress as Progress
from prunelm.study.results import DENSE, NO_LM, Row, open_study, read_row, write_row
from prunelm.study.testbed import TestBed
from prunelm.training.pretrained import add_chosen, write_chosen

ALONE = SearchOptions(lm_weight=0.0)
FUSED = SearchOptions()


@dataclass(frozen=True)
class Grid:
    """What to prune.

    Args:
        methods: name -> method; the name is what tables call it.
        targets: falling sizes, such as "50%".
        ladder: all sizes of a series in one run, each from the one before; else each size in a run
            of its own from the dense model, which is what comparing schedules needs.
    """

    methods: Mapping[str, Method]
    targets: tuple[str, ...]
    criteria: tuple[Criterion, ...] = (Taylor(),)
    schedules: tuple[Schedule, ...] = (OneShot(),)
    recovery: Recovery | None = field(default_factory=Finetune)
    seeds: tuple[int, ...] = (0,)
    ladder: bool = True

    def chains(self) -> Iterator["Chain"]:
        """The pruner's runs."""
        for (name, method), criterion, schedule, seed in itertools.product(
            self.methods.items(), self.criteria, self.schedules, self.seeds
        ):
            series = [name]
            if len(self.criteria) > 1:
                series.append(_short(criterion))
            if len(self.schedules) > 1:
                series.append(_short(schedule))
            pruner = Pruner(method, criterion, schedule, self.recovery, seed)
            runs = [self.targets] if self.ladder else [(target,) for target in self.targets]
            for targets in runs:
                yield Chain(", ".join(series), pruner, targets)

    @property
    def size(self) -> int:
        """Number of cells."""
        return sum(len(chain.targets) for chain in self.chains())


@dataclass(frozen=True)
class Chain:
    """One run of the pruner: a series of models, each smaller than the one before."""

    series: str
    pruner: Pruner
    targets: tuple[str, ...]

    def key(self, target: str) -> str:
        """A file name for one of its cells."""
        words = f"{self.series} {target} seed{self.pruner.seed}"
        return re.sub(r"[^a-z0-9.]+", "-", words.lower().replace("%", "pc")).strip("-")


@dataclass(frozen=True)
class Measuring:
    """How cells are measured.

    Args:
        alone: the search without a language model.
        fused: the search with one.
        rows: hypotheses in the LM step that is timed.
        context: tokens before them.
        batch, length: rows and tokens of a batch of recovery text.
    """

    alone: SearchOptions = ALONE
    fused: SearchOptions = FUSED
    rows: int = 32
    context: int = 32
    threads: int = 1
    runs: int = 50
    batch: int = 16
    length: int = 64


def run_grid(
    bed: TestBed,
    grid: Grid,
    folder: Path | str,
    *,
    title: str,
    measuring: Measuring = Measuring(),
    progress: Progress = LINES,
) -> None:
    """Prunes and measures what is not yet there, cell by cell.

    Args:
        folder: the study's.
        progress: is told about each thing done.

    Raises:
        ValueError: the folder holds another study or is in use, or the models do not fit.
    """
    check_grid(bed, grid)
    folder = Path(folder)
    with prepared(folder):
        _run_grid(bed, grid, folder, title, measuring, progress)


def check_grid(bed: TestBed, grid: Grid) -> None:
    """ValueError for sizes that are none, do not fall in one run, or are named twice."""
    dense = count_parameters(bed.lm.model)
    asked = [parse_target(target, dense) for target in grid.targets]
    if not asked or (grid.ladder and any(b >= a for a, b in itertools.pairwise(asked))):
        raise ValueError(
            f"targets: expected falling sizes, got {', '.join(grid.targets) or 'none'}"
        )
    known: set[str] = set()
    for chain in grid.chains():
        for target in chain.targets:
            if chain.key(target) in known:
                raise ValueError(
                    "targets, seeds: expected each once, got "
                    f"{chain.series}, {target}, seed {chain.pruner.seed} twice"
                )
            known.add(chain.key(target))


def _run_grid(
    bed: TestBed, grid: Grid, folder: Path, title: str, measuring: Measuring, progress: Progress
) -> None:
    study = {**bed.facts, **_settings(grid, measuring)}
    open_study(folder, title, study)
    add_chosen(folder, [*bed.lm.chosen, *(bed.recogniser.chosen if bed.recogniser else ())])
    work = _Work(bed, folder, measuring, progress, grid.size + 1 + (bed.recogniser is not None))
    work.references()
    for chain in grid.chains():
        work.chain(chain)
    remove_work(folder)


class _Work:
    """The state of one call: what is encoded already, and how many rows are done."""

    def __init__(
        self, bed: TestBed, folder: Path, measuring: Measuring, progress: Progress, count: int
    ) -> None:
        self.bed, self.folder, self.how, self.progress = bed, folder, measuring, progress
        self.count, self.done = count, 0
        self._encoded: list[EncodedBatch] | None = None

    def references(self) -> None:
        """The rows that all others are compared with."""
        if self.bed.recogniser is not None and not self.skip("no-lm"):
            started = time.perf_counter()
            self.doing("no LM: decoding")
            heard = self.hear("no-lm", None)
            row = Row(NO_LM, "", 0, **heard, seconds={"decode": time.perf_counter() - started})
            self.finish("no-lm", row)
        if not self.skip("dense-lm"):
            self.finish("dense-lm", self.measure("dense-lm", DENSE, self.bed.lm.model))

    def chain(self, chain: Chain) -> None:
        """Prunes one chain, if any of its cells is missing, and measures those."""
        missing = [t for t in chain.targets if not self.skip(chain.key(t))]
        if not missing:
            return
        started = time.perf_counter()
        name = f"{chain.series}: pruning to {', '.join(chain.targets)}"
        self.doing(name)
        done = 0

        def finished(result: Result) -> None:
            """Measures a size at once, so that it stands whatever comes of the next."""
            nonlocal started, done
            seconds, target = time.perf_counter() - started, chain.targets[done]
            if target in missing:
                self.cell(chain, target, result, seconds)
            done += 1
            started = time.perf_counter()

        folder = work_folder(self.folder) / chain.key("-".join(chain.targets))
        try:
            chain.pruner.ladder(
                self.bed.lm.model, list(chain.targets), self.data(chain.pruner.seed),
                folder=folder, finished=finished,
                watch=lambda what, step, of: self.doing(f"{name}, {what} {step}/{of}"),
            )  # fmt: skip
        except ValueError as error:
            if not str(error).startswith("target: expected at least"):
                raise
            self.done += len(missing)
            self.progress.say(f"{chain.series}: left out, {error}")
            return
        shutil.rmtree(folder, ignore_errors=True)

    def cell(self, chain: Chain, target: str, result: Result, seconds: float) -> None:
        """Measures and writes one pruned model."""
        key = chain.key(target)
        result.save(self.folder / "models" / key, self.bed.tokenizer)
        write_chosen(self.folder / "models" / key, self.bed.lm.chosen)
        model = result.model
        assert isinstance(model, TransformerLM)
        row = self.measure(
            key, chain.series, model, target=target, size=result.size,
            seed=chain.pruner.seed, settings=dict(result.settings), seconds=seconds,
        )  # fmt: skip
        self.finish(key, row)

    def measure(
        self,
        key: str,
        series: str,
        model: TransformerLM,
        *,
        target: str = "",
        size: int | None = None,
        seed: int = 0,
        settings: Mapping[str, Any] | None = None,
        seconds: float | None = None,
    ) -> Row:
        """Everything about one model."""
        bed, how = self.bed, self.how
        name = f"{series}, {target}" if target else series
        self.doing(f"{name}: measuring perplexity and time")
        fast = cast(TransformerLM, accelerate(model))
        took = {} if seconds is None else {"prune": seconds}
        started = time.perf_counter()
        test = perplexity(model, bed.test_lines, bed.tokenizer).per_word
        valid = perplexity(model, bed.valid_lines, bed.tokenizer).per_word
        models = {"dense": bed.lm.model, "plain": model, "fast": fast}
        times = latency(
            models, rows=how.rows, context=how.context, threads=how.threads, runs=how.runs
        )
        took["measure"] = time.perf_counter() - started
        heard: dict[str, Any] = {}
        if bed.recogniser is not None:
            started = time.perf_counter()
            self.doing(f"{name}: decoding")
            heard = self.hear(key, fast)
            took["decode"] = time.perf_counter() - started
        return Row(
            series, target, count_parameters(model) if size is None else size,
            perplexity=test, valid_perplexity=valid,
            flops=flops_per_token(model, how.context, zeros=False),
            latency_ms=times["fast"].median_ms, torch_latency_ms=times["plain"].median_ms,
            dense_latency_ms=times["dense"].median_ms,
            seed=seed, settings=settings or {}, seconds=took, **heard,
        )  # fmt: skip

    def hear(self, key: str, lm: TransformerLM | None) -> dict[str, Any]:
        """WER of the test utterances, beside which the words heard are kept."""
        bed, how = self.bed, self.how.alone if lm is None else self.how.fused
        assert bed.recogniser is not None
        nbest = search(bed.recogniser.model, self.encoded(), lm, how)
        heard = best_words(nbest, bed.tokenizer)
        said = {utterance.id: utterance.text for utterance in bed.test}
        write_transcripts(self.folder / "transcripts" / f"{key}.tsv", said, heard)
        references, hypotheses = [said[name] for name in heard], [*heard.values()]
        found = word_error_rate(references, hypotheses)
        better = None
        dense = self.folder / "transcripts" / "dense-lm.tsv"
        if key != "dense-lm" and dense.is_file():
            other = read_transcripts(dense)
            better = compare(references, [other[name] for name in heard], hypotheses).better
        return {
            "wer": found.rate, "wer_low": found.low, "wer_high": found.high,
            "errors": found.errors, "words": found.words, "better": better,
        }  # fmt: skip

    def encoded(self) -> list[EncodedBatch]:
        """The test utterances after the encoder, which runs once."""
        if self._encoded is None:
            started = time.perf_counter()
            assert self.bed.recogniser is not None
            self._encoded = encode(self.bed.recogniser.model, self.bed.test)
            self.progress.say(
                f"encoded {len(self.bed.test)} utterances in {time.perf_counter() - started:.0f} s"
            )
        return self._encoded

    def data(self, seed: int) -> Any:
        """Recovery text as batches."""
        how = self.how
        return self.bed.batches(
            work_folder(self.folder), batch=how.batch, length=how.length, seed=seed
        )

    def doing(self, text: str) -> None:
        """Tells what is under way."""
        self.progress.doing(f"[{self.done + 1}/{self.count}] {text}")

    def skip(self, key: str) -> bool:
        """Whether the row is there already."""
        found = read_row(self.folder, key) is not None
        self.done += found
        return found

    def finish(self, key: str, row: Row) -> None:
        """Writes a row and says so."""
        write_row(self.folder, key, row)
        self.done += 1
        parts = [f"[{self.done}/{self.count}] {row.name}"]
        if row.perplexity is not None:
            parts.append(f"perplexity {row.perplexity:.1f}")
        if row.wer is not None:
            parts.append(f"WER {100 * row.wer:.1f} %")
        if row.target and row.speedup is not None:
            parts.append(f"step {row.speedup:.2f}x as fast")
        self.progress.say(f"{', '.join(parts)}  ({sum(row.seconds.values()):.0f} s)")


def write_transcripts(path: Path, said: Mapping[str, str], heard: Mapping[str, str]) -> None:
    """Writes id, text, heard as TSV."""
    with replace_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["id", "text", "heard"])
        writer.writerows([name, said[name], heard[name]] for name in sorted(heard))


def read_transcripts(path: Path) -> dict[str, str]:
    """id -> heard, as `write_transcripts` wrote them."""
    with path.open(encoding="utf-8", newline="") as file:
        return {row["id"]: row["heard"] for row in csv.DictReader(file, delimiter="\t")}


def _settings(grid: Grid, measuring: Measuring) -> dict[str, Any]:
    first = next(grid.chains()).pruner.settings()
    return {
        "methods": ", ".join(f"{name}: {c}" for name, c in _methods(grid).items()),
        "criteria": ", ".join(map(_short, grid.criteria)),
        "schedules": ", ".join(map(_short, grid.schedules)),
        "targets": ", ".join(grid.targets),
        "recovery": first["recovery"],
        "seeds": ", ".join(map(str, grid.seeds)),
        "sizes": "one run per series" if grid.ladder else "one run per size",
        "beam": measuring.fused.beam,
        "lm_weight": measuring.fused.lm_weight,
        "token_reward": measuring.fused.token_reward,
        "token_reward_without_lm": measuring.alone.token_reward,
        "timing": f"{measuring.rows} rows, {measuring.context} tokens before, "
        f"{measuring.threads} thread, median of {measuring.runs}",
        "recovery_batches": f"{measuring.batch} rows of {measuring.length} tokens",
    }


def _methods(grid: Grid) -> dict[str, str]:
    return {name: Pruner(method).settings()["method"] for name, method in grid.methods.items()}


def _short(value: Any) -> str:
    """`Taylor(order=1)` for the objects on an axis: what differs from the defaults."""
    kind = type(value)
    try:
        default = vars(kind())
    except TypeError:
        default = {}
    changed = [f"{k}={v!r}" for k, v in vars(value).items() if default.get(k, kind) != v]
    return f"{kind.__name__}({', '.join(changed)})" if changed else kind.__name__
