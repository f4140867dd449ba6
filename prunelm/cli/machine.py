"""`prunelm env` and `prunelm bench`."""

import importlib
import pkgutil
import sys
import time
from collections.abc import Sequence
from json import dumps
from typing import Any


def env(json: bool = False) -> None:
    """Shows versions, instruction sets, devices, and what was built.

    Args:
        json: print JSON.
    """
    from prunelm.study.machine import describe, version_of

    found: dict[str, Any] = describe()
    try:
        from prunelm import _C
    except ImportError as error:
        found["extension"] = f"not loaded: {error}"
    else:
        for name, value in _C.build_information().items():
            if name != "instruction_set":  # said already
                found[f"built with {name}"] = value
    for package in ("triton", "sentencepiece", "kaldialign", "kaldi-native-fbank", "PyYAML"):
        found[package] = version_of(package)
    if json:
        print(dumps(found, indent=1, default=str))
        return
    width = max(map(len, found)) + 2
    for name, value in found.items():
        shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        print(f"{name.replace('_', ' '):{width}}{shown}")


def bench(kind: str, words: Sequence[str]) -> None:
    """Runs the benchmarks of one kind, `main(words)` of each module.

    Args:
        kind: "decoding", or "kernels" for all others.
        words: options of the benchmarks, see their `--help`.
    """
    import prunelm.benchmarks

    names = [m.name for m in pkgutil.iter_modules(prunelm.benchmarks.__path__)]
    chosen = [
        name
        for name in sorted(names)
        if name.startswith("bench_") and (name == "bench_decoding") == (kind == "decoding")
    ]
    if not chosen:
        raise ValueError(f"bench {kind}: expected bench_*.py in prunelm.benchmarks, found none")
    if {"-h", "--help"} & set(words):
        others = ", ".join(name.removeprefix("bench_") for name in chosen)
        print(f"Measures {others}; all take these options.\n")
        _benchmark(kind, chosen[0], words)
        return
    begin = time.perf_counter()
    for i, name in enumerate(chosen):
        done = f"{i + 1} of {len(chosen)}, {time.perf_counter() - begin:.0f} s so far"
        print(f"{name.removeprefix('bench_')}: {done}", file=sys.stderr, flush=True)
        _benchmark(kind, name, words)


def _benchmark(kind: str, name: str, words: Sequence[str]) -> None:
    """Runs one; its help and its complaints about options name the command."""
    before, sys.argv[0] = sys.argv[0], f"prunelm bench {kind}"
    try:
        importlib.import_module(f"prunelm.benchmarks.{name}").main(list(words))
    finally:
        sys.argv[0] = before
