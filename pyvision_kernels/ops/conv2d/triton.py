"""conv2d and its two gradients by Triton: large dense problems in float16, bfloat16 and float32 (tf32 or ieee).

Each is an operator of `torch.library.triton_op`, so that torch.compile sees the kernels. They take the arguments of
conv2d and of its gradients, and tiles to run with (`config`, the numbers of a Config). `supports` says which problems
are worth it; the kernels run any of zero padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyvision_kernels import _activation
from pyvision_kernels._backend import CHOICE
from pyvision_kernels._check import FLOATING, require
from pyvision_kernels._op import Op, declare
from pyvision_kernels.ops.conv2d import backward, gradient, operator, triton_launch, triton_run
from pyvision_kernels.ops.conv2d.algorithm import TF32, Problem
from pyvision_kernels.ops.conv2d.triton_configs import Config, configs
from pyvision_kernels.ops.conv2d.triton_run import key_of, machine_of, run, run_again

_OP, _INPUT, _WEIGHT = "_conv2d_triton", "_conv2d_triton_backward_input", "_conv2d_triton_backward_weight"
_TENSORS = ("input_ptr", "weight_ptr", "bias_ptr", "scale_ptr", "shift_ptr", "residual_ptr", "output_ptr")
_LEAST_CHANNELS = 32  # of a group, in and out: below, a tile of tensor cores is mostly padding
_LEAST_PIXELS = 1024
_LEAST_PRODUCTS = 2**28  # 0.5 GFLOP: below, a launch costs more than the product


def available() -> bool:
    """Whether Triton is installed, and has what the kernels use."""
    return not triton_run.MISSING


def supports(problem: Problem, pool: bool) -> bool:
    """Whether Triton is to run a convolution of zero padding: a large dense one on CUDA.

    With enough channels in each group, pixels and products; float64 it has not. What it does not support is for the
    CUDA kernels in C++.
    """
    p = problem
    pixels = p.N * p.OH * p.OW
    return (
        available()
        and p.device == "cuda"
        and p.dtype in FLOATING[:3]
        and min(p.C, p.K) // p.groups >= _LEAST_CHANNELS
        and _LEAST_PIXELS <= pixels < 2**31
        and pixels * p.R * p.S * p.C * (p.K // p.groups) >= _LEAST_PRODUCTS
        and (not pool or min(p.OH, p.OW) > 1)
    )


def _check(op: str, tensor: Tensor, numbers: list[int], algorithm: int) -> str:
    """What only these kernels do not take; the precision of their products."""
    if tensor.dtype not in FLOATING[:3]:
        raise NotImplementedError(f"{op}: expected float16, bfloat16 or float32, but got {tensor.dtype}")
    if numbers[9] != 0:
        raise NotImplementedError(f"{op}: expected zero padding, the mode 0, but got the mode {numbers[9]}")
    return "tf32" if algorithm == TF32 and tensor.dtype == torch.float32 else "ieee"


def _config(op: str, given: list[int] | None) -> Config | None:
    if given is None:
        return None
    require(len(given) in (5, 6), op, "config to have 5 numbers, or 6: those of a Config", given)
    return Config(*given)


def _turned(weight: Tensor, groups: int) -> Tensor:
    """With channels next to each other: a pass over the weight, which each tile then reads by 16 bytes."""
    last = torch.channels_last
    together = groups > 1 or weight.shape[2:] == (1, 1) or weight.is_contiguous(memory_format=last)
    return weight if together else weight.contiguous(memory_format=last)


# ---- forward ----


def _fake(
    input, weight, bias, scale, shift, residual, geometry, activation, pool, channels_last, algorithm, config=None
):
    return operator._fake(
        input, weight, bias, scale, shift, residual, None, geometry, activation, pool, channels_last, algorithm
    )


def _forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    geometry: list[int],
    activation: int,
    pool: bool,
    channels_last: bool,
    algorithm: int,
    config: list[int] | None = None,
) -> Tensor:
    key = key_of(
        (input, weight, bias, scale, shift, residual),
        *(_OP, geometry, activation, pool, channels_last, algorithm, config),
    )
    plan = triton_run.plans.get(key)
    if plan is not None:
        return run_again(plan, input, _turned(weight, geometry[8]), bias, scale, shift, residual)
    precision = _check(_OP, input, geometry, algorithm)
    output = _fake(
        input, weight, bias, scale, shift, residual, geometry, activation, pool, channels_last, algorithm, config
    )
    if output.numel() == 0:
        return output
    machine, tiles, weight = machine_of(_OP, input), _config(_OP, config), _turned(weight, geometry[8])
    vectors = bias, scale, shift
    launch = triton_launch.product(
        *(machine, tiles, precision, input, weight, vectors, residual, output, geometry, activation, pool, False)
    )
    run([launch], dict(zip(_TENSORS, (input, weight, *vectors, residual, output), strict=True)), key)
    return output


def _setup(ctx, inputs, output):
    *tensors, _ = inputs[:7]
    ctx.options = inputs[6:]
    ctx.backend = CHOICE.backend
    _, activation, pool, *_ = ctx.options
    by_result = activation != 0 and not _activation.needs_input(activation) and not pool
    ctx.save_for_backward(*tensors, output if by_result else None)


def _backward(ctx, grad):
    *tensors, result = ctx.saved_tensors
    numbers, activation, pool, channels_last, kernel, _ = ctx.options
    narrow = tensors[0].dtype != torch.float32

    def convolve(input, weight, bias):
        by = TF32 if narrow and input.dtype == torch.float32 else kernel  # a 16-bit type fits in tf32
        return conv2d_triton_op(input, weight, bias, *(None,) * 3, numbers, 0, False, channels_last, by, None)

    needs = tuple(ctx.needs_input_grad[:6])
    how = kernel, ctx.backend
    ours = None if grad.is_cuda else (_backward_input, _backward_weight)  # interpreted: there is nothing to choose
    grads = gradient.backward(grad, needs, tuple(tensors), numbers, activation, pool, result, convolve, how, ours)
    return *grads, *(None,) * len(ctx.options)


def _cast(*args):
    *tensors, _ = operator._cast(*args[:6], None)
    return *tensors, *args[6:]


conv2d_triton_op: Op = declare(
    f"{_OP}(Tensor input, Tensor weight, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? residual, "
    "SymInt[] geometry, SymInt activation, bool pool, bool channels_last, SymInt algorithm, SymInt[]? config=None) "
    "-> Tensor",
    fake=_fake,
    implementation=_forward,
    setup_context=_setup,
    backward=_backward,
    autocast=_cast,
    vmap=backward._unbound(lambda: conv2d_triton_op, 6),
)


# ---- the gradients ----


def _fake_input(grad_output, weight, bias, geometry, size, activation, channels_last, algorithm, config=None):
    return backward._fake_input(grad_output, weight, bias, geometry, size, activation, channels_last, algorithm)


def _by_input(
    grad_output: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: list[int],
    size: list[int],
    activation: int,
    channels_last: bool,
    algorithm: int,
    config: list[int] | None = None,
) -> Tensor:
    key = key_of((grad_output, weight, bias), *(_INPUT, geometry, size, activation, channels_last, algorithm, config))
    plan = triton_run.plans.get(key)
    if plan is not None:
        return run_again(plan, grad_output, _turned(weight, geometry[8]), bias)
    precision = _check(_INPUT, weight, geometry, algorithm)
    output = _fake_input(grad_output, weight, bias, geometry, size, activation, channels_last, algorithm)
    if output.numel() == 0:
        return output
    machine, tiles, weight = machine_of(_INPUT, weight), _config(_INPUT, config), _turned(weight, geometry[8])
    vectors = bias, None, None
    launch = triton_launch.product(
        *(machine, tiles, precision, grad_output, weight, vectors, None, output, geometry, activation, False, True)
    )
    given = {"input_ptr": grad_output, "weight_ptr": weight, "bias_ptr": bias, "output_ptr": output}
    run([launch], given, key)
    return output


def _backward_input(grad_output, weight, bias, geometry, size, activation, channels_last, algorithm):
    return backward_input_triton_op(
        grad_output, weight, bias, geometry, size, activation, channels_last, algorithm, None
    )


def _backward_weight(grad_output, input, geometry, taps, channels_last, algorithm):
    return backward_weight_triton_op(grad_output, input, geometry, taps, channels_last, algorithm, None)


def _convolve(input, weight, numbers, channels_last, algorithm):
    return conv2d_triton_op(input, weight, *(None,) * 4, numbers, 0, False, channels_last, algorithm, None)


def _backward_of_input(ctx, grad):
    narrow = grad.dtype != torch.float32

    def widened(grad_output, weight, bias, numbers, size, activation, channels_last, kernel):
        by = TF32 if narrow else kernel  # a 16-bit type fits in tf32
        return _backward_input(grad_output, weight, bias, numbers, size, activation, channels_last, by)

    return *backward.gradient_of_input(ctx, grad, _convolve, widened, _backward_weight), *(None,) * 6


backward_input_triton_op: Op = declare(
    f"{_INPUT}(Tensor grad_output, Tensor weight, Tensor? bias, SymInt[] geometry, SymInt[] size, "
    "SymInt activation, bool channels_last, SymInt algorithm, SymInt[]? config=None) -> Tensor",
    fake=_fake_input,
    implementation=_by_input,
    setup_context=backward._setup_input,
    backward=_backward_of_input,
    autocast=backward._cast,
    vmap=backward._unbound(lambda: backward_input_triton_op, 3),
)


def _fake_weight(grad_output, input, geometry, taps, channels_last, algorithm, config=None):
    return backward._fake_weight(grad_output, input, geometry, taps, channels_last, algorithm)


def _by_weight(
    grad_output: Tensor,
    input: Tensor,
    geometry: list[int],
    taps: list[int],
    channels_last: bool,
    algorithm: int,
    config: list[int] | None = None,
) -> Tensor:
    key = key_of((grad_output, input), *(_WEIGHT, geometry, taps, channels_last, algorithm, config))
    plan = triton_run.plans.get(key)
    if plan is not None:
        return run_again(plan, grad_output, input)
    precision = _check(_WEIGHT, input, geometry, algorithm)
    output = _fake_weight(grad_output, input, geometry, taps, channels_last, algorithm)
    if output.numel() == 0:
        return output
    machine, tiles = machine_of(_WEIGHT, input), _config(_WEIGHT, config)
    launches = triton_launch.weight_gradient(machine, tiles, precision, grad_output, input, output, geometry)
    run(launches, {"grad_ptr": grad_output, "input_ptr": input, "output_ptr": output}, key)
    return output


def _backward_of_weight(ctx, grad):
    return *backward.gradient_of_weight(ctx, grad, _convolve, _backward_input), *(None,) * 5


backward_weight_triton_op: Op = declare(
    f"{_WEIGHT}(Tensor grad_output, Tensor input, SymInt[] geometry, SymInt[] taps, bool channels_last, "
    "SymInt algorithm, SymInt[]? config=None) -> Tensor",
    fake=_fake_weight,
    implementation=_by_weight,
    setup_context=backward._setup_weight,
    backward=_backward_of_weight,
    autocast=backward._cast,
    vmap=backward._unbound(lambda: backward_weight_triton_op, 2),
)


# ---- what others call: the arguments of conv2d_op (but packed), backward_input_op and backward_weight_op ----


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    geometry: list[int],
    activation: int,
    pool: bool,
    channels_last: bool,
    algorithm: int,
    config: Config | None = None,
) -> Tensor:
    return conv2d_triton_op(
        *(input, weight, bias, scale, shift, residual, geometry, activation, pool, channels_last, algorithm),
        None if config is None else list(config),
    )


def backward_input(
    grad_output: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: list[int],
    size: list[int],
    activation: int,
    channels_last: bool,
    algorithm: int,
    config: Config | None = None,
) -> Tensor:
    return backward_input_triton_op(
        *(grad_output, weight, bias, geometry, size, activation, channels_last, algorithm),
        None if config is None else list(config),
    )


def backward_weight(
    grad_output: Tensor,
    input: Tensor,
    geometry: list[int],
    taps: list[int],
    channels_last: bool,
    algorithm: int,
    config: Config | None = None,
) -> Tensor:
    return backward_weight_triton_op(
        *(grad_output, input, geometry, taps, channels_last, algorithm), None if config is None else list(config)
    )


__all__ = [
    "Config",
    "available",
    "backward_input",
    "backward_weight",
    "configs",
    "forward",
    "supports",
]
