"""The emulator's scalar and warp intrinsics and its atomics against numpy, exact fractions and Python's integers."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from references import (
    FORMATS,
    INTEGERS,
    ROUNDINGS,
    apply,
    encode,
    from_slots,
    invoke,
    pointer,
    round_exactly,
    round_to,
    to_integer,
    to_slots,
)

WARP = 32
FULL = 0xFFFF_FFFF


def some_floats(rng: np.random.Generator, count: int) -> np.ndarray:
    """Of every size, or close to 1; then the limits."""
    sizes = rng.integers(0, 1 << 32, count).astype(np.uint32).view(np.float32)
    near_one = rng.uniform(-2, 2, count).astype(np.float32)
    limits = [0.0, -0.0, 1.0, 2.0**-149, 2.0**-126, FORMATS["float"].largest, math.inf, math.nan]
    return np.concatenate([sizes, near_one, np.array([*limits, *(-x for x in limits)], np.float32)])


def some_integers(rng: np.random.Generator, dtype: str, count: int = 500) -> np.ndarray:
    limits = np.iinfo(dtype)
    powers = [sign * (1 << bit) + offset for bit in range(limits.bits) for offset in (-1, 0, 1) for sign in (-1, 1)]
    random = rng.integers(limits.min, limits.max, count, dtype, endpoint=True)
    return np.concatenate([np.array([v for v in powers if limits.min <= v <= limits.max], dtype), random])


# ---- floating point ----


def exact_fma(x: float, y: float, z: float) -> Fraction:
    return Fraction(x) * Fraction(y) + Fraction(z)


EXACT: dict[str, Callable[..., Fraction]] = {
    "fadd": lambda x, y, z: Fraction(x) + Fraction(y),
    "fsub": lambda x, y, z: Fraction(x) - Fraction(y),
    "fmul": lambda x, y, z: Fraction(x) * Fraction(y),
    "fdiv": lambda x, y, z: Fraction(x) / Fraction(y),
    "frcp": lambda x, y, z: 1 / Fraction(x),
    "fmaf": exact_fma,
}
# What float64 gives decides NaN, infinities and zeros.
NEARLY: dict[str, Callable] = {
    "fadd": lambda x, y, z: x + y,
    "fsub": lambda x, y, z: x - y,
    "fmul": lambda x, y, z: x * y,
    "fdiv": lambda x, y, z: x / y,
    "frcp": lambda x, y, z: 1 / x,
    "fmaf": lambda x, y, z: x * y + z,
}


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("operation", EXACT)
def test_float_arithmetic_rounds_exactly(
    selftest: ctypes.CDLL, rng: np.random.Generator, operation: str, rounding: str
) -> None:
    x, y, z = (rng.permutation(some_floats(rng, 1500)) for _ in range(3))
    y[::3] = -x[::3] * np.float32(1.0000001)
    z[::2] = (-x * y)[::2]
    operands = [values.astype(np.float64) for values in (x, y, z)]
    want = NEARLY[operation](*operands)
    for i in np.flatnonzero(np.isfinite(want) & (want != 0)):
        exact = EXACT[operation](*(float(values[i]) for values in operands))
        want[i] = round_exactly(exact, "float", rounding) if exact else 0.0
    got = apply(selftest, f"{operation}_{rounding}", "f4", x, y, z)
    np.testing.assert_array_equal(got, want.astype(np.float32))
    sure = want != 0  # a sum that is zero has a sign of its own, below
    np.testing.assert_array_equal(np.signbit(got[sure & ~np.isnan(want)]), np.signbit(want[sure & ~np.isnan(want)]))


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_opposites_add_up_to_minus_zero_only_rounding_down(selftest: ctypes.CDLL, rounding: str) -> None:
    x = np.array([1.5, -3.0, 0.0, -0.0, 0.0, -0.0], np.float32)
    y = np.array([-1.5, 3.0, 0.0, -0.0, -0.0, 0.0], np.float32)
    got = np.signbit(apply(selftest, f"fadd_{rounding}", "f4", x, y))
    down = rounding == "rd"
    np.testing.assert_array_equal(got, [down, down, False, True, down, down])


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_square_root_rounds_exactly(selftest: ctypes.CDLL, rng: np.random.Generator, rounding: str) -> None:
    x = some_floats(rng, 2000)
    got = apply(selftest, f"fsqrt_{rounding}", "f4", x)
    np.testing.assert_allclose(got, np.sqrt(x.astype(np.float64)), rtol=2.0**-23)
    for value, root in zip(x, got, strict=True):
        if not (np.isfinite(value) and value > 0):
            continue
        # From just below to just above the root, or to the middles between floats.
        low, high = (Fraction(float(np.nextafter(root, np.float32(end)))) for end in (0, np.inf))
        middle = Fraction(float(root))
        if rounding == "rn":
            low, high = (low + middle) / 2, (high + middle) / 2
        else:
            low, high = (middle, high) if rounding in ("rz", "rd") else (low, middle)
        assert low**2 <= Fraction(float(value)) <= high**2


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_doubles_narrow_to_float(selftest: ctypes.CDLL, rng: np.random.Generator, rounding: str) -> None:
    near = some_floats(rng, 20_000).astype(np.float64)
    any_size = rng.integers(0, 1 << 64, 20_000, np.uint64).view(np.float64)
    x = np.concatenate([near, np.nextafter(near, np.inf), (near + np.nextafter(near, np.inf)) / 2, any_size])
    got = apply(selftest, f"double2float_{rounding}", "f4", x)
    number = ~np.isnan(x)
    want = encode(round_to(x, "float", rounding), "float")
    np.testing.assert_array_equal(got.view(np.uint32)[number], want[number])


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("integer", ["int", "uint", "ll", "ull"])
def test_floats_become_integers(selftest: ctypes.CDLL, rng: np.random.Generator, integer: str, rounding: str) -> None:
    dtype = INTEGERS[integer]
    halves = np.arange(-20, 20, dtype=np.float32) / 4
    powers = np.ldexp(np.float32([1, -1, 0.9999999, -0.9999999])[:, None], np.arange(66)).ravel()
    x = np.concatenate([halves, powers.astype(np.float32), some_floats(rng, 5000)])
    want = to_integer(x.astype(np.float64), rounding, dtype)
    np.testing.assert_array_equal(apply(selftest, f"float2{integer}_{rounding}", dtype, x), want)
    if integer in ("int", "ll"):
        wide = np.concatenate([x.astype(np.float64), np.nextafter(x.astype(np.float64), np.inf)])
        want = to_integer(wide, rounding, dtype, from_double=True)
        np.testing.assert_array_equal(apply(selftest, f"double2{integer}_{rounding}", dtype, wide), want)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("integer", ["int", "uint", "ll", "ull"])
def test_integers_become_floats(selftest: ctypes.CDLL, rng: np.random.Generator, integer: str, rounding: str) -> None:
    x = some_integers(rng, INTEGERS[integer])
    want = [round_exactly(Fraction(int(value)), "float", rounding) if value else 0.0 for value in x]
    np.testing.assert_array_equal(apply(selftest, f"{integer}2float_{rounding}", "f4", x), np.float32(want))


APPROXIMATE: dict[str, Callable] = {
    "expf": np.exp,
    "exp10f": lambda x: np.power(10.0, x),
    "logf": np.log,
    "log2f": np.log2,
    "log10f": np.log10,
    "sinf": np.sin,
    "cosf": np.cos,
    "tanf": np.tan,
    "rsqrtf": lambda x: 1 / np.sqrt(x),
    "saturatef": lambda x: np.where(x > 0, np.minimum(x, 1), 0.0),
}


@pytest.mark.parametrize("function", APPROXIMATE)
def test_functions_are_close(selftest: ctypes.CDLL, rng: np.random.Generator, function: str) -> None:
    x = some_floats(rng, 20_000)
    want = APPROXIMATE[function](x.astype(np.float64))
    np.testing.assert_allclose(
        apply(selftest, function, "f4", x), want.astype(np.float32), rtol=2.0**-22, atol=2.0**-148
    )


def test_functions_of_two_are_close(selftest: ctypes.CDLL, rng: np.random.Generator) -> None:
    x, y = (rng.permutation(some_floats(rng, 20_000)) for _ in range(2))
    a, b = x.astype(np.float64), y.astype(np.float64)
    for function, want in {"powf": np.power(a, b), "fdividef": a / b}.items():
        np.testing.assert_allclose(
            apply(selftest, function, "f4", x, y), want.astype(np.float32), rtol=2.0**-22, atol=2.0**-148
        )
    np.testing.assert_allclose(apply(selftest, "rsqrt", "f8", a), 1 / np.sqrt(a), rtol=1e-15)


def test_min_and_max(selftest: ctypes.CDLL, rng: np.random.Generator) -> None:
    x, y = (rng.permutation(some_floats(rng, 2000)) for _ in range(2))
    np.testing.assert_array_equal(apply(selftest, "min_float", "f4", x, y), np.fmin(x, y))
    np.testing.assert_array_equal(apply(selftest, "max_float", "f4", x, y), np.fmax(x, y))
    i, j = (rng.permutation(some_integers(rng, "i4")) for _ in range(2))
    u, v = i.view(np.uint32), j.view(np.uint32)
    np.testing.assert_array_equal(apply(selftest, "min_int", "i4", i, j), np.minimum(i, j))
    np.testing.assert_array_equal(apply(selftest, "max_uint", "u4", u, v), np.maximum(u, v))
    np.testing.assert_array_equal(apply(selftest, "max_mixed", "u4", i, j), np.maximum(u, v))


def test_bit_casts(selftest: ctypes.CDLL, rng: np.random.Generator) -> None:
    x = some_floats(rng, 2000)
    np.testing.assert_array_equal(apply(selftest, "float_as_int", "u4", x), x.view(np.uint32))
    np.testing.assert_array_equal(apply(selftest, "uint_as_float", "u4", x.view(np.uint32)), x.view(np.uint32))
    wide = some_integers(rng, "u8")
    np.testing.assert_array_equal(apply(selftest, "hiloint2double", "u8", wide.view(np.float64)), wide)


# ---- integers: by the words of CUDA's manual, in Python ----


def signed(x: int, bits: int) -> int:
    x &= (1 << bits) - 1
    return x - (x >> (bits - 1) << bits)


def reverse(x: int, bits: int) -> int:
    return int(f"{x:0{bits}b}"[::-1], 2)


def permute_bytes(x: int, y: int, selectors: int) -> int:
    pool = x.to_bytes(4, "little") + y.to_bytes(4, "little")
    result = []
    for i in range(4):
        selector = selectors >> (4 * i) & 15
        byte = pool[selector & 7]
        result.append(byte if selector < 8 else 255 * (byte >> 7))
    return int.from_bytes(bytes(result), "little")


def dot_bytes(x: int, y: int, z: int, bits: Callable[[int], int]) -> int:
    return z + sum(bits(x >> i & 255) * bits(y >> i & 255) for i in range(0, 32, 8))


# Operands and results are unsigned patterns of 4 bytes, or of 8.
INTEGER_INTRINSICS: dict[str, tuple[str, Callable[[int, int, int], int]]] = {
    "popc": ("u4", lambda x, y, z: x.bit_count()),
    "popcll": ("u8", lambda x, y, z: x.bit_count()),
    "clz": ("u4", lambda x, y, z: 32 - x.bit_length()),
    "clzll": ("u8", lambda x, y, z: 64 - x.bit_length()),
    "ffs": ("u4", lambda x, y, z: (x & -x).bit_length()),
    "ffsll": ("u8", lambda x, y, z: (x & -x).bit_length()),
    "brev": ("u4", lambda x, y, z: reverse(x, 32)),
    "brevll": ("u8", lambda x, y, z: reverse(x, 64)),
    "byte_perm": ("u4", permute_bytes),
    "funnelshift_l": ("u4", lambda x, y, z: (y << 32 | x) << z % 32 >> 32),
    "funnelshift_r": ("u4", lambda x, y, z: (y << 32 | x) >> z % 32),
    "funnelshift_lc": ("u4", lambda x, y, z: (y << 32 | x) << min(z, 32) >> 32),
    "funnelshift_rc": ("u4", lambda x, y, z: (y << 32 | x) >> min(z, 32)),
    "mulhi": ("u4", lambda x, y, z: signed(x, 32) * signed(y, 32) >> 32),
    "umulhi": ("u4", lambda x, y, z: x * y >> 32),
    "mul64hi": ("u8", lambda x, y, z: signed(x, 64) * signed(y, 64) >> 64),
    "umul64hi": ("u8", lambda x, y, z: x * y >> 64),
    "mul24": ("u4", lambda x, y, z: signed(x, 24) * signed(y, 24)),
    "umul24": ("u4", lambda x, y, z: (x % (1 << 24)) * (y % (1 << 24))),
    "sad": ("u4", lambda x, y, z: abs(signed(x, 32) - signed(y, 32)) + z),
    "usad": ("u4", lambda x, y, z: abs(x - y) + z),
    "dp4a": ("u4", lambda x, y, z: dot_bytes(x, y, z, lambda byte: signed(byte, 8))),
    "udp4a": ("u4", lambda x, y, z: dot_bytes(x, y, z, lambda byte: byte)),
}


@pytest.mark.parametrize("name", INTEGER_INTRINSICS)
def test_integer_intrinsics(selftest: ctypes.CDLL, rng: np.random.Generator, name: str) -> None:
    dtype, formula = INTEGER_INTRINSICS[name]
    x, y, z = (rng.permutation(some_integers(rng, dtype, 2000)) for _ in range(3))
    z[::2] %= 40  # shifts about the word's width
    got = apply(selftest, name, dtype, x, y, z)
    mask = (1 << np.iinfo(dtype).bits) - 1
    want = [formula(*(int(v) for v in operands)) & mask for operands in zip(x, y, z, strict=True)]
    np.testing.assert_array_equal(got, np.array(want, dtype if "ll" not in name else "u8"))


# ---- warps ----


def run_warp(
    library: ctypes.CDLL, name: str, x: np.ndarray, y: np.ndarray | None = None, mask: int = FULL, width: int = WARP
) -> np.ndarray:
    """Slots; -1 for the lanes outside the mask."""
    out = np.zeros(WARP, np.uint64)
    slots = to_slots(x), to_slots(x if y is None else y)
    message = invoke(library, name, pointer(slots[0]), pointer(slots[1]), pointer(out), mask, width)
    if message is not None:
        raise RuntimeError(message)
    return out


def source_lane(kind: str, lane: int, operand: int, width: int) -> int:
    """CUDA's manual: segments of `width` lanes; a lane that would read beyond its segment reads itself."""
    segment = lane // width * width
    if kind == "shfl":
        return segment + operand % width
    operand %= WARP
    source = {"shfl_up": lane - operand, "shfl_down": lane + operand, "shfl_xor": lane ^ operand}[kind]
    beyond = source < segment if kind == "shfl_up" else source >= segment + width
    return lane if beyond else source


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("kind", ["shfl", "shfl_up", "shfl_down", "shfl_xor"])
def test_shuffles(selftest: ctypes.CDLL, rng: np.random.Generator, kind: str, width: int) -> None:
    types = {"int": "i4", "ull": "u8", "double": "f8", "half": "u2", "bfloat162": "u4"}
    for name, dtype in types.items():
        x = rng.integers(0, 1 << 16, WARP).astype(dtype)
        for y in (*(np.full(WARP, delta, np.int32) for delta in range(35)), rng.integers(0, 64, WARP, np.int32)):
            sources = [source_lane(kind, lane, int(y[lane]), width) for lane in range(WARP)]
            got = from_slots(run_warp(selftest, f"{kind}_{name}", x, y, width=width), dtype)
            np.testing.assert_array_equal(got, x[sources])


def test_shuffle_among_some_lanes(selftest: ctypes.CDLL) -> None:
    mask = 0x0F0F_00FF
    lanes = [lane for lane in range(WARP) if mask >> lane & 1]
    x, y = np.arange(WARP, dtype=np.int32) * 3, np.zeros(WARP, np.int32)
    y[lanes] = lanes[::-1]
    got = from_slots(run_warp(selftest, "shfl_int", x, y, mask), "i4")
    np.testing.assert_array_equal(got[lanes], x[lanes[::-1]])
    assert (got[[lane for lane in range(WARP) if lane not in lanes]] == -1).all()


@pytest.mark.emulator_only
def test_reading_a_lane_outside_the_mask_is_stopped(selftest: ctypes.CDLL) -> None:
    x = np.arange(WARP, dtype=np.int32)
    with pytest.raises(
        RuntimeError, match=r"__shfl_xor_sync: lane 4 reads lane 20, which is not in the mask 0x0000fff0"
    ):
        run_warp(selftest, "shfl_xor_int", x, np.full(WARP, 16, np.int32), 0xFFF0)


@pytest.mark.emulator_only
@pytest.mark.parametrize("width", [0, 3, 64])
def test_bad_width_is_stopped(selftest: ctypes.CDLL, width: int) -> None:
    x = np.arange(WARP, dtype=np.int32)
    with pytest.raises(RuntimeError, match=f"expected width to be a power of two up to 32, but got {width}"):
        run_warp(selftest, "shfl_int", x, x, width=width)


@pytest.mark.parametrize("mask", [FULL, 1, 0x8000_0000, 0x1234_5678])
def test_votes_matches_and_reductions(selftest: ctypes.CDLL, rng: np.random.Generator, mask: int) -> None:
    lanes = [lane for lane in range(WARP) if mask >> lane & 1]
    draws = [rng.integers(-2, 2, WARP).astype(np.int32) for _ in range(10)]
    draws += [np.zeros(WARP, np.int32), np.full(WARP, -3, np.int32)]
    draws += [rng.integers(-(1 << 31), 1 << 31, WARP).astype(np.int32) for _ in range(5)]
    for x in draws:
        values = [int(x[lane]) for lane in lanes]
        patterns = [value & FULL for value in values]
        ballot = sum(1 << lane for lane in lanes if x[lane] != 0)
        same = {v: sum(1 << lane for lane in lanes if int(x[lane]) == v) for v in values}
        all_same = len(same) == 1
        want: dict[str, int | list[int]] = {
            "ballot": ballot,
            "any": int(ballot != 0),
            "all": int(ballot == mask),
            "match_any": [same[v] for v in values],
            "match_all": (1 << 32 | mask) if all_same else 0,
            "reduce_add": sum(values) & FULL,
            "reduce_min": min(values) & FULL,
            "reduce_max": max(values) & FULL,
            "reduce_umin": min(patterns),
            "reduce_umax": max(patterns),
            "reduce_and": int(np.bitwise_and.reduce(np.uint32(patterns))),
            "reduce_or": int(np.bitwise_or.reduce(np.uint32(patterns))),
            "reduce_xor": int(np.bitwise_xor.reduce(np.uint32(patterns))),
        }
        for name, result in want.items():
            expected = result if isinstance(result, list) else [result] * len(lanes)
            assert [int(v) for v in run_warp(selftest, name, x, mask=mask)[lanes]] == expected, name
        wide = x.astype(np.int64) << 32
        assert [int(v) for v in run_warp(selftest, "match_any_ll", wide, mask=mask)[lanes]] == want["match_any"]


# ---- atomics: the results of some order of the threads ----


def run_atomic(library: ctypes.CDLL, name: str, x: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cell afterwards, and what each thread found."""
    slots, cell, old = to_slots(x), to_slots(start), np.zeros(len(x), np.uint64)
    assert invoke(library, f"atomic_{name}", pointer(slots), pointer(cell), pointer(old), len(x)) is None
    return from_slots(cell, x.dtype.str), from_slots(old, x.dtype.str)


@pytest.mark.parametrize("dtype", ["int", "uint", "ull"])
@pytest.mark.parametrize("operation", ["add", "min", "max", "and", "or", "xor"])
def test_atomics_reduce(selftest: ctypes.CDLL, rng: np.random.Generator, operation: str, dtype: str) -> None:
    ufuncs = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}
    ufunc = ufuncs.get(operation, np.bitwise_xor)
    start, *x = rng.permutation(some_integers(rng, INTEGERS[dtype], 200))
    values = np.array(x, INTEGERS[dtype])
    cell, old = run_atomic(selftest, f"{operation}_{dtype}", values, np.array([start]))
    assert cell[0] == ufunc.reduce(values, initial=start, dtype=values.dtype)
    # What the threads found and what they made of it are one chain.
    chain = np.sort(np.append(ufunc(old, values), start))
    np.testing.assert_array_equal(chain, np.sort(np.append(old, cell[0])))


@pytest.mark.parametrize("dtype", ["float", "double", "half", "bfloat16"])
def test_atomic_add_of_floats(selftest: ctypes.CDLL, dtype: str) -> None:
    ones = {
        "float": np.ones(100, "f4"),
        "double": np.ones(100, "f8"),
        "half": np.full(100, 0x3C00, "u2"),
        "bfloat16": np.full(100, 0x3F80, "u2"),
    }[dtype]
    hundred = {"half": 0x5640, "bfloat16": 0x42C8}.get(dtype, 100)
    cell, old = run_atomic(selftest, f"add_{dtype}", ones, np.zeros(1, ones.dtype))
    assert cell[0] == hundred
    assert len(set(old.tolist())) == 100


@pytest.mark.parametrize(("dtype", "one", "ten"), [("half2", 0x3C00, 0x4900), ("bfloat162", 0x3F80, 0x4120)])
def test_atomic_add_of_pairs(selftest: ctypes.CDLL, dtype: str, one: int, ten: int) -> None:
    cell, _ = run_atomic(selftest, f"add_{dtype}", np.full(10, one << 16 | one, "u4"), np.zeros(1, "u4"))
    assert cell[0] == ten << 16 | ten


@pytest.mark.parametrize("dtype", ["int", "uint", "ull", "float"])
def test_atomic_exchange_passes_each_value_on_once(selftest: ctypes.CDLL, dtype: str) -> None:
    x = np.arange(1, 201, dtype=INTEGERS.get(dtype, "f4"))
    cell, old = run_atomic(selftest, f"exch_{dtype}", x, np.zeros(1, x.dtype))
    np.testing.assert_array_equal(np.sort(np.append(old, cell)), np.arange(201))


@pytest.mark.parametrize("dtype", ["int", "uint", "ull"])
def test_one_compare_and_swap_wins(selftest: ctypes.CDLL, dtype: str) -> None:
    x = np.arange(100, 300, dtype=INTEGERS[dtype])
    cell, old = run_atomic(selftest, f"cas_{dtype}", x, np.array([7], x.dtype))
    assert cell[0] in x
    assert (old == 7).sum() == 1
    assert x[old == 7] == cell
    assert set(old.tolist()) <= {7, int(cell[0])}


def test_atomic_subtract_increment_and_decrement(selftest: ctypes.CDLL) -> None:
    cell, _ = run_atomic(selftest, "sub_int", np.arange(200, dtype=np.int32), np.zeros(1, np.int32))
    assert cell[0] == -19900
    nines = np.full(200, 9, np.uint32)
    cell, old = run_atomic(selftest, "inc_uint", nines, np.full(1, 5, np.uint32))
    assert cell[0] == (5 + 200) % 10
    np.testing.assert_array_equal(np.bincount(old), [20] * 10)
    cell, old = run_atomic(selftest, "dec_uint", nines, np.full(1, 77, np.uint32))
    assert cell[0] == 0  # 77 is above 9, so that the first leaves 9; the others go round
    np.testing.assert_array_equal(np.bincount(old)[:10], [19] + [20] * 9)
