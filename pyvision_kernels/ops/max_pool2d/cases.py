"""Cases of max_pool2d, max_pool1d, adaptive_max_pool2d and max_unpool2d: models' sizes, odd windows, NaN, ties."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch.nn import functional as F

from pyvision_kernels._case import Case, ErrorCase, Inputs, OpCases, error_case
from pyvision_kernels.ops import adaptive_max_pool2d, max_pool1d, max_pool2d, max_unpool2d
from pyvision_kernels.ops.max_pool2d import reference

NAN, INF = math.nan, math.inf


def _case(name: str, size: tuple[int, ...], kind: str = "normal", options: Any = None, **pooling: Any) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        return {"input": values(generator, size, kind), **pooling}

    return Case(name, make, **(options or {}))


def values(generator: torch.Generator, size: tuple[int, ...], kind: str) -> torch.Tensor:
    input = torch.randn(size, generator=generator, dtype=torch.float64)
    if kind == "ties":  # few values, so that many are equal; zeros of both signs
        return (input * 2).round()
    if kind == "hostile":
        kinds = torch.randint(0, 6, size, generator=generator)
        for number, value in enumerate((NAN, INF, -INF)):
            input = torch.where(kinds == number, value, input)
    return input


def _bench(name: str, size: tuple[int, ...], bench: str, **pooling: Any) -> Case:
    return _case(name, size, options={"bench": bench}, **pooling)


# What a 3 x 3 stem pools: ResNet's at 224, the detectors' at 800 x 1333.
STEM: dict[str, Any] = {"kernel_size": 3, "stride": 2, "padding": 1}
FITTING = {"input": torch.ones(1, 3, 6, 6), "kernel_size": 2}


def _error(name: str, error: type[Exception], message: str, op: str = "max_pool2d", **changes: Any) -> ErrorCase:
    return error_case(op, name, error, message, {**FITTING, **changes})


def _pooled(result: Any) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result


def bytes_of(inputs: Inputs, output: Any) -> float:
    """The map once, the result once."""
    pooled = _pooled(output)
    return (inputs["input"].numel() + pooled.numel()) * pooled.element_size()


def _comparisons(inputs: Inputs, output: Any) -> float:
    kernel = inputs.get("kernel_size")
    taps = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    return float(_pooled(output).numel() * (math.prod(taps) if kernel else 1))


MAX_POOL2D = OpCases(
    name="max_pool2d",
    op=max_pool2d,
    reference=reference.max_pool2d,
    peer=F.max_pool2d,
    operators=("max_pool2d", "_max_pool2d_backward"),
    peer_package="torch",
    peer_is_native=True,
    differentiable=("input",),
    tiny=_case("per_call_overhead", (1, 1, 2, 2), kernel_size=2),
    cases=(
        _case("stem", (2, 19, 23, 37), **STEM),
        _case("halving", (2, 5, 16, 70), kernel_size=2),
        _case("rgb", (2, 3, 15, 41), kernel_size=3, stride=2, padding=1, return_indices=True),
        _case("same_size", (1, 20, 9, 35), kernel_size=3, stride=1, padding=1, return_indices=True),
        _case("ties", (2, 9, 13, 21), "ties", **STEM, return_indices=True),
        _case("hostile", (2, 9, 14, 22), "hostile", kernel_size=3, stride=2, padding=1, return_indices=True),
        _case("ties_of_wide_windows", (2, 3, 40, 50), "ties", kernel_size=(3, 40), return_indices=True),
        _case("hostile_of_wide_windows", (2, 3, 40, 50), "hostile", kernel_size=(3, 40), return_indices=True),
        _case("ceil", (1, 10, 10, 36), kernel_size=3, stride=2, ceil_mode=True, return_indices=True),
        _case("dilated", (1, 9, 17, 20), kernel_size=(3, 2), stride=(1, 3), padding=1, dilation=(2, 5)),
        # Both taps of each window are outside of the map, where PyTorch's gradient writes.
        _case(
            "windows_without_pixels",
            (1, 8, 9, 5),
            options={"for_peer": lambda _: None},
            kernel_size=2,
            stride=1,
            padding=1,
            dilation=(10, 2),
        ),
        _case("stride_beyond_the_kernel", (2, 9, 11, 29), kernel_size=2, stride=(5, 7)),
        _case("wide_kernel", (1, 9, 14, 35), kernel_size=13, stride=1, padding=6),
        _case("one_column", (2, 9, 30, 1), kernel_size=(3, 1), stride=(2, 1), padding=(1, 0)),
        _case("one_pixel", (3, 33, 1, 1), kernel_size=1),
        _case("whole_map", (2, 21, 7, 9), "hostile", kernel_size=(7, 9), return_indices=True),
        _case("unbatched", (7, 12, 18), **STEM, return_indices=True),
        _case("no_images", (0, 8, 6, 7), kernel_size=2, return_indices=True),
        _case("many_planes", (66_000, 1, 2, 2), kernel_size=2, options={"dtypes": (torch.float32,)}),
        _bench("resnet_stem", (8, 64, 112, 112), "quick", **STEM),
        _bench("detector_stem", (1, 64, 400, 667), "full", **STEM),
        _bench("vgg_1", (8, 64, 224, 224), "full", kernel_size=2),
        _bench("vgg_3", (8, 256, 56, 56), "quick", kernel_size=2),
        _bench("vgg_5", (8, 512, 14, 14), "full", kernel_size=2),
        _bench("inception", (8, 192, 28, 28), "quick", kernel_size=3, stride=1, padding=1),
        _bench("spatial_pyramid", (8, 256, 20, 20), "full", kernel_size=5, stride=1, padding=2),
        _bench("extra_level", (1, 256, 25, 42), "full", kernel_size=1, stride=2),
        _bench("image", (8, 3, 224, 224), "full", kernel_size=2),
    ),
    errors=(
        _error(
            "rank",
            RuntimeError,
            "expected input to have 4 dimensions [N, C, H, W], or no N, but got [3, 4]",
            input=torch.ones(3, 4),
        ),
        _error(
            "no_window_fits",
            RuntimeError,
            "expected input to have a padded height of at least 9, the reach of a window, but got 6",
            kernel_size=9,
        ),
        _error(
            "padding",
            RuntimeError,
            "expected padding to be at most half of kernel_size, 3, but got 2",
            kernel_size=3,
            padding=2,
        ),
        _error("stride", RuntimeError, "expected stride to be in [1, 2147483647], but got 0", stride=0),
        _error(
            "kernel", TypeError, "expected kernel_size to be an int or a pair of ints, but got 2.5", kernel_size=2.5
        ),
        _error(
            "empty_map",
            RuntimeError,
            "expected input to have no empty dimension but the batch, but got [1, 3, 0, 6]",
            input=torch.ones(1, 3, 0, 6),
        ),
        _error(
            "dtype",
            NotImplementedError,
            "expected input to be float16, bfloat16, float32 or float64, but got torch.int64",
            input=torch.ones(1, 3, 6, 6, dtype=torch.int64),
        ),
        _error(
            "pixels",
            RuntimeError,
            "expected input to have fewer than 2147483648 pixels a channel, but got 65536 x 32768",
            input=torch.ones(1, 1, 1, 1).expand(1, 1, 65536, 32768),
        ),
    ),
    flops=_comparisons,
    bytes=bytes_of,
)

MAX_POOL1D = OpCases(
    name="max_pool1d",
    op=max_pool1d,
    reference=reference.max_pool1d,
    peer=F.max_pool1d,
    operators=("max_pool2d", "_max_pool2d_backward"),
    peer_package="torch",
    peer_is_native=True,
    differentiable=("input",),
    tiny=_case("per_call_overhead", (1, 1, 2), kernel_size=2),
    layouts=("contiguous", "strided"),
    cases=(
        _case("halving", (3, 5, 71), kernel_size=2),
        _case("dilated", (2, 5, 50), kernel_size=3, stride=1, dilation=4, ceil_mode=True),
        _case("wide", (2, 3, 200), "ties", kernel_size=50, stride=25, padding=20, return_indices=True),
        _case("unbatched", (4, 19), kernel_size=(3,), stride=[2]),
        _case("no_batch", (0, 4, 19), kernel_size=3),
        _case("hostile", (2, 5, 50), "hostile", kernel_size=3, stride=2, padding=1, return_indices=True),
        _bench("audio", (8, 64, 16000), "quick", kernel_size=4),
    ),
    errors=(
        _error(
            "rank",
            RuntimeError,
            "expected input to have 3 dimensions [N, C, L], or no N, but got [1, 3, 6, 6]",
            "max_pool1d",
        ),
        _error(
            "kernel",
            TypeError,
            "expected kernel_size to be an int or a sequence of one, but got (2, 2)",
            "max_pool1d",
            input=torch.ones(1, 3, 6),
            kernel_size=(2, 2),
        ),
    ),
    flops=lambda inputs, output: float(_pooled(output).numel() * inputs["kernel_size"]),
    bytes=bytes_of,
)


def adaptive_error(op: str, name: str, error: type[Exception], message: str, **changes: Any) -> ErrorCase:
    fitting = {"input": torch.ones(1, 3, 6, 6), "output_size": 2}
    return error_case(op, name, error, message, {**fitting, **changes})


ADAPTIVE_MAX_POOL2D = OpCases(
    name="adaptive_max_pool2d",
    op=adaptive_max_pool2d,
    reference=reference.adaptive_max_pool2d,
    peer=F.adaptive_max_pool2d,
    operators=("max_pool2d", "_max_pool2d_backward"),
    peer_package="torch",
    peer_is_native=True,
    differentiable=("input",),
    tiny=_case("per_call_overhead", (1, 1, 2, 2), output_size=1),
    cases=(
        _case("uneven", (2, 9, 13, 41), output_size=(5, 7), return_indices=True),
        _case("as_the_input", (1, 5, 6, 70), output_size=(None, 3)),
        _case("even", (2, 17, 12, 18), "ties", output_size=6, return_indices=True),
        _case("more_than_there_are", (1, 5, 3, 4), output_size=(7, 9)),
        _case("unbatched", (4, 9, 10), output_size=(2, None)),
        _case("no_images", (0, 4, 9, 10), output_size=3),
        _case("whole_map", (2, 9, 13, 21), "hostile", output_size=1, return_indices=True),
        _case("no_outputs", (2, 4, 9, 10), options={"for_peer": lambda _: None}, output_size=(0, 3)),
        _bench("global", (8, 512, 14, 14), "quick", output_size=1),
        _bench("vgg_of_288", (8, 512, 9, 9), "full", output_size=7),
    ),
    errors=(
        adaptive_error(
            "adaptive_max_pool2d",
            "negative",
            ValueError,
            "expected output_size not to be negative, but got (2, -1)",
            output_size=(2, -1),
        ),
        adaptive_error(
            "adaptive_max_pool2d",
            "empty_map",
            RuntimeError,
            "expected input to have no empty dimension but the batch, but got [1, 3, 0, 6]",
            input=torch.ones(1, 3, 0, 6),
        ),
    ),
    flops=lambda inputs, output: float(inputs["input"].numel()),
    bytes=bytes_of,
)


def _unpool_case(name: str, size: tuple[int, ...], options: Any = None, **more: Any) -> Case:
    """Maxima of windows of 2 x 2."""

    def make(generator: torch.Generator) -> Inputs:
        map = torch.randn(size, generator=generator, dtype=torch.float64)
        pooled, indices = F.max_pool2d(map, 2, return_indices=True)
        return {"input": pooled, "indices": indices, "kernel_size": 2, **more}

    return Case(name, make, **(options or {}))


def _unpool_error(name: str, error: type[Exception], message: str, **changes: Any) -> ErrorCase:
    zeros = torch.zeros(1, 3, 2, 2, dtype=torch.int64)
    fitting = {"input": torch.ones(1, 3, 2, 2), "indices": zeros, "kernel_size": 2}
    return error_case("max_unpool2d", name, error, message, {**fitting, **changes})


MAX_UNPOOL2D = OpCases(
    name="max_unpool2d",
    op=max_unpool2d,
    reference=reference.max_unpool2d,
    peer=lambda **inputs: _unpool_by_torch(**inputs),
    operators=("max_unpool2d",),
    peer_package="torch",
    peer_is_native=True,
    differentiable=("input",),
    tiny=_unpool_case("per_call_overhead", (1, 1, 2, 2)),
    cases=(
        _unpool_case("halved", (2, 5, 12, 18)),
        _unpool_case("odd_size", (2, 9, 7, 11), output_size=(7, 11)),
        _unpool_case("whole_size", (2, 9, 7, 11), output_size=torch.Size([2, 9, 7, 11])),
        _unpool_case("unbatched", (5, 12, 18)),
        _unpool_case("one_row", (1, 20, 2, 30)),
        _unpool_case("no_images", (0, 5, 12, 18)),
        _unpool_case("segnet", (2, 64, 112, 112), {"bench": "quick"}),
    ),
    errors=(
        _unpool_error(
            "size",
            RuntimeError,
            "expected indices to have the size of input, [1, 3, 2, 2], but got [1, 3, 2, 1]",
            indices=torch.zeros(1, 3, 2, 1, dtype=torch.int64),
        ),
        _unpool_error(
            "dtype",
            RuntimeError,
            "expected indices to be int64, but got torch.int32",
            indices=torch.zeros(1, 3, 2, 2, dtype=torch.int32),
        ),
        _unpool_error(
            "output_size",
            ValueError,
            "expected output_size to be less than a stride [2, 2] from [4, 4], but got [4, 6]",
            output_size=(4, 6),
        ),
    ),
    flops=lambda inputs, output: 0.0,
    bytes=lambda inputs, output: (
        output.numel() * output.element_size() + inputs["input"].numel() * (output.element_size() + 8)
    ),
)


def _unpool_by_torch(input: torch.Tensor, indices: torch.Tensor, **rest: Any) -> torch.Tensor:
    with warnings.catch_warnings():  # that with repeated indices it is not deterministic
        warnings.simplefilter("ignore")
        return F.max_unpool2d(input, indices.contiguous(), **rest)  # its gradient takes no other strides


CASES = (MAX_POOL2D, MAX_POOL1D, ADAPTIVE_MAX_POOL2D, MAX_UNPOOL2D)
