"""Every method to the same sizes, at once and in rounds, on the novels.

    python recipes/novels/study.py --data runs/novels --out runs/novels/study

Stopped and started again, it goes on; `prunelm report --folder runs/novels/study` shows it.
"""

import argparse
from pathlib import Path

import torch

from prunelm import (
    Blocks,
    Elements,
    Finetune,
    Heads,
    Incremental,
    LowRank,
    Neurons,
    OneShot,
    Taylor,
)
from prunelm.study.demo import run_study
from prunelm.study.grid import Grid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--targets", nargs="+", default=["50%", "25%"])
    parser.add_argument("--steps", type=int, default=300, help="of recovery for each size")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    grid = Grid(
        methods={
            "Elements": Elements(),
            "Blocks 16x4": Blocks(16, 4),
            "Heads | Neurons": Heads() | Neurons(multiple_of=8),
            "LowRank": LowRank(multiple_of=8),
        },
        targets=tuple(options.targets),
        criteria=(Taylor(),),
        schedules=(OneShot(), Incremental(rounds=4)),
        recovery=Finetune(steps=options.steps, distill=0.5),
        ladder=False,
    )
    run_study(options.out, grid, title="Novels", data=options.data)


if __name__ == "__main__":
    main()
