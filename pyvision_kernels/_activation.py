"""Activations that an op applies to its result: names, numbers of csrc/core/activation.h, functions, derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "silu": F.silu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
}
NAMES = (None, *FUNCTIONS)
NUMBERS: dict[str | None, int] = {name: number for number, name in enumerate(NAMES)}
# Of these the derivative follows from the result.
_BY_RESULT = frozenset(NUMBERS[name] for name in ("relu", "relu6", "sigmoid"))


def number_of(op: str, activation: str | None) -> int:
    """The kernels' number of an activation; ValueError where there is none of that name."""
    try:
        return NUMBERS[activation]
    except (KeyError, TypeError):
        known = ", ".join(f"'{name}'" for name in FUNCTIONS)
        raise ValueError(f"{op}: expected activation to be None or one of {known}, but got {activation!r}") from None


def apply(number: int, x: Tensor) -> Tensor:
    name = NAMES[number]
    return x if name is None else FUNCTIONS[name](x)


def needs_input(number: int) -> bool:
    """Whether the derivative takes what the activation was applied to, and not its result."""
    return number != 0 and number not in _BY_RESULT


def backward(number: int, grad: Tensor, x: Tensor) -> Tensor:
    """grad times the derivative, in differentiable steps. x: see needs_input."""
    name = NAMES[number]
    if name is None:
        return grad
    if name == "relu":
        return grad * (x > 0)
    if name == "relu6":
        return grad * ((x > 0) & (x < 6))
    if name == "sigmoid":
        return grad * x * (1 - x)
    if name == "hardswish":
        return grad * torch.where(x < -3, 0.0, torch.where(x <= 3, x / 3 + 0.5, 1.0)).to(x.dtype)
    if name == "silu":
        sigmoid = torch.sigmoid(x)
        return grad * sigmoid * (1 + x * (1 - sigmoid))
    below = 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))  # gelu: P(X < x), and the density
    return grad * (below + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi))
