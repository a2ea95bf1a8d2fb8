"""Cases of the NMS family: sizes of real detectors, classes, ties, hostile boxes and scores."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyvision_kernels._case import Case, ErrorCase, Inputs, OpCases, error_case
from pyvision_kernels.ops import batched_nms, batched_nms_padded, nms, soft_nms
from pyvision_kernels.ops.nms import reference

NAN, INF = math.nan, math.inf
HOSTILE = [
    [NAN, 0, 10, 10],
    [0, 0, NAN, 10],
    [-INF, -INF, INF, INF],
    [0, 0, INF, 10],
    [0, 0, 0, 0],
    [10, 10, 0, 0],  # inverted twice: a positive area that overlaps nothing
    [10, 0, 0, 10],
    [-1e30, -1e30, 1e30, 1e30],
    [-1e30, -1e30, 1e30, 1e30],
    [0, 0, 1e-25, 1e-25],
    [0, 0, 1e-25, 1e-25],
    [0, 0, 3e38, 3e38],
    [0, 0, 10, 10],
    [0, 0, 10, 10],
]


def _proposals(generator: torch.Generator, count: int, sides=(16.0, 256.0), extent=(800.0, 1216.0)) -> Tensor:
    """[N, 4] in clusters of eight around objects, as an RPN gives them."""
    low, high = (math.log(side) for side in sides)
    objects = max(count // 8, 1)
    pick = torch.randint(0, objects, (count,), generator=generator)
    center = (torch.rand(objects, 2, generator=generator, dtype=torch.float64) * torch.tensor([extent[1], extent[0]]))[
        pick
    ]
    side = torch.exp(torch.rand(objects, 2, generator=generator, dtype=torch.float64) * (high - low) + low)[pick]
    center = center + side * 0.2 * torch.randn(count, 2, generator=generator, dtype=torch.float64)
    side = side * torch.exp(0.2 * torch.randn(count, 2, generator=generator, dtype=torch.float64))
    return torch.cat([center - side / 2, center + side / 2], 1)


def _candidates(
    generator: torch.Generator,
    count: int,
    levels: int = 0,
    hostile: bool = False,
    round_to: float = 0.0,
    distinct: bool = False,
) -> tuple[Tensor, Tensor]:
    """Boxes and scores of one image; `distinct`: no two scores are equal in float32."""
    boxes = _proposals(generator, count)
    if round_to:
        boxes = (boxes / round_to).round() * round_to
    if hostile:
        boxes = torch.cat([boxes, torch.tensor(HOSTILE, dtype=torch.float64)])
    scores = torch.rand(len(boxes), generator=generator, dtype=torch.float64)
    if distinct:
        scores = (torch.randperm(count, generator=generator).double() + 1) / count
    if levels:  # few different scores: ties
        scores = (scores * levels).floor() / levels
    if hostile:
        scores[::9] = NAN
        scores[1::9] = INF
        scores[2::9] = -0.0
        scores[3::9] = 0.0
    return boxes, scores


def _classes(generator: torch.Generator, count: int, classes: int, values: tuple[int, ...] = ()) -> Tensor:
    idxs = torch.randint(0, classes, (count,), generator=generator)
    return torch.tensor(values)[idxs] if values else idxs


def _case(name: str, count: int, threshold: float, **options) -> Case:
    drawn: dict[str, Any] = {key: options.pop(key) for key in ("levels", "hostile", "round_to") if key in options}

    def make(generator: torch.Generator) -> Inputs:
        boxes, scores = _candidates(generator, count, **drawn)
        return {"boxes": boxes, "scores": scores, "iou_threshold": threshold}

    return Case(name, make, **options)


def _batched(
    name: str,
    count: int,
    classes: int,
    threshold: float = 0.5,
    values: tuple[int, ...] = (),
    integers: torch.dtype = torch.int64,
    compared: bool = False,
    **options,
) -> Case:
    """`compared`: with torchvision too, on coordinates that its shift by classes does not round."""
    drawn: dict[str, Any] = {key: options.pop(key) for key in ("levels", "hostile", "round_to") if key in options}
    if "bench" in options:  # torchvision's loop over classes leaves ties in any order
        drawn["distinct"] = True
        options.setdefault("dtypes", (torch.float32,))
    if compared or "bench" in options:
        drawn["round_to"] = 1 / 16
    else:
        options["for_peer"] = lambda inputs: None

    def make(generator: torch.Generator) -> Inputs:
        boxes, scores = _candidates(generator, count, **drawn)
        idxs = _classes(generator, len(boxes), classes, values).to(integers)
        return {"boxes": boxes, "scores": scores, "idxs": idxs, "iou_threshold": threshold}

    return Case(name, make, **options)


def _padded(
    name: str,
    images: int,
    count: int,
    classes: int,
    max_output: int,
    threshold: float = 0.5,
    absent: float = 0.0,
    **options,
) -> Case:
    """`classes` 0: idxs is None; `absent`: the part of the scores that is -inf."""
    drawn: dict[str, Any] = {key: options.pop(key) for key in ("levels", "hostile", "round_to") if key in options}
    if "bench" in options:
        drawn.update(round_to=1 / 16, distinct=True)
        options.setdefault("dtypes", (torch.float32,))
    else:
        options["for_peer"] = lambda inputs: None

    def make(generator: torch.Generator) -> Inputs:
        drawings = [_candidates(generator, count, **drawn) for _ in range(images)]
        empty = torch.zeros(0, count, 4, dtype=torch.float64), torch.zeros(0, count, dtype=torch.float64)
        boxes, scores = (torch.stack(part) for part in zip(*drawings, strict=True)) if images else empty
        if absent:
            scores[torch.rand(scores.shape, generator=generator) < absent] = -INF
        idxs = _classes(generator, scores.numel(), classes).view(scores.shape) if classes else None
        return {
            "boxes": boxes,
            "scores": scores,
            "idxs": idxs,
            "iou_threshold": threshold,
            "max_output": max_output,
        }

    return Case(name, make, **options)


def _soft(name: str, count: int, classes: int, settings: dict | None = None, **options) -> Case:
    """`classes` 0: idxs is None."""
    drawn: dict[str, Any] = {key: options.pop(key) for key in ("levels", "hostile", "round_to") if key in options}
    if "bench" not in options:  # the peer is the reference
        options["for_peer"] = lambda inputs: None

    def make(generator: torch.Generator) -> Inputs:
        boxes, scores = _candidates(generator, count, **drawn)
        idxs = _classes(generator, len(boxes), classes) if classes else None
        return {"boxes": boxes, "scores": scores, "idxs": idxs, **(settings or {})}

    return Case(name, make, **options)


def _tiny(arguments) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        boxes = torch.tensor([[0, 0, 2, 2], [0, 0, 2, 3], [5, 5, 6, 6]], dtype=torch.float64)
        return arguments(boxes, torch.tensor([0.5, 0.7, 0.6], dtype=torch.float64), torch.tensor([1, 1, 0]))

    return Case("per_call_overhead", make)


def _errors(op: str, more: Inputs, images: bool = False) -> tuple[ErrorCase, ...]:
    """What all refuse: fitting inputs with some replaced."""
    lead = (2,) if images else ()
    size, sizes = ("[B, N, 4]", [2, 3]) if images else ("[N, 4]", [3])
    fitting = {"boxes": torch.ones(*lead, 3, 4), "scores": torch.ones(*lead, 3), **more}
    if op != "soft_nms":
        fitting["iou_threshold"] = 0.5

    def case(name: str, error: type[Exception], message: str, **changes) -> ErrorCase:
        return error_case(op, name, error, message, {**fitting, **changes})

    cases = [
        case(
            "boxes_shape",
            RuntimeError,
            f"expected boxes to have size {size}, but got {[*lead, 3, 5]}",
            boxes=torch.ones(*lead, 3, 5),
        ),
        case("boxes_type", TypeError, "expected boxes to be a Tensor, but got list", boxes=[1.0]),
        case(
            "scores_shape",
            RuntimeError,
            f"expected scores to have size {sizes}, but got {[*lead, 4]}",
            scores=torch.ones(*lead, 4),
        ),
        case("scores_type", TypeError, "expected scores to be a Tensor, but got list", scores=[1, 2, 3]),
        case(
            "scores_dtype",
            RuntimeError,
            "expected scores to be torch.float32 as boxes is, but got torch.float64",
            scores=torch.ones(*lead, 3, dtype=torch.float64),
        ),
        case(
            "scores_device",
            RuntimeError,
            "expected scores to be on the device of boxes, but got meta",
            scores=torch.ones(*lead, 3, device="meta"),
        ),
        case(
            "boxes_dtype",
            NotImplementedError,
            "expected boxes to be float16, bfloat16, float32 or float64, but got torch.int64",
            boxes=torch.ones(*lead, 3, 4, dtype=torch.int64),
            scores=torch.ones(*lead, 3, dtype=torch.int64),
        ),
    ]
    if "idxs" in more:
        cases += [
            case("idxs_type", TypeError, "expected idxs to be a Tensor, but got list", idxs=[1, 2, 3]),
            case(
                "idxs_bool",
                TypeError,
                "expected idxs to be of an integer or floating dtype, but got torch.bool",
                idxs=torch.ones(*lead, 3, dtype=torch.bool),
            ),
            case(
                "idxs_shape",
                RuntimeError,
                f"expected idxs to have size {sizes}, but got {[*lead, 4]}",
                idxs=torch.ones(*lead, 4, dtype=torch.int64),
            ),
            case(
                "idxs_device",
                RuntimeError,
                "expected idxs to be on the device of boxes, but got meta",
                idxs=torch.ones(*lead, 3, dtype=torch.int64, device="meta"),
            ),
        ]
    if op == "batched_nms_padded":
        cases += [
            case("max_output", ValueError, "expected max_output to be at least 0, but got -1", max_output=-1),
            case("max_output_type", TypeError, "expected max_output to be an int, but got float", max_output=1.0),
        ]
    if op == "soft_nms":
        cases += [
            case("sigma", ValueError, "expected sigma to be positive, but got 0.0", sigma=0.0),
            case("sigma_nan", ValueError, "expected sigma to be positive, but got nan", sigma=NAN),
            case(
                "score_threshold",
                ValueError,
                "expected score_threshold to be at least 0, but got -0.5",
                score_threshold=-0.5,
            ),
            case("method", ValueError, "expected method to be 'gaussian' or 'linear', but got 'hard'", method="hard"),
        ]
    return tuple(cases)


def _kept(output) -> float:
    """Of all images together."""
    if isinstance(output, tuple):
        return float(output[1].sum()) if output[0].dim() == 2 else len(output[0])
    return len(output)


def _flops(inputs: Inputs, output) -> float:
    """Ten operations for each box against each box that is kept of its image, before it or after it."""
    images = inputs["boxes"].size(0) if inputs["boxes"].dim() == 3 else 1
    return 10.0 * inputs["boxes"].numel() / 4 / max(images, 1) * _kept(output) / 2


def _bytes(inputs: Inputs, output) -> float:
    """Boxes, scores, classes and indices once."""
    given = sum(item.numel() * item.element_size() for item in inputs.values() if isinstance(item, Tensor))
    return given + 8 * _kept(output)


NMS = OpCases(
    name="nms",
    op=nms,
    reference=reference.nms,
    peer=lambda **inputs: _torchvision().nms(**inputs),
    operators=("nms",),
    tiny=_tiny(lambda boxes, scores, idxs: {"boxes": boxes, "scores": scores, "iou_threshold": 0.5}),
    exact=True,
    sized_by_data=True,
    layouts=("contiguous", "strided"),
    cases=(
        _case("none", 0, 0.5),
        _case("one", 1, 0.5),
        _case("small", 65, 0.5),
        _case("ties", 700, 0.5, levels=4),
        _case("rounded_coordinates", 600, 0.5, round_to=16.0),
        _case("all_tied", 300, 0.6, levels=1),
        _case("strict", 500, 0.95),
        _case("loose", 500, 0.05),
        _case("zero_threshold", 300, 0.0),
        _case("negative_zero_threshold", 300, -0.0),
        _case("threshold_one", 400, 1.0, round_to=32.0),
        _case("threshold_above_one", 100, 2.0),
        _case("negative_threshold", 100, -0.1, hostile=True),
        _case("nan_threshold", 100, NAN),
        _case("hostile", 400, 0.5, levels=30, hostile=True),
        _case("hostile_low_threshold", 200, 1e-6, levels=30, hostile=True),
        _case("several_blocks", 4500, 0.6, dtypes=(torch.float32, torch.bfloat16)),
        _case("fcos_1000", 1000, 0.6, bench="quick"),
        _case("rpn_2000", 2000, 0.7, bench="quick"),
        _case("rpn_5000", 5000, 0.7, bench="quick"),
        _case("dense_20000", 20000, 0.5, bench="quick"),
        _case("dense_50000", 50000, 0.5, bench="full"),
        _case("dense_100000", 100000, 0.5, bench="full"),
    ),
    errors=_errors("nms", {}),
    flops=_flops,
    bytes=_bytes,
)

LARGE_CLASSES = (-(2**63), 2**63 - 1, -1, 0, 2**32, 7)

BATCHED_NMS = OpCases(
    name="batched_nms",
    op=batched_nms,
    reference=reference.batched_nms,
    peer=lambda **inputs: _torchvision().batched_nms(**inputs),
    operators=("batched_nms",),
    tiny=_tiny(lambda boxes, scores, idxs: {"boxes": boxes, "scores": scores, "idxs": idxs, "iou_threshold": 0.5}),
    exact=True,
    sized_by_data=True,
    layouts=("contiguous", "strided"),
    cases=(
        _batched("none", 0, 3),
        _batched("one", 1, 3),
        _batched("small", 65, 2),
        _batched("compared", 700, 5, compared=True),
        _batched("ties", 600, 6, levels=4),
        _batched("one_class", 300, 1),
        _batched("a_class_each", 300, 10_000),
        _batched("large_classes", 400, 6, values=LARGE_CLASSES),
        _batched("classes_of_8_bits", 300, 3, values=(-128, 127, 0), integers=torch.int8),
        _batched("classes_of_16_bits", 300, 3, values=(-32768, 32767, 255), integers=torch.int16),
        _batched("unsigned_classes", 300, 3, values=(2**32 - 1, 2**31, 0), integers=torch.uint32),
        _batched("zero_threshold", 300, 4, threshold=0.0),
        _batched("negative_threshold", 100, 3, threshold=-0.1, hostile=True),
        _batched("nan_threshold", 100, 3, threshold=NAN),
        _batched("hostile", 400, 3, levels=30, hostile=True),
        _batched("several_blocks", 2500, 3, dtypes=(torch.float32,)),
        _batched("rpn_4500_levels_5", 4500, 5, threshold=0.7, bench="quick"),
        _batched("ssd_1000_classes_91", 1000, 91, bench="quick"),
        _batched("retinanet_5000_classes_80", 5000, 80, bench="quick"),
        _batched("dense_20000_classes_80", 20000, 80, bench="full"),
    ),
    errors=_errors("batched_nms", {"idxs": torch.ones(3, dtype=torch.int64)}),
    flops=_flops,
    bytes=_bytes,
)

BATCHED_NMS_PADDED = OpCases(
    name="batched_nms_padded",
    op=batched_nms_padded,
    reference=reference.batched_nms_padded,
    peer=lambda **inputs: _image_after_image(**inputs),
    operators=("batched_nms_padded",),
    tiny=_tiny(
        lambda boxes, scores, idxs: {
            "boxes": boxes[None],
            "scores": scores[None],
            "idxs": idxs[None],
            "iou_threshold": 0.5,
            "max_output": 2,
        }
    ),
    exact=True,
    layouts=("contiguous", "strided"),
    cases=(
        _padded("no_boxes", 2, 0, 3, 5),
        _padded("one", 1, 1, 3, 2),
        _padded("small", 3, 65, 2, 20),
        _padded("one_class", 2, 300, 0, 100),
        _padded("more_than_there_are", 2, 70, 3, 200),
        _padded("no_images", 0, 5, 3, 4),
        _padded("no_output", 2, 10, 3, 0),
        _padded("absent", 3, 300, 3, 200, absent=0.5),
        _padded("all_absent", 2, 70, 3, 10, absent=1.1),
        _padded("ties", 2, 300, 4, 80, levels=4),
        _padded("hostile", 2, 200, 3, 150, levels=30, hostile=True, absent=0.2),
        _padded("negative_threshold", 2, 60, 3, 30, threshold=-0.1, hostile=True),
        _padded("full_in_a_later_block", 2, 2300, 3, 2150, threshold=0.97, absent=0.02, dtypes=(torch.float32,)),
        _padded("full_in_the_first_block", 1, 2300, 0, 64, dtypes=(torch.float32,)),
        _padded("images_4_classes_80", 4, 4000, 80, 1000, bench="quick"),
        _padded("images_8_one_class", 8, 4000, 0, 1000, bench="quick"),
        _padded("images_4_all", 4, 4000, 80, 4000, bench="full"),
        _padded("images_16_of_1000", 16, 1000, 80, 100, bench="full"),
    ),
    errors=_errors("batched_nms_padded", {"idxs": torch.ones(2, 3, dtype=torch.int64), "max_output": 2}, images=True),
    flops=_flops,
    bytes=_bytes,
)

SOFT_NMS = OpCases(
    name="soft_nms",
    op=soft_nms,
    reference=reference.soft_nms,
    peer=reference.soft_nms,
    peer_package="torch",
    operators=("soft_nms",),
    tiny=_tiny(lambda boxes, scores, idxs: {"boxes": boxes, "scores": scores, "idxs": idxs}),
    exact=True,
    sized_by_data=True,
    layouts=("contiguous", "strided"),
    cases=(
        _soft("none", 0, 3),
        _soft("one", 1, 0),
        _soft("small", 65, 2),
        _soft("one_class", 120, 0),
        _soft("linear", 150, 3, {"method": "linear"}),
        _soft("linear_one_class", 150, 0, {"method": "linear", "iou_threshold": 0.5}),
        _soft("narrow", 120, 3, {"sigma": 0.01, "score_threshold": 0.2}),
        _soft("wide", 120, 3, {"sigma": INF, "score_threshold": 0.0}),
        _soft("underflow", 100, 0, {"sigma": 1e-310, "score_threshold": 0.0}),
        _soft("all_dropped", 80, 3, {"score_threshold": 2.0}),
        _soft("ties", 150, 4, {"method": "linear"}, levels=4, round_to=32.0),
        _soft("a_class_each", 100, 10_000),
        _soft("hostile", 90, 3, levels=30, hostile=True),
        _soft("hostile_linear", 90, 0, {"method": "linear", "iou_threshold": -1.0}, levels=30, hostile=True),
        _soft("nan_threshold", 60, 2, {"method": "linear", "iou_threshold": NAN}),
        _soft("more_than_a_cta", 700, 2, {"method": "linear"}, dtypes=(torch.float32,)),
        _soft("ssd_1000_classes_91", 1000, 91, bench="quick"),
        _soft("rpn_1000", 1000, 0, {"method": "linear"}, bench="quick"),
        _soft("retinanet_5000_classes_80", 5000, 80, bench="full"),
    ),
    errors=_errors("soft_nms", {"idxs": torch.ones(3, dtype=torch.int64)}),
    flops=_flops,
    bytes=_bytes,
)

CASES = (NMS, BATCHED_NMS, BATCHED_NMS_PADDED, SOFT_NMS)


def _torchvision():
    import torchvision

    return torchvision.ops


def _image_after_image(boxes, scores, idxs, iou_threshold, max_output) -> tuple[Tensor, Tensor]:
    keep = torch.full((len(boxes), max_output), -1, device=boxes.device)
    count = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    for image in range(len(boxes)):
        if idxs is None:
            kept = _torchvision().nms(boxes[image], scores[image], iou_threshold)
        else:
            kept = _torchvision().batched_nms(boxes[image], scores[image], idxs[image], iou_threshold)
        kept = kept[:max_output]
        keep[image, : len(kept)] = kept
        count[image] = len(kept)
    return keep, count
