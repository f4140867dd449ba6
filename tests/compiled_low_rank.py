"""Compiles the Triton low-rank linear for GPUs and prints a line of JSON for each kernel.

A program of its own: what was imported for the interpreter cannot be compiled.
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from prunelm.triton_kernels import low_rank_linear as low_rank

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
K = N = 4096
OPTIONS = {"HAS_BIAS": True, "ACTIVATION": "gelu", "PRECISION": "ieee"}
PLAIN = {**OPTIONS, "HAS_BIAS": False, "ACTIVATION": "none"}
COUNTED = {
    "wgmma": r"wgmma\.mma_async",
    "mma": r"\bmma\.sync",
    "tcgen05": r"tcgen05\.mma",
    "copies": r"cp\.async\.cg",
}


def compile_kernel(
    label: str,
    kernel: Any,
    capability: int,
    constants: dict[str, Any],
    pointers: dict[str, str],
    **options: int,
) -> None:
    names = kernel.arg_names
    types = {name: "constexpr" if name in constants else "i32" for name in names} | pointers
    source = ASTSource(
        kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        # Without these, loads go one by one and nothing is copied asynchronously. M is any number.
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if types[name] != "constexpr" and name != "M"
        },
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(STACK|LOCAL|REG):(\d+)", usage)}
    counts = {name: len(re.findall(p, compiled.asm["ptx"])) for name, p in COUNTED.items()}
    shared = compiled.metadata.shared
    print(json.dumps({"label": label, "sm": capability, "shared": shared, **found, **counts}))


def compile_pair(capability: int, M: int, R: int) -> None:
    parts = min(low_rank.PARTS_PER_RANK // R, 8) if M <= 256 else 1
    swapped = M < 64
    tiles = low_rank.tiles(M, K, R, N, parts, 2, low_rank.Device())
    z = "*fp32" if parts > 1 else "*bf16"
    bf16 = dict.fromkeys(("p_left", "p_right", "p_bias", "p_out"), "*bf16")
    middle = "p_right" if swapped else "p_left"
    for label, tile, pointers, constants in (
        ("down", tiles[0], {"p_out": z}, {**PLAIN, "PARTS": parts, "PARTS_IN": 1}),
        ("up", tiles[1], {middle: z}, {**OPTIONS, "PARTS": 1, "PARTS_IN": parts}),
    ):
        constants |= {"ROWS": tile.rows, "COLS": tile.cols, "DEPTH": tile.depth}
        constants |= {"SWAPPED": swapped, "PARTS_OUT": label == "down" and parts > 1}
        if M == 1:
            constants["Q"] = 1  # Triton makes a constant of every 1
        compile_kernel(
            f"{label} M={M} R={R}", low_rank._product, capability, constants, bf16 | pointers,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


for capability in (80, 90, 100):
    compile_pair(capability, 1, 256)
    if capability == 90:
        compile_pair(capability, 33, 64)
        compile_pair(capability, 64, 256)
    compile_pair(capability, 4096, 256)
    constants = low_rank.fused_tile(256) | OPTIONS | {"PARTS": 2}
    warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
    pointers = dict.fromkeys(("p_x", "p_down", "p_up", "p_bias", "p_y"), "*bf16")
    compile_kernel(
        "fused M=16384 R=256", low_rank._fused, capability, constants, pointers,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
