"""Calls of the functions in intrinsics.cu, and what the results must be: rounding by numpy and by exact fractions."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch

ROUNDINGS = {"rn": np.rint, "rz": np.trunc, "rd": np.floor, "ru": np.ceil}
EXACT_ROUNDINGS: dict[str, Callable] = {"rn": round, "rz": math.trunc, "rd": math.floor, "ru": math.ceil}
INTEGERS = {"short": "i2", "ushort": "u2", "int": "i4", "uint": "u4", "ll": "i8", "ull": "u8"}


class Format(NamedTuple):
    digits: int  # of the significand
    least: int  # exponent of the smallest subnormal
    largest: float
    dtype: torch.dtype


FORMATS = {
    "half": Format(11, -24, 65504.0, torch.float16),
    "bfloat16": Format(8, -133, float(np.ldexp(2.0 - 2.0**-7, 127)), torch.bfloat16),
    "float": Format(24, -149, float(np.finfo(np.float32).max), torch.float32),
}


# ---- calls: every operand and result is a slot of 8 bytes ----


def to_slots(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}").astype(np.uint64)


def from_slots(slots: np.ndarray, dtype: str) -> np.ndarray:
    size = np.dtype(dtype).itemsize
    return slots.astype(f"u{size}").view(dtype)


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def invoke(library: ctypes.CDLL, name: str, *arguments: ctypes.c_void_p | int) -> str | None:
    function = getattr(library, f"intrinsics_{name}")
    function.restype = ctypes.c_char_p
    message = function(*(a if isinstance(a, ctypes.c_void_p) else ctypes.c_uint32(a & 0xFFFFFFFF) for a in arguments))
    return message.decode() if message else None


def apply(library: ctypes.CDLL, name: str, dtype: str, *operands: np.ndarray) -> np.ndarray:
    slots = [to_slots(operand) for operand in operands]
    slots += [slots[0]] * (3 - len(slots))
    out = np.full(len(slots[0]), 0xAAAA_AAAA_AAAA_AAAA, np.uint64)
    assert invoke(library, name, *map(pointer, slots), pointer(out), len(out)) is None
    return from_slots(out, dtype)


# ---- references ----


def decode(bits: np.ndarray, name: str) -> np.ndarray:
    if name == "half":
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def encode(values: np.ndarray, name: str) -> np.ndarray:
    """Bits of values that the format has; NaN is 0x7fff."""
    if name == "float":
        return values.astype(np.float32).view(np.uint32)
    if name == "half":
        bits = values.astype(np.float16).view(np.uint16)
    else:
        bits = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), 0x7FFF, bits).astype(np.uint16)


def round_to(values: np.ndarray, name: str, rounding: str = "rn") -> np.ndarray:
    form = FORMATS[name]
    unit = np.maximum(np.frexp(values)[1] - form.digits, form.least)
    result = np.ldexp(ROUNDINGS[rounding](np.ldexp(values, -unit)), unit)
    up, down = rounding in ("rn", "ru"), rounding in ("rn", "rd")
    result = np.where(result > form.largest, np.inf if up else form.largest, result)
    result = np.where(result < -form.largest, -np.inf if down else -form.largest, result)
    return np.where(np.isfinite(values), result, values)


def round_exactly(value: Fraction, name: str, rounding: str) -> float:
    form = FORMATS[name]
    exponent = abs(value.numerator).bit_length() - value.denominator.bit_length()
    exponent -= abs(value) < Fraction(2) ** exponent
    unit = Fraction(2) ** max(exponent - form.digits + 1, form.least)
    result = EXACT_ROUNDINGS[rounding](value / unit) * unit
    if abs(result) <= Fraction(form.largest):
        return math.copysign(float(result), value)
    to_infinity = rounding == "rn" or rounding == ("ru" if value > 0 else "rd")
    return math.copysign(math.inf if to_infinity else form.largest, value)


def to_integer(values: np.ndarray, rounding: str, dtype: str, from_double: bool = False) -> np.ndarray:
    """Saturated; NaN as PTX has it."""
    limits = np.iinfo(dtype)
    whole = ROUNDINGS[rounding](values)
    above = whole >= float(limits.max // 2 + 1) * 2
    fits = ~np.isnan(whole) & (whole >= limits.min) & ~above
    result = np.where(fits, whole, 0).astype(dtype)
    result[above] = limits.max
    result[whole < limits.min] = limits.min
    top_bit = np.array([1 << (limits.bits - 1)], f"u{limits.bits // 8}").view(dtype)[0]
    result[np.isnan(whole)] = top_bit if from_double or limits.bits == 64 else 0
    return result
