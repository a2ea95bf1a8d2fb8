"""Resizing of maps: schema, checks, gradient, and the public function."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyvision_kernels import _pooling
from pyvision_kernels._backend import CHOICE
from pyvision_kernels._check import require, require_tensors
from pyvision_kernels.ops.avg_pool2d import adaptive_avg_pool2d

# The numbers of the filters in csrc/ops/interpolate/interpolate.h.
NEAREST, NEAREST_EXACT, LINEAR, CUBIC, LINEAR_ANTIALIAS, CUBIC_ANTIALIAS = range(6)
_FILTERS = {
    (3, "nearest", False): NEAREST,
    (4, "nearest", False): NEAREST,
    (3, "nearest-exact", False): NEAREST_EXACT,
    (4, "nearest-exact", False): NEAREST_EXACT,
    (3, "linear", False): LINEAR,
    (4, "bilinear", False): LINEAR,
    (4, "bilinear", True): LINEAR_ANTIALIAS,
    (4, "bicubic", False): CUBIC,
    (4, "bicubic", True): CUBIC_ANTIALIAS,
}
_CHOICES = ("nearest", "nearest-exact", "area")  # modes without align_corners


interpolate_op, interpolate_backward_op = _pooling.declare_linear(
    "interpolate", "filters", "bool align_corners, float row_factor, float column_factor"
)


def _filter_of(rank: int, mode: str, antialias: bool) -> int:
    number = _FILTERS.get((rank, mode, bool(antialias)))
    if number is None:
        wanted = f"mode to be one of an input with {rank} dimensions, with antialias={bool(antialias)}"
        have = ", ".join(name for dims, name, smooth in _FILTERS if dims == rank and smooth == bool(antialias))
        raise NotImplementedError(f"interpolate: expected {wanted} ({have or 'none'}), but got {mode!r}")
    return number


def _per_axis(argument: str, value: Any, rank: int, one: type) -> list[Any]:
    if isinstance(value, str | bool):
        raise TypeError(f"interpolate: expected {argument} to be made of numbers, but got {value!r}")
    if type(value) is int or type(value) is one:
        return [value] * (rank - 2)
    items = list(value) if isinstance(value, list | tuple) else [value] * (rank - 2)
    if len(items) != rank - 2:
        raise ValueError(f"interpolate: expected {argument} to have {rank - 2} numbers or to be one, but got {value}")
    numbers = (int, torch.SymInt) if one is int else (int, float, torch.SymInt, torch.SymFloat)
    for i, item in enumerate(items):
        if not isinstance(item, numbers):
            try:  # of numpy, or a tensor with one element
                items[i] = item.__index__() if one is int else float(item)
            except (AttributeError, TypeError, ValueError):
                what = "ints" if one is int else "numbers"
                raise TypeError(f"interpolate: expected {argument} to be made of {what}, but got {value}") from None
    return items


def _sizes(
    input: Tensor, size: Any, scale_factor: Any, recompute_scale_factor: bool | None
) -> tuple[list[Any], list[float]]:
    """Of each axis: how many outputs, and the scale factor that the indices are computed with; 0: that of the sizes."""
    rank = input.dim()
    if (size is None) == (scale_factor is None):
        given = f"size={size}, scale_factor={scale_factor}"
        raise ValueError(f"interpolate: expected one of size and scale_factor, but got {given}")
    if size is not None:
        if recompute_scale_factor:
            raise ValueError(
                f"interpolate: expected recompute_scale_factor to go with a scale_factor, but got size={size}"
            )
        return _per_axis("size", size, rank, int), [0.0] * (rank - 2)
    factors = _per_axis("scale_factor", scale_factor, rank, float)
    for factor in factors:
        if isinstance(factor, float) and not math.isfinite(factor):
            raise ValueError(f"interpolate: expected scale_factor to be finite, but got {scale_factor}")
    whole = int if type(input.shape[-1]) is int else torch.sym_int
    outputs = [whole(length * factor) for length, factor in zip(input.shape[2:], factors, strict=True)]
    return outputs, [0.0 if recompute_scale_factor else max(float(factor), 0.0) for factor in factors]


_FEW = 8  # channels: with fewer ours run along rows in channels_last too
_CACHED = 16 << 20  # bytes of a result that stay in a cache
_SMALL = 4096  # elements of a result that the call itself takes longer than


def _is_for_torch(input: Tensor, filter: int, outputs: list[Any], factors: list[float]) -> bool:
    """Whether PyTorch's kernels run: `pvk.backend` says so, or with "auto" where they were measured faster.

    On the CPU PyTorch's are vectorised for the nearest pixel and for linear interpolation in channels_last. Where its
    two formulas for the nearest pixel differ, ours run whatever the size, so that a batch does not choose the pixels.
    """
    if CHOICE.backend != "auto":
        return CHOICE.backend == "torch"
    if input.is_cuda:  # ours are not yet measured there; they are deterministic
        return not torch.are_deterministic_algorithms_enabled()
    if filter not in (NEAREST, NEAREST_EXACT, LINEAR) or torch.compiler.is_compiling():  # no guard on sizes
        return False
    if filter == NEAREST:
        for length, output, factor in zip(input.shape[2:], outputs, factors, strict=True):
            if factor > 0 and output in (length, 2 * length) and factor * length != output:
                return False
    elements = input.shape[0] * input.shape[1] * math.prod(outputs)
    if input.dim() == 4 and input.shape[1] >= _FEW and _pooling.is_channels_last(input):
        return elements * input.element_size() < _CACHED
    return elements < _SMALL


def interpolate(
    input: Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor:
    """Resizes maps, or rows, by the nearest pixel, or by linear or cubic interpolation of their neighbours.

    Matches `torch.nn.functional.interpolate`, its indices computed as there. Sums are in float32 for 16-bit types, and
    rounded once.

    Args:
        input (Tensor[N, C, H, W] or [N, C, L]): float16, bfloat16, float32 or float64; any strides.
        size (int or ints): Rows and columns of the result.
        scale_factor (float or floats): Or what those of the input are multiplied by.
        mode (str): ``"nearest"``, ``"nearest-exact"``, ``"area"`` (an adaptive average); ``"bilinear"``, ``"bicubic"``
            of maps; ``"linear"`` of rows. Default: ``"nearest"``.
        align_corners (bool): The centres of the corner pixels lie on each other, instead of their corners; of the
            linear and cubic modes.
        recompute_scale_factor (bool): Indices follow from the sizes instead of from ``scale_factor``.
        antialias (bool): Where a map shrinks the filter grows with the distance of its outputs; of ``"bilinear"`` and
            ``"bicubic"``.

    Returns:
        Tensor[N, C, OH, OW] or [N, C, OL] in input's dtype and layout.

    Raises:
        RuntimeError: a dimension but the batch is empty, in the input or in the result.
        ValueError: not one of ``size`` and ``scale_factor``; options that do not go together.
        NotImplementedError: ``input`` is of another dtype or rank, or the mode is not one of its rank.
        TypeError: an argument is not a Tensor or not made of numbers.

    Note: deterministic forward and backward.
    Reference: torch.nn.functional.interpolate.
    """
    op = "interpolate"
    require_tensors(op, input=input)
    rank = input.dim()
    if rank not in (3, 4):
        raise NotImplementedError(
            f"{op}: expected input to have 4 dimensions [N, C, H, W] or 3 [N, C, L], but got {list(input.shape)}"
        )
    if align_corners is not None and not isinstance(align_corners, bool):
        raise TypeError(f"{op}: expected align_corners to be a bool or None, but got {align_corners!r}")
    if mode in _CHOICES and align_corners is not None:
        raise ValueError(f"{op}: expected align_corners to be None with mode {mode!r}, but got {align_corners}")
    _pooling.check_dtype(op, input)
    outputs, factors = _sizes(input, size, scale_factor, recompute_scale_factor)
    for length in (*input.shape[1:], *outputs):
        if not 0 < length < 2**31:
            given = f"an input of {list(input.shape)} and a result of {outputs}"
            require(False, op, f"sizes to be {'less than 2^31' if length > 0 else 'greater than 0'}", given)
    if mode == "area" and not antialias:
        if rank == 4:
            return adaptive_avg_pool2d(input, outputs)
        return adaptive_avg_pool2d(input.unsqueeze(-2), [1, *outputs]).squeeze(-2)
    filter = _filter_of(rank, mode, antialias)
    if _is_for_torch(input, filter, outputs, factors):
        return F.interpolate(input, size, scale_factor, mode, align_corners, recompute_scale_factor, antialias)
    if rank == 4:
        return interpolate_op(input, [filter, filter], *outputs, bool(align_corners), *factors)
    maps = input.unsqueeze(-2)
    return interpolate_op(maps, [NEAREST, filter], 1, *outputs, bool(align_corners), 0.0, *factors).squeeze(-2)
