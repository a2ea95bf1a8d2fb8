"""Group normalisation: schema, checks, gradient, the rule of `auto`, and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyvision_kernels import _activation
from pyvision_kernels._backend import CHOICE
from pyvision_kernels._check import require
from pyvision_kernels._norm import (
    as_map,
    batched,
    cast_as_torch,
    check_input,
    check_residual,
    check_vectors,
    dense,
    each_gradient,
    each_map,
    fake_gradients,
    fits,
    gradients,
    is_small,
    is_uniform,
    laid_out,
    opmath,
    require_all_tensors,
    wide,
)
from pyvision_kernels._op import Op, declare
from pyvision_kernels.ops.group_norm import reference

_OP = "group_norm"


def _check(input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, groups: int) -> None:
    require(input.dim() >= 2, _OP, "input to have at least 2 dimensions [N, C, ...]", input.shape)
    check_input(_OP, input)
    channels = input.shape[1]
    for size in input.shape[1:]:
        require(size > 0, _OP, "input to have no empty dimension but the batch", input.shape)
    require(groups >= 1 and channels % groups == 0, _OP, f"num_groups to divide {channels} channels", groups)
    if residual is not None:
        check_residual(_OP, residual, input)
    check_vectors(_OP, input, (channels,), weight=weight, bias=bias)


def _fake(input, residual, weight, bias, groups, eps, activation):
    _check(input, residual, weight, bias, groups)
    return torch.empty_like(input), input.new_empty((2, input.shape[0], groups), dtype=opmath(input.dtype))


def _setup(ctx, inputs, output):
    input, residual, weight, bias, ctx.groups, ctx.eps, ctx.activation = inputs
    result, stats = output
    by_input = _activation.needs_input(ctx.activation)
    result = result if ctx.activation != 0 and not by_input else None
    ctx.bias_dtype = None if bias is None else bias.dtype
    rest = (residual, bias) if by_input else (None, None)
    ctx.save_for_backward(input, *rest, weight, result, stats)
    ctx.mark_non_differentiable(stats)


def _backward(ctx, grad, _):
    input, residual, bias, weight, result, stats = ctx.saved_tensors

    def normalize():
        return group_norm_op(*map(wide, (input, residual, weight, bias)), ctx.groups, ctx.eps, 0)[0]

    def differentiable(grad):
        size = (input.shape[0], ctx.groups, -1)
        x, g = wide(input).reshape(size), wide(grad).reshape(*input.shape[:2], -1)
        x = x - x.mean(-1, keepdim=True)
        rstd = (x.square().mean(-1, keepdim=True) + ctx.eps).rsqrt()
        y = x * rstd
        weighed = (g if weight is None else g * wide(weight)[:, None]).reshape(size)
        slope = weighed - weighed.mean(-1, keepdim=True) - y * (weighed * y).mean(-1, keepdim=True)
        by_input = (slope * rstd).reshape(input.shape).to(input.dtype)
        by_weight = None if weight is None else (g * y.reshape(g.shape)).sum((0, 2)).to(weight.dtype)
        by_bias = None if ctx.bias_dtype is None else g.sum((0, 2)).to(ctx.bias_dtype)
        return by_input, by_weight, by_bias

    given = input, result, stats, weight, ctx.groups
    found = gradients(ctx, grad, *given, group_norm_backward_op, normalize, differentiable)
    return *found, None, None, None


def _vmap(info, in_dims, input, residual, weight, bias, groups, eps, activation):
    if in_dims[2] is not None or in_dims[3] is not None:
        given = input, residual, weight, bias, groups, eps, activation
        return each_map(group_norm_op)(info, in_dims, *given)
    # Samples are normalised by themselves: those of all items are one batch.
    many: Any = batched(input, in_dims[0], info.batch_size)
    rest = batched(residual, in_dims[1], info.batch_size)
    rest = None if rest is None else rest.flatten(0, 1)
    output, stats = group_norm_op(many.flatten(0, 1), rest, weight, bias, groups, eps, activation)
    size = many.shape[:2]
    return (output.unflatten(0, size), stats.unflatten(1, size).movedim(1, 0)), (0, 0)


def _vmap_backward(*args: Any) -> Any:
    return each_gradient(group_norm_backward_op)(*args)


group_norm_backward_op: Op = declare(
    "_group_norm_backward(Tensor grad, Tensor input, Tensor? output, Tensor stats, Tensor? weight, Tensor? bias, "
    "int groups, int activation, bool needs_input, bool needs_residual, bool needs_weight, bool needs_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=fake_gradients,
    vmap=_vmap_backward,
)

group_norm_op = declare(
    "group_norm(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, int groups, float eps, int activation) "
    "-> (Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    autocast=cast_as_torch,
    vmap=_vmap,
)


# Elements below which the call takes longer than its work, without and with gradients; of channels_last.
_SMALL, _SMALL_ROWS = (1 << 16, 1 << 20), (1 << 15, 1 << 18)


def torch_is_faster(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """By what was measured: on small maps. On CUDA ours has not been timed."""
    is_fast = input.is_cuda or is_small(input, weight, *(_SMALL if input.is_contiguous() else _SMALL_ROWS))
    return is_fast and is_uniform(input, weight, bias)


def run(
    input: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    """group_norm of arguments whose types are right, by the kernel that the rule picks."""
    size = input.shape[1:2]
    if not (
        len(size) == 1
        and input.numel() > 0
        and groups >= 1
        and size[0] % groups == 0
        and fits(input, size, weight)
        and fits(input, size, bias)
        and (residual is None or fits(input, input.shape, residual))
    ):
        _check(input, residual, weight, bias, groups)  # float32 beside 16 bits, or an error
    mode = CHOICE.backend
    if mode == "torch" or (mode == "auto" and torch_is_faster(input, weight, bias)) or input.numel() == 0:
        return reference.group_norm(input, groups, weight, bias, eps, residual=residual, activation=activation)
    input = laid_out(input)
    if residual is not None:
        residual = as_map(input, residual)
    number = _activation.NUMBERS[activation]
    return group_norm_op(input, residual, dense(weight), dense(bias), groups, eps, number)[0]


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Normalises groups of channels of each sample, with a residual and an activation in the same pass.

    ``activation((input - mean) / sqrt(variance + eps) * weight + bias + residual)`` with the mean and the biased
    variance of all pixels of a sample in the channels of a group. Matches `torch.nn.functional.group_norm`; statistics,
    and what comes after them, are in float32 for 16-bit types, and rounded once.

    Args:
        input (Tensor[N, C, ...]): float16, bfloat16, float32 or float64; any strides.
        num_groups (int): Groups of neighbouring channels; divides C.
        weight (Tensor[C]): Of input's dtype, or float32 beside a 16-bit input.
        bias (Tensor[C]): The same; of weight's dtype.
        eps (float): Added to the variance. Default: 1e-5.
        residual (Tensor): Added before the activation; of input's size and dtype.
        activation (str): ``"relu"``, ``"relu6"``, ``"hardswish"``, ``"silu"``, ``"gelu"``, ``"sigmoid"`` or None.

    Returns:
        Tensor of input's size and dtype; channels_last where input is, else contiguous.

    Raises:
        RuntimeError: sizes, dtypes or devices do not fit each other.
        ValueError: ``activation`` is none of these.
        NotImplementedError: ``input`` is of another dtype.
        TypeError: an argument is not a Tensor, or ``num_groups`` not an int.

    Note: deterministic forward and backward; a sample's result does not depend on other samples. Double backward is by
        PyTorch's operators.
    Reference: Wu and He, Group Normalization, 2018.
    """
    require_all_tensors(_OP, input=input, weight=weight, bias=bias, residual=residual)
    if not isinstance(num_groups, int | torch.SymInt):
        raise TypeError(f"{_OP}: expected num_groups to be an int, but got {num_groups}")
    _activation.number_of(_OP, activation)
    return run(input, num_groups, weight, bias, eps, residual, activation)
