"""Cases of batch_norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyvision_kernels import _activation
from pyvision_kernels._case import DTYPES, Case, Inputs, OpCases, error_case
from pyvision_kernels.ops.batch_norm import batch_norm, reference

_HALF = (torch.bfloat16, torch.float16)
_LONG = (torch.float32, *_HALF)


def _case(
    name: str,
    size: tuple[int, ...],
    *,
    training: bool = True,
    affine: bool = True,
    running: bool = False,
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
            "running_mean": normal(channels) if running or not training else None,
            "running_var": 0.5 + torch.rand(channels, generator=generator, dtype=torch.float64)
            if running or not training
            else None,
            "weight": 1 + 0.5 * normal(channels) if affine else None,
            "bias": normal(channels) if affine else None,
            "training": training,
            "eps": eps,
            "activation": activation,
        }
        if residual:
            inputs["residual"] = normal(*size)
        return inputs

    return Case(name, make, dtypes=dtypes, bench=bench, single=single)


def _with(value: float) -> Callable[[Tensor], Tensor]:
    """One value in the second channel; the others are whole."""

    def change(input: Tensor) -> Tensor:
        input[0, 1, 2] = value
        return input

    return change


def _peer(
    input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Any, bias: Any, **options: Any
) -> Tensor:
    """PyTorch's steps, in place where they can be."""
    activation, residual = options.pop("activation", None), options.pop("residual", None)
    out = torch.nn.functional.batch_norm(input, running_mean, running_var, weight, bias, **options)
    if residual is not None:
        out = out.add_(residual)
    if activation == "relu":
        return torch.relu_(out)
    return out if activation is None else _activation.FUNCTIONS[activation](out)


def _bytes(inputs: Inputs, output: Tensor) -> float:
    maps = 3 if inputs.get("residual") is not None else 2
    return float(maps * output.numel() * output.element_size())


def _good(**change: Any) -> Inputs:
    vectors = {name: torch.ones(3) for name in ("running_mean", "running_var", "weight", "bias")}
    return {"input": torch.ones(2, 3, 4), **vectors, **change}


def _error(name: str, error: type[Exception], message: str, **change: Any) -> Any:
    return error_case("batch_norm", name, error, message, _good(**change))


BATCH_NORM = OpCases(
    name="batch_norm",
    op=batch_norm,
    reference=reference.batch_norm,
    peer=_peer,
    peer_package="torch",
    peer_is_native=True,
    operators=("batch_norm", "_batch_norm_backward"),
    differentiable=("input", "weight", "bias"),
    cases=(
        _case(
            "parts_of_pixels", (3, 19, 51, 49), dtypes=_LONG
        ),  # more than one part of a channel's sums, in rows and in planes
        _case("odd", (3, 5, 7, 3), activation="relu"),
        _case("residual_relu", (2, 18, 4, 5), residual=True, activation="relu"),
        _case("eval", (2, 8, 4, 4), training=False, activation="relu"),
        _case("vectors", (37, 20)),
        _case("sequences", (4, 6, 33), activation="relu6", residual=True),
        _case("long_planes", (1, 2, 70, 61), dtypes=_LONG),  # more than one piece of a plane
        _case("one_channel", (4, 1, 3, 3)),
        _case("many_channels", (2, 133, 1, 1), dtypes=_LONG),
        _case("eval_of_vectors", (5, 33), training=False),
        _case("silu", (4, 6, 9, 7), activation="silu", residual=True),
        _case("mixed", (3, 8, 4, 5), dtypes=_HALF, single=("weight", "bias"), activation="relu"),
        _case(
            "mixed_eval",
            (3, 8, 4, 5),
            dtypes=_HALF,
            training=False,
            single=("weight", "bias", "running_mean", "running_var"),
        ),
        _case("constants", (2, 3, 4, 4), change=lambda x: torch.full_like(x, 0.1)),
        # In float64 the mean's own rounding is 1e6 units of the result: ops/test_batch_norm.py has long doubles.
        _case("large_mean", (2, 3, 9, 9), change=lambda x: 1e4 + 1e-2 * x, dtypes=_LONG),
        _case("squares_underflow", (4, 3, 9, 8), change=lambda x: 1e-30 * x),
        _case("nan", (2, 3, 5), change=_with(float("nan"))),
        _case("infinity", (2, 3, 5), change=_with(float("inf"))),
        _case("resnet50_stem_b8", (8, 64, 112, 112), activation="relu", bench="full"),
        _case("resnet50_layer1_b8", (8, 64, 56, 56), activation="relu", bench="quick"),
        _case("resnet50_layer1_out_b8", (8, 256, 56, 56), residual=True, activation="relu", bench="quick"),
        _case("resnet50_layer2_b8", (8, 128, 28, 28), bench="full"),
        _case("resnet50_layer3_b8", (8, 1024, 14, 14), residual=True, activation="relu", bench="full"),
        _case("resnet50_layer4_b8", (8, 512, 7, 7), activation="relu", bench="quick"),
        _case("resnet50_layer1_eval_b8", (8, 64, 56, 56), training=False, activation="relu", bench="full"),
        _case("mobilenet_v2_b8", (8, 96, 56, 56), activation="relu6", bench="full"),
    ),
    errors=(
        _error("one_dimension", RuntimeError, "expected input to have at least 2 dimensions", input=torch.ones(3)),
        _error(
            "one_value",
            ValueError,
            "expected input to have more than 1 value per channel when training",
            input=torch.ones(1, 3),
            training=True,
        ),
        _error("eps", ValueError, "expected eps to be positive when training", training=True, eps=0.0),
        _error(
            "no_running",
            RuntimeError,
            "expected running_mean and running_var to be Tensors when training is False",
            running_mean=None,
            running_var=None,
        ),
        _error(
            "one_running",
            ValueError,
            "expected running_mean and running_var to both be",
            running_mean=None,
            training=True,
        ),
        _error("weight", RuntimeError, "expected weight to have size [3]", weight=torch.ones(4)),
        _error("running_mean", RuntimeError, "expected running_mean to have size [3]", running_mean=torch.ones(2)),
        _error("weight_dtype", RuntimeError, "expected weight to be torch.float32", weight=torch.ones(3).double()),
        _error("residual", RuntimeError, "expected residual to have size [2, 3, 4]", residual=torch.ones(2, 3, 3)),
        _error("activation", ValueError, "expected activation to be None or one of", activation="tan"),
        _error(
            "integers",
            NotImplementedError,
            "expected input to be float16, bfloat16, float32 or float64",
            input=torch.ones(2, 3, 4).int(),
        ),
        _error("type", TypeError, "expected weight to be a Tensor", weight=1.0),
    ),
    tiny=_case("per_call_overhead", (2, 8, 1, 1)),
    flops=lambda inputs, output: 7.0 * output.numel(),
    bytes=_bytes,
)

CASES = (BATCH_NORM,)
