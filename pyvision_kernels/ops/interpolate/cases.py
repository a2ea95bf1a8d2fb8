"""Cases of interpolate: what pyramids, decoders and image transforms ask for, uneven scales, hostile values."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional as F

from pyvision_kernels._case import Case, ErrorCase, Inputs, OpCases, error_case
from pyvision_kernels.ops import interpolate
from pyvision_kernels.ops.interpolate import reference
from pyvision_kernels.ops.max_pool2d.cases import bytes_of

OP = "interpolate"


def _case(name: str, shape: tuple[int, ...], options: dict[str, Any] | None = None, **resizing: Any) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        input = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name.startswith("hostile"):
            kinds = torch.randint(0, 60, shape, generator=generator)
            for number, value in enumerate((math.nan, math.inf, -math.inf, 1e-310)):
                input = torch.where(kinds == number, value, input)
        return {"input": input, **resizing}

    return Case(name, make, **(options or {}))


def _bench(name: str, shape: tuple[int, ...], bench: str, **resizing: Any) -> Case:
    return _case(name, shape, {"bench": bench}, **resizing)


def _error(name: str, error: type[Exception], message: str, **changes: Any) -> ErrorCase:
    fitting = {"input": torch.ones(1, 3, 6, 6), "scale_factor": 2}
    return error_case(OP, name, error, message, {**fitting, **changes})


def _additions(inputs: Inputs, output: torch.Tensor) -> float:
    """Of both passes, where rows are resized along themselves first."""
    cubic = inputs.get("mode") == "bicubic"
    taps = 1 if inputs.get("mode", "nearest").startswith("nearest") else 4 if cubic else 2
    return float(2 * output.numel() * taps * (output.dim() - 2))


_LINEAR: dict[str, Any] = {"mode": "bilinear"}
_SMOOTH: dict[str, Any] = {"mode": "bilinear", "antialias": True}
_CORNERS: dict[str, Any] = {"mode": "bilinear", "align_corners": True}

INTERPOLATE = OpCases(
    name=OP,
    op=interpolate,
    reference=reference.interpolate,
    peer=F.interpolate,
    operators=("interpolate", "_interpolate_backward"),
    peer_package="torch",
    peer_is_native=True,
    differentiable=("input",),
    tiny=_case("per_call_overhead", (1, 1, 2, 2), scale_factor=2),
    cases=(
        _case("doubled", (2, 5, 9, 37), scale_factor=2, mode="bilinear"),
        _case("doubled_nearest", (2, 19, 7, 22), scale_factor=2),
        _case("shrunk_smoothly", (2, 3, 31, 47), size=(12, 20), **_SMOOTH),
        _case("nearest_exact", (2, 3, 15, 21), size=(22, 13), mode="nearest-exact"),
        _case("grown_and_shrunk", (1, 18, 9, 40), size=(30, 11), **_LINEAR),
        _case("corners", (2, 4, 8, 13), size=(17, 30), **_CORNERS),
        _case("cubic", (1, 17, 7, 12), scale_factor=(1.7, 2.5), mode="bicubic"),
        _case("cubic_smooth", (1, 3, 40, 33), size=(9, 12), mode="bicubic", antialias=True),
        _case("given_scale", (2, 6, 11, 13), scale_factor=(2.3, 0.6), **_LINEAR),
        _case("recomputed_scale", (2, 6, 11, 13), scale_factor=1.7, recompute_scale_factor=True, **_LINEAR),
        _case("same_size", (2, 6, 5, 9), size=(5, 9), **_LINEAR),
        _case("from_one_pixel", (3, 33, 1, 1), size=(5, 40), **_LINEAR),
        _case("to_one_pixel", (3, 33, 6, 50), size=1, **_SMOOTH),
        _case("one_in_nine", (1, 9, 36, 150), size=(4, 16), **_LINEAR),
        _case("hostile", (2, 9, 8, 22), scale_factor=2, **_LINEAR),
        _case("hostile_nearest", (2, 9, 8, 22), size=(12, 11)),
        _case("area", (2, 5, 9, 14), size=(4, 20), mode="area"),
        _case("rows", (3, 5, 71), scale_factor=1.5, mode="linear"),
        _case("no_images", (0, 4, 6, 7), scale_factor=2),
        _bench("fpn", (1, 256, 50, 50), "quick", scale_factor=2),
        _bench("fpn_of_100", (1, 256, 100, 100), "full", scale_factor=2),
        _bench("decoder", (1, 256, 100, 100), "quick", scale_factor=2, **_LINEAR),
        _bench("deeplab", (1, 21, 65, 65), "quick", size=513, **_LINEAR),
        _bench("unet", (8, 64, 64, 64), "full", scale_factor=2, **_CORNERS),
        _bench("image", (8, 3, 480, 640), "full", size=224, **_LINEAR),
        _bench("image_smoothly", (8, 3, 480, 640), "full", size=224, **_SMOOTH),
        _bench("image_cubic", (8, 3, 480, 640), "full", size=224, mode="bicubic"),
    ),
    errors=(
        _error(
            "rank",
            NotImplementedError,
            "expected input to have 4 dimensions [N, C, H, W] or 3 [N, C, L], but got [1, 1, 2, 3, 4]",
            input=torch.ones(1, 1, 2, 3, 4),
        ),
        _error(
            "mode",
            NotImplementedError,
            "expected mode to be one of an input with 4 dimensions, with antialias=False "
            "(nearest, nearest-exact, bilinear, bicubic), but got 'trilinear'",
            mode="trilinear",
        ),
        _error(
            "antialias",
            NotImplementedError,
            "expected mode to be one of an input with 4 dimensions, with antialias=True (bilinear, bicubic), but got "
            "'nearest'",
            antialias=True,
        ),
        _error(
            "both",
            ValueError,
            "expected one of size and scale_factor, but got size=3, scale_factor=2",
            size=3,
        ),
        _error(
            "corners",
            ValueError,
            "expected align_corners to be None with mode 'nearest', but got True",
            align_corners=True,
        ),
        _error(
            "empty_result",
            RuntimeError,
            "expected sizes to be greater than 0, but got an input of [1, 3, 6, 6] and a result of [0, 0]",
            scale_factor=0.1,
        ),
        _error(
            "sizes",
            ValueError,
            "expected scale_factor to have 2 numbers or to be one, but got (2, 2, 2)",
            scale_factor=(2, 2, 2),
        ),
        _error(
            "dtype",
            NotImplementedError,
            "expected input to be float16, bfloat16, float32 or float64, but got torch.uint8",
            input=torch.ones(1, 3, 6, 6, dtype=torch.uint8),
        ),
    ),
    flops=_additions,
    bytes=bytes_of,
)

CASES = (INTERPOLATE,)
