"""Cases of softmax_cross_entropy: classification, segmentation, ignored labels, probabilities, extreme logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyvision_kernels._case import Case, ErrorCase, Inputs, OpCases, error_case
from pyvision_kernels.ops import softmax_cross_entropy
from pyvision_kernels.ops.softmax_cross_entropy import reference


def _labels(size: tuple[int, ...], generator: torch.Generator, ignored: bool) -> Tensor:
    classes = size[0] if len(size) == 1 else size[1]
    labels = torch.randint(0, classes, size[:1] + size[2:] if len(size) > 1 else (), generator=generator)
    if ignored:
        labels.flatten()[::4] = -100
    return labels


def _case(
    name: str,
    size: tuple[int, ...],
    soft: bool = False,
    weighted: bool = False,
    ignored: bool = False,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    extremes: tuple[float, ...] = (),
    **options: Any,
) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        input = torch.randn(size, generator=generator, dtype=torch.float64) * 3
        input.flatten()[: len(extremes)] = torch.tensor(extremes, dtype=torch.float64)
        target = _labels(size, generator, ignored)
        if soft:  # sixteenths are exact in every dtype
            target = (torch.rand(size, generator=generator, dtype=torch.float64) * 16).round() / 16
        made: Inputs = {
            "input": input,
            "target": target,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
        }
        if weighted:
            classes = size[0] if len(size) == 1 else size[1]
            made["weight"] = torch.rand(classes, generator=generator, dtype=torch.float64) + 0.5
        return made

    return Case(name, make, **options)


def _peer(input: Tensor, target: Tensor, weight: Tensor | None = None, **options: Any) -> Tensor:
    return F.cross_entropy(input, target, weight, **options)


def _error(name: str, error: type[Exception], message: str, **changes: Any) -> ErrorCase:
    """Fitting inputs with some replaced."""
    fitting = {"input": torch.ones(2, 3, 4), "target": torch.zeros(2, 4, dtype=torch.int64)}
    return error_case("softmax_cross_entropy", name, error, message, {**fitting, **changes})


SOFTMAX_CROSS_ENTROPY = OpCases(
    name="softmax_cross_entropy",
    op=softmax_cross_entropy,
    reference=reference.softmax_cross_entropy,
    peer=_peer,
    peer_package="torch",
    peer_is_native=True,
    operators=("softmax_cross_entropy", "_softmax_cross_entropy_backward"),
    tiny=Case(
        "per_call_overhead",
        lambda generator: {
            "input": torch.randn(2, 3, generator=generator, dtype=torch.float64),
            "target": torch.zeros(2, dtype=torch.int64),
        },
    ),
    differentiable=("input",),
    cases=(
        _case("rows", (7, 10)),
        _case("rows_sum", (37, 33), reduction="sum", ignored=True),
        _case("rows_none", (19, 5), reduction="none", ignored=True),
        _case("long_rows", (5, 1003), ignored=True),
        _case("long_rows_smooth", (6, 520), weighted=True, label_smoothing=0.1, ignored=True),
        _case("very_long_rows", (2, 5003), reduction="none"),
        _case("map", (2, 21, 9, 11), ignored=True),
        _case("map_weighted", (2, 5, 6, 13), weighted=True, ignored=True, reduction="none"),
        _case("map_smooth", (1, 19, 5, 16), label_smoothing=0.2, weighted=True, ignored=True),
        _case("map_of_many_classes", (1, 150, 3, 7), label_smoothing=0.1, reduction="sum"),
        _case("volume", (2, 3, 2, 3, 4), ignored=True),
        _case("one_dimension", (11,)),
        _case("one_class", (5, 1), label_smoothing=0.5),
        _case("probabilities", (17, 10), soft=True),
        _case("probabilities_weighted", (3, 6, 35), soft=True, weighted=True, reduction="sum", label_smoothing=0.1),
        _case("probabilities_of_a_map", (2, 4, 3, 5), soft=True, reduction="none"),
        _case("probabilities_of_long_rows", (4, 530), soft=True, weighted=True, label_smoothing=0.3),
        _case("probabilities_of_one_dimension", (20,), soft=True, reduction="none"),
        _case("everything_smooth", (9, 7), label_smoothing=1.0, weighted=True),
        _case("extreme_logits", (8, 4), extremes=(1e4, -1e4, 1e4, 0.0, 3e4, 3e4, 3e4, 3e4, -3e4, -3e4, -3e4, -3e4)),
        _case("no_positions", (0, 5), reduction="sum"),
        _case("no_pixels", (2, 5, 0, 3), reduction="none"),
        _case("many_positions", (70_001, 2)),  # beyond 65,535
        # ImageNet's and CIFAR's heads, the pixels of a VOC crop, a language model's rows.
        _case("imagenet", (256, 1000), bench="quick"),
        _case("imagenet_smooth", (256, 1000), label_smoothing=0.1, bench="quick"),
        _case("voc_segmentation", (1, 21, 513, 513), ignored=True, bench="quick"),
        _case("cifar", (1024, 10), bench="full"),
        _case("ade20k_segmentation", (2, 150, 128, 128), weighted=True, ignored=True, bench="full"),
        _case("vocabulary", (128, 32000), bench="full"),
        _case("mixup", (256, 1000), soft=True, bench="full"),
    ),
    errors=(
        _error(
            "no_dimensions",
            RuntimeError,
            "expected input to have dimensions [C], [N, C] or [N, C, ...], but got []",
            input=torch.ones(()),
        ),
        _error("no_classes", RuntimeError, "expected input to have at least one class", input=torch.ones(2, 0, 4)),
        _error(
            "input_dtype",
            NotImplementedError,
            "expected input to be float16, bfloat16, float32 or float64, but got torch.int64",
            input=torch.ones(2, 3, 4, dtype=torch.int64),
        ),
        _error(
            "target_size",
            RuntimeError,
            "expected target to have the size of input, [2, 3, 4], without its classes, but got [2, 3]",
            target=torch.zeros(2, 3, dtype=torch.int64),
        ),
        _error(
            "probabilities_size",
            RuntimeError,
            "expected target to have size [2, 3, 4] of input, but got [2, 4]",
            target=torch.zeros(2, 4),
        ),
        _error(
            "target_dtype",
            RuntimeError,
            "expected target to be int64, uint8 or probabilities, but got torch.int32",
            target=torch.zeros(2, 4, dtype=torch.int32),
        ),
        _error(
            "target_device",
            RuntimeError,
            "expected target to be on",
            target=torch.zeros(2, 4, dtype=torch.int64, device="meta"),
        ),
        _error("weight_size", RuntimeError, "expected weight to have size [3], but got [4]", weight=torch.ones(4)),
        _error(
            "weight_gradient",
            NotImplementedError,
            "expected weight not to require a gradient",
            weight=torch.ones(3, requires_grad=True),
        ),
        _error(
            "reduction", ValueError, "expected reduction to be 'none', 'mean' or 'sum', but got 'max'", reduction="max"
        ),
        _error(
            "label_smoothing",
            RuntimeError,
            "expected label_smoothing to be in [0, 1], but got 1.5",
            label_smoothing=1.5,
        ),
        _error(
            "ignored_probabilities",
            RuntimeError,
            "expected no ignore_index beside probabilities, but got 1",
            target=torch.ones(2, 3, 4),
            ignore_index=1,
        ),
        _error("target_type", TypeError, "expected target to be a Tensor, but got int", target=1),
    ),
    flops=lambda inputs, output: 4.0 * inputs["input"].numel(),
    bytes=lambda inputs, output: inputs["input"].numel() * inputs["input"].element_size() + inputs["target"].nbytes,
)

CASES = (SOFTMAX_CROSS_ENTROPY,)
