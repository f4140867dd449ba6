"""Calls of the CPU kernels past torch's dispatcher, which takes as long as the smallest products.

Only without gradients, where nothing but the numbers is asked of a call, and only where nobody
listens in: no autocast, no compiling or tracing, no mode or transform that would see the op. What
is not as the kernels read it goes through the dispatcher too, which copies it or says what is
wrong.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

import prunelm._C
from prunelm.sparse import INT32_MAX, BlockSparse

# As in number.h.
NUMBERS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

_plain = frozenset((Tensor, Parameter))
_gradients = torch.is_grad_enabled
_autocast = torch._C._is_any_autocast_enabled
_compiling = torch.compiler.is_compiling
_tracing = torch._C._is_tracing
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_profiling = torch._C._autograd._profiler_enabled
_transform = torch._C._functorch.peek_interpreter_stack


class Layout:
    """What has been read off a weight's tensors, which must be the ones that it still has.

    It keeps their memory alive: where the addresses are the same, so is what lies there. A copy of
    a weight reads its own tensors.

    Attributes:
        dtype, strides: of the values.
        addresses: of values, crow and col.
        sizes: number, nnz, N, K, bn, bk.
    """

    def __init__(self, weight: BlockSparse) -> None:
        """Raises ValueError where a kernel cannot read the tensors as they are."""
        values, crow, col = weight.values, weight.crow, weight.col
        number = NUMBERS.get(values.dtype)
        if number is None or (values.dim(), crow.dim(), col.dim()) != (3, 1, 1):
            raise ValueError("weight: expected [nnz, bn, bk] and two lists")
        (N, K), (nnz, bn, bk) = weight.shape, values.shape
        rows, columns = (-(-N // bn), -(-K // bk)) if bn and bk else (-1, -1)
        good = (
            0 <= rows <= INT32_MAX
            and 0 <= columns <= INT32_MAX
            and nnz <= INT32_MAX
            and crow.shape == (rows + 1,)
            and col.shape == (nnz,)
            and crow.dtype == col.dtype == torch.int32
            and values.transpose(1, 2).is_contiguous()
            and crow.is_contiguous()
            and col.is_contiguous()
            and all(type(t) in _plain and t.is_cpu for t in (values, crow, col))
        )
        if not good:
            raise ValueError("weight: expected a plain one, laid out for the kernels")
        self.dtype, self.strides = values.dtype, values.stride()
        self.sizes = (number, nnz, N, K, bn, bk)
        self._alive = (values.detach(), crow.detach(), col.detach())
        self.addresses = (values.data_ptr(), crow.data_ptr(), col.data_ptr())

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


def block_sparse_linear(
    x: Tensor, weight: BlockSparse, bias: Tensor | None, activation: int
) -> Tensor | None:
    """The op's result, or None where it must go through the dispatcher."""
    # Compilers come first: they follow no other question. The weight is looked at last: under a
    # transform it may have no memory.
    if _compiling() or _gradients() or not _unwatched(x) or (found := _layout(weight)) is None:
        return None
    sizes, dtype = found.sizes, x.dtype
    number, _, N, K, _, _ = sizes
    rows, added = _rows(x, K, number), _bias(bias, N, dtype, found.dtype)
    if not rows or not N or added is None:
        return None
    y = x.new_empty((rows, N) if x.dim() == 2 else (*x.shape[:-1], N))
    prunelm._C.block_sparse_linear(
        x.data_ptr(), NUMBERS[dtype], rows, *found.addresses, *sizes, *added, activation,
        y.data_ptr(),
    )  # fmt: skip
    return y


def low_rank_linear(
    x: Tensor, down: BlockSparse, up: BlockSparse, bias: Tensor | None, activation: int
) -> Tensor | None:
    """The op's result from factors in blocks, or None where it must go through the dispatcher."""
    if _compiling() or _gradients() or not _unwatched(x):
        return None
    thin, wide = _layout(down), _layout(up)
    if thin is None or wide is None or thin.dtype is not wide.dtype:
        return None
    (number, _, R, K, _, _), (_, up_nnz, N, inner, bn, bk) = thin.sizes, wide.sizes
    rows, added = _rows(x, K, number), _bias(bias, N, x.dtype, thin.dtype)
    if not rows or not N or inner != R or added is None:
        return None
    y = x.new_empty((rows, N) if x.dim() == 2 else (*x.shape[:-1], N))
    prunelm._C.low_rank_linear(
        x.data_ptr(), NUMBERS[x.dtype], rows, *thin.addresses, *thin.sizes,
        *wide.addresses, up_nnz, N, bn, bk, *added, activation, y.data_ptr(),
    )  # fmt: skip
    return y


def _unwatched(x: Tensor) -> bool:
    """Whether a call on x may go past the dispatcher; a transform's x answers no other question."""
    return (
        _transform() is None
        and forward_ad._current_level < 0
        and not _autocast()
        and not _dispatch_modes()
        and not _function_modes()
        and not _tracing()
        and not _profiling()
        and type(x) in _plain
        and x.is_cpu
        and x.layout is torch.strided
        and x.is_contiguous()
        and not x.is_neg()
        and x.data_ptr() != 0
    )


def _layout(weight: BlockSparse) -> Layout | None:
    """The weight's layout, read again where `.data` has been exchanged under it."""
    found: Layout | None = weight.__dict__.get("layout")
    if found is not None:
        values, crow, col = found.addresses
        if (
            weight.values.data_ptr() == values
            and weight.crow.data_ptr() == crow
            and weight.col.data_ptr() == col
            and weight.values.dtype is found.dtype
            and weight.values.stride() == found.strides
        ):
            return found
    try:
        found = Layout(weight)
    except ValueError:
        return None
    # Past the dataclass, which is frozen: a reading of its fields, not one of them.
    weight.__dict__["layout"] = found
    return found


def _rows(x: Tensor, K: int, weight_number: int) -> int:
    """M; 0 where there is nothing to compute, or what must be refused."""
    if not K or not x.dim() or x.size(-1) != K:
        return 0
    number = NUMBERS.get(x.dtype, -1)
    if number != weight_number and (number != 0 or weight_number < 2):
        return 0
    return x.numel() // K


def _bias(
    bias: Tensor | None, N: int, dtype: torch.dtype, weight_dtype: torch.dtype
) -> tuple[int, int] | None:
    """Address and number; None where it must be refused or copied."""
    if bias is None:
        return 0, 0
    own = bias.dtype
    fits = (
        (own is dtype or own is weight_dtype)
        and type(bias) in _plain
        and bias.is_cpu
        and bias.numel() == N
        and bias.dim() == 1
        and bias.is_contiguous()
    )
    return (bias.data_ptr(), NUMBERS[own]) if fits else None
