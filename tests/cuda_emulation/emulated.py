"""Builds the CUDA kernels for the CPU and calls them on CPU tensors."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

FOLDER = Path(__file__).parent
SOURCES = FOLDER.parent.parent / "csrc"
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
ACTIVATIONS = (None, "relu", "gelu", "silu")
PRUNE = ("late", "early", "after")


# How a program of kernels is built and run for each of its checkers; all but "fibers" and
# "memcheck" give every CUDA thread a thread of its own.
THREADS = ("-O0", "-g", "-DCUDA_EMULATION_THREADS")
CHECKERS = {
    "fibers": ("-O1", "-fsanitize=alignment"),
    "thread": (*THREADS, "-fsanitize=thread"),
    "address": (*THREADS, "-fsanitize=address,undefined"),
    "memcheck": ("-O1", "-g", "-DCUDA_EMULATION_MEMCHECK"),
}


def compile_files(files: Sequence[Path], to: Path, *flags: str, sources: Path = SOURCES) -> None:
    """Compiles CUDA and C++ files for the CPU, two at a time, and links them."""
    with TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        objects = [f"{folder}/{file.name}.o" for file in files]
        include = f"-I{FOLDER}", f"-I{sources}"
        # Each library keeps its own threads: unique symbols would be shared by all that are loaded.
        command = ["g++", "-std=c++20", "-fno-gnu-unique", "-pthread", *include, *flags]

        def compile_object(file: Path, out: str) -> None:
            subprocess.run([*command, "-c", "-x", "c++", str(file), "-o", out], check=True)

        list(pool.map(compile_object, files, objects))
        subprocess.run([*command, *objects, "-o", str(to)], check=True)


def compile_kernels(
    main: str, to: Path, *flags: str, sources: Path = SOURCES, op: str = "*"
) -> None:
    """Compiles an op's .cu of `sources` (all by default), and `main` of this folder."""
    files = [*sorted(sources.glob(f"cuda/{op}.cu")), FOLDER / main]
    compile_files(files, to, *flags, sources=sources)


def has_memcheck() -> bool:
    """valgrind with its headers."""
    return bool(shutil.which("valgrind")) and Path("/usr/include/valgrind/memcheck.h").exists()


def checked(program: Path, checker: str, *words: str) -> str:
    """What a checker says of a program's run; empty if it is content."""
    command = [str(program), *words]
    if checker == "memcheck":
        command = ["valgrind", "-q", "--error-exitcode=1", *command]
    elif shutil.which("setarch"):
        command = ["setarch", "-R", *command]  # ThreadSanitizer wants the old layout of addresses
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    return result.stderr or ("" if result.returncode == 0 else f"exit {result.returncode}")


def _structure(name: str, pointers: str, numbers: str, more: str = "") -> type[ctypes.Structure]:
    fields = [(field, ctypes.c_void_p) for field in pointers.split()]
    fields += [(field, ctypes.c_int64) for field in numbers.split()]
    fields += [(field, ctypes.c_void_p) for field in more.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


# The structs of csrc/cuda/launch.h, field by field.
BlockSparseLinear = _structure(
    "BlockSparseLinear", "x values crow col bias y", "M K N bn bk", "cut workspace"
)
BlockSparseGradient = _structure(
    "BlockSparseGradient", "grad x values crow col out", "M K N bn bk nnz"
)
LowRankLinear = _structure("LowRankLinear", "x down up bias y workspace", "M K N R")

TreeAttention = _structure("TreeAttention", "qkv cos sin path length key value out", "R P H D C")


class BeamTerm(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("row", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("L", ctypes.c_int64),
        ("dtype", ctypes.c_int),
    )


class BeamStep(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("score", "am_logits", "slot", "token_reward")),
        ("terms", BeamTerm * 8),
        ("silent", ctypes.c_int64 * 8),
        ("term_count", ctypes.c_int32),
        ("silent_count", ctypes.c_int32),
        ("temperature", ctypes.c_double),
        ("blank_penalty", ctypes.c_double),
        ("prune", ctypes.c_int),
        ("weigh_blank", ctypes.c_bool),
        *((name, ctypes.c_int64) for name in "BWV"),
        *((name, ctypes.c_void_p) for name in ("new_score", "parent", "token", "parts", "bad")),
        ("workspace", ctypes.c_void_p),
        ("most_shared", ctypes.c_int64),
    )


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class Kernels:
    """The launchers of one build; each raises RuntimeError with the launcher's error text."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        for name, structure in (
            ("block_sparse_linear", BlockSparseLinear),
            ("block_sparse_linear_grad_x", BlockSparseGradient),
            ("block_sparse_linear_grad_values", BlockSparseGradient),
            ("low_rank_linear", LowRankLinear),
            ("tree_attention", TreeAttention),
            ("beam_step", BeamStep),
        ):
            getattr(self._library, name).restype = ctypes.c_char_p
            size = getattr(self._library, f"size_of_{name}")()
            assert size == ctypes.sizeof(structure), f"{name}: launch.h differs from this file"
        for op in ("block_sparse_linear", "low_rank_linear"):
            getattr(self._library, f"{op}_workspace").restype = ctypes.c_int64

    @contextmanager
    def device(
        self, capability: int = 90, multiprocessors: int = 132, largest_cluster: int = 16
    ) -> Iterator[None]:
        """Plays another device; by default it is 9.0 with 132 multiprocessors."""
        self._library.play(capability, multiprocessors, largest_cluster)
        try:
            yield
        finally:
            self._library.play(90, 132, 16)

    def launches(self) -> list[tuple[str, int, int, int, int]]:
        """Of each kernel and compute capability so far: mangled name, capability, and the most
        threads of a block, bytes of dynamic shared memory, blocks of a cluster."""
        self._library.launches.restype = ctypes.c_char_p
        lines = [line.split() for line in self._library.launches().decode().splitlines()]
        return [(name, *map(int, numbers)) for name, *numbers in lines]

    def _launch(self, name: str, op: ctypes.Structure, *codes: int) -> None:
        error = getattr(self._library, name)(ctypes.byref(op), *codes)
        if error is not None:
            raise RuntimeError(error.decode())

    def block_sparse_linear(
        self,
        x: Tensor,  # [M, K]
        values: Tensor,  # [nnz, bn, bk], bn fastest in memory
        crow: Tensor,
        col: Tensor,
        bias: Tensor | None,
        *,
        out_features: int,
        activation: str | None = None,
        cut: Tensor | None = None,
    ) -> Tensor:
        y = torch.empty(len(x), out_features, dtype=x.dtype)
        tensors = (x, values, crow, col, bias, y)
        sizes = (len(x), x.shape[1], out_features, values.shape[1], values.shape[2])
        op = BlockSparseLinear(*map(_pointer, tensors), *sizes, _pointer(cut), None)
        dtype = DTYPES.index(x.dtype)
        needed = self._library.block_sparse_linear_workspace(ctypes.byref(op), dtype)
        workspace = torch.empty(needed)
        if needed:
            op.workspace = workspace.data_ptr()
        self._launch("block_sparse_linear", op, dtype, ACTIVATIONS.index(activation))
        return y

    def block_sparse_linear_gradients(
        self, grad: Tensor, x: Tensor, values: Tensor, crow: Tensor, col: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gradients to x [M, K] and to values [nnz, bn, bk]."""
        nnz, bn, bk = values.shape
        grad_x, grad_values = torch.empty_like(x), x.new_empty(nnz, bk, bn)
        sizes = (*x.shape, grad.shape[1], bn, bk, nnz)
        for name, out in (("x", grad_x), ("values", grad_values)):
            tensors = (grad, x, values, crow, col, out)
            op = BlockSparseGradient(*map(_pointer, tensors), *sizes)
            self._launch(f"block_sparse_linear_grad_{name}", op)
        return grad_x, grad_values.transpose(1, 2)

    def low_rank_linear(
        self,
        x: Tensor,
        down: Tensor,
        up: Tensor,
        bias: Tensor | None,
        *,
        activation: str | None = None,
    ) -> Tensor:
        y = torch.empty(len(x), len(up), dtype=x.dtype)
        tensors = (x, down, up, bias, y)
        op = LowRankLinear(*map(_pointer, tensors), None, *x.shape, *up.shape)
        codes = DTYPES.index(x.dtype), ACTIVATIONS.index(activation)
        needed = self._library.low_rank_linear_workspace(ctypes.byref(op), codes[0])
        workspace = torch.empty(needed)
        if needed:
            op.workspace = workspace.data_ptr()
        self._launch("low_rank_linear", op, *codes)
        return y

    def tree_attention(
        self,
        qkv: Tensor,  # [R, 3, H, D]
        cos: Tensor,
        sin: Tensor,
        path: Tensor,
        length: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> Tensor:
        """Writes key and value."""
        (R, _, H, D), (_, P) = qkv.shape, path.shape
        out = qkv.new_empty(R, H, D)
        tensors = (qkv, cos, sin, path, length, key, value, out)
        op = TreeAttention(*map(_pointer, tensors), R, P, H, D, len(key))
        self._launch("tree_attention", op, DTYPES.index(qkv.dtype))
        return out

    def beam_step(
        self,
        score: Tensor,
        am_logits: Tensor,
        terms: Sequence[tuple[Tensor, Tensor, Tensor]] = (),
        *,
        slot: Tensor | None = None,
        silent: Sequence[int] = (0,),
        token_reward: Tensor | None = None,
        temperature: float = 1.0,
        blank_penalty: float = 0.0,
        prune: str = "late",
        weigh_blank: bool = False,
        most_shared: int = 96 * 1024,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        B, W, V = am_logits.shape
        out = (
            torch.empty_like(score),
            torch.empty(B, W, dtype=torch.int64),
            torch.empty(B, W, dtype=torch.int64),
            score.new_empty(B, W, 1 + len(terms)),
            torch.empty(B, dtype=torch.bool),
        )
        op = BeamStep()
        for name, tensor in zip(
            ("score", "am_logits", "slot", "token_reward"),
            (score, am_logits, slot, token_reward),
            strict=True,
        ):
            setattr(op, name, _pointer(tensor))
        for i, (rows, row, weight) in enumerate(terms):
            op.terms[i] = BeamTerm(
                *map(_pointer, (rows, row, weight)), len(rows), DTYPES.index(rows.dtype)
            )
        op.silent[: len(silent)] = silent
        op.term_count, op.silent_count = len(terms), len(silent)
        op.temperature, op.blank_penalty = temperature, blank_penalty
        op.prune, op.weigh_blank = PRUNE.index(prune), weigh_blank
        op.B, op.W, op.V = B, W, V
        for name, tensor in zip(("new_score", "parent", "token", "parts", "bad"), out, strict=True):
            setattr(op, name, _pointer(tensor))
        op.most_shared = most_shared
        codes = DTYPES.index(am_logits.dtype), DTYPES.index(score.dtype)
        workspace_bytes = self._library.beam_step_workspace_bytes
        workspace_bytes.restype = ctypes.c_int64
        workspace = torch.full((workspace_bytes(ctypes.byref(op), *codes),), 255, dtype=torch.uint8)
        op.workspace = _pointer(workspace)
        self._launch("beam_step", op, *codes)
        return out


def assert_accurate(y: Tensor, truth: Tensor, size: Tensor) -> None:
    """y [M, N] against float64; `size` [M, N] is what it sums over, all positive."""
    allowed = 4 * torch.finfo(y.dtype).eps * size + 1e-6
    error = (y.double() - truth).abs()
    assert bool((error <= allowed).all()), f"largest error {error.max()}"
