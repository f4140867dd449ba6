"""torch's own Triton kernel for block-sparse weights, its parameters tuned on this card.

python -m prunelm.benchmarks.gpu_torch_bsr [--full] [--seconds 60] [--out FOLDER]

Only this kernel's times: gpu_goals.py puts them beside those of block_sparse_linear. It multiplies
the weight by the transposed rows, of which it wants 16 or more; it adds the bias, and relu follows.
"""

import multiprocessing
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prunelm.benchmarks.gpu_block_sparse_linear import BLOCKS, SPARSITIES, K, Layer, N
from prunelm.benchmarks.gpu_harness import (
    Case,
    Roof,
    Timer,
    options_of,
    replayed,
    run_benchmark,
    times,
)
from prunelm.benchmarks.harness import check

ROWS = (4096, 16)
WORKERS = 8
TUNED_AT = 0.75  # sparsity
Meta = Mapping[str, int]


def metas(M: int, block: int, full: bool) -> Iterator[Meta]:
    """Parameters worth trying: columns at a time, stages, warps."""
    widths = (16,) if M <= 16 else (64, 128)
    stages = (1, 2, 3, 4, 5) if full else (1, 3, 4)
    for width, num_stages, num_warps in product(widths, stages, (2, 4, 8) if full else (4, 8)):
        if block * max(width, block) * 4 * num_stages > 220 * 1024:
            continue  # the two tiles of a stage would not fit into shared memory
        yield {
            "SPLIT_N": max(M // width, 1),
            "GROUP_SIZE_ROW": 4,
            "num_stages": num_stages,
            "num_warps": num_warps,
        }


def run(x: Tensor, weight: Tensor, bias: Tensor, meta: Meta) -> Tensor:
    """relu(x @ weight.T + bias), weight in torch's BSR layout."""
    from torch.sparse._triton_ops import bsr_dense_addmm

    start = bias[:, None].expand(len(bias), len(x))
    return bsr_dense_addmm(start, weight, x.T, meta=dict(meta)).T.relu()


def layer_of(M: int, block: int, sparsity: float) -> tuple[Layer, tuple[Tensor, ...]]:
    layer = Layer((N, K), block, sparsity, "cuda")
    x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
    return layer, (x, layer.dense.to_sparse_bsr((block, block)), layer.bias)


def compile_some(share: Sequence[tuple[int, int, Meta]]) -> None:
    """Calls the kernel once for each, so that Triton's cache on disk has it; in a child process."""
    for M, block, meta in share:
        try:
            with torch.no_grad():
                run(*layer_of(M, block, TUNED_AT)[1], meta)
        except Exception as error:
            print(f"torch's kernel, {block}x{block}, {dict(meta)}: {str(error).splitlines()[0]}")


def compile_all(full: bool, seconds: float) -> None:
    """Compiles all kernels side by side; what is not ready in time is compiled when it is tried."""
    wanted = [(M, b, meta) for M in ROWS for b in BLOCKS for meta in metas(M, b, full)]
    spawn = multiprocessing.get_context("spawn")
    shares = [wanted[i::WORKERS] for i in range(WORKERS)]
    workers = [spawn.Process(target=compile_some, args=(share,)) for share in shares]
    end = time.monotonic() + seconds
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(max(0.0, end - time.monotonic()))
        if worker.is_alive():
            worker.kill()
            worker.join()


def tuned(timer: Timer, M: int, block: int, full: bool, known: dict[Any, Meta]) -> Meta:
    """The fastest parameters for a shape, at one sparsity."""
    if (M, block) not in known:
        inputs, found = layer_of(M, block, TUNED_AT)[1], dict[int, float]()
        tried = list(metas(M, block, full))
        for i, meta in enumerate(tried):
            try:
                run(*inputs, meta)
                replay = timer.capture(lambda meta=meta: [run(*inputs, meta) for _ in range(5)])[0]  # type: ignore[misc]
                found[i] = min(timer.elapsed_us(replay, 5))
            except RuntimeError:
                continue  # more shared memory than there is
        if not found:
            raise RuntimeError(f"none of torch's kernels runs, {block}x{block}, M = {M}")
        known[M, block] = tried[min(found, key=lambda i: found[i])]
    return known[M, block]


def forward(
    timer: Timer, known: dict[Any, Meta], *, M: int, block: int, sparsity: float, full: bool
) -> Mapping[str, Any]:
    """One line of the table, checked."""
    meta = tuned(timer, M, block, full, known)
    layer, inputs = layer_of(M, block, sparsity)
    call = partial(run, meta=meta)
    x, _, bias = inputs
    got = replayed(timer, call, inputs)
    wide = (t.double() for t in (x, layer.dense, bias))
    plain, exact = F.linear(x, layer.dense, bias).relu(), F.linear(*wide).relu()
    check(got, plain, exact, "torch's BSR")
    own = times(timer, call, inputs)
    chosen = {name: meta[name] for name in ("num_stages", "num_warps", "SPLIT_N")}
    return {"us": own.warm_us, "cold_us": own.cold_us, **chosen}


def cases(timer: Timer, roof: Roof, full: bool) -> list[Case]:
    """All lines."""
    known: dict[Any, Meta] = {}
    return [
        (
            {"M": M, "N": N, "K": K, "block": f"{b}x{b}", "sparsity": s},
            partial(forward, timer, known, M=M, block=b, sparsity=s, full=full),
        )
        for M, b, s in product(ROWS, BLOCKS, SPARSITIES)
    ]


def main(words: Sequence[str] | None = None) -> int:
    """Prints the card, a table in microseconds, and saves it."""
    options = options_of(str(__doc__), words)
    begin = time.monotonic()
    compile_all(options.full, options.seconds / 2)
    left_s = options.seconds - (time.monotonic() - begin)
    return run_benchmark("torch BSR", partial(cases, full=options.full), options, left_s)


if __name__ == "__main__":
    sys.exit(main())
