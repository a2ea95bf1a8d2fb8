"""Resizing against test inputs that others wrote: PyTorch's own (op_db) and ONNX's.

What cannot apply (three dimensions, integers, other coordinates) must be refused in our words, or has no such call.
"""

from __future__ import annotations

import importlib
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import pyvision_kernels as pvk
from pyvision_kernels.ops.interpolate import LINEAR_ANTIALIAS
from tests.errors import assert_as_good

with warnings.catch_warnings():  # of packages that these would like to have
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db

interpolate = pvk.ops.interpolate


def _smooth(
    input: Tensor,
    output_size: Any,
    align_corners: bool,
    scale_factors: Any = None,
    scales_h: float | None = None,
    scales_w: float | None = None,
) -> Tensor:
    if scales_h is not None and scales_w is not None:  # beside a size: only the operator has that
        filters = [LINEAR_ANTIALIAS, LINEAR_ANTIALIAS]
        return torch.ops.pvk.interpolate(input, filters, *output_size, align_corners, scales_h, scales_w)
    size = None if output_size is None else tuple(output_size)
    return interpolate(input, size, scale_factors, "bilinear", align_corners, antialias=True)


OURS = {
    "nn.functional.interpolate": interpolate,
    "nn.functional.upsample_nearest": lambda input, *args, **kwargs: interpolate(input, *args, **kwargs),
    "nn.functional.upsample_bilinear": lambda input, *args, **kwargs: interpolate(
        input, *args, **kwargs, mode="bilinear", align_corners=True
    ),
    "_upsample_bilinear2d_aa": _smooth,
}
THEIRS = {f"{entry.name}-{entry.variant_test_name}".rstrip("-"): entry for entry in op_db if entry.name in OURS}
VOLUMES = {name for name in THEIRS if name.endswith("trilinear")}
OUR_WORDS = re.compile(r"^interpolate: expected .*, but got ")

by_op = pytest.mark.parametrize("name", sorted(set(THEIRS) - VOLUMES))
DTYPES = [
    (name, dtype)
    for name in sorted(set(THEIRS) - VOLUMES)
    for dtype in (torch.float32, torch.bfloat16)
    if dtype in THEIRS[name].dtypes
]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*upsample"),  # that they are deprecated, and not deterministic
    pytest.mark.filterwarnings("ignore:The default behavior"),
]


def _samples(name: str, device: str, dtype: torch.dtype, **options: Any) -> Any:
    """Those of three and four dimensions."""
    for sample in THEIRS[name].sample_inputs(device, dtype, **options):
        if sample.input.dim() < 5:
            yield sample


def _call(name: str, sample: Any, double: bool = False) -> tuple[Tensor, Tensor]:
    """Ours; theirs, or theirs in float64."""
    entry = THEIRS[name]
    input = sample.input.detach().double() if double else sample.input
    ours = OURS[entry.name](sample.input, *sample.args, **sample.kwargs)
    return ours, entry.op(input, *sample.args, **sample.kwargs)


@pytest.mark.parametrize(("name", "dtype"), DTYPES, ids=[f"{name}-{str(dtype)[6:]}" for name, dtype in DTYPES])
def test_samples_of_op_db(name, dtype, device):
    count = 0
    for sample in _samples(name, device, dtype):
        ours, theirs = _call(name, sample)
        assert_as_good(ours, theirs, _call(name, sample, double=True)[1], sample)
        count += 1
    assert count >= 1


@by_op
def test_gradients_of_the_samples_of_op_db(name):
    for sample in _samples(name, "cpu", torch.float64, requires_grad=True):
        results = _call(name, sample)
        direction = torch.randn_like(results[0])
        ours, theirs = (torch.autograd.grad(result, sample.input, direction)[0] for result in results)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", sorted(VOLUMES))
def test_volumes_are_refused(name):
    for sample in THEIRS[name].sample_inputs("cpu", torch.float32):
        with pytest.raises(NotImplementedError, match=OUR_WORDS):
            interpolate(sample.input, *sample.args, **sample.kwargs)


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.uint8], ids=lambda dtype: str(dtype)[6:])
def test_integers_and_complex_numbers_are_refused(dtype):
    with pytest.raises(NotImplementedError, match="float16, bfloat16, float32 or float64, but got"):
        interpolate(torch.ones(1, 2, 3, 4).to(dtype), scale_factor=2)


# Arguments that torch.nn.functional.interpolate refuses.
WRONG: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((1, 2, 4, 4), {}),
    ((1, 2, 4, 4), {"size": 3, "scale_factor": 2}),
    ((1, 2, 4, 4), {"size": (3, 3, 3)}),
    ((1, 2, 4, 4), {"size": (3.0, 3.0)}),
    ((1, 2, 4, 4), {"scale_factor": (2.0,)}),
    ((1, 2, 4, 4), {"size": (0, 3)}),
    ((1, 2, 4, 4), {"scale_factor": -1.0}),
    ((1, 2, 4, 4), {"size": 3, "recompute_scale_factor": True}),
    ((1, 2, 4, 4), {"size": 3, "align_corners": False}),
    ((1, 2, 4, 4), {"size": 3, "mode": "linear"}),
    ((1, 2, 4), {"size": 3, "mode": "bilinear"}),
    ((1, 2, 4, 4), {"size": 3, "mode": "area", "antialias": True}),
    ((1, 2, 4, 4), {"size": 3, "mode": "cubic"}),
    ((4, 4), {"size": 3}),
    ((1, 2, 0, 4), {"size": 3}),
    ((1, 0, 4, 4), {"size": 3}),
]


@pytest.mark.parametrize(("size", "options"), WRONG, ids=str)
def test_what_torch_refuses_is_refused(size, options):
    input = torch.ones(size)
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        F.interpolate(input, **options)
    with pytest.raises((RuntimeError, ValueError, TypeError), match=OUR_WORDS):
        interpolate(input, **options)


def _onnx_cases() -> dict[str, Any]:
    """ONNX's backend node tests of Resize by name; none where onnx is absent."""
    package = "onnx.backend.test.case.node"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(f"{package}.resize")
    except ImportError:
        return {}
    made = importlib.import_module(package)._NodeTestCases
    return {case.name: case for case in made if case.model.graph.node[0].op_type == "Resize"}


def _options(case: Any) -> dict[str, Any]:
    import onnx

    options = {item.name: onnx.helper.get_attribute_value(item) for item in case.model.graph.node[0].attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in options.items()}


def _has_an_op_here(case: Any) -> bool:
    """Coordinates, the rounding of the nearest pixel, and cubic coefficients that torch's interpolate has too."""
    options = _options(case)
    coordinates = options.get("coordinate_transformation_mode", "half_pixel")
    if options["mode"] == "nearest":
        return coordinates == "half_pixel" and "nearest_mode" not in options and "policy" not in str(options)
    if options.get("exclude_outside") or options.get("cubic_coeff_a", -0.75) != -0.75:
        return False
    return coordinates in ("half_pixel", "align_corners", "pytorch_half_pixel")


ONNX = _onnx_cases()
# What torch's interpolate computes otherwise.
OTHERWISE = {
    "sizes_nearest": "halfway between two pixels ONNX takes the lower one",
    "antialias": "the widened filter is sampled at other places; the cubic one has A = -0.75",
    "downsample_scales_cubic_align_corners": "corners are aligned before the size is rounded",
    "downsample_scales_linear_align_corners": "corners are aligned before the size is rounded",
    "pytorch_half_pixel": "a single output reads the first pixel",
}
ONNX_HERE = sorted(
    name for name, case in ONNX.items() if _has_an_op_here(case) and not any(part in name for part in OTHERWISE)
)


@pytest.mark.skipif(not ONNX, reason="onnx is not installed")
@pytest.mark.parametrize("name", ONNX_HERE)
def test_onnx_backend_node(name, device):
    case, options = ONNX[name], _options(ONNX[name])
    mode = {"nearest": "nearest-exact", "linear": "bilinear", "cubic": "bicubic"}[options["mode"]]
    arguments: dict[str, Any] = {"mode": mode, "antialias": bool(options.get("antialias", 0))}
    if mode != "nearest-exact":
        arguments["align_corners"] = options.get("coordinate_transformation_mode") == "align_corners"
    by_size = case.model.graph.node[0].input[-1] == "sizes"
    for inputs, (expected,) in case.data_sets:
        numbers = inputs[-1].tolist()
        if "axes" in options:
            numbers = [numbers[options["axes"].index(axis)] for axis in (2, 3)]
        arguments["size" if by_size else "scale_factor"] = tuple(numbers[-2:])
        found = interpolate(torch.tensor(inputs[0], device=device), **arguments)
        torch.testing.assert_close(found.cpu(), torch.tensor(expected), rtol=case.rtol, atol=case.atol)


@pytest.mark.skipif(not ONNX, reason="onnx is not installed")
def test_onnx_cases_are_all_there():
    assert len(ONNX) >= 35
    assert len(ONNX_HERE) >= 12
