"""block_sparse_linear against torch's dense linear and the sparse products of others.

python -m prunelm.benchmarks.bench_block_sparse_linear [--full] [--threads 2] [--save]
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prunelm import BlockSparse, ops
from prunelm.benchmarks.harness import Roof, check, measure_roof, options_of, report, side_by_side

BLOCKS = ((16, 1), (16, 4), (16, 16), (32, 32))
TALL = ((64, 64), (128, 128))
SPARSITIES = (0.5, 0.75, 0.9, 0.95)
FULLER = (0.0, 0.25)  # where it no longer pays, for one block and shape
ROWS = (1, 8, 64, 512)
SQUARE = (1024, 1024)
# (N, K): attention and feed-forward layers of models of width 512 and 1024.
SHAPES = (SQUARE, (2048, 512), (512, 2048), (1024, 4096), (4096, 1024))
PEERS = ("compiled", "torch_bsr", "torch_csr", "scipy")
SMALL = ((512, 512), (512, 1024), (1024, 512))


def case(
    M: int, N: int, K: int, block: tuple[int, int], sparsity: float
) -> tuple[Tensor, Tensor, BlockSparse]:
    """x, the dense weight with its zeros, and its blocks: exactly as many as sparsity says."""
    g = torch.Generator().manual_seed(0)
    rows, cols = N // block[0], K // block[1]
    order = torch.randperm(rows * cols, generator=g)
    mask = (order < round((1 - sparsity) * rows * cols)).view(rows, cols)
    dense = torch.randn(N, K, generator=g)
    dense *= mask.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    return torch.randn(M, K, generator=g), dense, BlockSparse.from_dense(dense, block, mask)


def torch_sparse(x: Tensor, weight: Tensor) -> Callable[[], object]:
    """torch's own product with a sparse weight, which does not run under inference mode."""

    def call() -> object:
        with torch.inference_mode(False), torch.no_grad():
            return F.linear(x, weight)

    return call


def empty_call(x: Tensor, weight: BlockSparse) -> Callable[[], object]:
    """The same call of an op that does nothing but make its result: what no kernel can save."""
    tensors = (weight.values, weight.crow, weight.col, None)
    op, N = torch.ops.prunelm.block_sparse_linear_empty.default, weight.shape[0]
    return lambda: op(x, *tensors, N, 0)


def compiled_linear() -> Callable[[Tensor, Tensor], Tensor]:
    """torch's dense linear, compiled for the shape that it meets."""
    torch.compiler.reset()  # it gives up after some shapes
    compiled: Callable[[Tensor, Tensor], Tensor] = torch.compile(
        lambda x, weight: F.linear(x, weight), dynamic=False
    )
    return compiled


def peers(x: Tensor, dense: Tensor, block: tuple[int, int]) -> dict[str, Callable[[], object]]:
    """Other sparse products of the same weight; SciPy's only where it is installed."""
    calls: dict[str, Callable[[], object]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that they are in beta
        if block[0] == block[1] >= 16:
            calls["torch_bsr"] = torch_sparse(x, dense.to_sparse_bsr(block))
        if block == (1, 1):
            calls["torch_csr"] = torch_sparse(x, dense.to_sparse_csr())
    try:
        from scipy import sparse  # type: ignore[import-not-found]
    except ImportError:
        return calls
    numbers = dense.numpy()
    single = block == (1, 1)
    stored = sparse.csr_array(numbers) if single else sparse.bsr_array(numbers, blocksize=block)
    columns = x.T.contiguous().numpy()
    calls["scipy"] = lambda: stored @ columns
    return calls


def forward(
    M: int,
    N: int,
    K: int,
    block: tuple[int, int],
    sparsity: float,
    *,
    threads: int,
    roof: Roof,
    dtype: torch.dtype = torch.float32,
    beside: bool = False,
    compiled: bool = False,
) -> dict[str, Any]:
    """One line of the table: every way to compute the same, checked first.

    Args:
        dtype: of the stored weight; rows are float32.
        beside: also the sparse products of others.
        compiled: also torch's dense linear compiled.
    """
    x, dense, weight = case(M, N, K, block, sparsity)
    others = peers(x, dense, block) if beside else {}
    if compiled:
        linear = compiled_linear()
        others["compiled"] = lambda: linear(x, dense)
    calls: dict[str, Callable[[], object]] = {"dense": lambda: F.linear(x, dense), **others}
    if dtype != torch.float32:
        values = weight.values.transpose(1, 2).to(dtype).transpose(1, 2)
        weight = BlockSparse(values, weight.crow, weight.col, weight.shape)
        narrow, narrow_x = dense.to(dtype), x.to(dtype)
        dense = narrow.float()
        calls["dense_16"] = lambda: F.linear(narrow_x, narrow)
    exact = F.linear(x.double(), dense.double())
    what = f"block_sparse_linear at M={M} N={N} K={K}, block {block}, sparsity {sparsity}"
    check(ops.block_sparse_linear(x, weight), F.linear(x, dense), exact, what)
    with torch.inference_mode():
        for name, call in others.items():  # they err more, and are not ours to judge
            got = torch.as_tensor(call()).double()
            if not torch.allclose(got.T if name == "scipy" else got, exact, rtol=1e-3, atol=1e-3):
                raise RuntimeError(f"{what}: expected the same product from {name}")
        own = {"ours": lambda: ops.block_sparse_linear(x, weight), "empty": empty_call(x, weight)}
        rounds = 7 if M * N * K >= 2**28 else 15
        us = side_by_side({**own, **calls}, threads, rounds)
    stored = weight.values.numel()
    size = weight.values.element_size() * stored + 4 * (weight.col.numel() + M * (N + K))
    return {
        "M": M,
        "N": N,
        "K": K,
        "block": f"{block[0]}x{block[1]}",
        "sparsity": sparsity,
        "stored": str(dtype).removeprefix("torch."),
        "ours": us["ours"],
        "dense": us["dense"],
        **{name: us.get(name) for name in ("empty", "dense_16", *PEERS)},
        "speedup": us["dense"] / us["ours"],
        "GFLOP/s": 2 * M * stored / us["ours"] / 1e3,
        "of_roof": roof.us(2 * M * stored, size) / us["ours"],
    }


def gradients(
    M: int, block: tuple[int, int], sparsity: float, *, threads: int, roof: Roof
) -> dict[str, Any]:
    """Each gradient beside the forward product of the same weight."""
    N, K = SQUARE
    x, dense, weight = case(M, N, K, block, sparsity)
    grad = torch.randn(M, N, generator=torch.Generator().manual_seed(1))
    op, at = torch.ops.prunelm, (weight.crow, weight.col)

    def grad_x() -> Tensor:
        return op.block_sparse_linear_grad_x(grad, weight.values, *at, K)

    def grad_values() -> Tensor:
        return op.block_sparse_linear_grad_values(grad, x, *at, *block)

    exact = (grad.double() @ dense.double(), grad.double().T @ x.double())
    kept = BlockSparse(torch.ones_like(weight.values), *at, weight.shape).to_dense()
    full = BlockSparse(grad_values(), *at, weight.shape).to_dense()
    check(grad_x(), grad @ dense, exact[0], "gradient of x")
    check(full, grad.T @ x * kept, exact[1] * kept, "gradient of values")
    with torch.inference_mode():
        us = side_by_side(
            {
                "forward": lambda: ops.block_sparse_linear(x, weight),
                "grad_x": grad_x,
                "grad_values": grad_values,
            },
            threads,
        )
    stored = weight.values.numel()
    least = roof.us(2 * M * stored, 4 * (stored + M * (N + K)))
    names = {"M": M, "N": N, "K": K, "block": f"{block[0]}x{block[1]}", "sparsity": sparsity}
    shares = {f"{name}/forward": us[name] / us["forward"] for name in ("grad_x", "grad_values")}
    roofs = {f"{name}_of_roof": least / us[name] for name in ("grad_x", "grad_values")}
    return {**names, **us, **shares, **roofs}


def training_step(
    M: int, N: int, K: int, block: tuple[int, int], sparsity: float, *, threads: int, roof: Roof
) -> dict[str, Any]:
    """Forward, both gradients and Adam of one layer, beside the dense one."""
    x, dense, weight = case(M, N, K, block, sparsity)
    grad = torch.randn(M, N, generator=torch.Generator().manual_seed(1))
    x.requires_grad_()

    def step(parameter: Tensor, product: Callable[[], Tensor]) -> Callable[[], object]:
        adam = torch.optim.Adam([parameter], lr=1e-6, fused=True)

        def call() -> None:
            x.grad = None
            adam.zero_grad()
            product().backward(grad)
            adam.step()

        return call

    full, values = dense.requires_grad_(), weight.values.detach().requires_grad_()
    stored = BlockSparse(values, weight.crow, weight.col, weight.shape)
    us = side_by_side(
        {
            "ours": step(values, lambda: ops.block_sparse_linear(x, stored)),
            "dense": step(full, lambda: F.linear(x, full)),
        },
        threads,
        rounds=7,
    )
    names = {"M": M, "N": N, "K": K, "block": f"{block[0]}x{block[1]}", "sparsity": sparsity}
    numbers = stored.values.numel()
    # Weights: read three times, Adam's two moments and the weight itself read and written.
    least = roof.us(6 * M * numbers, 4 * (9 * numbers + 3 * M * (N + K)))
    shares = {"speedup": us["dense"] / us["ours"], "of_roof": least / us["ours"]}
    return {**names, **us, **shares}


def main(words: Sequence[str] | None = None) -> None:
    """Prints a machine line, tables in microseconds and lines of JSON."""
    options = options_of(str(__doc__), words, "all shapes, blocks and peers, 6 minutes")
    threads, roof, full = options.threads, measure_roof(options.threads), options.full

    def line(
        M: int, shape: tuple[int, int], block: tuple[int, int], sparsity: float, **more: Any
    ) -> dict[str, Any]:
        return forward(M, *shape, block, sparsity, threads=threads, roof=roof, **more)

    with_peers = {"beside": full, "compiled": full}
    rows = [
        line(M, shape, block, sparsity, **(with_peers if shape == SQUARE else {}))
        for shape in ((*SHAPES, *SMALL) if full else (SQUARE,))
        for block in (*BLOCKS, *(TALL if full and shape == SQUARE else ()))
        for sparsity in SPARSITIES
        for M in ROWS
    ]
    rows += [line(M, SQUARE, (16, 4), sparsity) for sparsity in FULLER for M in ROWS]
    report("block_sparse_linear", threads, roof, rows, options.save)
    single = [
        line(M, SQUARE, (1, 1), sparsity, beside=True, compiled=full)
        for sparsity in SPARSITIES
        for M in ROWS
    ]
    report("block_sparse_linear of single weights", threads, roof, single, options.save)
    panels = [line(M, SQUARE, (16, SQUARE[1]), 0.0) for M in (1, 2, 4, 8, 16, 32, 64, 512)]
    if full:
        panels += [line(M, shape, (16, shape[1]), 0.0) for shape in SHAPES[1:] for M in ROWS]
    report("block_sparse_linear of dense weights", threads, roof, panels, options.save)
    narrow = [
        line(M, shape, (16, shape[1] if sparsity == 0 else 4), sparsity, dtype=torch.bfloat16)
        for shape in ((SQUARE, (4096, 4096)) if full else (SQUARE,))
        for sparsity in (0.0, 0.75)
        for M in (1, 8, 64)
    ]
    report("block_sparse_linear of bfloat16 weights", threads, roof, narrow, options.save)
    both = [
        gradients(M, block, sparsity, threads=threads, roof=roof)
        for block in BLOCKS[1:]
        for sparsity in (SPARSITIES if full else (0.75, 0.9))
        for M in (64, 512)
    ]
    report("block_sparse_linear gradients", threads, roof, both, options.save)
    M, N, K = (2048, 2048, 2048) if full else (512, 1024, 1024)
    steps = [training_step(M, N, K, block, 0.9, threads=threads, roof=roof) for block in BLOCKS[1:]]
    report("block_sparse_linear training step", threads, roof, steps, options.save)


if __name__ == "__main__":
    main()
