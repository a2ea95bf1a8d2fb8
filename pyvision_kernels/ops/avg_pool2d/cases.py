"""Cases of avg_pool2d, avg_pool1d and adaptive_avg_pool2d: models' sizes, odd windows, divisors, infinities."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional as F

from pyvision_kernels._case import Case, ErrorCase, Inputs, OpCases, error_case
from pyvision_kernels.ops import adaptive_avg_pool2d, avg_pool1d, avg_pool2d
from pyvision_kernels.ops.avg_pool2d import reference
from pyvision_kernels.ops.max_pool2d.cases import adaptive_error, bytes_of


def _case(name: str, size: tuple[int, ...], options: dict[str, Any] | None = None, **pooling: Any) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        input = torch.randn(size, generator=generator, dtype=torch.float64)
        if name == "hostile":
            kinds = torch.randint(0, 30, size, generator=generator)
            for number, value in enumerate((math.nan, math.inf, -math.inf)):
                input = torch.where(kinds == number, value, input)
        return {"input": input, **pooling}

    return Case(name, make, **(options or {}))


def _bench(name: str, size: tuple[int, ...], bench: str, **pooling: Any) -> Case:
    return _case(name, size, {"bench": bench}, **pooling)


SAME: dict[str, Any] = {"kernel_size": 3, "stride": 1, "padding": 1}


def _error(name: str, error: type[Exception], message: str, op: str = "avg_pool2d", **changes: Any) -> ErrorCase:
    fitting = {"input": torch.ones(1, 3, 6, 6), "kernel_size": 2}
    return error_case(op, name, error, message, {**fitting, **changes})


def _additions(inputs: Inputs, output: torch.Tensor) -> float:
    kernel = inputs["kernel_size"]
    return float(output.numel() * (math.prod(kernel) if isinstance(kernel, tuple) else kernel * kernel))


AVG_POOL2D = OpCases(
    name="avg_pool2d",
    op=avg_pool2d,
    reference=reference.avg_pool2d,
    peer=F.avg_pool2d,
    operators=("avg_pool2d", "_avg_pool2d_backward"),
    peer_package="torch",
    peer_is_native=True,
    differentiable=("input",),
    tiny=_case("per_call_overhead", (1, 1, 2, 2), kernel_size=2),
    cases=(
        _case("same_size", (2, 19, 13, 37), **SAME),
        _case("halving", (2, 5, 16, 70), kernel_size=2),
        _case("rgb", (2, 3, 15, 41), kernel_size=3, stride=2, padding=1),
        _case("without_padding", (2, 9, 13, 37), **SAME, count_include_pad=False),
        _case("ceil", (1, 10, 10, 36), kernel_size=3, stride=2, padding=1, ceil_mode=True),
        _case("divisor", (1, 9, 11, 20), kernel_size=(3, 2), padding=(1, 0), divisor_override=-5),
        _case("stride_beyond_the_kernel", (2, 9, 11, 29), kernel_size=2, stride=(5, 3)),
        _case("wide_kernel", (1, 9, 14, 70), kernel_size=(5, 40), stride=(1, 7), padding=(2, 20)),
        _case("hostile", (2, 9, 14, 22), kernel_size=3, stride=2, padding=1),
        _case("one_column", (2, 9, 30, 1), kernel_size=(3, 1), stride=(2, 1), padding=(1, 0)),
        _case("one_pixel", (3, 33, 1, 1), kernel_size=1),
        _case("whole_map", (2, 21, 7, 9), kernel_size=(7, 9)),
        _case("unbatched", (7, 12, 18), **SAME),
        _case("no_images", (0, 8, 6, 7), kernel_size=2),
        _bench("densenet_1", (8, 128, 56, 56), "quick", kernel_size=2),
        _bench("densenet_3", (8, 512, 14, 14), "full", kernel_size=2),
        _bench("inception", (8, 192, 35, 35), "quick", **SAME),
        _bench("resnet_d", (4, 256, 112, 112), "full", kernel_size=2),
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
        _error("divisor", RuntimeError, "expected divisor_override not to be 0, but got 0", divisor_override=0),
        _error(
            "padding",
            RuntimeError,
            "expected padding to be at most half of kernel_size, 3, but got (0, 2)",
            kernel_size=3,
            padding=(0, 2),
        ),
        _error(
            "dtype",
            NotImplementedError,
            "expected input to be float16, bfloat16, float32 or float64, but got torch.int64",
            input=torch.ones(1, 3, 6, 6, dtype=torch.int64),
        ),
    ),
    flops=_additions,
    bytes=bytes_of,
)

AVG_POOL1D = OpCases(
    name="avg_pool1d",
    op=avg_pool1d,
    reference=reference.avg_pool1d,
    peer=F.avg_pool1d,
    operators=("avg_pool2d", "_avg_pool2d_backward"),
    peer_package="torch",
    peer_is_native=True,
    differentiable=("input",),
    tiny=_case("per_call_overhead", (1, 1, 2), kernel_size=2),
    layouts=("contiguous", "strided"),
    cases=(
        _case("halving", (3, 5, 71), kernel_size=2),
        _case("overlapping", (2, 5, 50), kernel_size=3, stride=2, padding=1, count_include_pad=False),
        _case("wide", (2, 3, 200), kernel_size=50, stride=25, padding=20, ceil_mode=True),
        _case("unbatched", (4, 19), kernel_size=(3,), stride=[2]),
        _case("no_batch", (0, 4, 19), kernel_size=3),
        _bench("audio", (8, 64, 16000), "quick", kernel_size=4),
    ),
    errors=(
        _error(
            "rank",
            RuntimeError,
            "expected input to have 3 dimensions [N, C, L], or no N, but got [1, 3, 6, 6]",
            "avg_pool1d",
        ),
    ),
    flops=lambda inputs, output: float(output.numel() * inputs["kernel_size"]),
    bytes=bytes_of,
)


ADAPTIVE_AVG_POOL2D = OpCases(
    name="adaptive_avg_pool2d",
    op=adaptive_avg_pool2d,
    reference=reference.adaptive_avg_pool2d,
    peer=F.adaptive_avg_pool2d,
    operators=("avg_pool2d", "_avg_pool2d_backward"),
    peer_package="torch",
    peer_is_native=True,
    differentiable=("input",),
    tiny=_case("per_call_overhead", (1, 1, 2, 2), output_size=1),
    cases=(
        _case("uneven", (2, 9, 13, 41), output_size=(5, 7)),
        _case("whole_map", (2, 9, 13, 21), output_size=1),
        _case("even", (2, 17, 12, 18), output_size=6),
        _case("more_than_there_are", (1, 5, 3, 4), output_size=(7, 9)),
        _case("as_the_input", (1, 5, 6, 70), output_size=(None, 3)),
        _case("unbatched", (4, 9, 10), output_size=(2, None)),
        _case("no_images", (0, 4, 9, 10), output_size=3),
        _case("no_outputs", (2, 4, 9, 10), {"for_peer": lambda _: None}, output_size=(0, 3)),
        _bench("global", (8, 512, 7, 7), "quick", output_size=1),
        _bench("global_of_56", (8, 256, 56, 56), "full", output_size=1),
        _bench("vgg_of_288", (8, 512, 9, 9), "full", output_size=7),
        _bench("pyramid_pooling", (2, 512, 60, 60), "full", output_size=6),
    ),
    errors=(
        adaptive_error(
            "adaptive_avg_pool2d",
            "negative",
            ValueError,
            "expected output_size not to be negative, but got -1",
            output_size=-1,
        ),
        adaptive_error(
            "adaptive_avg_pool2d",
            "empty_map",
            RuntimeError,
            "expected input to have no empty dimension but the batch, but got [1, 3, 0, 6]",
            input=torch.ones(1, 3, 0, 6),
        ),
    ),
    flops=lambda inputs, output: float(inputs["input"].numel()),
    bytes=bytes_of,
)

CASES = (AVG_POOL2D, AVG_POOL1D, ADAPTIVE_AVG_POOL2D)
