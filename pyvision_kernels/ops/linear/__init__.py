"""Fully connected layer: schema, checks, gradient, the way to a kernel, and the public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyvision_kernels import _activation
from pyvision_kernels._backend import CHOICE
from pyvision_kernels._check import FLOATING, autocasts, require, require_tensors
from pyvision_kernels._op import declare, runs_cuda_kernels
from pyvision_kernels._tuner import TUNER
from pyvision_kernels.ops.conv2d import choice
from pyvision_kernels.ops.conv2d.algorithm import DIRECT, TF32, TORCH, is_triton
from pyvision_kernels.ops.conv2d.geometry import Geometry
from pyvision_kernels.ops.conv2d.operator import Packs, problem_of
from pyvision_kernels.ops.linear import reference

_OP = "linear"
_ROWS_WITHOUT_PACKING = 16  # at most so many are multiplied with the weight as it is


def _check(input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    require(weight.dim() == 2, _OP, "weight to have 2 dimensions [K, C]", weight.shape)
    channels = weight.shape[1]
    require(
        input.dim() == 2 and input.shape[1] == channels,
        _OP,
        f"input to have size [M, {channels}] as weight has",
        input.shape,
    )
    if input.dtype not in FLOATING:
        raise RuntimeError(f"{_OP}: expected input to be float16, bfloat16, float32 or float64, but got {input.dtype}")
    for name, tensor in (("weight", weight), ("residual", residual), ("bias", bias)):
        if tensor is None:
            continue
        beside = name == "bias" and tensor.dtype == torch.float32 and input.dtype != torch.float64
        require(tensor.dtype == input.dtype or beside, _OP, f"{name} to be {input.dtype} as input is", tensor.dtype)
        require(tensor.device == input.device, _OP, f"{name} to be on the device of input", tensor.device)
    if bias is not None:
        require(tuple(bias.shape) == (weight.shape[0],), _OP, f"bias to have size [{weight.shape[0]}]", bias.shape)
    if residual is not None:
        wanted = [input.shape[0], weight.shape[0]]
        require(list(residual.shape) == wanted, _OP, f"residual to have size {wanted}", residual.shape)


def _fake(input, weight, bias, residual, packed, activation, tf32=False):
    _check(input, weight, bias, residual)
    return input.new_empty((input.shape[0], weight.shape[0]))


def _setup(ctx, inputs, output):
    *tensors, _, ctx.activation = inputs[:6]
    ctx.options, ctx.backend = inputs[6:], CHOICE.backend  # whether tf32, where it is given
    by_result = ctx.activation != 0 and not _activation.needs_input(ctx.activation)
    ctx.save_for_backward(*tensors, output if by_result else None)


def _backward(ctx, grad):
    input, weight, bias, residual, at = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if _activation.needs_input(ctx.activation):
        # In float32 beside 16 bits: a derivative that jumps is taken on the right side.
        tensors = (input, weight, bias, residual)
        wide = [value.float() if value is not None and value.dtype != torch.float64 else value for value in tensors]
        at = linear_op(*wide, None, 0, *ctx.options)
    grad = _activation.backward(ctx.activation, grad, at).to(input.dtype)
    how = (bool(ctx.options) and ctx.options[0], ctx.backend)
    return (
        _gradient(choice.INPUT, grad, input, weight, how) if needs[0] else None,
        _gradient(choice.WEIGHT, grad, input, weight, how) if needs[1] else None,
        grad.sum(0).to(bias.dtype) if needs[2] and bias is not None else None,
        grad if needs[3] and residual is not None else None,
        *(None,) * (2 + len(ctx.options)),
    )


def _gradient(direction: str, grad: Tensor, input: Tensor, weight: Tensor, how: tuple[bool, str]) -> Tensor:
    """Of input or weight: on CUDA perhaps by a kernel of the 1 x 1 convolution that a linear layer is.

    how: Whether the forward rounded to tf32, and `pvk.backend` when it ran.
    """
    if not runs_cuda_kernels(grad):
        return grad @ weight if direction == choice.INPUT else grad.mT @ input

    def by_kernel(kernel: int) -> Tensor:
        if kernel == TORCH:
            return grad @ weight if direction == choice.INPUT else grad.mT @ input
        if direction == choice.INPUT:
            given = _as_map(grad), _as_map(weight), None, _GEOMETRY.numbers, [1, 1], 0
            maps = choice.backward_input(*given, False, kernel=kernel)
        else:
            maps = choice.backward_weight(
                _as_map(grad), _as_map(input), _GEOMETRY.numbers, [1, 1], False, kernel=kernel
            )
        return maps.flatten(1)

    sizes = _as_map(input).shape, _as_map(weight).shape
    kernel = choice.choose_gradient(
        f"linear {direction}", *sizes, _as_map(grad), _GEOMETRY.numbers, False, *how, by_kernel
    )
    return by_kernel(kernel)


def _as_map(rows: Tensor) -> Tensor:
    """[M, C] -> [M, C, 1, 1], a view."""
    return rows[:, :, None, None]


_GEOMETRY = Geometry.of(1, 0, 1, 1, "zeros", (1, 1), _OP)


def _cast(*args):
    # As torch's linear: all in autocast's dtype, but float64.
    dtype = torch.get_autocast_dtype(args[0].device.type)
    cast = (arg.to(dtype) if isinstance(arg, Tensor) and arg.dtype in FLOATING[:3] else arg for arg in args[:4])
    return *cast, None, *args[5:]


def _vmap(info, in_dims, *args):
    tensors = [
        arg.unbind(dim) if arg is not None and dim is not None else (arg,) * info.batch_size
        for arg, dim in zip(args[:5], in_dims[:5], strict=True)
    ]
    return torch.stack([linear_op(*one, *args[5:]) for one in zip(*tensors, strict=True)]), 0


linear_op = declare(
    "linear(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, Tensor? packed, int activation, "
    "bool tf32=False) -> Tensor",
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    autocast=_cast,
    vmap=_vmap,
)


def _fake_pack(weight):
    return weight.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.uint8)


linear_pack_op = declare("_linear_pack(Tensor weight) -> Tensor", fake=_fake_pack)


def pack_for(weight: Tensor, rows: int, packs: Packs) -> Tensor | None:
    """The packed weight; None where so few rows are multiplied with the weight as it is."""
    if rows <= _ROWS_WITHOUT_PACKING:
        return None
    return packs.get(weight, weight.dtype, lambda: linear_pack_op(weight.detach()))


def run(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    packs: Packs | None = None,
) -> Tensor:
    """linear for layers: of checked arguments, with a packed weight, by the kernel that the rule picks."""
    if autocasts(input):  # what is chosen, and measured, is of the dtype that is computed in
        input, weight, bias, residual = _cast(input, weight, bias, residual)[:4]
        with torch.autocast(input.device.type, enabled=False):
            return run(input, weight, bias, residual=residual, activation=activation)
    size = input.shape
    if input.dim() != 2:
        require(input.dim() > 0 and weight.dim() == 2, _OP, "input to have size [..., C], weight [K, C]", size)
        require(size[-1] == weight.shape[1], _OP, f"input to have {weight.shape[1]} features as weight has", size)
        out_size = (*size[:-1], weight.shape[0])
        if residual is not None:
            require(tuple(residual.shape) == out_size, _OP, f"residual to have size {list(out_size)}", residual.shape)
            residual = residual.reshape(-1, weight.shape[0])
        rows = input.reshape(size[:-1].numel(), size[-1])
        return run(rows, weight, bias, residual=residual, activation=activation, packs=packs).reshape(out_size)
    if not input.is_cuda:
        # PyTorch's is nowhere faster on the CPU, by what was measured.
        kernel = TORCH if CHOICE.backend == "torch" else DIRECT
    else:
        require(weight.dim() == 2, _OP, "weight to have 2 dimensions [K, C]", weight.shape)
        kernel = _choose(input, weight, bias, residual, activation)
    return _by(kernel, input, weight, bias, residual, activation, packs)


def _by(kernel, input, weight, bias, residual, activation, packs) -> Tensor:
    """The call by the kernel of a number."""
    if kernel == TORCH:
        return reference.linear(input, weight, bias, residual=residual, activation=activation)
    number = _activation.NUMBERS[activation]
    if is_triton(kernel):
        added = None if residual is None else _as_map(residual)
        given = _as_map(input), _as_map(weight), bias, None, None, added, _GEOMETRY.numbers
        return choice.forward(*given, number, False, False, kernel=kernel).flatten(1)
    packed = None if packs is None else pack_for(weight, input.shape[0], packs)
    return linear_op(input, weight, bias, residual, packed, number, kernel == TF32)


_plans: dict[Any, int] = {}
_MOST_PLANS = 4096


def _choose(input: Tensor, weight: Tensor, bias: Any, residual: Any, activation: str | None) -> int:
    """On CUDA, as for the 1 x 1 convolution that a linear layer is; measured first where the tuner is on."""
    if CHOICE.backend == "torch":
        return TORCH
    compiling = torch.compiler.is_compiling()
    tf32 = choice.precision_of(input.dtype, "cuda", matmul=True)
    state = tf32, bias is None, residual is None, activation
    key = input.shape, input.stride(), weight.shape, weight.stride(), input.dtype, input.device, state
    kernel = None if compiling else _plans.get((key, CHOICE.key))
    if kernel is None:
        problem = problem_of(_as_map(input), _as_map(weight), _GEOMETRY, alone=True)
        fusion, gpu = choice.fusion_of(bias, None, None, residual, activation, pool=False), choice.gpu_of(input)
        if TUNER.wants(input):

            def by_kernel(kernel: int) -> Tensor:
                return _by(kernel, input, weight, bias, residual, activation, None)

            choice.measure(problem, _OP, fusion, tf32, gpu, by_kernel)
        kernel = choice.choose(problem, True, _OP, fusion, tf32, gpu)
        if not compiling and (TUNER.wants(input) or not TUNER.active):
            if len(_plans) > _MOST_PLANS:
                _plans.clear()
            _plans[key, CHOICE.key] = kernel
    return kernel


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Fully connected layer, with a residual and an activation in the same pass.

    ``activation(input @ weight.T + bias + residual)``. Matches `torch.nn.functional.linear`; what comes after the
    product is in float32 for 16-bit types, and rounded once.

    Args:
        input (Tensor[..., C]): float16, bfloat16, float32 or float64; any strides.
        weight (Tensor[K, C]): Of input's dtype; any strides.
        bias (Tensor[K]): Of input's dtype, or float32 beside a 16-bit input.
        residual (Tensor[..., K]): Added before the activation; of input's dtype.
        activation (str): ``"relu"``, ``"relu6"``, ``"hardswish"``, ``"silu"``, ``"gelu"``, ``"sigmoid"`` or None.

    Returns:
        Tensor[..., K] of input's dtype, contiguous.

    Raises:
        RuntimeError: sizes, dtypes or devices do not fit each other.
        ValueError: ``activation`` is none of these.
        TypeError: an argument is not a Tensor.

    Note: deterministic. The gradient is by PyTorch's operators, on CUDA also by ours; differentiable again.
    Reference: torch.nn.functional.linear.
    """
    given: dict[str, Any] = {"bias": bias, "residual": residual}
    require_tensors(
        _OP, input=input, weight=weight, **{key: value for key, value in given.items() if value is not None}
    )
    _activation.number_of(_OP, activation)
    if weight.dim() == 1:  # torch takes a weight [C] for one output without a dimension
        require(bias is None or bias.dim() == 0, _OP, "bias to have no dimension beside a weight of one", given["bias"])
        one = None if bias is None else bias.reshape(1)
        rest = None if residual is None else residual.unsqueeze(-1)
        return linear(input, weight.unsqueeze(0), one, residual=rest, activation=activation).squeeze(-1)
    return run(input, weight, bias, residual=residual, activation=activation)
