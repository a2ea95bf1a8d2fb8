"""Cases of linear."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyvision_kernels import _activation
from pyvision_kernels._case import Case, Inputs, OpCases, error_case
from pyvision_kernels.ops.linear import linear, reference, run


def _case(
    name: str,
    size: tuple[int, ...],
    outputs: int,
    activation: str | None = None,
    *,
    bias: bool = True,
    residual: bool = False,
    bench: str = "",
) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, dtype=torch.float64)

        inputs: Inputs = {"input": normal(*size), "weight": normal(outputs, size[-1]) / max(size[-1], 1) ** 0.5}
        inputs["bias"] = normal(outputs) if bias else None
        if residual:
            inputs["residual"] = normal(*size[:-1], outputs)
        return {**inputs, "activation": activation}

    return Case(name, make, bench=bench)


def _peer(input: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """PyTorch's steps, in place where they can be."""
    out = F.linear(input, weight, bias)
    if options.get("residual") is not None:
        out = out.add_(options["residual"])
    if options.get("activation") == "relu":
        return F.relu(out, inplace=True)
    return _activation.apply(_activation.number_of("linear", options.get("activation")), out)


def _flops(inputs: Inputs, output: Tensor) -> float:
    return 2.0 * output.numel() * inputs["weight"].shape[1]


def _bytes(inputs: Inputs, output: Tensor) -> float:
    tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
    return float(sum(tensor.numel() * tensor.element_size() for tensor in [*tensors, output]))


class _Packs:
    """A packed weight, as a layer in eval mode keeps it."""

    made: Tensor | None = None

    def get(self, weight: Tensor, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        if self.made is None:
            self.made = make()
        return self.made


def _in_eval(inputs: Inputs) -> Callable[[], Tensor]:
    rest = {name: inputs[name] for name in ("residual", "activation") if name in inputs}
    return functools.partial(run, inputs["input"], inputs["weight"], inputs["bias"], packs=_Packs(), **rest)


def _tiny(generator: torch.Generator) -> Inputs:
    return {
        "input": torch.randn(1, 8, generator=generator, dtype=torch.float64),
        "weight": torch.randn(4, 8, generator=generator, dtype=torch.float64),
    }


_GOOD = {"input": torch.ones(3, 5), "weight": torch.ones(4, 5)}

LINEAR = OpCases(
    name="linear",
    op=linear,
    reference=reference.linear,
    peer=_peer,
    peer_package="torch",
    peer_is_native=True,
    in_eval=_in_eval,
    operators=("linear",),
    cuda_operators=("linear", "_conv2d_backward_weight"),
    tiny=Case("per_call_overhead", _tiny),
    differentiable=("input", "weight"),
    cases=(
        _case("odd", (7, 33), 19),
        _case("one_row", (1, 70), 45, "relu"),
        _case("few_rows", (3, 65), 34, "gelu", residual=True),
        _case("tokens", (2, 13, 24), 40, "silu", bias=False),
        _case("many_rows", (70, 48), 96, "hardswish", residual=True),
        _case("relu6", (5, 16), 8, "relu6"),
        _case("sigmoid", (9,), 6, "sigmoid"),
        _case("no_rows", (0, 8), 4),
        _case("no_features", (3, 0), 4),
        _case("no_outputs", (3, 8), 0),
        _case("vgg16_fc1", (1, 25088), 4096, "relu", bench="full"),
        _case("vgg16_fc2", (1, 4096), 4096, "relu", bench="quick"),
        _case("vgg16_fc2_b8", (8, 4096), 4096, "relu", bench="full"),
        _case("vit_mlp", (197, 768), 3072, "gelu", bench="quick"),
        _case("vit_projection", (197, 3072), 768, residual=True, bench="full"),
        _case("rcnn_fc6", (1000, 12544), 1024, "relu", bench="full"),
        _case("mobilenet_v3_classifier", (1, 960), 1280, "hardswish", bench="full"),
    ),
    errors=(
        error_case("linear", "features", RuntimeError, "expected input to have", {**_GOOD, "input": torch.ones(3, 4)}),
        error_case(
            "linear", "features_of_tokens", RuntimeError, "expected input", {**_GOOD, "input": torch.ones(2, 3, 4)}
        ),
        error_case(
            "linear", "rank", RuntimeError, "expected weight to have 2", {**_GOOD, "weight": torch.ones(4, 5, 1)}
        ),
        error_case(
            "linear", "dtypes", RuntimeError, "expected weight to be", {**_GOOD, "weight": torch.ones(4, 5).double()}
        ),
        error_case(
            "linear", "integers", RuntimeError, "expected", {name: value.int() for name, value in _GOOD.items()}
        ),
        error_case("linear", "bias", RuntimeError, "expected bias to have size [4]", {**_GOOD, "bias": torch.ones(5)}),
        error_case("linear", "residual", RuntimeError, "expected residual to", {**_GOOD, "residual": torch.ones(3, 5)}),
        error_case("linear", "activation", ValueError, "expected activation to be", {**_GOOD, "activation": "tan"}),
        error_case("linear", "type", TypeError, "expected weight to be a Tensor", {**_GOOD, "weight": None}),
    ),
    flops=_flops,
    bytes=_bytes,
)

CASES = (LINEAR,)
