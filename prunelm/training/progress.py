"""Shows how far a run is."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

Watch = Callable[[str, int, int], None]
"""Is told what is under way, and how much of it is done, of how much."""

_SECONDS = 10.0  # between lines where there is no terminal


@contextmanager
def progress(
    describe: str, steps: int, done: int
) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """Yields a function that shows a record: a bar on a terminal, else lines.

    Args:
        describe: what the bar or line is called; "" shows nothing.
        done: steps done before.

    A record holds "step" and "seconds", now and then "loss", "validation" and "lr", and
    "validating" while the step's validation is under way.
    """
    if not describe:
        yield lambda record: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)

    def news(record: Mapping[str, float]) -> str:
        names = [name for name in ("loss", "validation", "lr") if name in record]
        return "  ".join(f"{name} {record[name]:.4g}" for name in names)

    if not console.is_terminal:

        def line(record: Mapping[str, float]) -> None:
            if news(record):
                step, seconds = int(record["step"]), record["seconds"]
                print(
                    f"{describe}  step {step}/{steps}  {news(record)}  {seconds:.0f} s", flush=True
                )

        yield line
        return
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task(describe, total=steps, completed=done)

        def bar(record: Mapping[str, float]) -> None:
            text = f"{describe}  {news(record)}" if news(record) else None
            if "validating" in record:
                text = f"{describe}  {news(record)}  validating"
            done = int(record["step"])
            progress.update(task, completed=done, description=text, refresh="validating" in record)

        yield bar


@contextmanager
def stages() -> Iterator[Watch]:
    """Yields a `Watch`: a bar for each stage on a terminal, a line every 10 s elsewhere."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        begin = said = time.monotonic()

        def line(what: str, done: int, of: int) -> None:
            nonlocal said
            now = time.monotonic()
            if now - said >= _SECONDS:
                said = now
                print(f"{what} {done:,}/{of:,}  {now - begin:.0f} s", file=sys.stderr, flush=True)

        yield line
        return
    columns = [TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn()]
    left = [TextColumn("left"), TimeRemainingColumn()]
    with Progress(*columns, *left, console=console, transient=True) as bars:
        task = bars.add_task("", total=None)
        present = ""

        def bar(what: str, done: int, of: int) -> None:
            nonlocal present
            begins = what != present
            if begins:
                present = what
                bars.reset(task, total=of, description=what)
            bars.update(task, completed=done, refresh=begins)

        yield bar
