"""What the GPU benchmarks share: times of CUDA graphs, the card's roof, where results go.

Every time is that of one call within the replay of a CUDA graph of many, so that neither Python nor
launches from the host are in it; the median over replays. It is taken twice: warm, with the same
tensors in every call, and cold, with copies of them in turn that together are several times the L2.
"""

import argparse
import dataclasses
import itertools
import json
import os
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from prunelm.benchmarks.harness import RESULTS, commit, table
from prunelm.data.files import replace_file

GRAPH_US = 400.0  # of work in a graph of warm calls
COLD = 3  # copies are together so many times the L2
MOST_CALLS = 200
REPLAYS = 11
SAVE_S = 3.0

Call = Callable[..., Any]


class Timer(Protocol):
    """What measures; the tests have one without a GPU."""

    l2_bytes: int

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Something that does again what `run` did, and what it returned."""

    def elapsed_us(self, replay: Callable[[], None], replays: int) -> list[float]:
        """Microseconds of each replay."""


class Gpu:
    """CUDA graphs timed by events, on the current device."""

    def __init__(self) -> None:
        self.l2_bytes = int(torch.cuda.get_device_properties().L2_cache_size)

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = run()
        return graph.replay, out

    def elapsed_us(self, replay: Callable[[], None], replays: int) -> list[float]:
        replay()  # the first one uploads the graph
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
        marks[0].record()
        for mark in marks[1:]:
            replay()
            mark.record()
        torch.cuda.synchronize()
        pairs = itertools.pairwise(marks)
        return [before.elapsed_time(after) * 1e3 for before, after in pairs]


class Dry(Gpu):
    """Captures as for a measurement, so that all kernels are compiled, and measures nothing."""

    l2_bytes = 0

    def __init__(self) -> None:
        pass

    def elapsed_us(self, replay: Callable[[], None], replays: int) -> list[float]:
        return [GRAPH_US] * replays


def cloned(value: Any) -> Any:
    """A copy whose tensors lie in memory of their own, with the same strides."""
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (field.name for field in dataclasses.fields(value))
        return dataclasses.replace(value, **{name: cloned(getattr(value, name)) for name in fields})
    if isinstance(value, (tuple, list)):
        return type(value)(cloned(one) for one in value)
    return value


def size_bytes(value: Any) -> int:
    """Bytes of all tensors in it."""
    if isinstance(value, Tensor):
        if value.layout is torch.sparse_bsr:
            value = value.values()
        return value.numel() * value.element_size()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return sum(size_bytes(getattr(value, f.name)) for f in dataclasses.fields(value))
    return sum(map(size_bytes, value)) if isinstance(value, (tuple, list)) else 0


def replayed(timer: Timer, call: Call, inputs: Sequence[Any]) -> Any:
    """What the call returns within a graph, having been told apart from what lay there before."""
    call(*inputs)  # compiles, tunes, loads
    replay, out = timer.capture(lambda: call(*inputs))
    for tensor in (out,) if isinstance(out, Tensor) else out:
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)
    replay()
    return out


@dataclass(frozen=True)
class Times:
    """Microseconds of one call."""

    warm_us: float
    cold_us: float


def times(timer: Timer, call: Call, inputs: Sequence[Any]) -> Times:
    """Both times of call(*inputs)."""
    with_one = timer.capture(lambda: call(*inputs))[0]
    once = max(statistics.median(timer.elapsed_us(with_one, 3)), 0.5)
    calls = max(2, min(MOST_CALLS, round(GRAPH_US / once)))
    warm = timer.capture(lambda: _in_turn(call, [inputs], calls))[0]
    warm_us = statistics.median(timer.elapsed_us(warm, REPLAYS)) / calls
    wanted = -(-COLD * timer.l2_bytes // max(size_bytes(tuple(inputs)), 1))
    copies = [inputs, *(cloned(tuple(inputs)) for _ in range(min(wanted, MOST_CALLS)))]
    cold = timer.capture(lambda: _in_turn(call, copies, len(copies)))[0]
    cold_us = statistics.median(timer.elapsed_us(cold, REPLAYS)) / len(copies)
    return Times(warm_us, cold_us)


def _in_turn(call: Call, sets: Sequence[Sequence[Any]], calls: int) -> None:
    for i in range(calls):
        call(*sets[i % len(sets)])


def best(timer: Timer, calls: Mapping[str, Call], inputs: Sequence[Any]) -> tuple[Times, str]:
    """The least warm and the least cold time of several ways, and the name of the first."""
    found = {name: times(timer, call, inputs) for name, call in calls.items()}
    warm = min(found, key=lambda name: found[name].warm_us)
    return Times(found[warm].warm_us, min(t.cold_us for t in found.values())), warm


@dataclass(frozen=True)
class Roof:
    """What the card was measured to reach.

    Attributes:
        tflops: a product of 8192 x 8192 matrices, bfloat16.
        gbytes: a copy of 1 GiB, bytes read and written.
        floor_us: a kernel that does next to nothing, within a graph.
    """

    tflops: float
    gbytes: float
    floor_us: float

    def us(self, flops: float, bytes_moved: float) -> float:
        """The least time for so much work."""
        return max(flops / self.tflops / 1e6, bytes_moved / self.gbytes / 1e3)


def measure_roof(timer: Timer, device: str = "cuda", size: int = 8192) -> Roof:
    """By torch's own matrix product, copy and addition, on random numbers."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    long, to = (torch.randn(4 * size * size, device=device) for _ in range(2))
    one = torch.zeros(1, device=device)
    a @ b  # loads the library

    def of(call: Call, calls: int) -> float:
        replay = timer.capture(lambda: _in_turn(call, [()], calls))[0]
        return statistics.median(timer.elapsed_us(replay, 5)) / calls

    product, copy = of(lambda: a @ b, 3), of(lambda: to.copy_(long), 3)
    floor = of(lambda: one.add_(1), 100)
    return Roof(2 * size**3 / product / 1e6, 2 * size_bytes(long) / copy / 1e3, floor)


def relu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The dense layer in torch's own two ops."""
    return F.linear(x, weight, bias).relu()


def fused_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The dense layer in one cuBLASLt call with its epilogue."""
    y: Tensor = torch._addmm_activation(bias, x, weight.T)
    return y


class Dense:
    """The best dense layer that a user would have, relu(x @ weight.T + bias), for each shape.

    Compiled once for a shape, not in the time, and not at all after `compile_s` seconds of it.
    """

    def __init__(self, timer: Timer, compile_s: float = 40.0) -> None:
        self.timer, self.left_s = timer, compile_s
        self.compiled: dict[tuple[int, ...], Call | None] = {}
        self.known: dict[Any, tuple[Times, str]] = {}

    def times(self, key: Any, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Times, str]:
        """The times, measured once for a key, and which way it was."""
        if key not in self.known:
            inputs = (x, weight, bias)
            ways: dict[str, Call] = {"cuBLAS": relu_linear, "cuBLASLt": fused_linear}
            ways = {name: way for name, way in ways.items() if _runs(way, inputs)}
            compiled = self._compile((*x.shape, *weight.shape), inputs)
            if compiled is not None:
                ways["compiled"] = compiled
            self.known[key] = best(self.timer, ways, inputs)
        return self.known[key]

    def _compile(self, shape: tuple[int, ...], inputs: Sequence[Any]) -> Call | None:
        if shape not in self.compiled:
            self.compiled[shape], seconds = compiled(relu_linear, inputs, self.left_s)
            self.left_s -= seconds
        return self.compiled[shape]


def compiled(call: Call, inputs: Sequence[Any], left_s: float) -> tuple[Call | None, float]:
    """The call compiled for these inputs, None where that fails or no time is left; and seconds."""
    begin = time.monotonic()
    if left_s <= 0:
        return None, 0.0
    torch.compiler.reset()  # few shapes may be compiled of one function
    made = torch.compile(call, dynamic=False)
    return (made if _runs(made, inputs) else None), time.monotonic() - begin


def _runs(call: Call, inputs: Sequence[Any]) -> bool:
    try:
        call(*inputs)
    except Exception as error:
        print(f"left out of the baselines: {type(error).__name__}: {str(error)[:200]}")
        return False
    return True


def options_of(doc: str, words: Sequence[str] | None) -> argparse.Namespace:
    """--seconds, --full and --out, which all GPU benchmarks take."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="no case begins after these")
    parser.add_argument("--full", action="store_true", help="more shapes")
    parser.add_argument(
        "--dry", action="store_true", help="run and check all cases once, measure and save nothing"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results go")
    options = parser.parse_args(words)
    if not torch.cuda.is_available():
        parser.error(f"expected an NVIDIA GPU and torch for CUDA, found torch {torch.__version__}")
    return options


Case = tuple[Mapping[str, Any], Callable[[], Mapping[str, Any]]]


def run_benchmark(
    name: str,
    cases: Callable[[Timer, Roof], Sequence[Case]],
    options: argparse.Namespace,
    seconds: float | None = None,
) -> int:
    """Measures all cases, prints a table and saves it; the exit code.

    What was measured is saved every few seconds, in case this process is ended.
    """
    seconds = options.seconds if seconds is None else seconds
    with torch.no_grad():
        if options.dry:
            rows, failed = run_cases(cases(Dry(), Roof(1, 1, 1)), seconds)
            print(f"{len(rows)} cases ran, {failed} of them failed")
            return 1 if failed else 0
        timer = Gpu()
        roof = measure_roof(timer)
        save = partial(save_rows, name, about(), roof, options.out)
        rows, failed = run_cases(cases(timer, roof), seconds, save)
    report(save(rows), roof)
    if failed:
        print(f"{failed} cases failed")
    return 1 if failed else 0


def run_cases(
    cases: Sequence[Case], seconds: float, save: Callable[[list[dict[str, Any]]], Any] | None = None
) -> tuple[list[dict[str, Any]], int]:
    """A row for each case, labels first, and how many failed; none begins after the time.

    A case that fails is a row with its error, and the next one runs, unless CUDA itself is lost.
    `save` is called with the rows so far from time to time.
    """
    saved = time.monotonic()
    begin, rows, failed = time.monotonic(), [], 0
    for i, (labels, run) in enumerate(cases):
        if time.monotonic() - begin > seconds:
            print(f"no time for {len(cases) - i} of {len(cases)} cases")
            break
        try:
            rows.append({**labels, **run()})
        except Exception as error:
            failed += 1
            said = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            rows.append({**labels, "error": said})
            print(f"{dict(labels)}: {said}", flush=True)
            if "CUDA error" in said:
                break
        if save is not None and time.monotonic() - saved > SAVE_S:
            save(rows)
            saved = time.monotonic()
    return rows, failed


def save_rows(
    name: str, about: Mapping[str, str], roof: Roof, folder: Path, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Merges a benchmark's rows into this card's file in the folder; returns what it put there."""
    found = {
        "bench": name,
        **about,
        "roof": {key: round(value, 2) for key, value in dataclasses.asdict(roof).items()},
        "rows": [
            {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()} for row in rows
        ],
    }
    merge(folder, device_name(), name, found)
    return found


def report(found: Mapping[str, Any], roof: Roof) -> None:
    """Prints the card and a table."""
    rows = found["rows"]
    print(f"{found['machine']}; clocks {found['clocks']}; commit {found['commit']}")
    print(f"roof: {roof.tflops:.0f} TFLOP/s, {roof.gbytes:.0f} GB/s, {roof.floor_us:.1f} us")
    good = [row for row in rows if "error" not in row]
    names = list(dict.fromkeys(key for row in good for key in row))
    if good:
        print(table([{key: row.get(key) for key in names} for row in good]))


def about() -> dict[str, str]:
    """The card, its clocks just now, and versions."""
    import triton

    name, clocks = torch.cuda.get_device_name(), query("clocks.sm,clocks.mem,clocks.max.sm")
    driver = query("driver_version")
    versions = f"torch {torch.__version__}, triton {triton.__version__}, CUDA {torch.version.cuda}"
    here = commit()
    return {
        "machine": f"{name}, driver {driver}, {versions}",
        "device": name,
        "clocks": clocks,
        "commit": os.environ.get("COMMIT", here) if here == "unknown" else here,
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def query(fields: str) -> str:
    """What nvidia-smi says, "unknown" where it does not."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return run.stdout.strip() if run.returncode == 0 else "unknown"


def device_name() -> str:
    """The stem of this card's file."""
    return slug(torch.cuda.get_device_name())


def slug(name: str) -> str:
    """ "NVIDIA H100 80GB HBM3" as nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def merge(folder: Path, device: str, name: str, found: Mapping[str, Any]) -> None:
    """Puts one benchmark's results into a device's file, beside what others measured."""
    path = folder / f"{device}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known[name] = found
    with replace_file(path) as temporary:
        temporary.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
