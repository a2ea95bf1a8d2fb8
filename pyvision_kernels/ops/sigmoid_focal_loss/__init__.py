"""Sigmoid focal loss: schema, checks, gradient, and the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvision_kernels._check import FLOATING, require, require_tensors
from pyvision_kernels._op import declare
from pyvision_kernels.ops.sigmoid_focal_loss.double_backward import second_derivatives

NONE, MEAN, SUM = range(3)
REDUCTIONS = {"none": NONE, "mean": MEAN, "sum": SUM}


def _check(inputs: Tensor, targets: Tensor, op: str = "sigmoid_focal_loss") -> None:
    if targets.size() != inputs.size():  # torch's words
        raise ValueError(f"Target size ({targets.size()}) must be the same as input size ({inputs.size()})")
    for name, tensor in (("inputs", inputs), ("targets", targets)):
        if tensor.dtype not in FLOATING:
            raise NotImplementedError(
                f"{op}: expected {name} to be float16, bfloat16, float32 or float64, but got {tensor.dtype}"
            )
    require(targets.device == inputs.device, op, "targets to be on the device of inputs", targets.device)


def _fake(inputs, targets, alpha, gamma, reduction):
    _check(inputs, targets)
    return torch.empty_like(inputs) if reduction == NONE else inputs.new_empty(())


def _fake_backward(grad, inputs, targets, alpha, gamma, reduction, needs_inputs, needs_targets):
    return tuple(
        torch.empty_like(inputs) if needed else inputs.new_empty((0,)) for needed in (needs_inputs, needs_targets)
    )


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.options = inputs[2:]


def _plain(grad: Tensor) -> Tensor:
    """Contiguous, or one value for all, as the gradient of a sum is."""
    single = all(stride == 0 or size == 1 for size, stride in zip(grad.shape, grad.stride(), strict=True))
    return grad if single else grad.contiguous()


def _backward(ctx, grad):
    inputs, targets = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    grads = sigmoid_focal_loss_backward_op(_plain(grad), inputs, targets, *ctx.options, *needs)
    return *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), None, None, None


def _setup_double(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _backward_double(ctx, by_input, by_target):
    # The backward is grad * (dL/dx, dL/dt); torch differentiates that product.
    grad, inputs, targets = ctx.saved_tensors
    alpha, gamma, reduction, *needs = ctx.options
    if reduction == MEAN:
        grad = grad / inputs.numel()
    by_input, by_target = (
        torch.zeros_like(inputs) if given is None or not needed else given
        for given, needed in zip((by_input, by_target), needs, strict=True)
    )
    x, t, xx, xt, tt = second_derivatives(inputs, targets, alpha, gamma)
    to_grad = by_input * x + by_target * t
    if reduction != NONE:
        to_grad = to_grad.mean() if reduction == MEAN else to_grad.sum()
    to_inputs = grad * (by_input * xx + by_target * xt)
    to_targets = grad * (by_input * xt + by_target * tt)
    return to_grad, to_inputs, to_targets, *(None,) * 5


def _moved(tensors, in_dims, size):
    return [
        (tensor.movedim(dim, 0) if dim is not None else tensor.expand(size, *tensor.shape)).contiguous()
        for tensor, dim in zip(tensors, in_dims, strict=False)
    ]


def _vmap(info, in_dims, inputs, targets, alpha, gamma, reduction):
    loss = sigmoid_focal_loss_op(*_moved((inputs, targets), in_dims, info.batch_size), alpha, gamma, NONE)
    if reduction == NONE:
        return loss, 0
    loss = loss.flatten(1) if loss.dim() > 1 else loss.unsqueeze(1)
    return (loss.mean(1) if reduction == MEAN else loss.sum(1)), 0


def _vmap_backward(info, in_dims, grad, inputs, targets, alpha, gamma, reduction, *needs):
    grad, inputs, targets = _moved((grad, inputs, targets), in_dims, info.batch_size)
    if reduction != NONE:
        count = inputs[0].numel() if reduction == MEAN else 1
        grad = (grad / count).view(-1, *(1,) * (inputs.dim() - 1)).expand(inputs.shape).contiguous()
    grads = sigmoid_focal_loss_backward_op(grad, inputs, targets, alpha, gamma, NONE, *needs)
    absent = inputs.new_empty((info.batch_size, 0))
    return tuple(given if needed else absent for given, needed in zip(grads, needs, strict=True)), (0, 0)


def _cast(*args):
    # As torch: the cross entropy, and what is multiplied with it, in float32.
    return tuple(
        arg.float() if isinstance(arg, Tensor) and arg.dtype in (torch.float16, torch.bfloat16) else arg for arg in args
    )


sigmoid_focal_loss_backward_op = declare(
    "_sigmoid_focal_loss_backward(Tensor grad, Tensor inputs, Tensor targets, float alpha, float gamma, "
    "int reduction, bool needs_inputs, bool needs_targets) -> (Tensor, Tensor)",
    fake=_fake_backward,
    setup_context=_setup_double,
    backward=_backward_double,
    autocast=_cast,
    vmap=_vmap_backward,
)

sigmoid_focal_loss_op = declare(
    "sigmoid_focal_loss(Tensor inputs, Tensor targets, float alpha, float gamma, int reduction) -> Tensor",
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    autocast=_cast,
    vmap=_vmap,
)


def sigmoid_focal_loss(
    inputs: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2, reduction: str = "none"
) -> Tensor:
    """Focal loss of binary labels: cross entropy, with what is classified well weighing less.

    ``alpha_t * (1 - p_t)^gamma * cross_entropy`` with ``p = sigmoid(inputs)``. Matches
    `torchvision.ops.sigmoid_focal_loss` in one pass without temporaries, in float32 inside for 16-bit types; where
    torchvision's gradient is NaN by 0 / 0 (``1 - p_t`` of 0 and ``gamma`` below 1) it is 0.

    Args:
        inputs (Tensor[...]): Logits of any shape; float16, bfloat16, float32 or float64; any strides.
        targets (Tensor[...]): 0, 1 or between, of the same shape; of another floating dtype, both are promoted.
        alpha (float): Weight of the positive class, in [0, 1]; -1: no weights. Default: 0.25.
        gamma (float): Exponent. Default: 2.
        reduction (str): ``"none"``, ``"mean"`` or ``"sum"``. Default: ``"none"``.

    Returns:
        Tensor of the shape and memory order of ``inputs``, or of no dimension; dtype of ``inputs``.

    Raises:
        ValueError: ``alpha`` or ``reduction`` is none of these, or the sizes differ.
        RuntimeError: devices differ.
        NotImplementedError: a Tensor is of another dtype.
        TypeError: an argument is not a Tensor.

    Note: deterministic forward and backward. Double backward is composite.
    Reference: Lin et al., Focal Loss for Dense Object Detection, 2017.
    """
    if not (0 <= alpha <= 1) and alpha != -1:  # torchvision's words, here and below
        raise ValueError(f"Invalid alpha value: {alpha}. alpha must be in the range [0,1] or -1 for ignore.")
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"Invalid Value for arg 'reduction': '{reduction} \n Supported reduction modes: 'none', 'mean', 'sum'"
        )
    require_tensors("sigmoid_focal_loss", inputs=inputs, targets=targets)
    _check(inputs, targets)
    if inputs.dtype != targets.dtype:
        dtype = torch.promote_types(inputs.dtype, targets.dtype)
        inputs, targets = inputs.to(dtype), targets.to(dtype)
    if inputs.is_contiguous() and targets.is_contiguous():
        return sigmoid_focal_loss_op(inputs, targets, alpha, gamma, REDUCTIONS[reduction])
    # In the memory order of inputs.
    strides = inputs.stride()
    order = sorted(range(inputs.dim()), key=lambda dim: -strides[dim])
    inputs, targets = inputs.permute(order).contiguous(), targets.permute(order).contiguous()
    loss = sigmoid_focal_loss_op(inputs, targets, alpha, gamma, REDUCTIONS[reduction])
    return loss.permute([order.index(dim) for dim in range(len(order))]) if reduction == "none" else loss
