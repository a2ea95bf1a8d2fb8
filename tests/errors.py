"""The rule of docs/design.md for errors against float64, of tests that do not go by the cases of an op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def in_double(value: Any) -> Any:
    """A floating point tensor in float64, without its gradient; another value as it is."""
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().double() if floating else value


def relative_error(found: Tensor, exact: Tensor, largest: float = 0.0) -> float:
    """The largest difference relative to the largest value, or to `largest` where that is more. NaN must be alike."""
    assert torch.equal(found.isnan(), exact.isnan())
    if found.numel() == 0 or exact.isnan().any():
        return 0.0
    return ((found.double() - exact).abs().max() / exact.abs().max().clamp(min=max(largest, 1e-30))).item()


def assert_as_good(ours: Any, theirs: Any, exact: Any, what: object = None, largest: float = 0.0) -> None:
    """At most twice PyTorch's error and one unit (in float64, where that error is taken for none, eight); of integers
    none. `largest`: of what cancels in a sum. Tensors, or tuples of them."""
    if isinstance(ours, tuple):
        for results in zip(ours, theirs, exact, strict=True):
            assert_as_good(*results, what, largest)
        return
    assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device), what
    if not ours.is_floating_point():
        assert torch.equal(ours, theirs), what
        return
    units = 8 if ours.dtype == torch.float64 else 1
    allowed = 2 * relative_error(theirs, exact, largest) + units * torch.finfo(ours.dtype).eps
    error = relative_error(ours, exact, largest)
    assert error <= allowed, (what, error, allowed)
