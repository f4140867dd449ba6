"""Predicted times of the linear ops on a GPU: what chooses a backend there, and where ops pay.

Every time is launch + roofline / efficiency. The roofline is the larger of bytes over bandwidth and
multiply-adds over rate, by the card's data sheet. Efficiencies come from gpu_times/<card>.json
where `make gpu-check` measured them, by op, dtype, block and buckets of M and density. Elsewhere
they are guesses that favour dense: it is taken to reach what cuBLAS reaches at its best, the
kernels here well below what they are built for, so that what is chosen loses nowhere.

Nothing here touches the device but the first look at its name, and all of it can be traced.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch

TABLES = Path(__file__).parent / "gpu_times"
ROW_BUCKETS = (1, 16, 64, 256, 1024)  # upper bounds of M; what is above is one more,
MANY_ROWS = 4096  # of which this is typical
DENSITY_BUCKETS = (0.07, 0.15, 0.35, 0.7, 1.0)  # upper bounds of the share that is stored
MARGIN = 0.85  # of dense's time, which a way that was not measured must keep
DECODE_ROWS = 64  # up to which low_rank_linear of CUDA is made for
SLICED_ROWS = 512  # up to which block_sparse_linear of CUDA cuts K into slices
FEW_ROWS = 16  # up to which a kernel without tiles is better than Triton's launch

Block = tuple[int, int]


@dataclass(frozen=True)
class Card:
    """What a card's data sheet says.

    Attributes:
        gbytes: GB/s of its memory.
        tflops: of bfloat16 products with float32 sums, without sparsity.
        tflops_32: of plain float32.
        l2_gbytes: GB/s that the L2 gives, read.
        launch_us: between the starts of two kernels of a graph, beside their work.
    """

    name: str
    gbytes: float
    tflops: float
    tflops_32: float
    l2_gbytes: float
    launch_us: float = 2.0


# NVIDIA's data sheets of each card; L2 rates are of the order that microbenchmarks give (Luo et al.
# 2024, arXiv 2402.13499, for the A100 and the H100), scaled by multiprocessors for the others.
KNOWN = (
    (r"h200", Card("H200", 4800, 989, 67, 5500)),
    (r"h100.*(pcie|nvl)", Card("H100 PCIe", 2000, 756, 51, 4500)),
    (r"h100|h800|gh200", Card("H100", 3350, 989, 67, 5500)),
    (r"b200|gb200", Card("B200", 8000, 2250, 80, 9000)),
    (r"a100.*80gb", Card("A100 80GB", 2039, 312, 19.5, 4500)),
    (r"a100|a800", Card("A100", 1555, 312, 19.5, 4500)),
    (r"l40", Card("L40S", 864, 362, 91.6, 4500)),
    (r"\ba10\b", Card("A10", 600, 125, 31.2, 2500)),
    (r"rtx 4090", Card("RTX 4090", 1008, 165, 82.6, 4500)),
    (r"rtx 3090", Card("RTX 3090", 936, 71, 35.6, 2500)),
)
# By compute capability, for cards that are not named above: a common card of that kind.
KINDS = {8: KNOWN[5][1], 9: KNOWN[2][1], 10: KNOWN[3][1], 12: KNOWN[8][1]}

# Guesses where nothing was measured, as shares of the roofline.
DENSE_OF_BANDWIDTH, DENSE_OF_RATE = 1.0, 0.8
OWN_OF_BANDWIDTH, OWN_OF_RATE = 0.5, 0.35
OWN_OF_RATE_32 = 0.1  # and of blocks that no matrix instruction takes


@dataclass(frozen=True)
class Prediction:
    """Microseconds of one call, and whether they come from a measurement on such a card."""

    us: float
    measured: bool

    def beats(self, dense_us: float) -> bool:
        """Whether to choose this way: by measurement, or because the model is sure."""
        return self.us <= dense_us * (1.0 if self.measured else MARGIN)


Function = TypeVar("Function", bound=Callable[..., object])


def constant_in_graphs(function: Function) -> Function:
    """torch.compiler.assume_constant_result, which would import the compiler for everybody."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_graphs
def card_of(index: int) -> Card:
    """The card of a CUDA device; the H100 where none can be asked, as when tracing without one."""
    return _card(index)


@cache
def _card(index: int) -> Card:
    if not torch.cuda.is_available():
        return KINDS[9]
    return card_named(torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)[0])


def card_named(name: str, major: int) -> Card:
    """By its name, or by its compute capability."""
    for pattern, card in KNOWN:
        if re.search(pattern, name.lower()):
            return card
    return KINDS.get(major, KINDS[8])


Key = tuple[str, str, str, int, int]


@constant_in_graphs
def measured_efficiency(
    card: str, what: str, dtype: str, block: str, rows: int, density: int
) -> float:
    """What was measured on a card of that name in KNOWN, 0 where nothing was.

    Args:
        what: "dense", or an op and its backend.
        block: "16x16", say; "" where there is none.
        rows, density: buckets of M and of the share that is stored.
    """
    return _table(card).get((what, dtype, block, rows, density), 0.0)


@cache
def _table(card: str) -> dict[Key, float]:
    path = TABLES / f"{card.lower().replace(' ', '-')}.json"
    if not path.is_file():
        return {}
    rows = json.loads(path.read_text())["rows"]
    return {
        (r["what"], r["dtype"], r["block"], r["rows"], r["density"]): r["efficiency"] for r in rows
    }


def row_bucket(M: int) -> int:
    """Which of ROW_BUCKETS, counted from 0."""
    for i, bound in enumerate(ROW_BUCKETS):
        if M <= bound:  # a branch, so that a symbolic M yields a plain number
            return i
    return len(ROW_BUCKETS)


def density_bucket(density: float) -> int:
    """Which of DENSITY_BUCKETS, counted from 0."""
    for i, bound in enumerate(DENSITY_BUCKETS[:-1]):
        if density <= bound:
            return i
    return len(DENSITY_BUCKETS) - 1


def roof_us(card: Card, flops: float, size_bytes: float, dtype: torch.dtype) -> float:
    """The least time for so much work."""
    rate = card.tflops_32 if dtype is torch.float32 else card.tflops
    return max(flops / rate / 1e6, size_bytes / card.gbytes / 1e3)


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16", say."""
    return str(dtype).removeprefix("torch.")


def _efficiency(card: Card, key: Key, guess: float) -> tuple[float, bool]:
    found = measured_efficiency(card.name, *key)
    return (found, True) if found else (guess, False)


def dense_us(card: Card, M: int, N: int, K: int, dtype: torch.dtype) -> Prediction:
    """torch.nn.functional.linear, [M, K] by [N, K]."""
    flops, moved = 2 * M * N * K, dtype.itemsize * (N * K + M * (N + K))
    roof = roof_us(card, flops, moved, dtype)
    by_rate = roof_us(card, flops, 0, dtype) / DENSE_OF_RATE
    guess = roof / max(by_rate, roof_us(card, 0, moved, dtype) / DENSE_OF_BANDWIDTH, 1e-9)
    efficiency, measured = _efficiency(
        card, ("dense", dtype_name(dtype), "", row_bucket(M), 0), guess
    )
    return Prediction(card.launch_us + roof / efficiency, measured)


def block_sparse_us(
    card: Card, backend: str, M: int, N: int, K: int, nnz: int, block: Block, dtype: torch.dtype
) -> Prediction:
    """block_sparse_linear on "cuda" or "triton", nnz blocks stored."""
    bn, bk = block
    weights = nnz * bn * bk
    flops, moved = 2 * M * weights, dtype.itemsize * (weights + M * (N + K))
    roof = roof_us(card, flops, moved, dtype)
    density = weights / max(N * K, 1)
    name = f"{bn}x{bk}"
    key = (f"block_sparse_linear {backend}", dtype_name(dtype), name)
    # A tile of rows reads its part of x again for each block: b multiply-adds for a number.
    near = flops / bn * dtype.itemsize / 2 / card.l2_gbytes / 1e3
    matrix = dtype is not torch.float32 and bn % 16 == 0 and bk % 16 == 0
    share = OWN_OF_RATE if matrix else OWN_OF_RATE_32
    slow = max(
        roof_us(card, flops, 0, dtype) / share,
        roof_us(card, 0, moved, dtype) / OWN_OF_BANDWIDTH,
        near / OWN_OF_BANDWIDTH,
    )
    efficiency, measured = _efficiency(
        card, (*key, row_bucket(M), density_bucket(density)), roof / max(slow, 1e-9)
    )
    return Prediction(card.launch_us + roof / max(efficiency, 1e-9), measured)


def low_rank_us(
    card: Card, backend: str, M: int, N: int, K: int, R: int, dtype: torch.dtype
) -> Prediction:
    """low_rank_linear on "cuda" or "triton"; "reference" is two dense products."""
    if backend == "reference":
        first, second = dense_us(card, M, R, K, dtype), dense_us(card, M, N, R, dtype)
        guess = Prediction(first.us + second.us, False)
    flops, moved = 2 * M * R * (N + K), dtype.itemsize * (R * (N + K) + M * (N + K))
    roof = roof_us(card, flops, moved, dtype)
    density = R * (N + K) / max(N * K, 1)
    key = (f"low_rank_linear {backend}", dtype_name(dtype), "")
    share = OWN_OF_RATE if dtype is not torch.float32 else OWN_OF_RATE_32
    slow = max(
        roof_us(card, flops, 0, dtype) / share, roof_us(card, 0, moved, dtype) / OWN_OF_BANDWIDTH
    )
    efficiency, measured = _efficiency(
        card, (*key, row_bucket(M), density_bucket(density)), roof / max(slow, 1e-9)
    )
    if backend == "reference" and not measured:
        return guess
    return Prediction(card.launch_us + roof / max(efficiency, 1e-9), measured)


def block_sparse_order(
    card: Card, M: int, N: int, K: int, nnz: int, block: Block, dtype: torch.dtype
) -> tuple[str, ...]:
    """The backends from the one that should run on; by measurement where there is one of both."""
    bn, bk = block
    density = nnz * bn * bk / max(N * K, 1)
    cuda, triton = (
        measured_efficiency(
            card.name, f"block_sparse_linear {backend}", dtype_name(dtype), f"{bn}x{bk}",
            row_bucket(M), density_bucket(density),
        )
        for backend in ("cuda", "triton")
    )  # fmt: skip
    if cuda and triton:
        cuda_first = cuda >= triton
    else:
        # With many rows blocks of 128 are best in Triton's kernels, which use Hopper's own matrix
        # instructions; smaller ones lose to what the CUDA kernel saves, reads of x.
        if in_tiles(K, block, dtype):
            cuda_first = M <= SLICED_ROWS or (bn <= 64 and dtype is not torch.float32)
        else:
            cuda_first = M <= FEW_ROWS
    return ("cuda", "triton", "reference") if cuda_first else ("triton", "cuda", "reference")


def in_tiles(K: int, block: Block, dtype: torch.dtype) -> bool:
    """Whether CUDA's block_sparse_linear takes it in tiles: takes_tiles there."""
    (bn, bk), size = block, dtype.itemsize
    step, chunk = 32 // size, 128 // size
    divides = chunk % bk == 0 or bk % chunk == 0
    return bn % 16 == 0 and bk % step == 0 and divides and K * size % 16 == 0


def low_rank_order(
    card: Card, M: int, N: int, K: int, R: int, dtype: torch.dtype
) -> tuple[str, ...]:
    """The same for low_rank_linear, where two dense products are a way of their own.

    One choice for each bucket of M, by its largest, so that a symbolic M can be traced.
    """
    bucket = row_bucket(M)
    M = ROW_BUCKETS[bucket] if bucket < len(ROW_BUCKETS) else MANY_ROWS
    own = [(low_rank_us(card, name, M, N, K, R, dtype), name) for name in ("cuda", "triton")]
    if not (own[0][0].measured and own[1][0].measured):
        if M > DECODE_ROWS:
            own.reverse()
    elif own[1][0].us < own[0][0].us:
        own.reverse()
    two = low_rank_us(card, "reference", M, N, K, R, dtype)
    names = tuple(name for _, name in own)
    return (*names, "reference") if own[0][0].beats(two.us) else ("reference", *names)


def best_block(
    card: Card, rows: tuple[int, ...], N: int, K: int, stored: Mapping[Block, int],
    dtype: torch.dtype,
) -> Block | None:  # fmt: skip
    """The block whose predicted time is least, if it beats dense for each M; a larger one if equal.

    Args:
        stored: how many blocks of each size hold something.
    """
    dense = [dense_us(card, M, N, K, dtype).us for M in rows]
    best, best_us = None, float("inf")
    for block, nnz in sorted(stored.items(), key=lambda one: -one[0][0] * one[0][1]):
        own = []
        for M in rows:
            first = block_sparse_order(card, M, N, K, nnz, block, dtype)[0]
            own.append(block_sparse_us(card, first, M, N, K, nnz, block, dtype))
        total = sum(one.us for one in own)
        if total < 0.99 * best_us and all(
            one.beats(us) for one, us in zip(own, dense, strict=True)
        ):
            best, best_us = block, total
    return best


def product_wins(
    card: Card, rows: tuple[int, ...], N: int, K: int, R: int, dtype: torch.dtype
) -> bool:
    """Whether two factors are slower than their product, multiplied out, for each M."""
    for M in rows:
        first = low_rank_order(card, M, N, K, R, dtype)[0]
        factored = low_rank_us(card, first, M, N, K, R, dtype).us
        if factored <= dense_us(card, M, N, K, dtype).us:
            return False
    return True
