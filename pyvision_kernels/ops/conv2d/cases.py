"""Cases of conv2d, conv2d_max_pool2d, conv1d and conv_transpose2d."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyvision_kernels import _activation
from pyvision_kernels._case import Case, Inputs, OpCases, error_case
from pyvision_kernels.ops.conv2d import bench_cases, conv1d, conv2d, conv2d_max_pool2d, conv_transpose2d, reference, run
from pyvision_kernels.ops.conv2d.geometry import Geometry

# Of Winograd F(4x4, 3x3), whose cases are large enough to get it.
F4_ERROR = 2e-6


def _normal(generator: torch.Generator, *size: int) -> Tensor:
    return torch.randn(size, generator=generator, dtype=torch.float64)


def case(
    name: str,
    size: tuple[int, ...],
    outputs: int,
    taps: int | tuple[int, ...],
    *,
    bias: bool = True,
    norm: bool = False,
    residual: bool = False,
    bench: str = "",
    l2: float | None = None,
    dtypes: Any = None,
    transposed: bool = False,
    **options: Any,
) -> Case:
    """A convolution of [N, C, ...] with `outputs` x taps; norm: scale and shift of a batch norm."""
    taps = (taps,) * (len(size) - 2) if isinstance(taps, int) else taps
    groups = options.get("groups", 1)

    def make(generator: torch.Generator) -> Inputs:
        channels = size[1] // groups
        weight_size = (size[1], outputs // groups, *taps) if transposed else (outputs, channels, *taps)
        fan_in = max(channels * torch.Size(taps).numel(), 1)
        inputs: Inputs = {
            "input": _normal(generator, *size),
            "weight": _normal(generator, *weight_size) / fan_in**0.5,
            "bias": _normal(generator, outputs) if bias else None,
            **options,
        }
        if norm:
            inputs["scale"] = 0.5 + torch.rand(outputs, generator=generator, dtype=torch.float64)
            inputs["shift"] = _normal(generator, outputs)
        if residual:
            rows, columns = _geometry(inputs).output_size(size[2:], taps)
            inputs["residual"] = _normal(generator, size[0], outputs, rows, columns)
        return inputs

    extra = {} if dtypes is None else {"dtypes": dtypes}
    return Case(name, make, bench=bench, l2=l2, single=("scale", "shift") if norm else (), **extra)


def _geometry(inputs: Inputs) -> Geometry:
    return Geometry.of(
        inputs.get("stride", 1),
        inputs.get("padding", 0),
        inputs.get("dilation", 1),
        inputs.get("groups", 1),
        inputs.get("padding_mode", "zeros"),
        inputs["weight"].shape[2:],
    )


def peer(input: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    """PyTorch's layers one after another, in place where they can be, as a model in eval mode runs them."""
    scale, shift, residual = (options.pop(name, None) for name in ("scale", "shift", "residual"))
    activation = options.pop("activation", None)
    out = reference.conv2d(input, weight, bias, **options)
    if scale is not None or shift is not None:
        like = scale if scale is not None else shift
        out = F.batch_norm(out, torch.zeros_like(like), torch.ones_like(like), scale, shift, eps=1e-30)
    if residual is not None:
        out = out.add_(residual)
    if activation in ("relu", "relu6", "silu", "hardswish"):
        return getattr(F, activation)(out, inplace=True)
    return _activation.apply(_activation.number_of("conv2d", activation), out)


def _pooled_peer(input: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    return F.max_pool2d(peer(input, weight, bias, **options), 2)


def _flops(inputs: Inputs, output: Tensor) -> float:
    weight = inputs["weight"]
    rows, columns = _geometry(inputs).output_size(inputs["input"].shape[2:], weight.shape[2:])
    return 2.0 * inputs["input"].shape[0] * rows * columns * weight.numel()


def _flops_of_result(inputs: Inputs, output: Tensor) -> float:
    """Of each element of the result as many as taps and channels go into it."""
    return 2.0 * output.numel() * inputs["weight"].numel() / max(output.shape[1], 1)


def _bytes(inputs: Inputs, output: Tensor) -> float:
    tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
    return float(sum(tensor.numel() * tensor.element_size() for tensor in [*tensors, output]))


class _Packs:
    """Packed weights, as a layer in eval mode keeps them."""

    def __init__(self) -> None:
        self.made: dict[Hashable, Tensor] = {}

    def get(self, weight: Tensor, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]


def _in_eval(pool: bool) -> Callable[[Inputs], Callable[[], Tensor]]:
    def prepare(inputs: Inputs) -> Callable[[], Tensor]:
        geometry, packs = _geometry(inputs), _Packs()
        names = ("scale", "shift", "residual", "activation")
        rest = {name: inputs[name] for name in names if name in inputs}
        arguments = (inputs["input"], inputs["weight"], inputs.get("bias"), geometry)
        return functools.partial(run, *arguments, pool=pool, packs=packs, **rest)

    return prepare


def _errors(op: str) -> tuple[Any, ...]:
    x, w = torch.ones(1, 4, 6, 6), torch.ones(8, 4, 3, 3)
    good = {"input": x, "weight": w}
    return (
        error_case(op, "channels", RuntimeError, "expected input to have 4 channels", {**good, "input": x[:, :3]}),
        error_case(op, "rank", RuntimeError, "expected input to have 4 dimensions", {**good, "input": x[0, 0]}),
        error_case(op, "weight_rank", RuntimeError, "expected weight to have 4 dimensions", {**good, "weight": w[0]}),
        error_case(
            op, "no_taps", RuntimeError, "expected weight to have at least one tap", {**good, "weight": w[..., :0]}
        ),
        error_case(op, "dtypes", RuntimeError, "expected weight to be", {**good, "weight": w.double()}),
        error_case(op, "integers", RuntimeError, "expected", {"input": x.int(), "weight": w.int()}),
        error_case(op, "bias_size", RuntimeError, "expected bias to have size [8]", {**good, "bias": torch.ones(7)}),
        error_case(op, "bias_dtype", RuntimeError, "expected bias to be", {**good, "bias": torch.ones(8).double()}),
        error_case(
            op, "scale_size", RuntimeError, "expected scale to have size [8]", {**good, "scale": torch.ones(2, 4)}
        ),
        error_case(
            op,
            "residual_size",
            RuntimeError,
            "expected residual to have size [1, 8, 4, 4]",
            {**good, "residual": torch.ones(1, 8, 4, 5)},
        ),
        error_case(
            op, "too_small", RuntimeError, "expected input to have a padded height", {**good, "input": x[:, :, :2]}
        ),
        error_case(
            op,
            "reflect",
            RuntimeError,
            "expected padding to be below the height of input, 6",
            {**good, "padding": 6, "padding_mode": "reflect"},
        ),
        error_case(
            op,
            "circular",
            RuntimeError,
            "expected padding to be at most the width of input, 6",
            {**good, "padding": (0, 7), "padding_mode": "circular"},
        ),
        error_case(op, "stride", ValueError, "expected stride to be positive", {**good, "stride": 0}),
        error_case(op, "dilation", ValueError, "expected dilation to be positive", {**good, "dilation": (1, 0)}),
        error_case(op, "padding", ValueError, "expected padding not to be negative", {**good, "padding": -1}),
        error_case(op, "padding_word", TypeError, "expected padding to be 'same'", {**good, "padding": "full"}),
        error_case(op, "same", ValueError, "expected stride to be 1 with", {**good, "padding": "same", "stride": 2}),
        error_case(op, "mode", ValueError, "expected padding_mode to be one of", {**good, "padding_mode": "mirror"}),
        error_case(
            op, "activation", ValueError, "expected activation to be None or one of", {**good, "activation": "tan"}
        ),
        error_case(
            op, "groups", RuntimeError, "expected weight to have output channels in a multiple", {**good, "groups": 3}
        ),
        error_case(op, "groups_positive", ValueError, "expected groups to be positive", {**good, "groups": 0}),
        error_case(op, "type", TypeError, "expected weight to be a Tensor", {**good, "weight": 3}),
        error_case(op, "bias_type", TypeError, "expected bias to be a Tensor", {**good, "bias": 3}),
    )


def _tiny(generator: torch.Generator) -> Inputs:
    return {"input": _normal(generator, 1, 3, 4, 4), "weight": _normal(generator, 4, 3, 3, 3), "padding": 1}


ACTIVATIONS = tuple(_activation.FUNCTIONS)

CONV2D = OpCases(
    name="conv2d",
    op=conv2d,
    reference=reference.conv2d,
    peer=peer,
    peer_package="torch",
    peer_is_native=True,
    in_eval=_in_eval(pool=False),
    operators=("conv2d",),
    cuda_operators=("conv2d", "_conv2d_backward_weight"),
    tiny=Case("per_call_overhead", _tiny),
    differentiable=("input", "weight"),
    cases=(
        case("plain", (2, 5, 9, 7), 6, 3, padding=1),
        case("winograd", (1, 16, 13, 10), 19, 3, padding=1, norm=True, residual=True, activation="relu"),
        case("winograd4", (1, 9, 24, 23), 6, 3, padding=1, activation="relu", l2=F4_ERROR),
        case("winograd_wide_padding", (1, 16, 6, 5), 16, 3, padding=(3, 0, 2, 4)),
        case("winograd_reflect", (1, 16, 9, 8), 16, 3, padding=2, padding_mode="reflect"),
        case("pointwise", (2, 21, 6, 5), 35, 1, norm=True, activation="silu"),
        case("pointwise_strided", (1, 16, 7, 9), 8, 1, stride=2, residual=True, activation="relu6"),
        case("strided", (1, 12, 11, 14), 18, 3, stride=2, padding=1, activation="gelu"),
        case("five_by_two", (1, 7, 12, 9), 9, (5, 2), stride=(1, 2), padding=(2, 0)),
        case("dilated_same", (1, 6, 11, 12), 8, (3, 4), dilation=(2, 3), padding="same"),
        case("grouped", (1, 12, 7, 8), 18, 3, groups=3, padding=1, activation="sigmoid"),
        case("first_layer", (1, 3, 19, 22), 17, 7, stride=2, padding=3, norm=True, activation="relu"),
        case("first_layer_valid", (2, 1, 9, 10), 8, (2, 4), padding="valid"),
        case("patches", (1, 3, 12, 16), 24, 4, stride=4),
        case("depthwise", (1, 35, 12, 19), 35, 3, groups=35, padding=1, norm=True, activation="hardswish"),
        case("depthwise_strided", (2, 16, 13, 11), 16, 5, groups=16, padding=2, stride=2, residual=True),
        case("depthwise_seven", (1, 9, 9, 10), 9, 7, groups=9, padding=3, bias=False),
        case("depthwise_multiplier", (1, 5, 7, 8), 15, 3, groups=5, padding=1, dilation=2),
        case("depthwise_circular", (1, 6, 7, 8), 6, (3, 5), groups=6, padding=(2, 1), padding_mode="circular"),
        case("replicate", (1, 6, 5, 4), 7, 3, padding=(5, 1, 0, 6), padding_mode="replicate"),
        case("one_pixel", (1, 4, 1, 1), 5, 3, padding=1),
        case("no_images", (0, 4, 6, 7), 5, 3, padding=1),
        *bench_cases.conv2d(case),
    ),
    errors=_errors("conv2d"),
    flops=_flops,
    bytes=_bytes,
)

CONV2D_MAX_POOL2D = OpCases(
    name="conv2d_max_pool2d",
    op=conv2d_max_pool2d,
    reference=reference.conv2d_max_pool2d,
    peer=_pooled_peer,
    peer_package="torch",
    peer_is_native=True,
    in_eval=_in_eval(pool=True),
    operators=("conv2d",),
    cuda_operators=("conv2d", "_conv2d_backward_weight"),
    tiny=Case("per_call_overhead", _tiny),
    differentiable=("input", "weight"),
    cases=(
        case("plain", (2, 5, 9, 7), 6, 3, padding=1, activation="relu"),
        case("winograd", (1, 16, 13, 10), 19, 3, padding=1, norm=True, activation="relu"),
        case("winograd4", (1, 9, 25, 26), 6, 3, padding=1, activation="relu", l2=F4_ERROR),
        case("pointwise", (1, 12, 6, 5), 9, 1, residual=True),
        case("strided", (1, 12, 11, 14), 18, 3, stride=2, padding=1, activation="gelu"),
        case("first_layer", (1, 3, 14, 13), 17, 3, padding=1, activation="relu"),
        case("depthwise", (1, 7, 9, 10), 7, 3, groups=7, padding=1),
        *bench_cases.conv2d_max_pool2d(case),
    ),
    errors=(
        *_errors("conv2d_max_pool2d"),
        error_case(
            "conv2d_max_pool2d",
            "one_row",
            RuntimeError,
            "expected at least 2 x 2 pixels to pool",
            {"input": torch.ones(1, 2, 1, 9), "weight": torch.ones(3, 2, 1, 1)},
        ),
    ),
    flops=_flops,
    bytes=_bytes,
)


def _row_peer(input: Tensor, weight: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
    if options.get("padding_mode", "zeros") != "zeros":
        return reference.conv1d(input, weight, bias, **options)
    activation = options.pop("activation", None)
    return _activation.apply(_activation.number_of("conv1d", activation), F.conv1d(input, weight, bias, **options))


def _tiny_row(generator: torch.Generator) -> Inputs:
    return {"input": _normal(generator, 1, 3, 8), "weight": _normal(generator, 4, 3, 3), "padding": 1}


def _row_errors() -> tuple[Any, ...]:
    x, w = torch.ones(1, 4, 6), torch.ones(8, 4, 3)
    good = {"input": x, "weight": w}
    return (
        error_case("conv1d", "rank", RuntimeError, "expected input to have 3 dimensions", {**good, "input": x[0, 0]}),
        error_case("conv1d", "weight_rank", RuntimeError, "expected weight to have 3", {**good, "weight": w[0]}),
        error_case("conv1d", "stride", ValueError, "expected stride to be positive", {**good, "stride": 0}),
        error_case("conv1d", "pair", TypeError, "expected stride to be an int", {**good, "stride": (1, 1)}),
        error_case("conv1d", "padding", TypeError, "expected padding to be", {**good, "padding": (1, 1, 1, 1)}),
        error_case("conv1d", "same", ValueError, "expected stride to be 1", {**good, "padding": "same", "stride": 2}),
    )


CONV1D = OpCases(
    name="conv1d",
    op=conv1d,
    reference=reference.conv1d,
    peer=_row_peer,
    peer_package="torch",
    peer_is_native=True,
    operators=("conv2d",),
    cuda_operators=("conv2d", "_conv2d_backward_weight"),
    tiny=Case("per_call_overhead", _tiny_row),
    differentiable=("input", "weight"),
    cases=(
        case("plain", (2, 5, 19), 6, 3, padding=1),
        case("strided", (1, 12, 31), 18, 5, stride=2, padding=2, activation="relu"),
        case("same", (1, 6, 21), 8, 5, padding="same", dilation=3),
        case("grouped", (2, 8, 17), 12, 3, groups=4, padding=(2,)),
        case("depthwise", (1, 9, 20), 9, 7, groups=9, padding=3),
        case("circular", (1, 3, 9), 4, 3, padding=2, padding_mode="circular"),
        case("wav2vec", (1, 512, 1600), 512, 3, stride=2, bench="quick"),
        case("tcn", (8, 64, 1024), 64, 3, padding=1, dilation=4, bench="full"),
    ),
    errors=_row_errors(),
    flops=_flops_of_result,
    bytes=_bytes,
)


def _tiny_transposed(generator: torch.Generator) -> Inputs:
    return {"input": _normal(generator, 1, 3, 4, 4), "weight": _normal(generator, 3, 4, 2, 2), "stride": 2}


def _transposed_errors() -> tuple[Any, ...]:
    op, x, w = "conv_transpose2d", torch.ones(1, 4, 6, 6), torch.ones(4, 8, 3, 3)
    good = {"input": x, "weight": w}
    return (
        error_case(op, "channels", RuntimeError, "expected input to have the channels", {**good, "input": x[:, :3]}),
        error_case(op, "rank", RuntimeError, "expected input to have 4 dimensions", {**good, "input": x[0, 0]}),
        error_case(
            op, "output_padding", RuntimeError, "expected output_padding to be below", {**good, "output_padding": 1}
        ),
        error_case(op, "stride", ValueError, "expected stride to be positive", {**good, "stride": (0, 1)}),
        error_case(op, "no_pixel", RuntimeError, "expected an output with at least one pixel", {**good, "padding": 4}),
    )


CONV_TRANSPOSE2D = OpCases(
    name="conv_transpose2d",
    op=conv_transpose2d,
    reference=reference.conv_transpose2d,
    peer=reference.conv_transpose2d,
    peer_package="torch",
    peer_is_native=True,
    operators=("conv2d",),
    cuda_operators=("_conv2d_backward_input", "_conv2d_backward_weight"),
    tiny=Case("per_call_overhead", _tiny_transposed),
    differentiable=("input", "weight"),
    cases=(
        case("plain", (2, 5, 7, 6), 6, 3, padding=1, transposed=True),
        case("up_by_two", (1, 12, 5, 6), 8, 2, stride=2, transposed=True, activation="relu"),
        case("dcgan", (1, 8, 4, 5), 6, 4, stride=2, padding=1, transposed=True),
        case("output_padding", (1, 6, 5, 4), 9, 3, stride=2, padding=1, output_padding=1, groups=3, transposed=True),
        case("dilated", (1, 4, 5, 6), 5, (3, 2), dilation=(2, 3), stride=(1, 2), transposed=True),
        case("cropped", (1, 4, 6, 7), 5, 1, padding=1, stride=3, transposed=True),
        case("stride_1", (1, 64, 28, 28), 64, 3, padding=1, transposed=True, bench="quick", bias=False, l2=F4_ERROR),
    ),
    errors=_transposed_errors(),
    flops=_flops_of_result,
    bytes=_bytes,
)

CASES = (CONV2D, CONV2D_MAX_POOL2D, CONV1D, CONV_TRANSPOSE2D)
