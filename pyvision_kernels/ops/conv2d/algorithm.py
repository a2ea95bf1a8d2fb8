"""Which kernel computes a convolution: the rule behind `pvk.backend("auto")`, by shape alone.

That of the CPU rests on ratios to PyTorch of the layers in bench_cases.py and of others like them, packed weights, one
thread (two for 1x1). That of CUDA rests on no measurement yet; what the tuner measures goes before it (choice.py).
docs/ops/conv2d.md says both in words.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pyvision_kernels._extension import cpu_has_bfloat16_dot

# Numbers are those of csrc/ops/conv2d/conv2d.h.
DIRECT, WINOGRAD2, WINOGRAD4, DEPTHWISE, FEW_CHANNELS, TF32 = range(6)
# Those of Triton are not C++'s. Its configuration i of choice.py is added as 8 * (i + 1); without it, the default.
TRITON, TRITON_TF32 = 6, 7
TORCH = -1  # PyTorch's kernels
NAMES = ("direct", "winograd2", "winograd4", "depthwise", "few_channels", "tf32", "triton", "triton tf32")
FEW = 4  # channels of a first layer, at most


@dataclass(frozen=True)
class Problem:
    """Sizes of a convolution: N images, C channels in, K out, R x S taps, OH x OW pixels out.

    alone: nothing follows that PyTorch would do in a pass of its own (batch norm, addition, activation, pooling), and
    it is in no fused model, whose maps flow in our layout.
    """

    N: int
    C: int
    H: int
    W: int
    K: int
    R: int
    S: int
    OH: int
    OW: int
    stride: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    dtype: torch.dtype
    device: str
    channels_last: bool
    alone: bool
    padding_mode: int = 0

    @property
    def is_dense_3x3(self) -> bool:
        one = (1, 1)
        return (self.R, self.S) == (3, 3) and self.stride == one and self.dilation == one and self.groups == 1


# algorithm -> (side of a tile of pixels, products a tile and channel)
_TILES = {DIRECT: (1, 9), WINOGRAD2: (2, 16), WINOGRAD4: (4, 36)}
# A pass over the weights costs as much as so many tiles: to read them, or to transform them first.
_TILES_TO_READ, _TILES_TO_PACK = 8, 28
_BY_DOT = 0.6  # of a product's cost in the direct algorithm: bfloat16 by dot products, where the others are in float32


def name_of(kernel: int) -> str:
    """Of the algorithm, and of the configuration where one was measured."""
    return NAMES[kernel % 8] + (f" #{kernel // 8 - 1}" if kernel >= 8 else "")


def is_triton(kernel: int) -> bool:
    return kernel >= 0 and kernel % 8 in (TRITON, TRITON_TF32)


def in_cuda_cpp(kernel: int) -> int:
    """The kernel in CUDA C++ that rounds float32 as this one does."""
    return TF32 if kernel >= 0 and kernel % 8 in (TF32, TRITON_TF32) else DIRECT


@torch.compiler.assume_constant_result
def convolution_allows_tf32() -> bool:
    """Whether PyTorch's flags let convolutions in float32 on CUDA round their factors to tf32."""
    return _PRECISION("cuda", "conv") == "tf32"


@torch.compiler.assume_constant_result
def matmul_allows_tf32() -> bool:
    """Whether PyTorch's flags let matrix products in float32 on CUDA do so."""
    return _PRECISION("cuda", "matmul") == "tf32"


# Follows `allow_tf32`, `fp32_precision` and `set_float32_matmul_precision` alike. The getters of the first and the last
# raise where a program has set both; this one does not.
_PRECISION = torch._C._get_fp32_precision_getter
# Below so many tiles of 128 x 128 outputs, a kernel with such tiles leaves most of a GPU idle.
_TILES_TO_FILL = 64
_FIRST_LAYER = 16  # channels, below which a step of a matrix product over channels is mostly padding


def is_for_triton(problem: Problem) -> bool:
    """On CUDA, of our own kernels: Triton for large dense convolutions; CUDA C++ for float64, groups, depthwise, first
    layers, and what is small, as most layers of one image are."""
    p = problem
    if p.dtype == torch.float64 or p.groups > 1 or min(p.C, p.K) < _FIRST_LAYER:
        return False
    return -(-p.N * p.OH * p.OW // 128) * -(-p.K // 128) >= _TILES_TO_FILL


def ours(problem: Problem, strict: bool, packed: bool) -> int:
    """The best of our own kernels on the CPU.

    Args:
        strict: Without F(4x4, 3x3), whose error may exceed twice PyTorch's.
        packed: The packed weight is kept between calls.
    """
    p = problem
    if p.groups > 1 and p.groups == p.C:
        return DEPTHWISE
    if p.groups == 1 and p.C <= FEW:
        return FEW_CHANNELS
    if not p.is_dense_3x3 or p.C < 8 or p.K < 4:
        return DIRECT
    weights = _TILES_TO_READ if packed else _TILES_TO_PACK
    best, least = DIRECT, 0.0
    for algorithm, (side, products) in _TILES.items():
        cost: float = products * (p.N * -(-p.OH // side) * -(-p.OW // side) + weights)
        if algorithm == DIRECT and p.dtype == torch.bfloat16 and p.device == "cpu" and cpu_has_bfloat16_dot():
            cost *= _BY_DOT
        if algorithm == DIRECT or (cost <= least and not (strict and algorithm == WINOGRAD4)):
            best, least = algorithm, cost
    return best


def torch_is_faster(problem: Problem, packed: bool) -> bool:
    """Where PyTorch's kernel was measured to be faster than ours, and on CUDA where ours was not measured to be so.

    packed: as of `ours`.
    """
    p = problem
    if p.device == "cuda":
        return p.groups == 1 or p.groups != p.C
    if p.device != "cpu" or not p.alone:
        return False
    if p.dtype == torch.float32:
        # To turn a contiguous map costs more than our 1 x 1 gains where it has more channels than the result.
        reduces = (p.R, p.S) == (1, 1) and p.groups == 1 and p.C >= 2 * p.K and p.C > FEW
        return reduces and not p.channels_last and p.OH * p.OW >= 28 * 28
    if p.dtype != torch.bfloat16:
        return False
    # PyTorch's kernels for bfloat16, which multiply by dot products where ours convert to float32.
    if p.groups > 1 and p.groups == p.C:
        return p.channels_last and p.N * p.OH * p.OW > 14 * 14
    if p.groups > 1:
        return p.C // p.groups <= 8
    if p.C <= FEW:
        return p.OH * p.OW > 28 * 28 and (p.channels_last or p.R > 3)
    # Of a small map the weights are most of the work where they are transformed at every call.
    return not packed and p.is_dense_3x3 and p.N * p.OH * p.OW <= 14 * 14
