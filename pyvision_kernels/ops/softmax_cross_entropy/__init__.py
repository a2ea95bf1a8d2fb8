"""Softmax cross entropy: schema, checks, gradient, and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyvision_kernels._backend import CHOICE
from pyvision_kernels._check import FLOATING, require, require_tensors
from pyvision_kernels._norm import check_input, check_vectors, one_by_one, opmath
from pyvision_kernels._op import Op, declare
from pyvision_kernels.ops.softmax_cross_entropy import reference

_OP = "softmax_cross_entropy"
NONE, MEAN, SUM = range(3)
REDUCTIONS = {"none": NONE, "mean": MEAN, "sum": SUM}
_MOST_CLASSES = 2**31 - 1
_MANY_CLASSES = 4096  # that lie apart are laid together first: a tile of them is larger than a cache


def _positions(input: Tensor) -> list[Any]:
    """The size of a loss that is not reduced."""
    return [size for i, size in enumerate(input.shape) if i != (0 if input.dim() == 1 else 1)]


def _check(input: Tensor, target: Tensor, weight: Tensor | None, op: str = _OP) -> None:
    require(input.dim() >= 1, op, "input to have dimensions [C], [N, C] or [N, C, ...]", input.shape)
    check_input(op, input)
    classes = input.shape[0 if input.dim() == 1 else 1]
    require(classes > 0, op, "input to have at least one class", input.shape)
    require(classes <= _MOST_CLASSES, op, f"input to have at most {_MOST_CLASSES} classes", classes)
    if target.is_floating_point():
        require(target.shape == input.shape, op, f"target to have size {list(input.shape)} of input", target.shape)
        require(target.dtype == input.dtype, op, f"target to be int64, or {input.dtype} as input is", target.dtype)
    else:
        size = _positions(input)
        fits = list(target.shape) == size
        require(fits, op, f"target to have the size of input, {list(input.shape)}, without its classes", target.shape)
        require(target.dtype == torch.int64, op, "target to be int64, uint8 or probabilities", target.dtype)
    require(target.device == input.device, op, f"target to be on {input.device} as input is", target.device)
    check_vectors(op, input, (classes,), weight=weight)


def _fake(input, target, weight, ignore_index, reduction, smoothing, in_single):
    _check(input, target, weight)
    positions = _positions(input)
    loss = input.new_empty(positions if reduction == NONE else (), dtype=torch.float32 if in_single else input.dtype)
    count = torch.empty(positions, device="meta").numel()
    return loss, input.new_empty((2 * count + 1,), dtype=opmath(input.dtype))


def _fake_backward(grad, input, target, weight, stats, ignore_index, reduction, smoothing, needs_input, needs_target):
    absent = (0,)
    return tuple(
        torch.empty_like(input) if needed else input.new_empty(absent) for needed in (needs_input, needs_target)
    )


def _setup(ctx, inputs, output):
    input, target, weight, *ctx.options, _ = inputs
    ctx.save_for_backward(input, target, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 7
    input, target, weight, stats = ctx.saved_tensors
    needs = ctx.needs_input_grad[:2]
    if torch.is_grad_enabled():  # differentiable again
        grads = _composite(grad, input, target, weight, stats[-1], *ctx.options)
    else:
        grads = softmax_cross_entropy_backward_op(grad.contiguous(), input, target, weight, stats, *ctx.options, *needs)
    return *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), *(None,) * 5


def _composite(
    grad: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    total: Tensor,
    ignore_index: int,
    reduction: int,
    smoothing: float,
) -> tuple[Tensor, Tensor]:
    """The gradients in PyTorch's operators."""
    logits = input if input.dim() == 1 else input.movedim(1, -1)
    q, _, counts = reference.wanted(input, target, weight, ignore_index, smoothing)
    scale = (grad / total if reduction == MEAN else grad).to(input.dtype)
    scale = scale.unsqueeze(-1).where(counts.unsqueeze(-1), 0.0)
    by_input = scale * (logits.softmax(-1) * q.sum(-1, keepdim=True) - q)
    by_target = -scale * (1 - smoothing) * logits.log_softmax(-1)
    if weight is not None:
        by_target = by_target * weight.to(input.dtype)
    last = input.dim() - 1
    return (by_input, by_target) if last == 0 else (by_input.movedim(last, 1), by_target.movedim(last, 1))


softmax_cross_entropy_backward_op: Op = declare(
    "_softmax_cross_entropy_backward(Tensor grad, Tensor input, Tensor target, Tensor? weight, Tensor stats, "
    "int ignore_index, int reduction, float label_smoothing, bool needs_input, bool needs_target) "
    "-> (Tensor, Tensor)",
    fake=_fake_backward,
    vmap=lambda info, in_dims, *args: one_by_one(softmax_cross_entropy_backward_op)(info, in_dims, *args),
)

softmax_cross_entropy_op: Op = declare(
    "softmax_cross_entropy(Tensor input, Tensor target, Tensor? weight, int ignore_index, int reduction, "
    "float label_smoothing, bool in_single) -> (Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    # As torch the loss is float32; 16-bit logits are read as they are.
    autocast=lambda *args: (*args[:-1], args[0].dtype != torch.float64),
    vmap=lambda info, in_dims, *args: one_by_one(softmax_cross_entropy_op)(info, in_dims, *args),
)


def _has_classes_last(input: Tensor) -> bool:
    return input.dim() > 1 and not input.is_contiguous() and input.movedim(1, -1).is_contiguous()


def _like(tensor: Tensor, classes_last: bool) -> Tensor:
    """Contiguous, or with the classes of a position next to each other."""
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if classes_last else tensor.contiguous()


def softmax_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy of logits against labels or probabilities of classes.

    ``- sum over c of q_c * log softmax(input)_c`` with ``q_c = weight_c * ((1 - label_smoothing) * t_c +
    label_smoothing / C)``, t_c 1 of the label and 0 of the others, or the probability. Matches
    `torch.nn.functional.cross_entropy`, with one pass over the logits forward and one backward, in float32 inside for
    16-bit types. Under autocast the loss of 16-bit logits is float32 without a copy of them.

    Args:
        input (Tensor[C], [N, C] or [N, C, ...]): Logits; float16, bfloat16, float32 or float64; any strides.
        target (Tensor[], [N] or [N, ...], int64 or uint8; or of input's size): Labels in [0, C); or probabilities,
            which are promoted with ``input`` to one dtype.
        weight (Tensor[C]): Of the classes; of input's dtype, or float32 beside 16 bits; has no gradient. Default: ones.
        ignore_index (int): A label whose positions count for nothing, whatever their logits. Default: -100.
        reduction (str): ``"none"``, ``"mean"`` or ``"sum"``. A mean of labels is divided by the sum of their weights.
            Default: ``"mean"``.
        label_smoothing (float): In [0, 1]. Default: 0.

    Returns:
        Tensor of no dimension, or without reduction Tensor[], [N] or [N, ...]; dtype of ``input``.

    Raises:
        RuntimeError: a label is no class; on CUDA, where that is not seen, its loss and its gradient are NaN. A size,
            dtype or device does not fit; ``label_smoothing`` is out of range.
        ValueError: ``reduction`` is none of these.
        NotImplementedError: ``input`` is of another dtype, or a gradient of ``weight`` is asked for.
        TypeError: an argument is not a Tensor.

    Note: deterministic forward and backward. Double backward is composite.
    Reference: torch.nn.functional.cross_entropy; label smoothing: Szegedy et al., Rethinking the Inception Architecture
        for Computer Vision, 2016.
    """
    tensors = {"input": input, "target": target}
    require_tensors(_OP, **tensors if weight is None else {**tensors, "weight": weight})
    if reduction not in REDUCTIONS:
        raise ValueError(f"{_OP}: expected reduction to be 'none', 'mean' or 'sum', but got {reduction!r}")
    if not isinstance(label_smoothing, int | float):
        raise TypeError(f"{_OP}: expected label_smoothing to be a number, but got {label_smoothing!r}")
    require(0 <= label_smoothing <= 1, _OP, "label_smoothing to be in [0, 1]", label_smoothing)
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError(f"{_OP}: expected weight not to require a gradient, which it has none of")
    if target.is_floating_point():
        require(ignore_index < 0, _OP, "no ignore_index beside probabilities", ignore_index)
        if target.dtype != input.dtype and target.dtype in FLOATING and input.dtype in FLOATING:
            dtype = torch.promote_types(input.dtype, target.dtype)
            input, target = input.to(dtype), target.to(dtype)
    elif target.dtype == torch.uint8:
        target = target.long()
    elif target.dtype != torch.int64:
        require(False, _OP, "target to be int64, uint8 or probabilities", target.dtype)
    if input.dtype not in FLOATING:
        check_input(_OP, input)
    if CHOICE.backend == "torch":
        beside = weight if weight is None or weight.dtype == input.dtype else weight.to(input.dtype)
        return F.cross_entropy(
            input, target, beside, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )
    classes_last = _has_classes_last(input) or (input.dim() > 2 and input.shape[1] >= _MANY_CLASSES)
    return softmax_cross_entropy_op(
        _like(input, classes_last),
        _like(target, classes_last and target.is_floating_point()),
        weight if weight is None else weight.contiguous(),
        ignore_index,
        REDUCTIONS[reduction],
        label_smoothing,
        False,
    )[0]
