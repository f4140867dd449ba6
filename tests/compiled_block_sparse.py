"""Compiles the block-sparse Triton kernels for GPUs that need not be there; prints facts as JSON.

python compiled_block_sparse.py quick|all, in a process of its own: what was imported for the
interpreter cannot be compiled. Tiles are those that the launchers choose.
"""

import json
import re
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from prunelm.gpu_index import group_size
from prunelm.triton_kernels.block_sparse_gradient import gradient_group, gradient_kernel
from prunelm.triton_kernels.block_sparse_linear import product_kernel
from prunelm.triton_kernels.block_sparse_tiles import Device, gradient_tile, product_tile

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


@dataclass(frozen=True)
class Case:
    """A kernel as a launcher would compile it; M = 0 stands for the gradient to values."""

    capability: int
    block: tuple[int, int]
    M: int
    dtype: torch.dtype = torch.bfloat16
    transposed: bool = False
    even: bool = True
    tf32: bool = False

    def __str__(self) -> str:
        kind = "grad_values" if self.M == 0 else f"M={self.M}"
        flags = "".join(f" {n}" for n in ("transposed", "even", "tf32") if getattr(self, n))
        bn, bk = self.block
        return f"sm_{self.capability} {bn}x{bk} {kind} {str(self.dtype)[6:]}{flags}"


QUICK = [
    Case(80, (64, 64), 4096),
    Case(80, (16, 16), 16),
    Case(80, (64, 64), 0),
    Case(90, (16, 16), 4096),
    Case(90, (64, 64), 4096),
    Case(90, (128, 128), 4096, transposed=True),
    Case(90, (16, 16), 16),
    Case(90, (64, 64), 0),
    Case(90, (16, 16), 0, even=False),
    Case(90, (64, 64), 4096, torch.float32),
    Case(90, (64, 64), 4096, torch.float32, tf32=True),
    Case(100, (64, 64), 4096),
    Case(100, (64, 64), 0),
]
ALL = QUICK + [
    Case(capability, block, M, dtype, transposed, even, tf32)
    for capability in (90, 80, 100)
    for dtype, even, tf32, blocks in (
        (torch.bfloat16, True, False, ((16, 16), (32, 32), (64, 64), (128, 128), (16, 4))),
        (torch.float16, False, False, ((16, 16), (64, 64), (7, 3))),
        (torch.float32, True, False, ((16, 16), (128, 128))),
        (torch.float32, True, True, ((16, 16), (128, 128))),
    )
    for block in blocks
    for M, transposed in ((0, False), (1, False), (60, False), (4096, False), (4096, True))
]


def compiled(case: Case) -> Any:
    """The compiled kernel of a case."""
    torch.backends.cuda.matmul.fp32_precision = "tf32" if case.tf32 else "ieee"
    device = Device(case.capability // 10, 132)
    bn, bk = reversed(case.block) if case.transposed else case.block
    group = group_size(bn)
    constants: dict[str, Any] = {"bn": bn, "bk": bk, "PRECISION": "tf32" if case.tf32 else "ieee"}
    if case.M == 0:
        group = gradient_group(bn)
        tile = gradient_tile(case.dtype, group * bn, (bn, bk), device)
        kernel = gradient_kernel
        constants |= {"ROWS": tile.cols, "COLS": tile.rows, "DEPTH": tile.depth}
    else:
        tile = product_tile(case.dtype, case.M, 32, group * bn, (bn, bk), device)
        kernel = product_kernel
        constants |= {"TILE_M": tile.rows, "TILE_N": tile.cols, "DEPTH": tile.depth}
        constants |= {"SWAP": tile.swap, "TRANSPOSED": case.transposed}
        constants |= {"HAS_BIAS": True, "ACTIVATION": "gelu"}
    constants |= {"GROUP": group, "EVEN_K": case.even, "EVEN_N": case.even}
    indices = ("p_pointer", "p_column", "p_block", "p_order")
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.startswith("p_"):
            signature[name] = "*i32" if name in indices else TYPES[case.dtype]
        else:
            signature[name] = "i32"
    # As a call at sizes that 16 divides: without these attributes nothing is copied 16 bytes at a
    # time.
    whole = [n for n, kind in signature.items() if kind.startswith("*") or n in ("K", "N")]
    source = ASTSource(
        kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(n),): value for n, value in constants.items()},
        attrs={(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in whole},
    )
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return triton.compile(source, target=GPUTarget("cuda", case.capability, 32), options=options)


def facts(case: Case, folder: Path) -> dict[str, Any]:
    """What PTX, ptxas and the finished code say."""
    found = compiled(case)
    ptx, code = found.asm["ptx"], folder / "code.cubin"
    code.write_bytes(found.asm["cubin"])
    command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", str(code)]
    used = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", used)
    assert numbers, used
    return {
        **asdict(case),
        "dtype": str(case.dtype),
        "name": str(case),
        "registers": int(numbers[1]),
        "stack": int(numbers[2]),
        "local": int(numbers[3]) + len(re.findall(r"(?:ld|st)\.local", ptx)),
        "shared": found.metadata.shared,
        "serialised": case.capability == 90 and "wgmma" in ptx and serialised(ptx, folder),
        **{
            name: len(re.findall(pattern, ptx))
            for name, pattern in {
                "mma": r"\bmma\.sync",
                "wgmma": r"wgmma\.mma_async",
                "tcgen05": r"tcgen05\.mma",
                "copies": r"cp\.async\.(?:ca|cg)|cp\.async\.bulk",
                "wide": r"cp\.async\.cg",
                "loads": r"ld\.global",
            }.items()
        },
    }


def serialised(ptx: str, folder: Path) -> bool:
    """Whether ptxas made the matrix instructions wait for each other, as it only tells aloud."""
    text = folder / "code.ptx"
    text.write_text(ptx)
    for tool in sorted(TOOLS.glob("ptxas*"), reverse=True):  # the one that knows this PTX
        command = [str(tool), "-v", "-arch", "sm_90a", str(text), "-o", "/dev/null"]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode == 0:
            return "serialized" in result.stderr + result.stdout
    raise RuntimeError("no ptxas took the PTX")


if __name__ == "__main__":
    with TemporaryDirectory() as scratch:
        for one in QUICK if sys.argv[1] == "quick" else ALL:
            print(json.dumps(facts(one, Path(scratch))), flush=True)
