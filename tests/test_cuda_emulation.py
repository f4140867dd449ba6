"""The emulated CUDA does what CUDA's guide says; the checkers built on it find planted faults."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_emulation.emulated import CHECKERS, FOLDER, SOURCES, checked, compile_files, has_memcheck

Run = Callable[..., np.ndarray]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """run(name, values, out): a kernel of primitives.cu."""
    path = tmp_path_factory.mktemp("primitives") / "primitives.so"
    compile_files([FOLDER / "primitives.cu"], path, "-shared", "-fPIC", *CHECKERS["fibers"])
    library = ctypes.CDLL(str(path))
    library.primitive.restype = ctypes.c_char_p

    def call(
        name: str,
        values: np.ndarray,  # one for each thread of a block
        out: np.ndarray,
        *,
        grid: tuple[int, int, int] = (1, 1, 1),
        rows: int = 1,
        numbers: tuple[int, int] = (0, 0),
    ) -> np.ndarray:
        values = np.ascontiguousarray(values, np.int64)
        sizes = (ctypes.c_int32 * 5)(*grid, len(values) // rows, rows)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (values, out)]
        error = library.primitive(name.encode(), *pointers, *map(ctypes.c_int64, numbers), sizes)
        assert error is None, error
        return out

    return call


def unwritten(*shape: int) -> np.ndarray:
    return np.full(shape, -77, np.int64)


@pytest.mark.parametrize("width", [32, 16, 4])
@pytest.mark.parametrize("by", [0, 1, 5, 17])
def test_shuffles(run: Run, by: int, width: int) -> None:
    value = np.random.default_rng(0).integers(-1000, 1000, 32)
    got = run("shuffle", value, unwritten(32, 4), numbers=(by, width))
    lane = np.arange(32)
    first, last = lane // width * width, lane // width * width + width - 1
    xor = lane ^ by
    sources = (
        first + (lane + by) % width,
        np.where(lane - by >= first, lane - by, lane),
        np.where(lane + by <= last, lane + by, lane),
        np.where(xor <= last, xor, lane),
    )
    for column, source in enumerate(sources):
        assert got[:, column].tolist() == value[source].tolist()


def test_halves_of_a_warp_go_their_own_ways(run: Run) -> None:
    value = np.arange(100, 132)
    expected = np.r_[np.full(16, value[:16].sum()), value[16:] - value[31]]
    assert run("halves", value, unwritten(32)).tolist() == expected.tolist()


@pytest.mark.parametrize("threads", [32, 45, 3])
def test_votes_of_broken_warps_and_without_those_who_returned(run: Run, threads: int) -> None:
    value = np.random.default_rng(1).integers(-1, 3, threads)
    got = run("votes", value, unwritten(threads, 4))
    for i in range(threads):
        lanes = [j for j in range(i // 32 * 32, min(i // 32 * 32 + 32, threads)) if j % 3]
        positive = [j for j in lanes if value[j] > 0]
        same = [j for j in lanes if value[j] == value[i]]
        expected = [
            sum(1 << j % 32 for j in positive),
            bool(positive),
            positive == lanes,
            sum(1 << j % 32 for j in same),
        ]
        assert got[i].tolist() == (expected if i % 3 else [-77] * 4)


def test_reductions(run: Run) -> None:
    value = np.random.default_rng(2).integers(-(2**31), 2**31, 32)
    got = run("reductions", value, unwritten(32, 8))
    for lanes in (range(8), range(8, 32)):
        signed, bits = value[lanes], value[lanes] % 2**32
        expected = [
            (signed.sum() + 2**31) % 2**32 - 2**31,
            *(signed.min(), signed.max(), bits.min(), bits.max()),
            *(op.reduce(bits) for op in (np.bitwise_and, np.bitwise_or, np.bitwise_xor)),
        ]
        assert got[lanes].tolist() == [expected] * len(lanes)


@pytest.mark.parametrize("votes", ["none", "some", "all"])
def test_votes_of_a_block(run: Run, votes: str) -> None:
    value = {"none": np.zeros(70), "some": np.arange(70) % 4, "all": np.full(70, 9)}[votes]
    got = run("block_votes", value, unwritten(70, 4))
    stay = np.arange(70) != 5
    yes = int((value[stay] != 0).sum())
    assert got[stay].tolist() == [[yes, yes > 0, yes == 69, 69 - yes]] * 69
    assert (got[5] == -77).all()


def test_atomic_operations(run: Run) -> None:
    value = np.random.default_rng(3).integers(-50, 50, 30)
    out = np.zeros(8, np.int64)
    out[4] = -1
    run("atomics", value, out, grid=(3, 1, 1))
    inc = 0
    for _ in range(3 * 30):
        inc = 0 if inc >= 6 else inc + 1
    low = out.view(np.int32)[::2]
    assert out[:2].tolist() == [3 * value.sum(), max(value.max(), 0)]
    assert low[2] == min(value.min(), 0) and out.view(np.uint32)[6] == 2**30 - 1
    assert out.view(np.uint32)[8] == 2**32 - 2**30 and low[5] == inc and low[7] in range(3)
    assert out[6:7].view(np.float32)[0] == 3 * value.sum()


def test_every_block_finds_poison_in_shared_memory(run: Run) -> None:
    got = run("shared_memory", np.zeros(32), unwritten(3 * 32, 4), grid=(3, 1, 1))
    assert (got[:, :2] == -1).all()
    expected = np.arange(96).reshape(3, 32)[:, ::-1].ravel()
    assert (got[:, 2:] == expected[:, None]).all()


def test_indices_of_grid_and_block(run: Run) -> None:
    got = run("indices", np.zeros(12), unwritten(2, 3, 2, 12), grid=(2, 3, 2), rows=3)
    for z, y, x, thread in np.ndindex(2, 3, 2, 12):
        assert got[z, y, x, thread] == z * 10_000 + y * 1000 + x * 100 + thread


def test_numbers(run: Run) -> None:
    value = np.r_[np.random.default_rng(4).integers(1, 2000, 31), 0]
    got = run("numbers", value, unwritten(32, 8))
    words = value.view(np.int32)
    for i, x in enumerate(value.tolist()):
        bits = f"{x:032b}"
        half = float(np.float16(x))
        wide = float(torch.tensor(float(x)).bfloat16())
        expected = [bits.count("1"), 32 if x == 0 else bits.index("1")]
        expected += [0 if x == 0 else 32 - bits.rindex("1"), int(bits[::-1], 2), half, wide]
        expected += [0x40003C00, words[i // 2 * 4 + 2 * (i % 2)]]
        assert got[i].tolist() == expected


def test_the_last_block_sees_what_all_have_written(run: Run) -> None:
    value, out = np.arange(20), np.zeros(1 + 4 * 20, np.int64)
    assert run("last_block", value, out, grid=(4, 1, 1))[0] == 4 * value.sum() + 20 * (
        0 + 1 + 2 + 3
    )


def test_names_and_types_are_those_of_cuda(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc was not found")
    for name in ("primitives", "faults"):
        command = [nvcc, "-c", "-std=c++20", "-arch=sm_80", f"-I{SOURCES}", "-Xcompiler", "-Wall"]
        command += ["-diag-suppress=177", str(FOLDER / f"{name}.cu"), "-o", str(tmp_path / "o")]
        subprocess.run(command, check=True)


RACE, NAN = "data race", "an element is NaN"
ADDRESS = "AddressSanitizer: heap-buffer-overflow"
FAULTS = {
    "no_barrier": {"thread": RACE, "fibers": NAN},
    "no_barrier_behind": {"thread": RACE},
    "shuffle_for_barrier": {"thread": RACE},
    "too_few_lanes": {"thread": RACE, "fibers": NAN},
    "no_fence": {"thread": RACE},
    "read_past_input": {"address": ADDRESS, "memcheck": "Invalid read"},
    "write_past_output": {"address": ADDRESS, "memcheck": "Invalid write"},
    "read_past_dynamic": {"address": ADDRESS, "memcheck": "Invalid read"},
    "write_past_static": {"address": "index 64 out of bounds"},
    "unwritten_static": {"fibers": NAN, "memcheck": "uninitialised"},
    "unwritten_dynamic": {"fibers": NAN, "memcheck": "uninitialised"},
    "unwritten_integer": {"memcheck": "uninitialised"},
    "unwritten_output": {"fibers": NAN},
    "copy_not_waited_for": {"fibers": NAN, "thread": NAN},
    "misaligned": {"fibers": "a misaligned address", "address": "misaligned address"},
    "stuck": {"fibers": "a barrier that only some threads reach"},
    "own_lane_missing": {"fibers": "a warp mask without the lane that names it"},
    "two_masks": {"fibers": "lanes that wait for each other with different masks"},
    "static_in_cluster": {"fibers": "a static __shared__ array in a cluster"},
    "too_many_threads": {"fibers": "a block of no or too many threads"},
    "too_much_shared": {"fibers": "more shared memory than a thread block of this device can have"},
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """faults.cu, built for each checker that is here."""
    folder = tmp_path_factory.mktemp("faults")
    here = [checker for checker in CHECKERS if checker != "memcheck" or has_memcheck()]
    for checker in here:
        compile_files([FOLDER / "faults.cu"], folder / checker, *CHECKERS[checker])
    return {checker: folder / checker for checker in here}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_and_nothing_where_there_is_none(
    programs: dict[str, Path], name: str
) -> None:
    for checker, words in FAULTS[name].items():
        if checker in programs:
            assert words in checked(programs[checker], checker, name, "1")
            assert checked(programs[checker], checker, name, "0") == ""
