"""From the tensors of a convolution to a launch of a Triton kernel: sizes, layout, descriptors or pointers, tiles."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyvision_kernels._check import require
from pyvision_kernels._packed import PLAIN
from pyvision_kernels.ops.conv2d.triton_configs import Config, candidates

GROUP_M = 8
_USEFUL = 0.75  # of the pixels of boxes, at least, for descriptors to be taken
_NARROW_REACH = 2**31 - 2**20  # of offsets of 32 bits, with a tile beyond the end
_LEAST_STEPS = 8  # of a part of a sum over pixels
_MOST_PARTS = 64
_SHARED = 227 * 1024  # of a multiprocessor, on GPUs with tensor descriptors


class Machine(NamedTuple):
    arch: int  # compute capability: 80, 90, ...
    multiprocessors: int


class Launch(NamedTuple):
    """A kernel by its name in triton_kernels.py, with all its arguments by name."""

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int
    stages: int


class _Map(NamedTuple):
    """A tensor [N, C, H, W] as a kernel reads it; strides in that order."""

    tensor: Tensor
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    @staticmethod
    def of(tensor: Tensor) -> _Map:
        # In a trace sizes may be symbols: tiles are of numbers, for which the graph is then guarded.
        return _Map(tensor, tuple(map(int, tensor.shape)), tuple(map(int, tensor.stride())))

    def flat(self) -> tuple[int, int] | None:
        """Strides of images and of their pixels in order; None where these have no one stride."""
        (_, _, h, w), (by_image, _, by_row, by_column) = self.sizes, self.strides
        by_pixel = _merged(h, by_row, w, by_column)
        return None if by_pixel is None else (by_image, by_pixel)

    def every(self, stride: list[int], rows: int, columns: int) -> _Map:
        """Of each stride-th pixel, rows x columns of them: what a filter of one tap reads."""
        (n, c, _, _), (by_n, by_c, by_h, by_w) = self.sizes, self.strides
        return _Map(self.tensor, (n, c, rows, columns), (by_n, by_c, by_h * stride[0], by_w * stride[1]))

    @property
    def by_pixels(self) -> bool:
        """Whether pixels are nearer to each other in memory than channels."""
        _, between, by_row, by_column = self._spread()
        return min(by_row, by_column) < between

    @property
    def described(self) -> bool:
        """Whether a tensor descriptor can be made of it: one stride is 1, others are multiples of 16 bytes."""
        n, c, h, w = self._spread()
        size = self.tensor.element_size()
        inner, *others = (w, n, c, h) if self.by_pixels else (c, n, h, w)
        return inner == 1 and min(others) > 0 and not any(by * size % 16 for by in others) and self._aligned()

    def _aligned(self) -> bool:
        if type(self.tensor) in PLAIN:
            return self.tensor.data_ptr() % 16 == 0
        return bool(self.tensor.storage_offset() * self.tensor.element_size() % 16 == 0)  # while it is traced

    def _spread(self) -> tuple[int, ...]:
        """Strides, where a dimension of size 1 has any that suits."""
        by_channel = 1 if self.sizes[1] == 1 else self.strides[1]
        n, _, h, w = (16 if size == 1 else stride for size, stride in zip(self.sizes, self.strides, strict=True))
        return n, by_channel, h, w

    def arguments(self, letter: str, channel: str = "c") -> dict[str, int]:
        names = (f"stride_{letter}{axis}" for axis in ("n", channel, "h", "w"))
        return dict(zip(names, self._spread(), strict=True))

    @property
    def reach(self) -> int:
        return sum((size - 1) * abs(stride) for size, stride in zip(self.sizes, self.strides, strict=True))


def _merged(outer: int, by_outer: int, inner: int, by_inner: int) -> int | None:
    """The stride of two dimensions as one."""
    if outer == 1:
        return by_inner
    if inner == 1:
        return by_outer
    return by_inner if by_outer == inner * by_inner else None


def _flattened(maps: list[_Map | None]) -> list[_Map | None]:
    """The maps of a product of matrices, all of the same pixels, with one row each, and one image where they allow."""
    given = [item for item in maps if item is not None]
    strides = [item.flat() for item in given]
    if None in strides:
        return maps
    n, _, h, w = given[0].sizes
    pairs = [pair for pair in strides if pair is not None]
    one = all(_merged(n, by_image, h * w, by_pixel) is not None for by_image, by_pixel in pairs)
    result: list[_Map] = []
    for item, (by_image, by_pixel) in zip(given, pairs, strict=True):
        if one:
            by_pixel = _merged(n, by_image, h * w, by_pixel) or by_pixel
        sizes = (1, item.sizes[1], 1, n * h * w) if one else (n, item.sizes[1], 1, h * w)
        result.append(_Map(item.tensor, sizes, (by_image, item.strides[1], 0, by_pixel)))
    rest = iter(result)
    return [None if item is None else next(rest) for item in maps]


@functools.lru_cache(maxsize=4096)
def box(block: int, n: int, h: int, w: int, least: int, most: int) -> tuple[int, int, int] | None:
    """Images, rows and columns of a box of `block` pixels, such that few boxes cover n maps of h x w.

    Args:
        least: Rows and columns, at least.
        most: Images and rows, at most.

    Returns:
        None where more than a quarter of their pixels would lie outside.
    """
    best, fewest = None, n * h * w / _USEFUL / block
    for log_w in range(block.bit_length()):
        for log_h in range(block.bit_length() - log_w):
            bw, bh = 1 << log_w, 1 << log_h
            bn = block // (bw * bh)
            if min(bh, bw) < least or max(bn, bh) > most:
                continue
            boxes = -(-n // bn) * -(-h // bh) * -(-w // bw)
            if boxes <= fewest:  # wide boxes are taken over narrow ones
                best, fewest = (bn, bh, bw), boxes
    return best


def _box_of(
    maps: list[_Map], block: int, n: int, h: int, w: int, least: int, shifts: bool
) -> tuple[int, int, int] | None:
    """The box that all maps can be read by; None where one cannot.

    Args:
        least: Rows and columns, at least.
        shifts: Taps shift it along columns, so that it may start at any.
    """
    if not all(item.described for item in maps):
        return None
    if not any(item.by_pixels for item in maps):
        return box(block, n, h, w, least, block)
    if shifts:  # what memory runs along is read from a multiple of 16 bytes
        return None
    return box(block, n, h, w, least, 1)  # between rows and between images the channels lie


def _power_of_two(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


def _fitted(config: Config, m: int, n: int, k: int) -> Config:
    """With no tile larger than what it covers. 16 is the least of a product on tensor cores."""
    block_m, block_n, block_k = (
        min(block, max(16, _power_of_two(size))) for block, size in zip(config[:3], (m, n, k), strict=True)
    )
    return config._replace(block_m=block_m, block_n=block_n, block_k=block_k)


def _with_a_pointer_each(config: Config, wide: bool) -> Config:
    """Smaller, where no 16 bytes that are read lie together: pointers take registers, wide offsets more."""
    pixels = min(config.block_m, 64) if wide else config.block_m
    return config._replace(block_m=pixels, block_n=min(config.block_n, 64), block_k=min(config.block_k, 32))


def _resident(config: Config, size: int) -> int:
    """Programs that share a multiprocessor, by the shared memory of their stages."""
    used = (config.block_m + config.block_n) * config.block_k * size * config.stages
    return min(2, max(1, _SHARED // used)) if config.warps > 4 else min(4, max(1, _SHARED // used))


def product(
    machine: Machine,
    config: Config | None,
    precision: str,
    input: Tensor,
    weight: Tensor,
    vectors: tuple[Tensor | None, Tensor | None, Tensor | None],
    residual: Tensor | None,
    output: Tensor,
    numbers: list[int],
    activation: int,
    pool: bool,
    transposed: bool,
) -> Launch:
    """The launch of conv2d_kernel.

    Args:
        vectors: bias, scale, shift.
        output: [N, K, OH, OW] of the convolution, pooled where pool says so; of the transposed one [N, C, H, W].
        numbers: Of the Geometry of the convolution, also where it is transposed.
    """
    stride, left, dilation, groups = numbers[0:2], numbers[2], numbers[6:8], numbers[8]
    taps = tuple(map(int, weight.shape[2:]))
    source, result = _Map.of(input), _Map.of(output)
    added = None if residual is None else _Map.of(residual)
    channels = source.sizes[1] // groups
    outputs = result.sizes[1] // groups
    one = [1, 1]
    if list(taps) == one and not (any(numbers[2:6]) or pool or transposed):
        source, stride, numbers = source.every(stride, *result.sizes[2:]), one, [*one, *numbers[2:]]
    if list(taps) == stride == one and not (any(numbers[2:6]) or pool):
        flat = _flattened([source, result, added])
        assert flat[0] is not None
        assert flat[1] is not None
        source, result, added = flat[0], flat[1], flat[2]
    rows, columns = result.sizes[2:]
    if pool:  # a last odd row or column of the convolution is in no window
        rows, columns = 2 * rows, 2 * columns
    n = source.sizes[0]
    phases = stride[0] * stride[1] if transposed else 1
    grid_rows, grid_columns = rows, columns
    if transposed:
        grid_rows, grid_columns = -(-rows // stride[0]), -(-columns // stride[1])
    pixels = n * grid_rows * grid_columns
    require(pixels * phases < 2**31, "conv2d", "fewer than 2^31 pixels for a kernel of Triton's", pixels * phases)

    if config is None:
        config = candidates(machine.arch, input.dtype, precision, pixels * phases, outputs)[0]
    config = _fitted(config, pixels, outputs, channels)
    filters = _weight_strides(weight, transposed)
    by_outputs = filters[0] < filters[1]
    boxed = None
    shifts = taps[1] > 1 or left > 0
    steps_one = transposed or stride == one
    if machine.arch >= 90 and groups == 1 and steps_one and _described(weight, filters):
        boxed = _box_of([source], config.block_m, n, grid_rows, grid_columns, 2 if pool else 1, shifts)
    maps = [source, result] + ([added] if added is not None else [])
    wide = max(item.reach for item in maps) >= _NARROW_REACH or weight.numel() >= _NARROW_REACH
    if boxed is None and source.by_pixels:
        config = _with_a_pointer_each(config, wide)
    tiles = -(-pixels // config.block_m)
    if boxed is not None:
        bn, bh, bw = boxed
        tiles = -(-n // bn) * -(-grid_rows // bh) * -(-grid_columns // bw)
    tiles *= phases * -(-outputs // config.block_n)
    programs = tiles
    if boxed is not None:  # a program makes its descriptors once
        programs = min(tiles, machine.multiprocessors * _resident(config, input.element_size()))
    arguments: dict[str, Any] = {
        "input_ptr": input,
        "weight_ptr": weight,
        **dict(zip(("bias_ptr", "scale_ptr", "shift_ptr"), vectors, strict=True)),
        "residual_ptr": residual,
        "output_ptr": output,
        **dict(zip(("N", "H", "W"), (n, *source.sizes[2:]), strict=True)),
        **{"OH": rows, "OW": columns, "channels": channels, "outputs": outputs},
        **source.arguments("x"),
        **dict(zip(("stride_wo", "stride_wc", "stride_wr", "stride_ws"), filters, strict=True)),
        **(added or result).arguments("r", "k"),
        **result.arguments("o", "k"),
        **_taps_of(taps, numbers),
        "PERIOD_H": stride[0] // math.gcd(stride[0], dilation[0]) if transposed else 1,
        "PERIOD_W": stride[1] // math.gcd(stride[1], dilation[1]) if transposed else 1,
        **{"TRANSPOSED": transposed, "ACTIVATION": activation, "POOL": pool},
        "DESCRIPTORS": boxed is not None,
        **dict(zip(("BOX_N", "BOX_H", "BOX_W"), boxed or (1, 1, 1), strict=True)),
        "INPUT_BY_PIXELS": source.by_pixels,
        "WEIGHT_BY_OUTPUTS": by_outputs,
        "WIDE": wide,
        "PRECISION": precision,
        **{"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "GROUP_M": GROUP_M},
    }
    return Launch("conv2d_kernel", (programs, groups), arguments, config.warps, config.stages)


def _taps_of(taps: tuple[int, ...], numbers: list[int]) -> dict[str, int]:
    names = ("R", "S", "STRIDE_H", "STRIDE_W", "TOP", "LEFT", "DILATION_H", "DILATION_W")
    return dict(zip(names, (*taps, *numbers[0:2], numbers[4], numbers[2], *numbers[6:8]), strict=True))


def _weight_strides(weight: Tensor, transposed: bool) -> tuple[int, ...]:
    """Of outputs, of what is summed over, of rows and columns of taps; those of a dimension of size 1 suit any use."""
    (k, c, r, s), (by_k, by_c, by_row, by_column) = map(int, weight.shape), map(int, weight.stride())
    dense = 16 * max(k, c)
    by_k, by_c = 1 if k == 1 else by_k, 1 if c == 1 else by_c
    by_column = (by_row if r > 1 else dense) if s == 1 else by_column
    by_row = s * by_column if r == 1 else by_row
    return (by_c, by_k, by_row, by_column) if transposed else (by_k, by_c, by_row, by_column)


def _described(weight: Tensor, strides: tuple[int, ...]) -> bool:
    """Whether a descriptor can be made of the weight, its taps as one dimension."""
    by_output, by_channel, by_row, by_column = strides
    outer = max(by_output, by_channel)
    size = weight.element_size()
    return (
        min(by_output, by_channel) == 1
        and (weight.shape[2] == 1 or by_row == weight.shape[3] * by_column)
        and min(outer, by_column) > 0
        and not any(stride * size % 16 for stride in (outer, by_column))
        and _Map.of(weight)._aligned()
    )


def weight_gradient(
    machine: Machine,
    config: Config | None,
    precision: str,
    grad_output: Tensor,
    input: Tensor,
    output: Tensor,
    numbers: list[int],
) -> list[Launch]:
    """The launches of conv2d_weight_kernel, and of the sum of its parts where there are any."""
    stride, left, top, groups = numbers[0:2], numbers[2], numbers[4], numbers[8]
    taps = tuple(map(int, output.shape[2:]))
    grad, source = _Map.of(grad_output), _Map.of(input)
    one = [1, 1]
    if list(taps) == one and not any(numbers[2:6]):
        source, stride, numbers = source.every(stride, *grad.sizes[2:]), one, [*one, *numbers[2:]]
        flat = _flattened([grad, source])
        assert flat[0] is not None
        assert flat[1] is not None
        grad, source = flat[0], flat[1]
    channels, outputs = source.sizes[1] // groups, grad.sizes[1] // groups
    n, _, rows, columns = grad.sizes
    pixels = n * rows * columns
    require(pixels < 2**31, "conv2d", "fewer than 2^31 pixels for a kernel of Triton's", pixels)
    if config is None:
        config = candidates(machine.arch, input.dtype, precision, outputs, channels * taps[0] * taps[1])[0]
    config = _fitted(config, outputs, channels, pixels)
    boxed = None
    # A tap may lie wholly in the padding where this is larger than the map; a descriptor cannot end there.
    if machine.arch >= 90 and groups == 1 and stride == one and rows > top and columns > left:
        boxed = _box_of([source, grad], config.block_k, n, rows, columns, 1, taps[1] > 1 or left > 0)
    size = int(output.numel())
    wide = max(grad.reach, source.reach, size) >= _NARROW_REACH
    if boxed is None and (source.by_pixels or grad.by_pixels):
        config = _with_a_pointer_each(config, False)
    steps = -(-pixels // config.block_k)
    if boxed is not None:
        steps = -(-n // boxed[0]) * -(-rows // boxed[1]) * -(-columns // boxed[2])
    tiles = -(-outputs // config.block_m) * -(-channels // config.block_n) * taps[0] * taps[1]
    wanted = machine.multiprocessors * _resident(config, input.element_size()) // max(tiles * groups, 1)
    parts = config.parts or max(1, min(wanted, steps // _LEAST_STEPS, _MOST_PARTS))
    of_part = max(1, -(-steps // max(parts, 1)))
    parts = max(1, -(-steps // of_part))
    to = output
    strides = (0, *map(int, output.stride()))
    if parts > 1:
        to = output.new_empty((parts, outputs * groups, *taps, channels), dtype=torch.float32)
        strides = (size, taps[0] * taps[1] * channels, 1, taps[1] * channels, channels)
    arguments: dict[str, Any] = {
        **{"grad_ptr": grad_output, "input_ptr": input, "output_ptr": to},
        **dict(zip(("N", "H", "W", "OH", "OW"), (n, *source.sizes[2:], rows, columns), strict=True)),
        **{"channels": channels, "outputs": outputs, "steps": of_part},
        **grad.arguments("g", "k"),
        **source.arguments("x"),
        **dict(zip(("stride_part", "stride_ok", "stride_oc", "stride_or", "stride_os"), strides, strict=True)),
        **_taps_of(taps, numbers),
        "DESCRIPTORS": boxed is not None,
        **dict(zip(("BOX_N", "BOX_H", "BOX_W"), boxed or (1, 1, 1), strict=True)),
        **{"GRAD_BY_PIXELS": grad.by_pixels, "INPUT_BY_PIXELS": source.by_pixels},
        "WIDE": wide,
        "PRECISION": precision,
        **{"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k},
    }
    launches = [Launch("conv2d_weight_kernel", (tiles, parts, groups), arguments, config.warps, config.stages)]
    if parts > 1:
        by_k, by_c, by_row, by_column = map(int, output.stride())
        total = {
            **{"partial_ptr": to, "output_ptr": output, "parts": parts, "size": size, "channels": channels},
            **{"taps": taps[0] * taps[1], "stride_k": by_k, "stride_c": by_c},
            **{"stride_t": by_column if taps[1] > 1 else by_row, "BLOCK": 1024},
        }
        launches.append(Launch("conv2d_weight_sum_kernel", (-(-size // 1024),), total, 4, 1))
    return launches
