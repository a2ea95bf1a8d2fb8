"""What the RoI ops share: checks of maps and boxes, lists of boxes, batches under vmap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyvision_kernels._check import FLOATING, require

MAX_SAMPLING_RATIO = 4096  # of samples per bin and axis: what is asked for beyond is a mistake, and would not end


def check_map(op: str, input: Tensor, boxes: Tensor) -> None:
    """What a feature map, or the gradient of pooled ones, and the boxes beside it must be."""
    require(input.dim() == 4, op, "input to have 4 dimensions [N, C, H, W]", input.shape)
    check_boxes(op, input, boxes)


def check_boxes(op: str, input: Tensor, boxes: Tensor) -> None:
    require(boxes.dim() == 2 and boxes.size(1) == 5, op, "boxes to have size [K, 5]", boxes.shape)
    require(boxes.device == input.device, op, "boxes to be on the device of input", boxes.device)
    if input.dtype not in FLOATING:
        raise NotImplementedError(
            f"{op}: expected input to be float16, bfloat16, float32 or float64, but got {input.dtype}"
        )
    if boxes.dtype != input.dtype:
        mixed = boxes.dtype == torch.float32 and input.dtype in (torch.float16, torch.bfloat16)
        require(mixed, op, f"boxes to be {input.dtype} as input is, or float32 beside a 16-bit input", boxes.dtype)


def check_sampling(op: str, sampling_ratio: int) -> None:
    require(
        sampling_ratio <= MAX_SAMPLING_RATIO, op, f"sampling_ratio to be at most {MAX_SAMPLING_RATIO}", sampling_ratio
    )


def cast_boxes(input: Tensor, boxes: Tensor) -> Tensor:
    """Under autocast, as torchvision: sampled in float32. The kernels accumulate in float32 anyway."""
    if boxes.is_floating_point() and torch.float64 not in (input.dtype, boxes.dtype):
        return boxes.float()
    return boxes


def join_boxes(op: str, boxes: Tensor | Sequence[Tensor], input: Tensor) -> Tensor:
    """A list of [K_i, 4], one for each image of input, becomes [K, 5]."""
    if isinstance(boxes, Tensor):
        return boxes
    if not isinstance(boxes, list | tuple) or not all(isinstance(item, Tensor) for item in boxes):
        raise TypeError(f"{op}: expected boxes to be a Tensor or a list of Tensors, but got {type(boxes).__name__}")
    for item in boxes:
        require(item.dim() == 2 and item.size(1) == 4, op, "each of boxes to have size [K, 4]", item.shape)
    require(len(boxes) == input.size(0), op, f"one Tensor of boxes for each of {input.size(0)} images", len(boxes))
    if not boxes:
        return input.new_empty((0, 5))
    # An index beyond 256 needs more than 16 bits, and float32 boxes go with every 16-bit input.
    wide = [item.float() if item.dtype in (torch.float16, torch.bfloat16) else item for item in boxes]
    joined = [pad(item, (1, 0), value=float(image)) for image, item in enumerate(wide)]
    return joined[0] if len(joined) == 1 else torch.cat(joined)


def split_boxes(boxes: Tensor, batches: int, images: int) -> Tensor:
    """[B, K, 5] -> [B * K, 5] over B * N images; an index outside its own N images becomes -1, which gives zeros."""
    boxes = boxes if boxes.dtype == torch.float64 else boxes.float()
    index = boxes[..., :1].trunc()
    offset = torch.arange(batches, device=boxes.device, dtype=boxes.dtype).mul_(images).view(-1, 1, 1)
    inside = (boxes[..., :1] > -1) & (index < images)
    index = torch.where(inside, index + offset, -1.0)
    return torch.cat([index, boxes[..., 1:]], -1).flatten(0, 1)


def with_batch(tensor: Tensor, dim: int | None, to: int, size: int) -> Tensor:
    """The tensor with its vmap dimension at `to`; repeated where it has none."""
    if dim is not None:
        return tensor.movedim(dim, to)
    return tensor.unsqueeze(to).expand(*tensor.shape[:to], size, *tensor.shape[to:])


def batch_forward(
    size: int,
    dims: Sequence[int | None],
    boxes_dim: int | None,
    features: Sequence[Tensor],
    boxes: Tensor,
    pool: Callable[[list[Tensor], Tensor], Tensor],
    bins: int = 1,
) -> tuple[Tensor, int]:
    """Pooling under vmap, in one call of pool(features, boxes): the output and its vmap dimension.

    `bins`: channels of a map that make one of the output.
    """
    if boxes_dim is None:  # the same boxes for all: fold the batch into the channels
        folded = [with_batch(item, dim, 1, size) for item, dim in zip(features, dims, strict=True)]
        out = pool([item.flatten(1, 2) for item in folded], boxes)
        return out.unflatten(1, (size, folded[0].size(2) // bins)), 1
    boxes = boxes.movedim(boxes_dim, 0)
    if all(dim is None for dim in dims):
        out = pool(list(features), boxes.flatten(0, 1))
    else:
        folded = [with_batch(item, dim, 0, size) for item, dim in zip(features, dims, strict=True)]
        out = pool([item.flatten(0, 1) for item in folded], split_boxes(boxes, size, folded[0].size(1)))
    return out.unflatten(0, (size, boxes.size(1))), 0


def batch_backward(
    size: int,
    grad_dim: int | None,
    boxes_dim: int | None,
    grad: Tensor,
    boxes: Tensor,
    images: int,
    channels: int,
    gradient: Callable[[Tensor, Tensor, int, int], list[Tensor]],
) -> tuple[list[Tensor], list[int]]:
    """The same of gradient(grad, boxes, images, channels): each map's gradient and its vmap dimension."""
    if boxes_dim is None:
        grads = gradient(with_batch(grad, grad_dim, 1, size).flatten(1, 2), boxes, images, size * channels)
        return [item.unflatten(1, (size, channels)) for item in grads], [1] * len(grads)
    grad = with_batch(grad, grad_dim, 0, size).flatten(0, 1)
    boxes = split_boxes(boxes.movedim(boxes_dim, 0), size, images)
    grads = gradient(grad, boxes, size * images, channels)
    return [item.unflatten(0, (size, images)) for item in grads], [0] * len(grads)


def is_channels_last(input: Tensor) -> bool:
    return input.stride(1) == 1 and not input.is_contiguous()


def empty(like: Tensor, size: Sequence[Any], channels_last: bool) -> Tensor:
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=memory_format)
