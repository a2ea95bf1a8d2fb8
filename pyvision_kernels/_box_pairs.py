"""What the ops on two sets of boxes share: checks, the result's dtype, gradients of either set, double backward.

Their operators take (boxes1, boxes2, kind, an option, eps), and their backwards (grad, the same, need1, need2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyvision_kernels._check import FLOATING, require


def check_types(op: str, boxes1: Tensor, boxes2: Tensor) -> None:
    """One device and one floating dtype."""
    require(boxes2.device == boxes1.device, op, "boxes2 to be on the device of boxes1", boxes2.device)
    if boxes1.dtype not in FLOATING:
        raise NotImplementedError(
            f"{op}: expected boxes1 to be float16, bfloat16, float32 or float64, but got {boxes1.dtype}"
        )
    if boxes2.dtype != boxes1.dtype:
        require(False, op, f"boxes2 to be {boxes1.dtype} as boxes1 is", boxes2.dtype)


def result_dtype(boxes: Tensor) -> torch.dtype:
    return torch.float64 if boxes.dtype == torch.float64 else torch.float32


def empty_gradients(boxes1: Tensor, boxes2: Tensor, need1: bool, need2: bool) -> tuple[Tensor, Tensor]:
    """What is not needed is empty."""
    return boxes1.new_empty(boxes1.shape if need1 else (0,)), boxes2.new_empty(boxes2.shape if need2 else (0,))


def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    boxes1, boxes2, *ctx.rest = inputs
    ctx.save_for_backward(boxes1, boxes2)


def backward_by(gradient: Callable[[], Callable[..., tuple[Tensor, Tensor]]]) -> Callable[..., Any]:
    """The backward of an op, by its backward op, which is declared later."""

    def backward(ctx, grad):
        need1, need2 = ctx.needs_input_grad[:2]
        grad1, grad2 = gradient()(grad, *ctx.saved_tensors, *ctx.rest, need1, need2)
        return grad1 if need1 else None, grad2 if need2 else None, None, None, None

    return backward


def setup_double(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad, boxes1, boxes2, *ctx.rest = inputs
    ctx.save_for_backward(grad, boxes1, boxes2)


def double_backward_of(formula: Callable[..., Tensor]) -> Callable[..., Any]:
    """Of a backward op: formula(boxes1, boxes2, kind, option, eps), in PyTorch, differentiated twice."""

    def backward(ctx, grad1, grad2):
        *rest, need1, need2 = ctx.rest

        def value(boxes1, boxes2):
            wide = result_dtype(boxes1)
            return formula(boxes1.to(wide), boxes2.to(wide), *rest)

        def first(grad, boxes1, boxes2):
            gradients = torch.func.vjp(value, boxes1, boxes2)[1](grad)
            return [gradient for gradient, need in zip(gradients, (need1, need2), strict=True) if need]

        pull: Any = torch.func.vjp(first, *ctx.saved_tensors)[1]
        return *pull([grad for grad, need in ((grad1, need1), (grad2, need2)) if need]), *(None,) * 5

    return backward
