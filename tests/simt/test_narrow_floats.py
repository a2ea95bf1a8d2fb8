"""The emulator's __half and __nv_bfloat16 against numpy, torch, and exact fractions."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from references import FORMATS, INTEGERS, ROUNDINGS, apply, decode, encode, round_exactly, round_to, to_integer

NARROW = ["half", "bfloat16"]


# ---- operands ----

ALL_BITS = np.arange(1 << 16, dtype=np.uint16)
SPECIAL = {
    "half": [0, 1, 2, 0x3FF, 0x400, 0x401, 0x3BFF, 0x3C00, 0x3C01, 0x3555, 0x5BFF, 0x7BFF, 0x7C00, 0x7C01, 0x7E00],
    "bfloat16": [0, 1, 2, 0x7F, 0x80, 0x81, 0x3F7F, 0x3F80, 0x3F81, 0x3EAB, 0x4B00, 0x7F7F, 0x7F80, 0x7F81, 0x7FC0],
}


def operands(name: str, rng: np.random.Generator, count: int, arity: int) -> list[np.ndarray]:
    """Every choice of special values, then values that are random, and half of them of similar size."""
    special = np.array([sign | bits for bits in SPECIAL[name] for sign in (0, 0x8000)], np.uint16)
    grid = [axis.ravel() for axis in np.meshgrid(*[special] * arity)]
    random = [rng.integers(0, 1 << 16, count).astype(np.uint16) for _ in range(arity)]
    for column in random[1:]:
        column[::2] = random[0][::2] ^ (column[::2] & 0x8FFF)
    return [np.concatenate(columns) for columns in zip(grid, random, strict=True)]


def floats_near(name: str, rng: np.random.Generator) -> np.ndarray:
    """Floats at, between and beside the values of a 16-bit format, and any others."""
    values = decode(ALL_BITS, name).astype(np.float32)
    middle = values.view(np.uint32) + (0x1000 if name == "half" else 0x8000)
    bits = [values.view(np.uint32), middle, middle + 1, middle - 1, rng.integers(0, 1 << 32, 100_000)]
    return np.concatenate(bits).astype(np.uint32).view(np.float32)


# ---- 16-bit floats ----


@pytest.mark.parametrize("name", NARROW)
def test_every_pattern_of_a_16_bit_float_widens_as_in_torch(selftest: ctypes.CDLL, name: str) -> None:
    got = apply(selftest, f"{name}_to_float", "f4", ALL_BITS)
    want = torch.from_numpy(ALL_BITS.view(np.int16)).view(FORMATS[name].dtype).float().numpy()
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.signbit(got[want == 0]), np.signbit(want[want == 0]))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", NARROW)
def test_floats_narrow(selftest: ctypes.CDLL, rng: np.random.Generator, name: str, rounding: str) -> None:
    values = floats_near(name, rng)
    got = apply(selftest, f"{name}_from_float_{rounding}", "u2", values)
    np.testing.assert_array_equal(got, encode(round_to(values.astype(np.float64), name, rounding), name))
    if rounding == "rn":
        want = torch.from_numpy(values).to(FORMATS[name].dtype).view(torch.int16).numpy().view(np.uint16)
        number = ~np.isnan(values)
        np.testing.assert_array_equal(got[number], want[number])


@pytest.mark.parametrize("name", NARROW)
def test_doubles_narrow_with_one_rounding(selftest: ctypes.CDLL, rng: np.random.Generator, name: str) -> None:
    middle = floats_near(name, rng).astype(np.float64)
    values = np.concatenate([middle, np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf)])
    got = apply(selftest, f"{name}_from_double_rn", "u2", values)
    np.testing.assert_array_equal(got, encode(round_to(values, name), name))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("integer", INTEGERS)
@pytest.mark.parametrize("name", NARROW)
def test_integers_convert(
    selftest: ctypes.CDLL, rng: np.random.Generator, name: str, integer: str, rounding: str
) -> None:
    dtype = INTEGERS[integer]
    got = apply(selftest, f"{name}_to_{integer}_{rounding}", dtype, ALL_BITS)
    np.testing.assert_array_equal(got, to_integer(decode(ALL_BITS, name), rounding, dtype))

    limits = np.iinfo(dtype)
    random = [
        int(value) >> int(shift)
        for value, shift in zip(
            rng.integers(limits.min, limits.max, 500, dtype), rng.integers(0, limits.bits, 500), strict=True
        )
    ]
    powers = [sign * (1 << bit) + offset for bit in range(limits.bits) for offset in (-1, 0, 1) for sign in (-1, 1)]
    values = np.array([v for v in (*powers, *random) if limits.min <= v <= limits.max], dtype)
    want = [round_exactly(Fraction(int(value)), name, rounding) if value else 0.0 for value in values]
    got = apply(selftest, f"{name}_from_{integer}_{rounding}", "u2", values)
    np.testing.assert_array_equal(got, encode(np.array(want), name))


def saturate(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, np.minimum(x, 1), 0.0)


def larger(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.where((x == 0) & (y == 0), np.where(np.signbit(x), y, x), np.fmax(x, y))


def smaller(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return -larger(-x, -y)


# Of float64, which rounds sums, products and quotients of 16-bit floats harmlessly.
ARITHMETIC: dict[str, Callable] = {
    "hadd": np.add,
    "hsub": np.subtract,
    "hmul": np.multiply,
    "hdiv": np.divide,
    "plus": np.add,
    "minus": np.subtract,
    "times": np.multiply,
    "over": np.divide,
    "hadd_sat": lambda x, y: saturate(x + y),
    "hmax": larger,
    "hmin": smaller,
    "hmax_nan": lambda x, y: np.where(np.isnan(x) | np.isnan(y), np.nan, larger(x, y)),
    "hmin_nan": lambda x, y: np.where(np.isnan(x) | np.isnan(y), np.nan, smaller(x, y)),
}
FUNCTIONS: dict[str, Callable] = {
    "hneg": np.negative,
    "habs": np.abs,
    "hsqrt": np.sqrt,
    "hrsqrt": lambda x: 1 / np.sqrt(x),
    "hrcp": np.reciprocal,
    "hexp": np.exp,
    "hexp2": np.exp2,
    "hexp10": lambda x: np.power(10.0, x),
    "hlog": np.log,
    "hlog2": np.log2,
    "hlog10": np.log10,
    "hsin": np.sin,
    "hcos": np.cos,
    "htanh": np.tanh,
    "hceil": np.ceil,
    "hfloor": np.floor,
    "htrunc": np.trunc,
    "hrint": np.rint,
}
PAIRS = {
    "hadd2": "hadd",
    "hsub2": "hsub",
    "hmul2": "hmul",
    "h2div": "hdiv",
    "hfma2": "hfma",
    "hmax2": "hmax",
    "hmin2": "hmin",
    "h2exp": "hexp",
    "h2rsqrt": "hrsqrt",
}


@pytest.mark.parametrize("operation", ARITHMETIC)
@pytest.mark.parametrize("name", NARROW)
def test_arithmetic_rounds_once(selftest: ctypes.CDLL, rng: np.random.Generator, name: str, operation: str) -> None:
    x, y = operands(name, rng, 50_000, 2)
    want = round_to(ARITHMETIC[operation](decode(x, name), decode(y, name)), name)
    np.testing.assert_array_equal(apply(selftest, f"{operation}_{name}", "u2", x, y), encode(want, name))


@pytest.mark.parametrize("name", NARROW)
def test_fma_rounds_once(selftest: ctypes.CDLL, rng: np.random.Generator, name: str) -> None:
    x, y, z = operands(name, rng, 5000, 3)
    x, y, z = x[::5], y[::5], z[::5]
    a, b, c = (decode(bits, name) for bits in (x, y, z))
    want = a * b + c  # NaN, infinity and zero, with their signs
    for i in np.flatnonzero(np.isfinite(want) & (want != 0)):
        want[i] = round_exactly(Fraction(a[i]) * Fraction(b[i]) + Fraction(c[i]), name, "rn")
    np.testing.assert_array_equal(apply(selftest, f"hfma_{name}", "u2", x, y, z), encode(want, name))
    relu = np.where(want <= 0, 0.0, want)
    np.testing.assert_array_equal(apply(selftest, f"hfma_relu_{name}", "u2", x, y, z), encode(relu, name))
    np.testing.assert_array_equal(apply(selftest, f"hfma_sat_{name}", "u2", x, y, z), encode(saturate(want), name))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", NARROW)
def test_functions_round_to_nearest(selftest: ctypes.CDLL, name: str, function: str) -> None:
    want = round_to(FUNCTIONS[function](decode(ALL_BITS, name)), name)
    np.testing.assert_array_equal(apply(selftest, f"{function}_{name}", "u2", ALL_BITS), encode(want, name))


@pytest.mark.parametrize("function", PAIRS)
@pytest.mark.parametrize("name", NARROW)
def test_pairs_are_two_scalars(selftest: ctypes.CDLL, rng: np.random.Generator, name: str, function: str) -> None:
    scalars = [bits[: bits.size // 2 * 2] for bits in operands(name, rng, 5000, 3)]
    got = apply(selftest, f"{function}_{name}", "u4", *(bits.view(np.uint32) for bits in scalars))
    np.testing.assert_array_equal(got.view(np.uint16), apply(selftest, f"{PAIRS[function]}_{name}", "u2", *scalars))


@pytest.mark.parametrize("relation", ["eq", "ne", "lt", "le", "gt", "ge"])
@pytest.mark.parametrize("name", NARROW)
def test_comparisons(selftest: ctypes.CDLL, rng: np.random.Generator, name: str, relation: str) -> None:
    x, y = operands(name, rng, 20_000, 2)
    a, b = decode(x, name), decode(y, name)
    unordered = np.isnan(a) | np.isnan(b)
    true = getattr(
        np,
        {"eq": "equal", "ne": "not_equal", "lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal"}[
            relation
        ],
    )(a, b)
    ordered = true & ~unordered
    np.testing.assert_array_equal(apply(selftest, f"h{relation}_{name}", "i4", x, y), ordered)
    np.testing.assert_array_equal(apply(selftest, f"h{relation}u_{name}", "i4", x, y), true | unordered)
    pairs = x.view(np.uint32), y.view(np.uint32)
    ones = encode(ordered.astype(np.float64), name)
    np.testing.assert_array_equal(apply(selftest, f"h{relation}2_{name}", "u4", *pairs).view(np.uint16), ones)
    both = ordered[::2] & ordered[1::2]
    np.testing.assert_array_equal(apply(selftest, f"hb{relation}2_{name}", "i4", *pairs), both)
    mask = apply(selftest, f"h{relation}2_mask_{name}", "u4", *pairs).view(np.uint16)
    np.testing.assert_array_equal(mask, np.where(ordered, 0xFFFF, 0))


@pytest.mark.parametrize("name", NARROW)
def test_classification(selftest: ctypes.CDLL, name: str) -> None:
    values = decode(ALL_BITS, name)
    np.testing.assert_array_equal(apply(selftest, f"hisnan_{name}", "i4", ALL_BITS), np.isnan(values))
    want = np.isposinf(values).astype(int) - np.isneginf(values)
    np.testing.assert_array_equal(apply(selftest, f"hisinf_{name}", "i4", ALL_BITS), want)
