"""Which tiles the Triton kernels of conv2d take: a table by architecture, type and shape; the first is the default."""

from __future__ import annotations

from typing import NamedTuple

import torch

from pyvision_kernels.ops.conv2d.algorithm import Problem


class Config(NamedTuple):
    """A tile of block_m x block_n of the result, block_k of the sum a step.

    parts: Into how many the sum over pixels of a weight's gradient is split; 0: by the size of the GPU.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    parts: int = 0


FORWARD, BACKWARD_INPUT, BACKWARD_WEIGHT = "forward", "backward_input", "backward_weight"
_FEW = 96 * 128 * 128  # elements of a result whose large tiles would leave most of a GPU without work
_NARROW = 64  # rows or columns that a tile of 128 would leave half empty

# (architecture, type) -> shape -> configurations. M: pixels, or K of a weight's gradient. N: K, or its C.
_TABLE: dict[tuple[int, str], dict[str, tuple[Config, ...]]] = {
    (80, "half"): {
        "wide": (Config(128, 128, 32, 8, 4), Config(128, 128, 64, 8, 3), Config(128, 64, 32, 4, 4)),
        "narrow": (Config(128, 64, 32, 4, 4), Config(64, 64, 64, 4, 3)),
        "few": (Config(64, 64, 64, 4, 4), Config(64, 128, 32, 4, 4)),
    },
    (90, "half"): {
        "wide": (
            Config(128, 128, 64, 8, 3),
            Config(128, 256, 64, 8, 3),
            Config(256, 128, 64, 8, 3),
            Config(128, 128, 64, 4, 4),
        ),
        "narrow": (Config(128, 64, 64, 4, 4), Config(256, 64, 64, 8, 3), Config(64, 64, 64, 4, 4)),
        "few": (Config(64, 64, 64, 4, 5), Config(64, 128, 64, 4, 4), Config(128, 64, 64, 4, 4)),
    },
    (100, "half"): {
        "wide": (Config(128, 128, 64, 4, 4), Config(128, 256, 64, 4, 3), Config(128, 128, 64, 8, 3)),
        "narrow": (Config(128, 64, 64, 4, 4), Config(64, 64, 64, 4, 4)),
        "few": (Config(64, 64, 64, 4, 5), Config(128, 64, 64, 4, 4)),
    },
    (80, "tf32"): {
        "wide": (Config(128, 128, 32, 8, 3), Config(128, 64, 32, 4, 3)),
        "narrow": (Config(128, 64, 32, 4, 3), Config(64, 64, 32, 4, 4)),
        "few": (Config(64, 64, 32, 4, 4), Config(64, 32, 32, 4, 4)),
    },
    (90, "tf32"): {
        "wide": (Config(128, 128, 32, 8, 3), Config(128, 64, 32, 4, 4)),
        "narrow": (Config(128, 64, 32, 4, 4), Config(64, 64, 32, 4, 4)),
        "few": (Config(64, 64, 32, 4, 5), Config(64, 128, 32, 4, 4)),
    },
    (80, "ieee"): {
        "wide": (Config(64, 64, 16, 4, 3), Config(128, 64, 16, 8, 3)),
        "narrow": (Config(64, 64, 16, 4, 3), Config(64, 32, 16, 4, 3)),
        "few": (Config(64, 32, 16, 4, 3), Config(32, 32, 16, 4, 3)),
    },
}
_TABLE[100, "tf32"] = _TABLE[90, "tf32"]
_TABLE[90, "ieee"] = _TABLE[100, "ieee"] = _TABLE[80, "ieee"]


def shapes(arch: int, dtype: torch.dtype, precision: str) -> dict[str, tuple[Config, ...]]:
    """The configurations of an architecture and a type, by the shape of the result."""
    # From 120 on, programs have the shared memory and the instructions of 80, and descriptors.
    family = 80 if arch >= 120 else max(known for known in (80, 90, 100) if known <= max(arch, 80))
    return _TABLE[family, precision if dtype == torch.float32 else "half"]


def candidates(arch: int, dtype: torch.dtype, precision: str, m: int, n: int) -> tuple[Config, ...]:
    """Configurations for a result of m x n elements, the default first.

    Args:
        arch: Compute capability: 80, 89, 90, 100, ...
        precision: "tf32" or "ieee", of products in float32.
    """
    shape = "narrow" if min(m, n) <= _NARROW else "few" if m * n <= _FEW else "wide"
    return shapes(arch, dtype, precision)[shape]


def configs(arch: int, problem: Problem, direction: str = FORWARD, precision: str = "ieee") -> tuple[Config, ...]:
    """What a tuner tries for a problem, the default first.

    Args:
        arch: Compute capability: 80, 89, 90, 100, ...
        direction: FORWARD, BACKWARD_INPUT or BACKWARD_WEIGHT.
        precision: "tf32" or "ieee", of products in float32.
    """
    p = problem
    m, n = {
        FORWARD: (p.N * p.OH * p.OW, p.K // p.groups),
        BACKWARD_INPUT: (p.N * p.H * p.W, p.C // p.groups),
        BACKWARD_WEIGHT: (p.K // p.groups, p.C // p.groups * p.R * p.S),
    }[direction]
    return candidates(arch, p.dtype, precision, m, n)
