"""What the normalisation ops share: checks of weight and bias, casts under autocast, vmap one by one, gradients of maps
with a residual and an activation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyvision_kernels import _activation
from pyvision_kernels._check import FLOATING, require, require_tensors

_DTYPES = frozenset(FLOATING)
HALF = (torch.float16, torch.bfloat16)
_BY_KERNEL = (0, 1, 2)  # none, relu, relu6: activations whose gradient the kernels take


def opmath(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def fits(input: Tensor, size: Sequence[int], other: Tensor | None) -> bool:
    """Whether a tensor is absent or has the size, and the dtype of an input that the kernels take, and its device."""
    if other is None:
        return input.dtype in _DTYPES
    dtype = other.dtype
    return dtype is input.dtype and dtype in _DTYPES and other.shape == size and other.device == input.device


def is_small(input: Tensor, weight: Tensor | None, least: int, with_gradients: int) -> bool:
    """Whether a map has fewer elements than so many, with gradients so many: the call takes longer than its work."""
    if torch.compiler.is_compiling():
        return False  # no guard on sizes
    if torch._C._functorch.maybe_current_level() is not None:
        return False  # its tensors do not say whether they get gradients
    trains = torch.is_grad_enabled() and (input.requires_grad or (weight is not None and weight.requires_grad))
    return input.numel() < (with_gradients if trains else least)


def is_uniform(input: Tensor, weight: Tensor | None, *others: Tensor | None) -> bool:
    """Whether vectors have one dtype, as PyTorch's kernels want it; ours take float32 beside 16 bits, pair by pair."""
    dtypes = {vector.dtype for vector in (weight, *others) if vector is not None}
    return not dtypes or dtypes == {input.dtype} or (len(dtypes) == 1 and weight is not None)


def require_all_tensors(op: str, **arguments: Tensor | None) -> None:
    for value in arguments.values():
        if not isinstance(value, Tensor) and value is not None:
            break
    else:
        if arguments["input"] is not None:
            return
    required = {name: value for name, value in arguments.items() if value is not None or name == "input"}
    require_tensors(op, **required)


def check_input(op: str, input: Tensor) -> None:
    if input.dtype not in FLOATING:
        raise NotImplementedError(
            f"{op}: expected input to be float16, bfloat16, float32 or float64, but got {input.dtype}"
        )


def check_residual(op: str, residual: Tensor, input: Tensor) -> None:
    require(residual.shape == input.shape, op, f"residual to have size {list(input.shape)} of input", residual.shape)
    require(residual.dtype == input.dtype, op, f"residual to be {input.dtype} as input is", residual.dtype)
    require(residual.device == input.device, op, f"residual to be on {input.device} as input is", residual.device)


def check_vectors(op: str, input: Tensor, size: Sequence[int], **vectors: Tensor | None) -> None:
    """Each of the size, of input's dtype or float32 beside 16 bits, and all of one dtype."""
    seen: torch.dtype | None = None
    for name, vector in vectors.items():
        if vector is None:
            continue
        require(tuple(vector.shape) == tuple(size), op, f"{name} to have size {list(size)}", vector.shape)
        beside = vector.dtype == torch.float32 and input.dtype in HALF
        require(
            vector.dtype == input.dtype or beside,
            op,
            f"{name} to be {input.dtype} as input is" + (", or float32" if input.dtype in HALF else ""),
            vector.dtype,
        )
        require(seen in (None, vector.dtype), op, f"{name} to be {seen} as others are", vector.dtype)
        require(vector.device == input.device, op, f"{name} to be on {input.device} as input is", vector.device)
        seen = vector.dtype


def cast_as_torch(*args: Any) -> tuple[Any, ...]:
    """PyTorch's autocast: float32 on CUDA; on the CPU as it comes."""
    if args[0].device.type == "cpu":
        return args
    return tuple(arg.float() if isinstance(arg, Tensor) and arg.dtype in HALF else arg for arg in args)


def one_by_one(op: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """A vmap rule: the op for each item, the results stacked."""

    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        items = [
            arg.unbind(dim) if isinstance(arg, Tensor) and dim is not None else (arg,) * info.batch_size
            for arg, dim in zip(args, in_dims, strict=True)
        ]
        results = [op(*item) for item in zip(*items, strict=True)]
        stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    return vmap


def each_map(op: Callable[..., Any]) -> Callable[..., Any]:
    """A vmap rule of op(input, residual, ...): one by one."""

    def each(input, residual, *rest):
        input = laid_out(input)
        return op(input, None if residual is None else as_map(input, residual), *rest)

    return one_by_one(each)


def each_gradient(op: Callable[..., Any]) -> Callable[..., Any]:
    """A vmap rule of op(grad, input, output, stats, ...): one by one."""

    def each(grad, input, output, stats, *rest):
        input = laid_out(input)
        output = None if output is None else as_map(input, output)
        return op(as_map(input, grad), input, output, stats.contiguous(), *rest)

    return one_by_one(each)


def fake_gradients(grad, input, output, stats, weight, bias, *rest):
    made = zip((input, input, weight, bias), rest[-4:], strict=True)
    return tuple(torch.empty_like(like) if needed else input.new_empty((0,)) for like, needed in made)


def wide(tensor: Any) -> Any:
    """In float32 beside 16 bits: a derivative that jumps is taken on the right side."""
    return tensor if tensor is None or tensor.dtype == torch.float64 else tensor.float()


def gradients(
    ctx: Any,
    grad: Tensor,
    input: Tensor,
    result: Tensor | None,
    stats: Tensor,
    weight: Tensor | None,
    how: Any,
    op: Callable[..., tuple[Tensor, ...]],
    normalize: Callable[[], Tensor],
    differentiable: Callable[[Tensor], tuple[Tensor | None, ...]],
) -> tuple[Tensor | None, ...]:
    """Of input, residual, weight and bias: what a norm with residual and activation gives back.

    Args:
        result: Of the forward, where the activation's gradient is taken by it.
        how: What ``op`` is told beside the activation.
        op: The kernel of the backward.
        normalize: What the activation was given, again.
        differentiable: Gradients of input, weight and bias from the one before the activation, in steps that can be
            differentiated again.
    """
    needs_input, needs_residual, needs_weight, needs_bias = needs = ctx.needs_input_grad[:4]
    activation = ctx.activation

    def before(grad: Tensor) -> Tensor:
        at: Any = normalize() if _activation.needs_input(activation) else result
        return _activation.backward(activation, grad, at).to(input.dtype)

    found: tuple[Tensor | None, ...]
    if torch.is_grad_enabled():
        grad = grad if activation == 0 else before(grad)
        by_input, by_weight, by_bias = differentiable(grad)
        found = by_input, grad, by_weight, by_bias
    else:
        if activation not in _BY_KERNEL:
            grad, activation, result = before(grad), 0, None
        grad = as_map(input, grad)
        bias = bias_like(ctx.bias_dtype, weight, input) if needs_bias else None
        by_kernel = needs_residual and activation != 0
        which = needs_input, by_kernel, needs_weight, needs_bias
        by_input, by_residual, *rest = op(grad, input, result, stats, weight, bias, how, activation, *which)
        found = by_input, by_residual if by_kernel else grad, *rest
    return tuple(value if needed else None for value, needed in zip(found, needs, strict=True))


def batched(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """Contiguous, with the vmap dimension in front; expanded where it has none."""
    if tensor is None:
        return None
    return (tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)).contiguous()


def bias_like(dtype: torch.dtype, weight: Tensor | None, input: Tensor) -> Tensor:
    """Of a bias's size and dtype, its values apart: the bias itself may change before a backward."""
    return weight if weight is not None else input.new_empty((input.shape[1],), dtype=dtype)


def dense(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def as_map(input: Tensor, map: Tensor) -> Tensor:
    """A map in the memory order of the input, which is contiguous or channels_last."""
    if input.is_contiguous():
        return map if map.is_contiguous() else map.contiguous()
    return map.contiguous(memory_format=torch.channels_last)


def laid_out(input: Tensor) -> Tensor:
    """Contiguous or channels_last."""
    if input.is_contiguous() or (input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last)):
        return input
    if input.dim() == 4 and torch._prims_common.suggest_memory_format(input) == torch.channels_last:
        return input.contiguous(memory_format=torch.channels_last)
    return input.contiguous()
