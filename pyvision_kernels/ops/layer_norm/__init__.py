"""Layer normalisation: schema, checks, gradient, the rule of `auto`, and the public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyvision_kernels._backend import CHOICE
from pyvision_kernels._check import require
from pyvision_kernels._norm import (
    HALF,
    batched,
    cast_as_torch,
    check_input,
    check_residual,
    check_vectors,
    dense,
    fits,
    is_small,
    is_uniform,
    one_by_one,
    opmath,
    require_all_tensors,
)
from pyvision_kernels._op import Op, declare
from pyvision_kernels.ops.layer_norm import reference

_OP = "layer_norm"
_WHOLE = (int, torch.SymInt)


def _check(input: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, shape: Any) -> None:
    require(
        len(shape) >= 1 and tuple(input.shape[max(input.dim() - len(shape), 0) :]) == tuple(shape),
        _OP,
        f"input to have a size that ends in normalized_shape, at least one size, which is {list(shape)}",
        input.shape,
    )
    check_input(_OP, input)
    if residual is not None:
        check_residual(_OP, residual, input)
    check_vectors(_OP, input, shape, weight=weight, bias=bias)


def _fake(input, residual, weight, bias, dims, eps):
    _check(input, residual, weight, bias, input.shape[input.dim() - dims :])
    rows = input.shape[: input.dim() - dims].numel()
    total = torch.empty_like(input) if residual is not None else input.new_empty((0,))
    return torch.empty_like(input), total, input.new_empty((2, rows), dtype=opmath(input.dtype))


def _fake_backward(grad, grad_sum, input, stats, weight, bias, dims, *needs):
    made = zip((input, weight, bias), needs, strict=True)
    return tuple(torch.empty_like(like) if needed else input.new_empty((0,)) for like, needed in made)


def _setup(ctx, inputs, output):
    input, residual, weight, bias, ctx.dims, _ = inputs
    _, total, stats = output
    ctx.save_for_backward(input if residual is None else total, stats, weight, bias)
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.has_sum = residual is not None


def _backward(ctx, grad, grad_sum, _):
    x, stats, weight, bias = ctx.saved_tensors
    grad_sum = grad_sum if ctx.has_sum else None
    needs_input, needs_residual, needs_weight, needs_bias = ctx.needs_input_grad[:4]
    if grad is None:  # of the sum alone
        return grad_sum, grad_sum, None, None, None, None
    needs = (needs_input or needs_residual, needs_weight, needs_bias)
    grad, grad_sum = dense(grad), dense(grad_sum) if needs[0] else None
    if torch.is_grad_enabled():  # PyTorch's is differentiable again
        shape = x.shape[x.dim() - ctx.dims :]
        mean, rstd = (part.view(*x.shape[: x.dim() - ctx.dims], *(1,) * ctx.dims) for part in stats)
        grads = torch.ops.aten.native_layer_norm_backward(grad, x, shape, mean, rstd, weight, bias, needs)
        by_input = grads[0] if grad_sum is None or not needs[0] else grads[0] + grad_sum
        by_weight, by_bias = grads[1:]
    else:
        by_input, by_weight, by_bias = layer_norm_backward_op(grad, grad_sum, x, stats, weight, bias, ctx.dims, *needs)
    return (
        by_input if needs_input else None,
        by_input if needs_residual else None,
        by_weight if needs_weight else None,
        by_bias if needs_bias else None,
        None,
        None,
    )


def _vmap(info, in_dims, input, residual, weight, bias, dims, eps):
    if in_dims[2] is not None or in_dims[3] is not None:
        return one_by_one(layer_norm_op)(info, in_dims, input, residual, weight, bias, dims, eps)
    input = batched(input, in_dims[0], info.batch_size)
    residual = batched(residual, in_dims[1], info.batch_size)
    output, total, stats = layer_norm_op(input, residual, weight, bias, dims, eps)
    if residual is None:
        total = total.expand(info.batch_size, 0)
    return (output, total, stats.unflatten(1, (info.batch_size, -1)).movedim(1, 0)), (0, 0, 0)


def _vmap_backward(info: Any, in_dims: Any, *args: Any) -> Any:
    return one_by_one(layer_norm_backward_op)(info, in_dims, *args)


layer_norm_backward_op: Op = declare(
    "_layer_norm_backward(Tensor grad, Tensor? grad_sum, Tensor input, Tensor stats, Tensor? weight, Tensor? bias, "
    "int dims, bool needs_input, bool needs_weight, bool needs_bias) -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    vmap=_vmap_backward,
)

layer_norm_op = declare(
    "layer_norm(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, int dims, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    autocast=cast_as_torch,
    vmap=_vmap,
)


# Elements below which the call takes longer than its work, without and with gradients; of 16 bits.
_SMALL, _SMALL_HALF = (1 << 16, 1 << 20), (1 << 16, 1 << 18)


def torch_is_faster(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """By what was measured: on few rows. On CUDA ours has not been timed."""
    is_fast = input.is_cuda or is_small(input, weight, *(_SMALL_HALF if input.dtype in HALF else _SMALL))
    return is_fast and is_uniform(input, weight, bias)


def run(
    input: Tensor,
    shape: tuple[int, ...],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
) -> Any:
    """layer_norm of arguments whose types are right, by the kernel that the rule picks."""
    if not (
        shape
        and input.shape[-len(shape) :] == shape
        and fits(input, shape, weight)
        and fits(input, shape, bias)
        and (residual is None or fits(input, input.shape, residual))
    ):
        _check(input, residual, weight, bias, shape)  # float32 beside 16 bits, or an error
    mode = CHOICE.backend
    if mode == "torch" or (mode == "auto" and torch_is_faster(input, weight, bias)):
        return reference.layer_norm(input, shape, weight, bias, eps, residual=residual)
    output, total, _ = layer_norm_op(dense(input), dense(residual), dense(weight), dense(bias), len(shape), eps)
    return output if residual is None else (output, total)


def layer_norm(
    input: Tensor,
    normalized_shape: int | Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
) -> Any:
    """Normalises over the last dimensions, of the sum with a residual where one is given.

    ``(x - mean) / sqrt(variance + eps) * weight + bias`` with the mean and the biased variance of each row. Matches
    `torch.nn.functional.layer_norm`. With a residual, x is ``input + residual`` as its dtype rounds it, and that sum,
    which the residual stream goes on with, is returned too. Statistics are in float32 for 16-bit types.

    Args:
        input (Tensor[..., *normalized_shape]): float16, bfloat16, float32 or float64; any strides.
        normalized_shape (int or ints): The last sizes of input.
        weight (Tensor[*normalized_shape]): Of input's dtype, or float32 beside a 16-bit input.
        bias (Tensor[*normalized_shape]): The same; of weight's dtype.
        eps (float): Added to the variance. Default: 1e-5.
        residual (Tensor): Of input's size and dtype.

    Returns:
        Tensor of input's size and dtype, contiguous; with a residual (output, input + residual).

    Raises:
        RuntimeError: sizes, dtypes or devices do not fit each other.
        NotImplementedError: ``input`` is of another dtype.
        TypeError: an argument is not a Tensor, or ``normalized_shape`` not of ints.

    Note: deterministic forward and backward; a row's result does not depend on other rows. Double backward is
        PyTorch's.
    Reference: Ba et al., Layer Normalization, 2016.
    """
    require_all_tensors(_OP, input=input, weight=weight, bias=bias, residual=residual)
    shape: Any = (normalized_shape,) if isinstance(normalized_shape, _WHOLE) else tuple(normalized_shape)
    for size in shape:
        if not isinstance(size, _WHOLE):
            raise TypeError(f"{_OP}: expected normalized_shape to be ints, but got {normalized_shape}")
    return run(input, shape, weight, bias, eps, residual)
