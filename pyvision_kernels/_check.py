"""Words of the errors that ops raise: `<op>: expected <argument> to <property>, but got <value>`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from typing import Any

import torch

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def require(condition: bool, op: str, expected: str, value: Any, *given: Any) -> None:
    """Raises RuntimeError in the project's words unless the condition holds.

    Args:
        given: What the braces of ``expected`` stand for, where those are sizes that torch.compile may not know.
    """
    if not condition:
        expected = expected.format(*given) if given else expected
        value = list(value) if isinstance(value, torch.Size) else value
        raise RuntimeError(f"{op}: expected {expected}, but got {value}")


def require_tensors(op: str, **arguments: Any) -> None:
    """Raises TypeError where an argument is not a Tensor."""
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{op}: expected {name} to be a Tensor, but got {type(value).__name__}")


def autocasts(tensor: torch.Tensor) -> bool:
    """Whether autocast is on for the tensor's device; meta and others have none."""
    kind = tensor.device.type
    return kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)


def as_pair(op: str, argument: str, value: int | Sequence[int]) -> tuple[int, int]:
    """An int becomes a pair; both must be positive."""
    if type(value) is int and value > 0:
        return value, value
    whole = (Integral, torch.SymInt)  # numpy's integers too
    pair: Any = (value, value) if isinstance(value, whole) else tuple(value) if isinstance(value, Iterable) else ()
    if len(pair) != 2 or not all(isinstance(item, whole) for item in pair):
        raise TypeError(f"{op}: expected {argument} to be an int or a pair of ints, but got {value}")
    if not all(item > 0 for item in pair):
        raise ValueError(f"{op}: expected {argument} to be positive, but got {value}")
    first, second = (item if isinstance(item, torch.SymInt) else int(item) for item in pair)
    return first, second  # type: ignore[return-value]  # a SymInt stands for an int
