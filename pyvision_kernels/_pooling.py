"""What the pooling ops share: windows from arguments, sizes of outputs and their errors, layouts, linear operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from pyvision_kernels._backend import CHOICE
from pyvision_kernels._check import FLOATING, require, require_tensors
from pyvision_kernels._op import Op, declare

_WHOLE = (Integral, torch.SymInt)
_MOST = 2**31 - 1

Numbers = int | Sequence[int]


def numbers_of(op: str, argument: str, value: Any, least: int, count: int = 2) -> tuple[int, ...]:
    """An int, or a sequence of one, becomes `count` of them; each at least `least`."""
    if type(value) is int:
        items: tuple[Any, ...] = (value,) * count
    elif isinstance(value, _WHOLE):
        items = (int(value),) * count
    else:
        items = tuple(value) if isinstance(value, list | tuple) else ()
        items = items * count if len(items) == 1 else items
        if len(items) != count or not all(isinstance(item, _WHOLE) for item in items):
            what = "an int or a pair of ints" if count == 2 else "an int or a sequence of one"
            raise TypeError(f"{op}: expected {argument} to be {what}, but got {value}")
        items = tuple(int(item) for item in items)
    for item in items:
        require(least <= item <= _MOST, op, f"{argument} to be in [{least}, {_MOST}]", value)
    return items


def window_of(op: str, kernel_size: Any, stride: Any, padding: Any, dilation: Any = 1, count: int = 2) -> list[int]:
    """The checked numbers of the operators: kernel, stride, padding, dilation of rows and of columns."""
    kernel = numbers_of(op, "kernel_size", kernel_size, 1, count)
    step = kernel if stride is None or stride == [] or stride == () else numbers_of(op, "stride", stride, 1, count)
    around = numbers_of(op, "padding", padding, 0, count)
    spread = numbers_of(op, "dilation", dilation, 1, count)
    for taps, pixels in zip(kernel, around, strict=True):
        require(2 * pixels <= taps, op, "padding to be at most half of kernel_size, {}", padding, kernel_size)
    for taps, distance in zip(kernel, spread, strict=True):
        reach = (taps - 1) * distance
        require(reach < _MOST, op, f"windows of at most {_MOST} pixels", reach + 1)
    if count == 1:  # a row: windows of one pixel down
        return [1, *kernel, 1, *step, 0, *around, 1, *spread]
    return [*kernel, *step, *around, *spread]


def output_size(op: str, window: list[int], size: Sequence[Any], ceil_mode: bool) -> list[Any]:
    """Rows and columns of a result; in ceil_mode a last window may end outside, but begins inside or before the map."""
    outputs = []
    for axis, (name, length) in enumerate(zip(("height", "width"), size, strict=True)):
        kernel, stride, padding, dilation = window[axis::2]
        reach = (kernel - 1) * dilation + 1
        rest = length + 2 * padding - reach
        require(
            rest >= 0 or (ceil_mode and rest > -stride),
            op,
            "input to have a padded {} of at least {}, the reach of a window",
            length + 2 * padding,
            name,
            reach,
        )
        count = (rest + (stride - 1 if ceil_mode else 0)) // stride + 1
        if ceil_mode and (count - 1) * stride >= length + padding:
            count -= 1
        outputs.append(count)
    return outputs


def adaptive_size(op: str, value: Any, size: Sequence[Any]) -> list[Any]:
    """Rows and columns asked for; None: those of the input."""
    pair = value if isinstance(value, list | tuple) else (value, value)
    if len(pair) != 2 or not all(item is None or isinstance(item, _WHOLE) for item in pair):
        raise TypeError(f"{op}: expected output_size to be an int, None or a pair of these, but got {value}")
    wanted = [length if item is None else item for item, length in zip(pair, size, strict=True)]
    for item in wanted:
        if not 0 <= item <= _MOST:
            raise ValueError(f"{op}: expected output_size not to be negative, but got {value}")
    return wanted


def check_input(op: str, input: Tensor, rank: int = 4, empty_channels: bool = False) -> None:
    """Rank, with or without a batch; dtype; that only the batch may be empty."""
    require_tensors(op, input=input)
    sizes = "[N, C, H, W]" if rank == 4 else "[N, C, L]"
    require(input.dim() in (rank, rank - 1), op, f"input to have {rank} dimensions {sizes}, or no N", input.shape)
    check_dtype(op, input)
    inner = input.shape[1 - rank :]
    for length in inner[1:] if empty_channels else inner:
        require(length > 0, op, "input to have no empty dimension but the batch", input.shape)


def check_dtype(op: str, input: Tensor) -> None:
    if input.dtype not in FLOATING:
        raise NotImplementedError(
            f"{op}: expected input to be float16, bfloat16, float32 or float64, but got {input.dtype}"
        )


def check_map(op: str, input: Tensor, any_size: bool = False) -> None:
    """What an operator is given."""
    require(input.dim() == 4, op, "input to have 4 dimensions [N, C, H, W]", input.shape)
    check_dtype(op, input)
    if not any_size:
        check_pixels(op, *input.shape[2:])


def check_pixels(op: str, height: int, width: int) -> None:
    if height * width >= 2**31:
        require(False, op, f"input to have fewer than {2**31} pixels a channel", f"{height} x {width}")


def is_channels_last(input: Tensor) -> bool:
    """Whether results are: PyTorch's rule (`suggest_memory_format`), by which slices are, and pixels [N, C, 1, 1]."""
    images, channels, height, width = input.shape
    image, channel, row, pixel = input.stride()
    return bool(pixel >= channel * channels and row >= pixel * width and image >= row * height > channel > 0 < images)


def empty(like: Tensor, size: Sequence[Any], channels_last: bool, dtype: torch.dtype | None = None) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=dtype or like.dtype, device=like.device, memory_format=memory_format)


def may_get_gradient(input: Tensor) -> bool:
    if not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None:
        return True  # its tensors do not say
    return input.requires_grad and torch.is_grad_enabled()


_FEW = 8  # channels: with fewer ours run along rows in channels_last too
_SMALL = 1 << 15  # elements of a map that the call itself takes longer than
_MEDIUM, _LARGE = 1 << 17, 1 << 19  # the same beside PyTorch's vectorised kernels, without and with a gradient
_VERY_LARGE = 1 << 21  # the same for averages of 16-bit types without a gradient, and adaptive maxima with one


def _is_for_torch_anyway(input: Tensor) -> bool:
    """By `pvk.backend`, and on CUDA, where ours are not yet measured; they are deterministic."""
    if CHOICE.backend != "auto":
        return CHOICE.backend == "torch"
    return input.is_cuda and not torch.are_deterministic_algorithms_enabled()


def is_unpooled_by_torch(input: Tensor) -> bool:
    """`is_for_torch` of max_unpool2d: on the CPU PyTorch's was measured faster on small maps, and with a gradient of
    channels_last ones.
    """
    if CHOICE.backend != "auto" or input.is_cuda:
        return _is_for_torch_anyway(input)
    if input.dim() == 4 and is_channels_last(input) and may_get_gradient(input):
        return True
    return not torch.compiler.is_compiling() and input.numel() < _SMALL


def is_for_torch(
    input: Tensor, of_maxima: bool, one_pixel: bool = False, dilated: bool = False, adaptive: bool = False
) -> bool:
    """Whether PyTorch's kernels run: `pvk.backend` says so, or with "auto" where they were measured faster.

    On the CPU PyTorch's are scalar in the contiguous layout and vectorised in channels_last, where they are ahead on
    small maps (larger ones in averages of 16-bit types without a gradient and in the gradient of adaptive maxima). In
    averages of the whole map they are ahead too, but in the gradient of channels_last ones.

    Args:
        of_maxima: Not of averages.
        one_pixel: Whether one window is the whole map.
        dilated: Then windows may have no pixel, for which PyTorch's gradient is written outside of the map: ours.
        adaptive: Whether windows are what an output size makes them.
    """
    if dilated:
        return CHOICE.backend == "torch"
    if CHOICE.backend != "auto" or input.is_cuda:
        return _is_for_torch_anyway(input)
    trains = may_get_gradient(input)
    channels_last = input.dim() == 4 and is_channels_last(input) and input.shape[1] >= _FEW
    if one_pixel and not of_maxima and not (trains and channels_last):
        return True
    if torch.compiler.is_compiling():  # no guard on sizes
        return channels_last and (trains or not of_maxima)
    if not channels_last:
        return trains and input.numel() < _SMALL
    if of_maxima:
        return input.numel() < ((_VERY_LARGE if adaptive else _LARGE) if trains else _MEDIUM)
    if one_pixel:
        return input.numel() < _MEDIUM
    return input.numel() < (_VERY_LARGE if input.element_size() == 2 and not trains else _LARGE << trains)


def fold(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """[..., N, C, H, W] with a dimension of vmap at `dim` as [B * N, C, H, W]; repeated where it has none."""
    if dim is None:
        return tensor.expand(size, *tensor.shape).flatten(0, 1)
    return tensor.movedim(dim, 0).flatten(0, 1)


def batched(op: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    """An operator on maps under vmap: in one call, of a larger batch."""
    size = info.batch_size
    folded = [fold(arg, dim, size) if isinstance(arg, Tensor) else arg for arg, dim in zip(args, in_dims, strict=True)]
    result = op(*folded)
    if isinstance(result, Tensor):
        return result.unflatten(0, (size, result.shape[0] // size)), 0
    parts, dims = [], []
    for part in result:  # what was not asked for is empty, and has no batch
        parts.append(part.unflatten(0, (size, part.shape[0] // size)) if part.dim() == 4 else part)
        dims.append(0 if part.dim() == 4 else None)
    return tuple(parts), tuple(dims)


def declare_linear(name: str, what: str, how: str) -> tuple[Op, Op]:
    """Declares an operator on maps that is linear, and its backward, whose own backward is the forward.

    Args:
        what: The name of its list of numbers.
        how: The arguments behind the sizes, as in a schema.
    """
    count = 1 + how.count(",")

    def fake(input, numbers, rows, columns, *rest):
        check_map(name, input, any_size=True)
        return empty(input, (*input.shape[:2], rows, columns), is_channels_last(input))

    def setup(ctx, inputs, output):
        input, ctx.numbers, _, _, *ctx.how = inputs
        ctx.size = input.shape[2:]
        ctx.channels_last = is_channels_last(input)

    def backward(ctx, grad):
        return backward_op(grad, ctx.numbers, *ctx.size, *ctx.how, ctx.channels_last), *(None,) * (3 + count)

    def fake_backward(grad, numbers, height, width, *rest):
        require(grad.dim() == 4, f"_{name}_backward", "grad to have 4 dimensions [N, C, OH, OW]", grad.shape)
        return empty(grad, (*grad.shape[:2], height, width), rest[-1])

    def setup_double(ctx, inputs, output):
        grad, ctx.numbers, _, _, *ctx.how, _ = inputs
        ctx.size = grad.shape[2:]

    def backward_double(ctx, grad):
        return op(grad, ctx.numbers, *ctx.size, *ctx.how), *(None,) * (4 + count)

    op = declare(
        f"{name}(Tensor input, int[] {what}, SymInt rows, SymInt columns, {how}) -> Tensor",
        fake=fake,
        setup_context=setup,
        backward=backward,
        autocast=lambda *args: args,
        vmap=lambda *args: batched(op, *args),
    )
    backward_op = declare(
        f"_{name}_backward(Tensor grad, int[] {what}, SymInt height, SymInt width, {how}, bool channels_last) "
        "-> Tensor",
        fake=fake_backward,
        setup_context=setup_double,
        backward=backward_double,
        autocast=lambda *args: args,
        vmap=lambda *args: batched(backward_op, *args),
    )
    return op, backward_op
