"""Cases of layer_norm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyvision_kernels._case import DTYPES, Case, Inputs, OpCases, error_case
from pyvision_kernels.ops.layer_norm import layer_norm, reference

_HALF = (torch.bfloat16, torch.float16)
_NARROW = (torch.float32, torch.bfloat16)  # where float64 is too ill-conditioned to be compared with itself


def _case(
    name: str,
    size: tuple[int, ...],
    *,
    dims: int = 1,
    affine: bool = True,
    bias: bool = True,
    residual: bool = False,
    eps: float = 1e-5,
    change: Callable[[Tensor], Tensor] | None = None,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    single: tuple[str, ...] = (),
    bench: str = "",
) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, dtype=torch.float64)

        shape = size[len(size) - dims :]
        input = normal(*size)
        inputs: Inputs = {"input": input if change is None else change(input), "normalized_shape": shape, "eps": eps}
        inputs["weight"] = 1 + 0.5 * normal(*shape) if affine else None
        inputs["bias"] = normal(*shape) if affine and bias else None
        if residual:
            inputs["residual"] = normal(*size)
        return inputs

    return Case(name, make, dtypes=dtypes, bench=bench, single=single)


def _with(value: float) -> Callable[[Tensor], Tensor]:
    """One value among others, in the second row; the first row is whole."""

    def change(input: Tensor) -> Tensor:
        input[1, 3] = value
        return input

    return change


def _bytes(inputs: Inputs, output: Any) -> float:
    maps = 4 if inputs.get("residual") is not None else 2
    return float(maps * inputs["input"].numel() * inputs["input"].element_size())


_GOOD: Inputs = {
    "input": torch.ones(2, 3, 4),
    "normalized_shape": (3, 4),
    "weight": torch.ones(3, 4),
    "bias": torch.ones(3, 4),
}


def _error(name: str, error: type[Exception], message: str, **change: Any) -> Any:
    return error_case("layer_norm", name, error, message, {**_GOOD, **change})


LAYER_NORM = OpCases(
    name="layer_norm",
    op=layer_norm,
    reference=reference.layer_norm,
    peer=reference.layer_norm,
    peer_package="torch",
    peer_is_native=True,
    operators=("layer_norm", "_layer_norm_backward"),
    differentiable=("input", "weight", "bias"),
    layouts=("contiguous", "strided"),
    cases=(
        _case("parts_of_rows", (133, 71)),  # more than one part of the sums over rows, the last odd
        _case("two_dimensions", (3, 5, 6, 7), dims=2),
        _case("few_features", (37, 3)),
        _case("residual", (9, 2, 33), residual=True),
        _case("long_rows", (3, 2049)),  # a block of threads on CUDA
        _case("long_rows_by_vectors", (2, 1040), residual=True),
        _case("one_row", (64,)),
        # In float64 the reference's gradient of the input is rounding alone, where 0 is exact.
        _case("one_feature", (5, 1), dtypes=(torch.float32, *_HALF)),
        _case("no_rows", (0, 8)),
        _case("no_features", (3, 0)),
        _case("mixed", (6, 40), dtypes=_HALF, single=("weight", "bias")),
        _case("constants", (4, 24), change=lambda x: torch.full_like(x, 0.1), dtypes=_NARROW),
        _case("large_constants", (4, 24), change=lambda x: torch.full_like(x, 1e10), dtypes=_NARROW),
        _case("large_mean", (4, 300), change=lambda x: 1e4 + 1e-2 * x, dtypes=_NARROW),
        _case("denormals", (4, 40), change=lambda x: 1e-40 * x, dtypes=(torch.float32, torch.float64)),
        _case("sums_overflow", (4, 40), change=lambda x: 3e37 + 1e18 * x, dtypes=_NARROW),
        _case("nan", (3, 20), change=_with(float("nan"))),
        _case("infinity", (3, 20), change=_with(float("inf"))),
        _case("vit_b_tokens", (197, 768), bench="quick"),
        _case("vit_b_tokens_residual", (197, 768), residual=True, bench="quick"),
        _case("vit_b_tokens_b32", (32 * 197, 768), bench="quick"),
        _case("swin_t_stage1_b8", (8, 3136, 96), bench="full"),
        _case("convnext_t_stage1_b8", (8, 56, 56, 96), eps=1e-6, bench="quick"),
        _case("convnext_t_stage4_b8", (8, 7, 7, 768), eps=1e-6, bench="full"),
    ),
    errors=(
        _error("size", RuntimeError, "expected input to have a size that ends in", input=torch.ones(2, 4, 3)),
        _error("no_shape", RuntimeError, "expected input to have a size that ends in", normalized_shape=()),
        _error("shape_of_floats", TypeError, "expected normalized_shape to be ints", normalized_shape=(3.0, 4.0)),
        _error("weight", RuntimeError, "expected weight to have size [3, 4]", weight=torch.ones(4)),
        _error("bias", RuntimeError, "expected bias to have size [3, 4]", bias=torch.ones(12)),
        _error("weight_dtype", RuntimeError, "expected weight to be torch.float32", weight=torch.ones(3, 4).double()),
        _error("bias_dtype", RuntimeError, "expected bias to be torch.float32", bias=torch.ones(3, 4).half()),
        _error("residual", RuntimeError, "expected residual to have size [2, 3, 4]", residual=torch.ones(2, 3, 3)),
        _error("residual_dtype", RuntimeError, "expected residual to be", residual=torch.ones(2, 3, 4).double()),
        _error(
            "integers",
            NotImplementedError,
            "expected input to be float16, bfloat16, float32 or float64",
            input=torch.ones(2, 3, 4).int(),
        ),
        _error("type", TypeError, "expected weight to be a Tensor", weight=1.0),
    ),
    tiny=_case("per_call_overhead", (1, 8)),
    flops=lambda inputs, output: 8.0 * inputs["input"].numel(),
    bytes=_bytes,
)

CASES = (LAYER_NORM,)
