"""Cases of group_norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyvision_kernels._case import DTYPES, Case, Inputs, OpCases, error_case
from pyvision_kernels.ops.group_norm import group_norm, reference

_HALF = (torch.bfloat16, torch.float16)
_NARROW = (torch.float32, torch.bfloat16)  # where float64 is too ill-conditioned to be compared with itself


def _case(
    name: str,
    size: tuple[int, ...],
    groups: int,
    *,
    affine: bool = True,
    bias: bool = True,
    residual: bool = False,
    activation: str | None = None,
    eps: float = 1e-5,
    change: Callable[[Tensor], Tensor] | None = None,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    single: tuple[str, ...] = (),
    bench: str = "",
) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, dtype=torch.float64)

        input, channels = normal(*size), size[1]
        inputs: Inputs = {
            "input": input if change is None else change(input),
            "num_groups": groups,
            "weight": 1 + 0.5 * normal(channels) if affine else None,
            "bias": normal(channels) if affine and bias else None,
            "eps": eps,
            "activation": activation,
        }
        if residual:
            inputs["residual"] = normal(*size)
        return inputs

    return Case(name, make, dtypes=dtypes, bench=bench, single=single)


def _with(value: float) -> Callable[[Tensor], Tensor]:
    """One value in the second sample; the first is whole."""

    def change(input: Tensor) -> Tensor:
        input[1, 1, 2] = value
        return input

    return change


def _apart(input: Tensor) -> Tensor:
    """Channels whose means lie far apart."""
    return input + 100 * torch.arange(input.shape[1], dtype=input.dtype).reshape(-1, *(1,) * (input.dim() - 2))


def _peer(input: Tensor, num_groups: int, weight: Any, bias: Any, eps: float, **options: Any) -> Tensor:
    """PyTorch's steps, in place where they can be."""
    activation, residual = options.get("activation"), options.get("residual")
    out = torch.nn.functional.group_norm(input, num_groups, weight, bias, eps)
    if residual is not None:
        out = out.add_(residual)
    if activation == "relu":
        return torch.relu_(out)
    if activation == "silu":
        return torch.nn.functional.silu(out, inplace=not out.requires_grad)
    return out if activation is None else reference._activation.FUNCTIONS[activation](out)


def _bytes(inputs: Inputs, output: Tensor) -> float:
    maps = 3 if inputs.get("residual") is not None else 2
    return float(maps * output.numel() * output.element_size())


def _error(name: str, error: type[Exception], message: str, **change: Any) -> Any:
    good = {"input": torch.ones(2, 6, 4), "num_groups": 3, "weight": torch.ones(6), "bias": torch.ones(6)}
    return error_case("group_norm", name, error, message, {**good, **change})


GROUP_NORM = OpCases(
    name="group_norm",
    op=group_norm,
    reference=reference.group_norm,
    peer=_peer,
    peer_package="torch",
    peer_is_native=True,
    operators=("group_norm", "_group_norm_backward"),
    differentiable=("input", "weight", "bias"),
    cases=(
        # More than one part of a sample's sums, and of a group; odd.
        _case("parts_of_samples", (2, 24, 65, 87), 3, dtypes=(torch.float32, *_HALF)),
        _case("odd", (3, 10, 7, 3), 2, activation="relu"),
        _case("one_group", (2, 3, 16, 8), 1),  # rows of channels_last are several pixels
        _case("as_many_groups_as_channels", (2, 5, 6, 7), 5),
        _case("residual_relu", (2, 18, 4, 5), 3, residual=True, activation="relu"),
        _case("by_vectors", (2, 32, 8, 8), 4, residual=True, activation="relu6"),
        _case("vectors", (37, 20), 4),
        _case("sequences", (4, 6, 33), 2, activation="silu", residual=True),
        _case("volumes", (2, 4, 3, 5, 2), 2),
        _case("one_value", (3, 6), 6, dtypes=(torch.float32, *_HALF)),  # a float64 reference of rounding alone
        _case("no_affine", (2, 6, 5, 5), 3, affine=False),
        _case("no_bias", (2, 6, 5, 5), 3, bias=False),
        _case("no_samples", (0, 6, 5), 3),
        _case("mixed", (3, 8, 4, 5), 2, dtypes=_HALF, single=("weight", "bias"), activation="relu"),
        _case("constants", (2, 6, 4, 4), 2, change=lambda x: torch.full_like(x, 0.1), dtypes=_NARROW),
        _case("large_mean", (2, 6, 19, 19), 2, change=lambda x: 1e4 + 1e-2 * x, dtypes=_NARROW),
        _case("channels_apart", (2, 8, 9, 9), 2, change=_apart),
        _case("squares_underflow", (4, 6, 9, 8), 3, change=lambda x: 1e-30 * x, dtypes=(torch.float32, torch.float64)),
        _case("nan", (2, 6, 5), 3, change=_with(float("nan"))),
        _case("infinity", (2, 6, 5), 3, change=_with(float("inf"))),
        _case("resnet50_gn_layer1_out_b8", (8, 256, 56, 56), 32, residual=True, activation="relu", bench="quick"),
        _case("resnet50_gn_layer1_b8", (8, 64, 56, 56), 32, activation="relu", bench="full"),
        _case("unet_level1_b2", (2, 320, 64, 64), 32, activation="silu", bench="quick"),
        _case("unet_level3_b2", (2, 1280, 16, 16), 32, activation="silu", bench="full"),
        _case("fpn_head", (1, 256, 100, 152), 32, activation="relu", bench="full"),
        _case("maps_b8", (8, 256, 56, 56), 32, bench="quick"),
    ),
    errors=(
        _error("one_dimension", RuntimeError, "expected input to have at least 2 dimensions", input=torch.ones(6)),
        _error("groups", RuntimeError, "expected num_groups to divide 6 channels, but got 4", num_groups=4),
        _error("no_groups", RuntimeError, "expected num_groups to divide 6 channels, but got 0", num_groups=0),
        _error("groups_of_float", TypeError, "expected num_groups to be an int, but got 3.0", num_groups=3.0),
        _error("weight", RuntimeError, "expected weight to have size [6]", weight=torch.ones(4)),
        _error("weight_dtype", RuntimeError, "expected weight to be torch.float32", weight=torch.ones(6).double()),
        _error("bias_dtype", RuntimeError, "expected bias to be torch.float32", bias=torch.ones(6).half()),
        _error("residual", RuntimeError, "expected residual to have size [2, 6, 4]", residual=torch.ones(2, 6, 3)),
        _error("activation", ValueError, "expected activation to be None or one of", activation="tan"),
        _error(
            "integers",
            NotImplementedError,
            "expected input to be float16, bfloat16, float32 or float64",
            input=torch.ones(2, 6, 4).int(),
        ),
        _error("type", TypeError, "expected weight to be a Tensor", weight=1.0),
    ),
    tiny=_case("per_call_overhead", (2, 8, 1, 1), 2),
    flops=lambda inputs, output: 7.0 * output.numel(),
    bytes=_bytes,
)

CASES = (GROUP_NORM,)
