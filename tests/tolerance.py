"""How wrong a result may be."""

import torch
from torch import Tensor


def assert_as_accurate(got: Tensor, dense: Tensor, exact: Tensor) -> None:
    """The largest error against float64 is at most twice that of torch's dense op.

    Args:
        got: the result.
        dense: torch's dense op, same inputs and dtype.
        exact: the same in float64. One rounding of its largest value is allowed beside, since dense
            may be exact by chance; 30 roundings for float64, where dense and exact are the same.
    """
    assert got.dtype == dense.dtype and got.shape == exact.shape
    if got.numel() == 0:
        return
    error = (got.double() - exact).abs().max()
    allowed = 2 * (dense.double() - exact).abs().max()
    roundings = 30 if got.dtype == torch.float64 else 1
    allowed += roundings * torch.finfo(got.dtype).eps * exact.abs().max()
    assert error <= allowed, f"error {float(error):.3g}, allowed {float(allowed):.3g}"
