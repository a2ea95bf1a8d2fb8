"""Cases of sigmoid_focal_loss: RetinaNet's sizes, odd sizes, exponents, extreme logits, soft labels."""

from __future__ import annotations

import math

import torch

from pyvision_kernels._case import Case, ErrorCase, Inputs, OpCases, error_case
from pyvision_kernels.ops import sigmoid_focal_loss
from pyvision_kernels.ops.sigmoid_focal_loss import reference


def _case(
    name: str,
    size: tuple[int, ...],
    alpha: float = 0.25,
    gamma: float = 2,
    reduction: str = "none",
    soft: bool = False,
    extremes: tuple[float, ...] = (),
    positive: float = 0.3,
    **options,
) -> Case:
    def make(generator: torch.Generator) -> Inputs:
        inputs = torch.randn(size, generator=generator, dtype=torch.float64) * 3
        targets = torch.rand(size, generator=generator, dtype=torch.float64)
        if extremes:
            values = torch.tensor(extremes, dtype=torch.float64)
            inputs.flatten()[: values.numel() * 2] = values.repeat(2)
            targets.flatten()[: values.numel()] = 0.0
            targets.flatten()[values.numel() : 2 * values.numel()] = 1.0
        # Sixteenths are exact in every dtype.
        targets = (targets * 16).round() / 16 if soft else (targets < positive).double()
        return {"inputs": inputs, "targets": targets, "alpha": alpha, "gamma": gamma, "reduction": reduction}

    return Case(name, make, **options)


def _error(name: str, error: type[Exception], message: str, **changes) -> ErrorCase:
    """Fitting inputs with some replaced."""
    fitting = {"inputs": torch.ones(2, 3), "targets": torch.ones(2, 3)}
    case = error_case("sigmoid_focal_loss", name, error, message, {**fitting, **changes})
    if error is not ValueError:
        return case
    return ErrorCase(name, case.make, error, message)  # torchvision's words


EXTREMES = (0.0, -0.0, 1e-4, 30.0, -30.0, 95.0, -95.0, 104.0, -104.0, 1e4, -1e4)
SINGLE = (torch.float32, torch.float64)

SIGMOID_FOCAL_LOSS = OpCases(
    name="sigmoid_focal_loss",
    op=sigmoid_focal_loss,
    reference=reference.sigmoid_focal_loss,
    peer=lambda **inputs: _torchvision()(**inputs),
    operators=("sigmoid_focal_loss", "_sigmoid_focal_loss_backward"),
    tiny=Case(
        "per_call_overhead",
        lambda generator: {
            "inputs": torch.randn(3, generator=generator, dtype=torch.float64),
            "targets": torch.ones(3, dtype=torch.float64),
        },
    ),
    differentiable=("inputs", "targets"),
    cases=(
        _case("sum", (17, 91), reduction="sum"),
        _case("none", (3, 5, 7)),
        _case("mean", (2, 3, 11, 6), reduction="mean"),
        _case("large_sum", (41, 1033), reduction="sum", positive=0.01),
        _case("four_dimensions", (2, 5, 6, 3)),
        _case("soft_labels", (300,), soft=True),
        _case("soft_labels_of_any_exponent", (300,), gamma=2.7, soft=True),
        _case("without_alpha", (130,), -1),
        _case("alpha_of_one", (130,), 1.0),
        _case("exponent_0", (130,), gamma=0.0),
        _case("exponent_a_half", (130,), gamma=0.5, soft=True),
        _case("exponent_1", (130,), gamma=1),
        _case("exponent_1_and_a_half", (130,), gamma=1.5),
        _case("exponent_3", (130,), gamma=3.0, reduction="sum"),
        _case("exponent_5", (130,), gamma=5.0),
        _case("any_exponent", (130,), gamma=0.7),
        _case("extreme_logits", (64,), extremes=EXTREMES, dtypes=SINGLE),
        _case("extreme_logits_sum", (64,), extremes=EXTREMES, reduction="sum"),
        _case("extreme_logits_without_alpha", (64,), -1, 1.0, extremes=EXTREMES, dtypes=SINGLE),
        # torchvision's gradient has 0 / 0 here.
        _case("extreme_logits_of_exponent_a_half", (64,), gamma=0.5, extremes=EXTREMES, for_peer=lambda _: None),
        _case("extreme_logits_of_any_exponent", (64,), gamma=0.3, extremes=EXTREMES, for_peer=lambda _: None),
        _case("one", (1,)),
        _case("no_dimensions", ()),
        _case("empty", (0, 91)),
        _case("empty_sum", (0, 91), reduction="sum"),
        # The anchors of an 800 x 800 image, as torchvision's RetinaNet calls it; and a batch of two of half its sides.
        _case("retinanet", (120087, 91), reduction="sum", positive=1e-4, bench="quick"),
        _case("retinanet_none", (30069, 91), positive=1e-4, bench="quick"),
        _case("retinanet_batch", (2, 30069, 91), reduction="mean", positive=1e-4, bench="full"),
    ),
    errors=(
        _error(
            "alpha",
            ValueError,
            "Invalid alpha value: 1.5. alpha must be in the range [0,1] or -1 for ignore.",
            alpha=1.5,
        ),
        _error(
            "alpha_is_nan",
            ValueError,
            "Invalid alpha value: nan. alpha must be in the range [0,1] or -1 for ignore.",
            alpha=math.nan,
        ),
        _error(
            "reduction",
            ValueError,
            "Invalid Value for arg 'reduction': 'max \n Supported reduction modes: 'none', 'mean', 'sum'",
            reduction="max",
        ),
        _error(
            "size",
            ValueError,
            "Target size (torch.Size([3])) must be the same as input size (torch.Size([2, 3]))",
            targets=torch.ones(3),
        ),
        _error(
            "inputs_dtype",
            NotImplementedError,
            "expected inputs to be float16, bfloat16, float32 or float64, but got torch.int64",
            inputs=torch.ones(2, 3, dtype=torch.int64),
        ),
        _error(
            "targets_dtype",
            NotImplementedError,
            "expected targets to be float16, bfloat16, float32 or float64, but got torch.int64",
            targets=torch.ones(2, 3, dtype=torch.int64),
        ),
        _error(
            "targets_device",
            RuntimeError,
            "expected targets to be on the device of inputs, but got meta",
            targets=torch.ones(2, 3, device="meta"),
        ),
        _error("inputs_type", TypeError, "expected inputs to be a Tensor, but got float", inputs=1.0),
    ),
    flops=lambda inputs, output: 40.0 * inputs["inputs"].numel(),
    bytes=lambda inputs, output: (2 * inputs["inputs"].numel() + output.numel()) * output.element_size(),
)

CASES = (SIGMOID_FOCAL_LOSS,)


def _torchvision():
    from torchvision.ops import sigmoid_focal_loss as peer

    return peer
