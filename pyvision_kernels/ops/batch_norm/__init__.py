"""Batch normalisation: schema, checks, gradient, running statistics, the rule of `auto`, and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyvision_kernels import _activation
from pyvision_kernels._backend import CHOICE
from pyvision_kernels._check import require
from pyvision_kernels._norm import (
    HALF,
    as_map,
    check_input,
    check_residual,
    check_vectors,
    dense,
    each_gradient,
    each_map,
    fake_gradients,
    gradients,
    is_uniform,
    laid_out,
    opmath,
    require_all_tensors,
    wide,
)
from pyvision_kernels._op import Op, declare

_OP = "batch_norm"


def _check(input, residual, weight, bias, running_mean, running_var, training) -> None:
    require(input.dim() >= 2, _OP, "input to have at least 2 dimensions [N, C, ...]", input.shape)
    check_input(_OP, input)
    if residual is not None:
        check_residual(_OP, residual, input)
    size = (input.shape[1],)
    check_vectors(_OP, input, size, weight=weight, bias=bias)
    check_vectors(_OP, input, size, running_mean=running_mean, running_var=running_var)
    require(
        training or (running_mean is not None and running_var is not None),
        _OP,
        "running_mean and running_var to be Tensors when training is False",
        None,
    )


def _fake(input, residual, weight, bias, running_mean, running_var, training, eps, activation):
    _check(input, residual, weight, bias, running_mean, running_var, training)
    return torch.empty_like(input), input.new_empty((3, input.shape[1]), dtype=opmath(input.dtype))


def _setup(ctx, inputs, output):
    input, residual, weight, bias, running_mean, running_var, ctx.training, ctx.eps, ctx.activation = inputs
    result, stats = output
    by_input = _activation.needs_input(ctx.activation)
    result = result if ctx.activation != 0 and not by_input else None
    ctx.bias_dtype = None if bias is None else bias.dtype
    rest = (residual, bias) if by_input else (None, None)
    if not ctx.training:  # they may move before the backward
        running_mean, running_var = running_mean.detach().clone(), running_var.detach().clone()
    ctx.save_for_backward(input, *rest, weight, running_mean, running_var, result, stats)
    ctx.mark_non_differentiable(stats)


def _backward(ctx, grad, _):
    input, residual, bias, weight, mean, var, result, stats = ctx.saved_tensors

    def normalize():
        return batch_norm_op(*map(wide, (input, residual, weight, bias, mean, var)), ctx.training, ctx.eps, 0)[0]

    def differentiable(grad):  # PyTorch's is
        needs = [ctx.needs_input_grad[i] for i in (0, 2, 3)]
        return torch.ops.aten.native_batch_norm_backward(
            grad, input, weight, mean, var, stats[0], stats[1], ctx.training, ctx.eps, needs
        )

    given = input, result, stats, weight, ctx.training
    found = gradients(ctx, grad, *given, batch_norm_backward_op, normalize, differentiable)
    return *found, None, None, None, None, None


def _vmap(*args: Any) -> Any:
    return each_map(batch_norm_op)(*args)


def _vmap_backward(*args: Any) -> Any:
    return each_gradient(batch_norm_backward_op)(*args)


batch_norm_backward_op: Op = declare(
    "_batch_norm_backward(Tensor grad, Tensor input, Tensor? output, Tensor stats, Tensor? weight, Tensor? bias, "
    "bool training, int activation, bool needs_input, bool needs_residual, bool needs_weight, bool needs_bias) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=fake_gradients,
    vmap=_vmap_backward,
)

batch_norm_op: Op = declare(
    "batch_norm(Tensor input, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? running_mean, "
    "Tensor? running_var, bool training, float eps, int activation) -> (Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    vmap=_vmap,
)


# Elements from which on ours were measured faster than PyTorch's: below, the call takes longer than the kernel.
_LEAST, _LEAST_WITH_GRADIENT, _LEAST_OF_SCALAR = 2**18, 2**19, 2**15
_FEW_CHANNELS = 8


def is_for_torch(input: Tensor, weight: Tensor | None, training: bool) -> bool:
    """Whether PyTorch's kernels run: `pvk.backend` says so, or with "auto" where they were measured faster.

    PyTorch's are scalar for contiguous maps in training, but for 16-bit types, and for few channels in channels_last.
    """
    if CHOICE.backend != "auto":
        return CHOICE.backend == "torch"
    if input.is_cuda:  # ours are not yet measured there; they are deterministic
        return not torch.are_deterministic_algorithms_enabled()
    if torch.compiler.is_compiling():  # no guard on sizes
        return False
    count = input.numel()
    if count >= _LEAST_WITH_GRADIENT:
        return False
    if count >= _LEAST_OF_SCALAR and input.dim() > 2:
        if input.is_contiguous():
            if training and input.dtype not in HALF:
                return False
        elif input.shape[1] <= _FEW_CHANNELS:
            return False
    trains = input.requires_grad or (weight is not None and weight.requires_grad)
    return count < (_LEAST_WITH_GRADIENT if trains and torch.is_grad_enabled() else _LEAST)


def run(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    """batch_norm of arguments whose types are right, by the kernel that the rule picks."""
    arguments = input, running_mean, running_var, weight, bias, training, momentum, eps, residual, activation
    if torch.compiler.is_compiling():
        _check(input, residual, weight, bias, running_mean, running_var, training)
        return _run(*arguments)
    try:
        return _run(*arguments)
    except (RuntimeError, TypeError, NotImplementedError, IndexError):
        _check(input, residual, weight, bias, running_mean, running_var, training)
        raise


def _run(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor:
    count = input.numel()
    if eps <= 0 and (training or eps < 0):
        least = "positive when training" if training else "non-negative"
        raise ValueError(f"{_OP}: expected eps to be {least}, but got {eps}")
    if training and count > 0 and count == input.shape[1]:
        raise ValueError(
            f"{_OP}: expected input to have more than 1 value per channel when training, but got input size "
            f"{list(input.shape)}"
        )
    if running_mean is None or running_var is None:
        if running_mean is not running_var:
            raise ValueError(f"{_OP}: expected running_mean and running_var to both be None or Tensors, but got one")
        if not training:
            _check(input, residual, weight, bias, running_mean, running_var, training)
    elif input.dim() > 1 and (
        running_mean.shape != input.shape[1:2]
        or running_var.shape != running_mean.shape
        or running_mean.device != input.device
        or running_var.device != input.device
        or running_mean.dtype is not running_var.dtype
        or running_mean.dtype is not input.dtype
    ):
        _check(input, residual, weight, bias, running_mean, running_var, training)
    # Of an empty map PyTorch's result is empty too, and no statistics are updated.
    is_torchs = is_for_torch(input, weight, training)
    if is_torchs and CHOICE.backend == "auto":
        is_torchs = is_uniform(input, weight, bias, running_mean, running_var)
    if count == 0 or is_torchs:
        if residual is not None:  # else PyTorch checks
            _check(input, residual, weight, bias, running_mean, running_var, training)
        out = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        if residual is not None:
            out = out + residual
        return out if activation is None else _activation.FUNCTIONS[activation](out)
    if not input.is_contiguous():
        input = laid_out(input)
    if residual is not None:
        residual = as_map(input, residual)
    number = _activation.NUMBERS[activation]
    if not training:
        kept = dense(running_mean), dense(running_var)
        return batch_norm_op(input, residual, dense(weight), dense(bias), *kept, False, eps, number)[0]
    output, stats = batch_norm_op(input, residual, dense(weight), dense(bias), None, None, True, eps, number)
    if running_mean is not None and running_var is not None:
        mean, _, var = stats.to(running_mean.dtype).unbind()
        with torch.no_grad():
            running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)  # of an infinity lerp_ makes NaN
            running_var.mul_(1 - momentum).add_(var, alpha=momentum)
    return output


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Normalises each channel over the batch, with a residual and an activation in the same pass.

    ``activation((input - mean) / sqrt(variance + eps) * weight + bias + residual)``, in training with the mean and the
    biased variance of the batch, else with the running ones. In training the running ones move to the batch's mean and
    unbiased variance by ``momentum``, in place. Matches `torch.nn.functional.batch_norm`; statistics, and what comes
    after them, are in float32 for 16-bit types, and rounded once.

    Args:
        input (Tensor[N, C, ...]): float16, bfloat16, float32 or float64; any strides.
        running_mean (Tensor[C]): Of input's dtype, or float32 beside a 16-bit input; None: not tracked.
        running_var (Tensor[C]): The same.
        weight (Tensor[C]): Of input's dtype, or float32 beside a 16-bit input.
        bias (Tensor[C]): Of weight's dtype.
        training (bool): Whether the batch's statistics are used, and tracked. Default: False.
        momentum (float): Of the running statistics. Default: 0.1.
        eps (float): Added to the variance. Default: 1e-5.
        residual (Tensor): Added before the activation; of input's size and dtype.
        activation (str): ``"relu"``, ``"relu6"``, ``"hardswish"``, ``"silu"``, ``"gelu"``, ``"sigmoid"`` or None.

    Returns:
        Tensor of input's size and dtype; channels_last where input is, else contiguous.

    Raises:
        RuntimeError: sizes, dtypes or devices do not fit each other.
        ValueError: one value a channel in training, ``eps`` or ``activation`` is not to be had.
        NotImplementedError: ``input`` is of another dtype.
        TypeError: an argument is not a Tensor.

    Note: deterministic forward and backward. Double backward is PyTorch's.
    Reference: Ioffe and Szegedy, Batch Normalization, 2015.
    """
    require_all_tensors(
        _OP,
        input=input,
        running_mean=running_mean,
        running_var=running_var,
        weight=weight,
        bias=bias,
        residual=residual,
    )
    _activation.number_of(_OP, activation)
    return run(input, running_mean, running_var, weight, bias, training, momentum, eps, residual, activation)
