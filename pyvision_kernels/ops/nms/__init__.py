"""Non-maximum suppression, of one image or many, with classes, and soft: schemas, checks, the public functions."""

from __future__ import annotations

import torch
from torch import Tensor

from pyvision_kernels._check import FLOATING, autocasts, require, require_tensors
from pyvision_kernels._op import declare

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
# Only equality matters.
SAME_BITS = {
    torch.uint16: torch.int16,
    torch.uint32: torch.int32,
    torch.uint64: torch.int64,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
METHODS = ("gaussian", "linear")


def _check(op: str, boxes: Tensor, scores: Tensor, idxs: Tensor | None = None, batched: bool = False) -> None:
    size = "[B, N, 4]" if batched else "[N, 4]"
    require(boxes.dim() == 2 + batched and boxes.size(-1) == 4, op, f"boxes to have size {size}", boxes.shape)
    if scores.shape != boxes.shape[:-1]:
        require(False, op, f"scores to have size {list(boxes.shape[:-1])}", scores.shape)
    require(scores.device == boxes.device, op, "scores to be on the device of boxes", scores.device)
    if boxes.dtype not in FLOATING:
        raise NotImplementedError(
            f"{op}: expected boxes to be float16, bfloat16, float32 or float64, but got {boxes.dtype}"
        )
    if scores.dtype != boxes.dtype:
        require(False, op, f"scores to be {boxes.dtype} as boxes is", scores.dtype)
    if idxs is not None:
        if idxs.shape != scores.shape:
            require(False, op, f"idxs to have size {list(scores.shape)}", idxs.shape)
        require(idxs.device == boxes.device, op, "idxs to be on the device of boxes", idxs.device)
        if idxs.dtype not in INTEGERS:
            raise TypeError(f"{op}: expected idxs to be of an integer or floating dtype, but got {idxs.dtype}")


def _check_max_output(max_output: int) -> None:
    if not max_output >= 0:
        raise ValueError(f"batched_nms_padded: expected max_output to be at least 0, but got {max_output}")


def _fake(boxes, scores, iou_threshold):
    _check("nms", boxes, scores)
    return boxes.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.int64)


def _fake_batched(boxes, scores, idxs, iou_threshold):
    _check("batched_nms", boxes, scores, idxs)
    return boxes.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.int64)


def _fake_padded(boxes, scores, idxs, iou_threshold, max_output):
    _check("batched_nms_padded", boxes, scores, idxs, batched=True)
    _check_max_output(max_output)
    images = boxes.size(0)
    return boxes.new_empty((images, max_output), dtype=torch.int64), boxes.new_empty((images,), dtype=torch.int64)


def _fake_soft(boxes, scores, idxs, iou_threshold, sigma, score_threshold, gaussian):
    _check("soft_nms", boxes, scores, idxs)
    kept = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty((kept,), dtype=torch.int64), scores.new_empty((kept,))


def _cast(boxes, scores, *rest):
    if boxes.is_floating_point() and scores.is_floating_point() and torch.float64 not in (boxes.dtype, scores.dtype):
        boxes, scores = boxes.float(), scores.float()
    return boxes, scores, *rest


def _vmap_padded(info, in_dims, boxes, scores, idxs, iou_threshold, max_output):
    def fold(tensor: Tensor | None, dim: int | None) -> Tensor | None:
        if tensor is None:
            return None
        tensor = tensor.movedim(dim, 0) if dim is not None else tensor.expand(info.batch_size, *tensor.shape)
        return tensor.flatten(0, 1)

    folded = (fold(tensor, dim) for tensor, dim in zip((boxes, scores, idxs), in_dims, strict=False))
    outputs = batched_nms_padded_op(*folded, iou_threshold, max_output)
    return tuple(output.unflatten(0, (info.batch_size, -1)) for output in outputs), (0, 0)


nms_op = declare(
    "nms(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor",
    fake=_fake,
    autocast=_cast,
)

batched_nms_op = declare(
    "batched_nms(Tensor boxes, Tensor scores, Tensor idxs, float iou_threshold) -> Tensor",
    fake=_fake_batched,
    autocast=_cast,
)

batched_nms_padded_op = declare(
    "batched_nms_padded(Tensor boxes, Tensor scores, Tensor? idxs, float iou_threshold, SymInt max_output)"
    " -> (Tensor, Tensor)",
    fake=_fake_padded,
    autocast=_cast,
    vmap=_vmap_padded,
)

soft_nms_op = declare(
    "soft_nms(Tensor boxes, Tensor scores, Tensor? idxs, float iou_threshold, float sigma, float score_threshold, "
    "bool gaussian) -> (Tensor, Tensor)",
    fake=_fake_soft,
    autocast=_cast,
)


def _require(op: str, boxes: Tensor, scores: Tensor, idxs: Tensor | None, batched: bool = False) -> Tensor | None:
    """Checks everything that the host can see; idxs in a dtype that the operators take."""
    require_tensors(op, boxes=boxes, scores=scores)
    if idxs is not None:
        require_tensors(op, idxs=idxs)
        if idxs.dtype in FLOATING:
            idxs = idxs + 0  # -0 becomes 0
        if idxs.dtype in SAME_BITS:
            idxs = idxs.view(SAME_BITS[idxs.dtype])
    if autocasts(boxes):
        boxes, scores = _cast(boxes, scores)
    _check(op, boxes, scores, idxs, batched)
    return idxs


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Keeps the boxes that no higher-scored kept box overlaps by more than a threshold.

    Equals `torchvision.ops.nms` on the CPU, index for index, on every device: stable order among equal scores, NaN
    scores first, the same rounding. 16-bit boxes are compared as float32.

    Args:
        boxes (Tensor[N, 4]): (x1, y1, x2, y2); float16, bfloat16, float32 or float64; any strides.
        scores (Tensor[N]): dtype of ``boxes``.
        iou_threshold (float): A box is dropped when its IoU with a kept box is greater.

    Returns:
        Tensor[M], int64: indices of the kept boxes, by descending score. On a GPU, reading M is the one
        synchronisation.

    Raises:
        RuntimeError: a shape, device or dtype does not fit.
        NotImplementedError: ``boxes`` is of another dtype.
        TypeError: ``boxes`` or ``scores`` is not a Tensor.

    Note: deterministic. Not differentiable.
    Reference: Neubeck and Van Gool, Efficient non-maximum suppression, 2006.
    """
    _require("nms", boxes, scores, None)
    return nms_op(boxes, scores, iou_threshold)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Keeps the boxes that no higher-scored kept box of the same class overlaps by more than a threshold.

    Equals `nms` of each class by itself, exactly: classes are compared for equality, and boxes are not moved apart as
    `torchvision.ops.batched_nms` does, which rounds them.

    Args:
        boxes (Tensor[N, 4]): (x1, y1, x2, y2); float16, bfloat16, float32 or float64; any strides.
        scores (Tensor[N]): dtype of ``boxes``.
        idxs (Tensor[N]): Classes; any numbers, of any integer or floating dtype.
        iou_threshold (float): A box is dropped when its IoU with a kept box of its class is greater.

    Returns:
        Tensor[M], int64: indices of the kept boxes of all classes, by descending score; ties by index, NaN scores
        first. On a GPU, reading M is the one synchronisation.

    Raises:
        RuntimeError: a shape, device or dtype does not fit.
        NotImplementedError: ``boxes`` is of another dtype.
        TypeError: an argument is not a Tensor, or ``idxs`` is of another dtype.

    Note: deterministic. Not differentiable.
    Reference: Neubeck and Van Gool, Efficient non-maximum suppression, 2006.
    """
    require_tensors("batched_nms", boxes=boxes, scores=scores, idxs=idxs)
    return batched_nms_op(boxes, scores, _require("batched_nms", boxes, scores, idxs), iou_threshold)


def batched_nms_padded(
    boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float, max_output: int
) -> tuple[Tensor, Tensor]:
    """Keeps the best boxes of each image of a batch, in outputs whose size depends on no value.

    Of each image, the first ``max_output`` indices that `batched_nms` (`nms` where ``idxs`` is None) returns. It ends
    as soon as these are found, does not synchronise, and can be captured in a CUDA graph.

    **A score of -inf marks a box that is not there**: it is never kept and suppresses nothing. So padded or filtered
    candidates need no compaction: ``scores.masked_fill(scores < 0.05, -math.inf)``.

    Args:
        boxes (Tensor[B, N, 4]): (x1, y1, x2, y2); float16, bfloat16, float32 or float64; any strides.
        scores (Tensor[B, N]): dtype of ``boxes``.
        idxs (Tensor[B, N] or None): Classes; any numbers, of any integer or floating dtype. None: one class.
        iou_threshold (float): A box is dropped when its IoU with a kept box of its class is greater.
        max_output (int): The most boxes that are kept of an image; may be 0 and may exceed N.

    Returns:
        (Tensor[B, max_output], Tensor[B]), both int64: indices of each image's kept boxes by descending score, then
        -1; and how many they are.

    Raises:
        RuntimeError: a shape, device or dtype does not fit.
        NotImplementedError: ``boxes`` is of another dtype.
        TypeError: an argument is not a Tensor, ``idxs`` is of another dtype, or ``max_output`` is not an int.
        ValueError: ``max_output`` is negative.

    Note: deterministic. Not differentiable.
    Reference: Neubeck and Van Gool, Efficient non-maximum suppression, 2006.
    """
    idxs = _require("batched_nms_padded", boxes, scores, idxs, batched=True)
    if not isinstance(max_output, int | torch.SymInt):
        raise TypeError(f"batched_nms_padded: expected max_output to be an int, but got {type(max_output).__name__}")
    _check_max_output(max_output)
    return batched_nms_padded_op(boxes, scores, idxs, iou_threshold, max_output)


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    *,
    idxs: Tensor | None = None,
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    score_threshold: float = 1e-3,
    method: str = "gaussian",
) -> tuple[Tensor, Tensor]:
    """Lowers the scores of boxes that a better box overlaps, instead of dropping them.

    Again and again the best remaining box is selected, and the score of every other (of its class) is multiplied by
    ``exp(-iou^2 / sigma)`` (gaussian), or by ``1 - iou`` where ``iou > iou_threshold`` (linear). It ends when no
    remaining score is above ``score_threshold``.

    Args:
        boxes (Tensor[N, 4]): (x1, y1, x2, y2); float16, bfloat16, float32 or float64; any strides.
        scores (Tensor[N]): dtype of ``boxes``.
        idxs (Tensor[N] or None): Classes; any numbers, of any integer or floating dtype. Default: one class.
        iou_threshold (float): For linear decay. Default: 0.3.
        sigma (float): For gaussian decay; positive. Default: 0.5.
        score_threshold (float): A box whose score falls to it or below is dropped; not negative. Default: 1e-3.
        method (str): "gaussian" or "linear". Default: "gaussian".

    Returns:
        (Tensor[M], int64, and Tensor[M], dtype of ``scores``): indices of the selected boxes in the order of
        selection, and the scores with which they were selected: descending, ties by index. On a GPU, reading M is the
        one synchronisation.

    Raises:
        RuntimeError: a shape, device or dtype does not fit.
        NotImplementedError: ``boxes`` is of another dtype.
        TypeError: an argument is not a Tensor, or ``idxs`` is of another dtype.
        ValueError: ``sigma`` is not positive, ``score_threshold`` is negative, or ``method`` is another.

    Note: deterministic. Not differentiable. A NaN score is dropped; an IoU of NaN decays nothing.
    Reference: Bodla et al., Soft-NMS: improving object detection with one line of code, 2017.
    """
    idxs = _require("soft_nms", boxes, scores, idxs)
    if method not in METHODS:
        raise ValueError(f"soft_nms: expected method to be 'gaussian' or 'linear', but got {method!r}")
    if not sigma > 0:
        raise ValueError(f"soft_nms: expected sigma to be positive, but got {sigma}")
    if not score_threshold >= 0:
        raise ValueError(f"soft_nms: expected score_threshold to be at least 0, but got {score_threshold}")
    return soft_nms_op(boxes, scores, idxs, iou_threshold, sigma, score_threshold, method == "gaussian")
