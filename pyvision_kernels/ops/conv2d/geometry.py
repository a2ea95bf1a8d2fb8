"""How the taps of a convolution lie over its input: strides, padding, dilation, groups; checked once, then cached."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch

PADDING_MODES = {"zeros": 0, "reflect": 1, "replicate": 2, "circular": 3}
Padding = int | str | Sequence[int]


@dataclass(frozen=True, eq=False)
class Geometry:
    """Attributes:
    numbers: What the operator takes of it, in its order: strides of rows and columns; padding on the left, right, top
        and bottom; dilations of rows and columns; groups; the number of the padding mode.
    plans: What was decided for inputs of a shape; filled by `run`.
    """

    numbers: list[int]
    plans: dict[Any, Any] = field(default_factory=dict)

    @property
    def stride(self) -> tuple[int, int]:
        return self.numbers[0], self.numbers[1]

    @property
    def padding(self) -> tuple[int, int, int, int]:
        """Left, right, top, bottom."""
        return self.numbers[2], self.numbers[3], self.numbers[4], self.numbers[5]

    @property
    def dilation(self) -> tuple[int, int]:
        return self.numbers[6], self.numbers[7]

    @property
    def groups(self) -> int:
        return self.numbers[8]

    @property
    def padding_mode(self) -> int:
        return self.numbers[9]

    def output_size(self, size: Sequence[int], taps: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of the result for those of the input and of the weight."""
        left, right, top, bottom = self.padding
        rows, columns = (
            (length + before + after - spread * (count - 1) - 1) // step + 1
            for length, before, after, count, step, spread in zip(
                size, (top, left), (bottom, right), taps, self.stride, self.dilation, strict=True
            )
        )
        return rows, columns

    @staticmethod
    def of(
        stride: int | Sequence[int],
        padding: Padding,
        dilation: int | Sequence[int],
        groups: int,
        padding_mode: str,
        kernel_size: Sequence[int],
        op: str = "conv2d",
    ) -> Geometry:
        """Checks the arguments of a convolution; kernel_size (rows, columns) is what 'same' depends on.

        Raises:
            TypeError, ValueError: an argument is not what the op takes.
        """
        # Lists are not hashable; what is given is nearly always a tuple or an int.
        find = _checked if torch.compiler.is_compiling() else _cached
        stride, padding, dilation = map(_hashable, (stride, padding, dilation))
        return find(stride, padding, dilation, groups, padding_mode, tuple(kernel_size), op)

    @staticmethod
    def of_row(
        stride: int | Sequence[int],
        padding: Padding,
        dilation: int | Sequence[int],
        groups: int,
        padding_mode: str,
        taps: int,
        op: str,
    ) -> Geometry:
        """The same of a convolution along one dimension: that of a map with one row.

        Raises:
            TypeError, ValueError: an argument is not what the op takes.
        """
        find = _checked_row if torch.compiler.is_compiling() else _cached_row
        stride, padding, dilation = map(_hashable, (stride, padding, dilation))
        return find(stride, padding, dilation, groups, padding_mode, taps, op)


def _checked_row(
    stride: Any, padding: Any, dilation: Any, groups: Any, padding_mode: Any, taps: int, op: str
) -> Geometry:
    if not isinstance(padding, str):
        sides = (padding,) if not isinstance(padding, Sequence) else tuple(padding)
        if len(sides) not in (1, 2):
            raise TypeError(
                f"{op}: expected padding to be 'same', 'valid', an int or a pair of ints, but got {padding!r}"
            )
        padding = (sides[0], sides[-1], 0, 0)
    step, spread = _in_a_row(op, "stride", stride), _in_a_row(op, "dilation", dilation)
    return Geometry.of(step, padding, spread, groups, padding_mode, (1, taps), op)


_cached_row = functools.lru_cache(maxsize=4096)(_checked_row)


def _in_a_row(op: str, name: str, value: Any) -> tuple[int, int]:
    """(1, value) for an int or a sequence of one."""
    if isinstance(value, Sequence):
        if len(value) != 1:
            raise TypeError(f"{op}: expected {name} to be an int, but got {value!r}")
        value = value[0]
    return 1, as_pair(op, name, value, 1)[1]


def _hashable(value: Any) -> Any:
    return tuple(value) if type(value) in (list, torch.Size) else value


def _checked(
    stride: Any, padding: Any, dilation: Any, groups: Any, padding_mode: Any, kernel_size: tuple[int, ...], op: str
) -> Geometry:
    stride_, dilation_ = as_pair(op, "stride", stride, 1), as_pair(op, "dilation", dilation, 1)
    if not isinstance(groups, Integral):
        raise TypeError(f"{op}: expected groups to be an int, but got {groups!r}")
    if groups < 1:
        raise ValueError(f"{op}: expected groups to be positive, but got {groups}")
    if padding_mode not in PADDING_MODES:
        known = ", ".join(f"'{mode}'" for mode in PADDING_MODES)
        raise ValueError(f"{op}: expected padding_mode to be one of {known}, but got {padding_mode!r}")
    sides = _sides(op, padding, stride_, dilation_, kernel_size)
    return Geometry([*stride_, *sides, *dilation_, int(groups), PADDING_MODES[padding_mode]])


_cached = functools.lru_cache(maxsize=4096)(_checked)


def _whole(value: Any) -> tuple[int, ...] | None:
    items = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)
    return tuple(map(int, items)) if all(isinstance(item, Integral) for item in items) else None


def as_pair(op: str, argument: str, value: Any, least: int) -> tuple[int, int]:
    pair = _whole(value)
    if pair is None or len(pair) not in (1, 2):
        raise TypeError(f"{op}: expected {argument} to be an int or a pair of ints, but got {value!r}")
    if min(pair) < least:
        bound = "positive" if least == 1 else "not negative"
        raise ValueError(f"{op}: expected {argument} to be {bound}, but got {value!r}")
    return (pair[0], pair[-1])


def _sides(
    op: str, padding: Any, stride: tuple[int, int], dilation: tuple[int, int], kernel_size: tuple[int, ...]
) -> tuple[int, int, int, int]:
    if padding == "valid":
        return 0, 0, 0, 0
    if padding == "same":
        if stride != (1, 1):
            raise ValueError(f"{op}: expected stride to be 1 with padding='same', but got {stride}")
        rows, columns = (spread * (count - 1) for spread, count in zip(dilation, kernel_size, strict=True))
        return columns // 2, columns - columns // 2, rows // 2, rows - rows // 2
    sides = _whole(padding) if not isinstance(padding, str) else None
    if sides is None or len(sides) not in (1, 2, 4):
        raise TypeError(
            f"{op}: expected padding to be 'same', 'valid', an int, a pair (rows, columns) or four (left, right, top, "
            f"bottom), but got {padding!r}"
        )
    if min(sides) < 0:
        raise ValueError(f"{op}: expected padding not to be negative, but got {padding!r}")
    if len(sides) == 4:
        return sides[0], sides[1], sides[2], sides[3]
    return sides[-1], sides[-1], sides[0], sides[0]
