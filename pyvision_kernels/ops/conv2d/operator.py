"""The operator of conv2d: schema, checks, gradient, and `run`, the way from checked arguments to a kernel."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pyvision_kernels import _activation
from pyvision_kernels._backend import CHOICE
from pyvision_kernels._check import FLOATING, autocasts, require
from pyvision_kernels._op import declare
from pyvision_kernels._tuner import TUNER
from pyvision_kernels.ops.conv2d import algorithm, choice, gradient, reference
from pyvision_kernels.ops.conv2d.algorithm import TORCH
from pyvision_kernels.ops.conv2d.geometry import Geometry


class Packs(Protocol):
    """Where a layer keeps packed weights."""

    def get(self, weight: Tensor, key: Hashable, make: Callable[[], Tensor]) -> Tensor | None: ...


def _check(input, weight, numbers, named, residual, op):
    """What shapes, dtypes and devices can show; returns the rows and columns of the convolution."""
    require(input.dim() == 4, op, "input to have 4 dimensions [N, C, H, W]", input.shape)
    require(weight.dim() == 4, op, "weight to have 4 dimensions [K, C / groups, R, S]", weight.shape)
    groups = numbers[8]
    require(
        weight.shape[0] % groups == 0,
        op,
        f"weight to have output channels in a multiple of groups {groups}",
        weight.shape,
    )
    require(weight.shape[2] > 0 and weight.shape[3] > 0, op, "weight to have at least one tap", weight.shape)
    channels = weight.shape[1] * groups
    require(input.shape[1] == channels, op, f"input to have {channels} channels as weight and groups have", input.shape)
    if input.dtype not in FLOATING:
        raise RuntimeError(f"{op}: expected input to be float16, bfloat16, float32 or float64, but got {input.dtype}")
    require(weight.dtype == input.dtype, op, f"weight to be {input.dtype} as input is", weight.dtype)
    require(weight.device == input.device, op, "weight to be on the device of input", weight.device)
    for name, values in named.items():
        if values is not None:
            require(
                tuple(values.shape) == (weight.shape[0],), op, f"{name} to have size [{weight.shape[0]}]", values.shape
            )
            fits = values.dtype in (input.dtype, torch.float32) and (
                values.dtype == input.dtype or input.dtype != torch.float64
            )
            require(fits, op, f"{name} to be {input.dtype} as input is, or float32 beside a 16-bit input", values.dtype)
            require(values.device == input.device, op, f"{name} to be on the device of input", values.device)
    left, right, top, bottom = numbers[2:6]
    sides = {"height": (2, top, bottom), "width": (3, left, right)}
    for (axis, (dim, before, after)), taps, spread in zip(sides.items(), weight.shape[2:], numbers[6:8], strict=True):
        size, reach = input.shape[dim], spread * (taps - 1) + 1
        most = max(before, after)
        if numbers[9] == 1:
            require(
                most < size or most == 0, op, f"padding to be below the {axis} of input, {size}, to reflect it", most
            )
        if numbers[9] == 3:
            require(most <= size, op, f"padding to be at most the {axis} of input, {size}", most)
        padded = size + before + after
        require(padded >= reach, op, f"input to have a padded {axis} of at least {reach}, the reach of weight", padded)
    rows, columns = Geometry(numbers).output_size(input.shape[2:], weight.shape[2:])
    if residual is not None:
        wanted = [input.shape[0], weight.shape[0], rows, columns]
        require(list(residual.shape) == wanted, op, f"residual to have size {wanted}", residual.shape)
        require(residual.dtype == input.dtype, op, f"residual to be {input.dtype} as input is", residual.dtype)
        require(residual.device == input.device, op, "residual to be on the device of input", residual.device)
    return rows, columns


def _fake(input, weight, bias, scale, shift, residual, packed, numbers, activation, pool, channels_last, algorithm):
    op = "conv2d_max_pool2d" if pool else "conv2d"
    rows, columns = _check(input, weight, numbers, {"bias": bias, "scale": scale, "shift": shift}, residual, op)
    require(not pool or (rows > 1 and columns > 1), op, "at least 2 x 2 pixels to pool", [rows, columns])
    size = (input.shape[0], weight.shape[0], rows // 2 if pool else rows, columns // 2 if pool else columns)
    return torch.empty(size, dtype=input.dtype, device=input.device, memory_format=_format(channels_last))


def _format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def _setup(ctx, inputs, output):
    *tensors, _ = inputs[:7]
    ctx.options = inputs[7:]
    ctx.backend = CHOICE.backend
    _, activation, pool, _, _ = ctx.options
    by_result = activation != 0 and not _activation.needs_input(activation) and not pool
    ctx.save_for_backward(*tensors, output if by_result else None)


def _backward(ctx, grad):
    *tensors, result = ctx.saved_tensors
    numbers, activation, pool, channels_last, kernel = ctx.options

    def convolve(input, weight, bias):
        again = algorithm.in_cuda_cpp(kernel) if input.is_cuda else kernel
        return conv2d_op(input, weight, bias, *(None,) * 4, numbers, 0, False, channels_last, again)

    needs = tuple(ctx.needs_input_grad[:6])
    how = kernel, ctx.backend
    grads = gradient.backward(grad, needs, tuple(tensors), numbers, activation, pool, result, convolve, how)
    return *grads, *(None,) * (1 + len(ctx.options))


def _vmap(info, in_dims, *args):
    tensors = [
        arg.unbind(dim) if arg is not None and dim is not None else (arg,) * info.batch_size
        for arg, dim in zip(args[:7], in_dims[:7], strict=True)
    ]
    return torch.stack([conv2d_op(*one, *args[7:]) for one in zip(*tensors, strict=True)]), 0


def _cast(*args):
    # As torch's convolutions: all in autocast's dtype, but float64.
    dtype = torch.get_autocast_dtype(args[0].device.type)

    def cast(arg):
        return arg.to(dtype) if isinstance(arg, Tensor) and arg.dtype in FLOATING[:3] else arg

    input, weight, bias, scale, shift, residual, _ = args[:7]
    single = [arg.float() if isinstance(arg, Tensor) and arg.dtype != torch.float64 else arg for arg in (scale, shift)]
    return cast(input), cast(weight), cast(bias), *single, cast(residual), None, *args[7:]


conv2d_op = declare(
    "conv2d(Tensor input, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? residual, "
    "Tensor? packed, int[] geometry, int activation, bool pool, bool channels_last, int algorithm) -> Tensor",
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    autocast=_cast,
    vmap=_vmap,
)


def _fake_pack(weight, geometry, algorithm):
    # How many bytes a kernel makes of a weight is its own affair.
    return weight.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.uint8)


conv2d_pack_op = declare(
    "_conv2d_pack(Tensor weight, int[] geometry, int algorithm) -> Tensor",
    fake=_fake_pack,
)


_MOST_DECIDED = 4096  # sizes of inputs of a Geometry


def decide(input: Tensor, weight: Tensor, geometry: Geometry, packed: bool, alone: bool, fusion: str = "") -> int:
    """The number of the algorithm for these inputs, or TORCH.

    Args:
        packed: The packed weight is kept between calls.
        alone: See `algorithm.Problem`.
        fusion: See `choice.fusion_of`; of CUDA alone.
    """
    problem = problem_of(input, weight, geometry, alone)
    tf32 = choice.precision_of(problem.dtype, problem.device)
    return choice.choose(problem, packed, fusion=fusion, tf32=tf32, gpu=choice.gpu_of(input))


def problem_of(input: Tensor, weight: Tensor, geometry: Geometry, alone: bool) -> algorithm.Problem:
    require(weight.dim() == 4, "conv2d", "weight to have 4 dimensions [K, C / groups, R, S]", weight.shape)
    require(input.dim() == 4, "conv2d", "input to have 4 dimensions [N, C, H, W]", input.shape)
    flows = flows_channels_last(input, weight)
    return _problem(input.shape, input.dtype, input.device.type, flows, weight, geometry, alone)


def _problem(
    size: Sequence[int],
    dtype: torch.dtype,
    device: str,
    channels_last: bool,
    weight: Tensor,
    geometry: Geometry,
    alone: bool,
) -> algorithm.Problem:
    images, channels, height, width = size
    rows, columns = geometry.output_size((height, width), weight.shape[2:])
    outputs, _, *taps = weight.shape
    return algorithm.Problem(
        *(images, channels, height, width),
        *(outputs, taps[0], taps[1], rows, columns),
        geometry.stride,
        geometry.dilation,
        geometry.groups,
        dtype,
        device,
        channels_last,
        alone,
        geometry.padding_mode,
    )


def decide_on_cpu(
    size: Sequence[int], dtype: torch.dtype, channels_last: bool, weight: Tensor, geometry: Geometry
) -> int:
    """decide, of a layer of a fused model whose input is not there yet."""
    problem = _problem(size, dtype, "cpu", channels_last, weight, geometry, alone=False)
    return choice.choose(problem, packed=True)


def state_of(input: Tensor) -> Any:
    """What a decision depends on beside the call itself; a part of every key of what is remembered."""
    if input.is_cuda and input.dtype is torch.float32:
        return CHOICE.key, algorithm.convolution_allows_tf32()
    return CHOICE.key


def flows_channels_last(input: Tensor, weight: Tensor) -> bool:
    """As PyTorch decides: where the input is, or the weight."""
    last = torch.channels_last
    if torch._C._functorch.maybe_current_level() is not None:  # vmap's tensors do not say
        return False
    if input.is_contiguous():
        return weight.is_contiguous(memory_format=last) and not weight.is_contiguous()
    return input.is_contiguous(memory_format=last) or (
        weight.is_contiguous(memory_format=last) and not weight.is_contiguous()
    )


def run(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    pool: bool = False,
    packs: Packs | None = None,
    channels_last: bool | None = None,
    fused: bool = False,
) -> Tensor:
    """conv2d for layers: of checked options, with packed weights, by the kernel that the rule picks.

    Args:
        packs: Keeps the packed weight between calls; None: it is packed at every call.
        channels_last: Layout of the result; None: that of the input.
        fused: It is a layer of a fused model.
        Others: as of conv2d; input is [N, C, H, W].
    """
    if autocasts(input):  # what is chosen, and measured, is of the dtype that is computed in
        cast = _cast(input, weight, bias, scale, shift, residual, None)[:6]
        with torch.autocast(input.device.type, enabled=False):
            input, weight, bias, scale, shift, residual = cast
            options = activation, pool, None, channels_last, fused
            return run(input, weight, bias, geometry, scale, shift, residual, *options)
    kernel = None
    compiling = torch.compiler.is_compiling()
    if not compiling:
        # What is fused, by what is absent: the same for every call of a layer.
        how = bias is None, scale is None, shift is None, residual is None, activation, pool, packs is None, fused
        key = input.shape, input.stride(), weight.shape, weight.stride(), input.dtype, input.device, how
        kernel = geometry.plans.get((key, state_of(input)))
    if channels_last is None:
        channels_last = flows_channels_last(input, weight)
    if kernel is None:
        alone = not (fused or pool) and scale is None and shift is None and residual is None and activation is None
        fusion = choice.fusion_of(bias, scale, shift, residual, activation, pool) if input.is_cuda else ""
        if not compiling and TUNER.wants(input):
            problem = problem_of(input, weight, geometry, alone)
            tf32, gpu = choice.precision_of(problem.dtype, problem.device), choice.gpu_of(input)

            def by_kernel(kernel: int) -> Tensor:
                return _by(kernel, input, weight, bias, geometry, scale, shift, residual, activation, pool, packs, last)

            last = channels_last
            choice.measure(problem, choice.FORWARD, fusion, tf32, gpu, by_kernel)
        kernel = decide(input, weight, geometry, packs is not None, alone, fusion)
        if not compiling and (TUNER.wants(input) or not TUNER.active):
            if len(geometry.plans) > _MOST_DECIDED:
                geometry.plans.clear()
            geometry.plans[key, state_of(input)] = kernel
    return _by(kernel, input, weight, bias, geometry, scale, shift, residual, activation, pool, packs, channels_last)


def _by(kernel, input, weight, bias, geometry, scale, shift, residual, activation, pool, packs, channels_last):
    """The call by the kernel of a number."""
    if kernel == TORCH:
        return _by_torch(input, weight, bias, geometry, scale, shift, residual, activation, pool, channels_last)
    options = geometry.numbers, _activation.NUMBERS[activation], pool, channels_last
    if algorithm.is_triton(kernel):
        return choice.forward(input, weight, bias, scale, shift, residual, *options, kernel=kernel)
    packed = None
    if packs is not None:
        packed = packs.get(weight, (kernel, input.dtype), lambda: pack(weight, geometry, kernel))
    return conv2d_op(input, weight, bias, scale, shift, residual, packed, *options, kernel)


def pack(weight: Tensor, geometry: Geometry, kernel: int) -> Tensor:
    """The weight as the algorithm reads it."""
    return conv2d_pack_op(weight.detach(), geometry.numbers, kernel)


def _by_torch(input, weight, bias, geometry, scale, shift, residual, activation, pool, channels_last):
    function = reference.conv2d_max_pool2d if pool else reference.conv2d
    modes = ("zeros", "reflect", "replicate", "circular")
    out = function(
        *(input, weight, bias, geometry.stride, geometry.padding, geometry.dilation, geometry.groups),
        scale=scale,
        shift=shift,
        residual=residual,
        activation=activation,
        padding_mode=modes[geometry.padding_mode],
    ).to(input.dtype)
    return out.contiguous(memory_format=_format(channels_last))
