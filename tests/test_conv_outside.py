"""Convolution and linear against test inputs that others wrote: PyTorch's own (op_db, module_db) and ONNX's.

What cannot apply (three dimensions, integers, complex numbers) must be refused in our words.
"""

from __future__ import annotations

import importlib
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import pyvision_kernels as pvk
from tests.errors import assert_as_good, in_double

with warnings.catch_warnings():  # of packages that these would like to have
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

OURS = {
    "nn.functional.conv2d": pvk.ops.conv2d,
    "nn.functional.conv1d": pvk.ops.conv1d,
    "nn.functional.conv_transpose2d": pvk.ops.conv_transpose2d,
    "nn.functional.linear": pvk.ops.linear,
}
THEIRS = {entry.name: entry for entry in op_db if entry.name in (*OURS, "nn.functional.conv3d")}
MODULES = {entry.module_cls: entry for entry in module_db}
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
REFUSED = (RuntimeError, ValueError, TypeError, NotImplementedError)
OUR_WORDS = re.compile(r"^(conv1d|conv2d|conv_transpose2d|linear): expected .*, but got ", re.DOTALL)

by_op = pytest.mark.parametrize("name", OURS)
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@pytest.fixture(autouse=True)
def our_kernels():
    torch.manual_seed(0)
    with pvk.backend("pvk"):
        yield


@by_op
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_samples_of_op_db(name, dtype, device):
    count = 0
    for sample in THEIRS[name].sample_inputs(device, dtype):
        arguments = (sample.input, *sample.args)
        exact = THEIRS[name].op(*map(in_double, arguments), **sample.kwargs)
        theirs = THEIRS[name].op(*arguments, **sample.kwargs)
        assert_as_good(OURS[name](*arguments, **sample.kwargs), theirs, exact, sample)
        count += 1
    assert count >= 10


@by_op
def test_gradients_of_the_samples_of_op_db(name, device):
    for sample in THEIRS[name].sample_inputs(device, torch.float64, requires_grad=True):
        arguments = (sample.input, *sample.args)
        leaves = [value for value in arguments if isinstance(value, Tensor)]
        results = [function(*arguments, **sample.kwargs) for function in (OURS[name], THEIRS[name].op)]
        direction = torch.randn_like(results[0])
        ours, theirs = (torch.autograd.grad(result, leaves, direction) for result in results)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", [name for name in OURS if THEIRS[name].error_inputs_func])
def test_error_inputs_of_op_db(name, device):
    for wrong in THEIRS[name].error_inputs(device):
        sample = wrong.sample_input
        with pytest.raises(REFUSED) as caught:
            OURS[name](sample.input, *sample.args, **sample.kwargs)
        assert OUR_WORDS.match(str(caught.value)), (sample, caught.value)


@by_op
def test_integers_and_complex_numbers_are_refused(name, device):
    refused = [dtype for dtype in THEIRS[name].dtypes if not dtype.is_floating_point]
    assert torch.int64 in refused
    assert torch.complex64 in refused
    for dtype in refused:
        sample = next(iter(THEIRS[name].sample_inputs(device, dtype)))
        with pytest.raises(REFUSED, match=r"float16, bfloat16, float32 or float64, but got"):
            OURS[name](sample.input, *sample.args, **sample.kwargs)


def test_three_dimensions_are_refused(device):
    for sample in THEIRS["nn.functional.conv3d"].sample_inputs(device, torch.float32):
        with pytest.raises(REFUSED, match=r"^conv2d: expected .* but got"):
            pvk.ops.conv2d(sample.input, *sample.args, **sample.kwargs)


@pytest.mark.parametrize("layer", ["Conv1d", "Conv2d", "Linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_samples_of_module_db(layer, dtype, training, device):
    stock_class, our_class = getattr(torch.nn, layer), getattr(pvk.nn, layer)
    entry = MODULES[stock_class]
    assert dtype in entry.dtypes
    for sample in entry.module_inputs_func(entry, device, dtype, requires_grad=False, training=training):
        made, given = sample.constructor_input, sample.forward_input
        ours, stock = (
            cls(*made.args, **made.kwargs, device=device, dtype=dtype).train(training)
            for cls in (our_class, stock_class)
        )
        stock.load_state_dict(ours.state_dict())
        exact = stock.double()(
            *map(in_double, given.args), **{key: in_double(value) for key, value in given.kwargs.items()}
        )
        stock.to(dtype)
        theirs = stock(*given.args, **given.kwargs)
        assert_as_good(ours(*given.args, **given.kwargs), theirs, exact, sample)


def _onnx_cases(*modules: str) -> dict[str, Any]:
    """ONNX's backend node tests of some operators by name; none where onnx is absent.

    Its public loader makes the cases of all operators, which takes half a minute: these are those of single modules.
    """
    package = "onnx.backend.test.case.node"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for module in modules:
                importlib.import_module(f"{package}.{module}")
    except ImportError:
        return {}
    made = importlib.import_module(package)._NodeTestCases
    operators = {"Conv", "ConvInteger", "ConvTranspose", "Gemm"}
    return {case.name: case for case in made if case.model.graph.node[0].op_type in operators}


ONNX = _onnx_cases("conv", "convinteger", "convtranspose", "gemm")
# One dimension and three, and integers: ours has no such op.
ONNX_REFUSED = {
    "test_convtranspose_1d": r"conv_transpose2d: expected weight to have 4 dimensions",
    "test_convtranspose_3d": r"conv_transpose2d: expected weight to have 4 dimensions",
    "test_convinteger_without_padding": r"conv2d: expected (input|weight) to be float16, bfloat16, float32 or float64",
    "test_convinteger_with_padding": r"conv2d: expected (input|weight) to be float16, bfloat16, float32 or float64",
}
needs_onnx = pytest.mark.skipif(not ONNX, reason="onnx is not installed")


def _total_padding(auto_pad: str, size: Any, taps: Any, stride: Any, dilation: Any) -> list[int]:
    """ONNX's pads (top, left, ..., bottom, right, ...) for as many pixels out as ceil(in / stride)."""
    if auto_pad not in ("SAME_UPPER", "SAME_LOWER"):
        return [0] * (2 * len(taps))
    totals = [
        max((-(-length // step) - 1) * step + spread * (count - 1) + 1 - length, 0)
        for length, count, step, spread in zip(size, taps, stride, dilation, strict=True)
    ]
    return _split(totals, auto_pad == "SAME_UPPER")


def _split(totals: list[int], upper: bool) -> list[int]:
    """The odd pixel goes to the end where upper, else to the beginning."""
    small, large = [total // 2 for total in totals], [total - total // 2 for total in totals]
    return [*small, *large] if upper else [*large, *small]


def _conv(options: dict[str, Any], input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    taps = weight.shape[2:]
    ones = [1] * len(taps)
    stride, dilation = options.get("strides", ones), options.get("dilations", ones)
    pads = options.get("pads") or _total_padding(options.get("auto_pad", ""), input.shape[2:], taps, stride, dilation)
    top, left, bottom, right = pads
    return pvk.ops.conv2d(input, weight, bias, stride, (left, right, top, bottom), dilation, options.get("group", 1))


def _conv_transpose(options: dict[str, Any], input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The whole map, of which pads are cut off."""
    taps = weight.shape[2:]
    ones = [1] * len(taps)
    stride, dilation = options.get("strides", ones), options.get("dilations", ones)
    extra = list(options.get("output_padding", [0] * len(taps)))
    whole = [
        (length - 1) * step + spread * (count - 1) + 1 + more
        for length, count, step, spread, more in zip(input.shape[2:], taps, stride, dilation, extra, strict=True)
    ]
    same = options.get("auto_pad", "NOTSET").startswith("SAME")
    wanted = options.get("output_shape") or (
        [length * step for length, step in zip(input.shape[2:], stride, strict=True)] if same else None
    )
    pads = options.get("pads", [0] * (2 * len(taps)))
    if wanted is not None:
        totals = [length - out for length, out in zip(whole, wanted, strict=True)]
        extra = [more - min(total, 0) for more, total in zip(extra, totals, strict=True)]
        pads = _split([max(total, 0) for total in totals], options.get("auto_pad") == "SAME_UPPER")
    out = pvk.ops.conv_transpose2d(
        input, weight, bias, stride, 0, extra, groups=options.get("group", 1), dilation=dilation
    )
    top, left, bottom, right = pads
    return out[:, :, top : out.shape[2] - bottom, left : out.shape[3] - right]


def _gemm(options: dict[str, Any], a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """alpha * A @ B + beta * C; C is a residual, which has the size of the result."""
    a = a.mT if options.get("transA") else a
    b = b if options.get("transB") else b.mT
    if c is not None:
        c = (options.get("beta", 1.0) * c).expand(a.shape[0], b.shape[0])
    return pvk.ops.linear(a, options.get("alpha", 1.0) * b, residual=c)


def _run_onnx(case: Any, inputs: list[Tensor]) -> Tensor:
    import onnx

    (node,) = case.model.graph.node
    options = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    options = {name: value.decode() if isinstance(value, bytes) else value for name, value in options.items()}
    if node.op_type == "ConvInteger":
        return _conv(options, *inputs[:2])
    return {"Conv": _conv, "ConvTranspose": _conv_transpose, "Gemm": _gemm}[node.op_type](options, *inputs)


@needs_onnx
@pytest.mark.parametrize("name", sorted(set(ONNX) - set(ONNX_REFUSED)))
def test_onnx_backend_node(name, device):
    case = ONNX[name]
    for inputs, (expected,) in case.data_sets:
        found = _run_onnx(case, [torch.tensor(array, device=device) for array in inputs])
        torch.testing.assert_close(found.cpu(), torch.tensor(expected), rtol=case.rtol, atol=case.atol)


@needs_onnx
def test_onnx_cases_are_all_there():
    assert {case.model.graph.node[0].op_type for case in ONNX.values()} == {
        "Conv",
        "ConvInteger",
        "ConvTranspose",
        "Gemm",
    }
    assert set(ONNX_REFUSED) <= set(ONNX)
    assert len(ONNX) >= 25


@needs_onnx
@pytest.mark.parametrize("name", ONNX_REFUSED)
def test_onnx_backend_node_that_has_no_op_here(name, device):
    inputs = [torch.tensor(array, device=device) for array in ONNX[name].data_sets[0][0]]
    with pytest.raises(REFUSED, match=ONNX_REFUSED[name]):
        _run_onnx(ONNX[name], inputs)
