"""Pooling against test inputs that others wrote: PyTorch's own (op_db, module_db) and ONNX's.

What cannot apply (three dimensions, integers, complex numbers) must be refused in our words.
"""

from __future__ import annotations

import importlib
import itertools
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import pyvision_kernels as pvk
from tests.errors import assert_as_good, in_double

with warnings.catch_warnings():  # of packages that these would like to have
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db

OURS = {
    f"nn.functional.{name}": getattr(pvk.ops, name)
    for name in (
        *("max_pool1d", "max_pool2d", "adaptive_max_pool2d", "max_unpool2d"),
        *("avg_pool1d", "avg_pool2d", "adaptive_avg_pool2d"),
    )
}
THEIRS = {entry.name: entry for entry in op_db if entry.name in OURS and not entry.variant_test_name}
MODULES = {entry.module_cls: entry for entry in module_db}
LAYERS = (
    *("MaxPool1d", "MaxPool2d", "AdaptiveMaxPool2d"),
    *("AvgPool1d", "AvgPool2d", "AdaptiveAvgPool2d"),
)
DTYPES = (torch.float32, torch.bfloat16)
REFUSED = (RuntimeError, ValueError, TypeError, NotImplementedError)
OUR_WORDS = re.compile(
    r"^(max_pool|max_unpool|adaptive_max_pool|avg_pool|adaptive_avg_pool)[12]d: expected .*, but got "
)

by_op = pytest.mark.parametrize("name", OURS)
pytestmark = pytest.mark.filterwarnings("ignore:max_unpool")  # that PyTorch's is not deterministic


def _tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@by_op
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_samples_of_op_db(name, dtype, device):
    count = 0
    for sample in THEIRS[name].sample_inputs(device, dtype):
        arguments = (sample.input, *sample.args)
        if sample.input.dim() > 4:
            continue
        exact = THEIRS[name].op(*map(in_double, arguments), **sample.kwargs)
        theirs = THEIRS[name].op(*arguments, **sample.kwargs)
        assert_as_good(OURS[name](*arguments, **sample.kwargs), theirs, exact, sample)
        count += 1
    assert count >= 4


@by_op
def test_gradients_of_the_samples_of_op_db(name):
    for sample in THEIRS[name].sample_inputs("cpu", torch.float64, requires_grad=True):
        if not sample.input.is_leaf:  # of max_unpool2d: the maxima of a leaf
            sample.input = sample.input.detach().requires_grad_()
        results = [
            _tuple(function(sample.input, *sample.args, **sample.kwargs))[0]
            for function in (OURS[name], THEIRS[name].op)
        ]
        direction = torch.randn_like(results[0])
        ours, theirs = (torch.autograd.grad(result, sample.input, direction)[0] for result in results)
        torch.testing.assert_close(ours, theirs)


WITH_ERRORS = [name for name in OURS if THEIRS[name].error_inputs_func]


@pytest.mark.parametrize("name", WITH_ERRORS)
def test_error_inputs_of_op_db(name):
    for wrong in THEIRS[name].error_inputs("cpu"):
        sample = wrong.sample_input
        with pytest.raises(REFUSED) as caught:
            OURS[name](sample.input, *sample.args, **sample.kwargs)
        assert OUR_WORDS.match(str(caught.value)), (sample, caught.value)


@by_op
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64], ids=lambda dtype: str(dtype)[6:])
def test_integers_and_complex_numbers_are_refused(name, dtype):
    sample = next(iter(THEIRS[name].sample_inputs("cpu", torch.float32)))
    with pytest.raises(REFUSED, match=r"float16, bfloat16, float32 or float64, but got"):
        OURS[name](sample.input.to(dtype), *sample.args, **sample.kwargs)


@pytest.mark.parametrize("pool", ["avg_pool2d", "max_pool2d", "adaptive_avg_pool2d", "interpolate"])
def test_layouts_of_results_are_torchs(pool):
    # Also where sides of one pixel, slices and other orders of dimensions leave it in doubt which layout a map has.
    for shape in itertools.product((1, 3), (1, 5), (1, 4), (1, 6)):
        map = torch.randn([length + 1 for length in shape])
        for order in itertools.permutations(range(4)):
            whole = map.permute(order).contiguous().permute([order.index(i) for i in range(4)])
            pixels = whole[..., 1:, 1:]
            for cut in (whole, whole[:, ::2], whole[:1, :1], pixels, pixels[:, 1:], pixels[1:]):
                for size in (1, 3) if pool == "adaptive_avg_pool2d" else (1,):
                    ours, theirs = (getattr(module, pool)(cut, size) for module in (pvk.ops, F))
                    assert ours.stride() == theirs.stride(), (cut.shape, cut.stride())


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_samples_of_module_db(layer, training, device):
    stock_class, our_class = getattr(torch.nn, layer), getattr(pvk.nn, layer)
    entry = MODULES[stock_class]
    count = 0
    for sample in entry.module_inputs_func(entry, device, torch.float32, requires_grad=False, training=training):
        made, given = sample.constructor_input, sample.forward_input
        ours, stock = (cls(*made.args, **made.kwargs).train(training) for cls in (our_class, stock_class))
        theirs = stock(*given.args, **given.kwargs)
        exact = stock(*map(in_double, given.args), **given.kwargs)
        assert_as_good(ours(*given.args, **given.kwargs), theirs, exact, sample)
        count += 1
    assert count >= 1


OPERATORS = {"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxUnpool"}


def _onnx_cases(*modules: str) -> dict[str, Any]:
    """ONNX's backend node tests of some operators by name; none where onnx is absent."""
    package = "onnx.backend.test.case.node"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for module in modules:
                importlib.import_module(f"{package}.{module}")
    except ImportError:
        return {}
    made = importlib.import_module(package)._NodeTestCases
    return {case.name: case for case in made if case.model.graph.node[0].op_type in OPERATORS}


ONNX = _onnx_cases("maxpool", "averagepool", "globalaveragepool", "globalmaxpool", "maxunpool")
# Three dimensions and integers: ours has no such op.
ONNX_REFUSED = {name for name in ONNX if "_3d_" in name or "uint8" in name}
# A dilated average, and indices of a map of another size than the result's: PyTorch has no such call either.
ONNX_APART = {"test_averagepool_2d_dilations", "test_maxunpool_export_with_output_shape"}
needs_onnx = pytest.mark.skipif(not ONNX, reason="onnx is not installed")


def _pads(options: dict[str, Any], size: Any, kernel: Any, stride: Any, dilation: Any) -> list[int]:
    """(left, right) or (left, right, top, bottom)."""
    rank = len(kernel)
    same = options.get("auto_pad", "NOTSET")
    if not same.startswith("SAME"):
        pads = options.get("pads", [0] * (2 * rank))
        return [pads[axis + end * rank] for axis in reversed(range(rank)) for end in (0, 1)]
    sides = []
    for axis in reversed(range(rank)):
        reach = dilation[axis] * (kernel[axis] - 1) + 1
        total = max((-(-size[axis] // stride[axis]) - 1) * stride[axis] + reach - size[axis], 0)
        small, large = total // 2, total - total // 2
        sides += [small, large] if same == "SAME_UPPER" else [large, small]
    return sides


def _pool(node: Any, options: dict[str, Any], input: Tensor) -> tuple[Tensor, ...]:
    """By padding around the map where ours takes no such padding: minus infinity, or zeros and their weights."""
    kernel = options["kernel_shape"]
    rank, ones = len(kernel), [1] * len(kernel)
    stride, dilation = options.get("strides", ones), options.get("dilations", ones)
    pads = _pads(options, input.shape[2:], kernel, stride, dilation)
    ceil = bool(options.get("ceil_mode", 0))
    plain = all(pads[2 * i] == pads[2 * i + 1] and 2 * pads[2 * i] <= kernel[rank - 1 - i] for i in range(rank))
    around = list(reversed(pads[::2]))
    if node.op_type == "MaxPool":
        pool = pvk.ops.max_pool1d if rank == 1 else pvk.ops.max_pool2d
        if not plain:
            assert len(node.output) == 1
            return (pool(F.pad(input, pads, value=-torch.inf), kernel, stride, 0, dilation, ceil),)
        values, indices = pool(input, kernel, stride, around, dilation, ceil, True)
        if len(node.output) == 1:
            return (values,)
        planes = torch.arange(input.shape[0] * input.shape[1]).view(*input.shape[:2], *ones)
        if options.get("storage_order"):
            indices = indices % input.shape[3] * input.shape[2] + indices // input.shape[3]
        return values, indices + planes * input[0, 0].numel()
    counts_padding = bool(options.get("count_include_pad", 0))
    pool = pvk.ops.avg_pool1d if rank == 1 else pvk.ops.avg_pool2d
    if plain and dilation == ones:
        return (pool(input, kernel, stride, around, ceil, counts_padding),)
    padded = pool(F.pad(input, pads), kernel, stride, 0, ceil)
    if counts_padding:
        return (padded,)
    return (padded / pool(F.pad(torch.ones_like(input), pads), kernel, stride, 0, ceil),)


def _run_onnx(case: Any, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    import onnx

    (node,) = case.model.graph.node
    options = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    options = {name: value.decode() if isinstance(value, bytes) else value for name, value in options.items()}
    if node.op_type == "MaxUnpool":
        size = inputs[2].tolist()[2:] if len(inputs) == 3 else None
        return (pvk.ops.max_unpool2d(*inputs[:2], options["kernel_shape"], options["strides"], 0, size),)
    if node.op_type.startswith("Global"):
        pool = pvk.ops.adaptive_avg_pool2d if node.op_type == "GlobalAveragePool" else pvk.ops.adaptive_max_pool2d
        return (pool(inputs[0], 1),)
    return _pool(node, options, inputs[0])


@needs_onnx
@pytest.mark.parametrize("name", sorted(set(ONNX) - ONNX_REFUSED - ONNX_APART))
def test_onnx_backend_node(name, device):
    case = ONNX[name]
    for inputs, expected in case.data_sets:
        found = _run_onnx(case, [torch.tensor(array, device=device) for array in inputs])
        for mine, right in zip(found, expected, strict=True):
            torch.testing.assert_close(mine.cpu(), torch.tensor(right), rtol=case.rtol, atol=case.atol)


@needs_onnx
@pytest.mark.parametrize("name", sorted(ONNX_REFUSED))
def test_onnx_backend_node_that_has_no_op_here(name):
    (inputs, _), *_ = ONNX[name].data_sets
    pool = pvk.ops.max_pool2d if ONNX[name].model.graph.node[0].op_type == "MaxPool" else pvk.ops.avg_pool2d
    with pytest.raises(REFUSED) as caught:
        pool(torch.tensor(inputs[0]), 2)
    assert OUR_WORDS.match(str(caught.value))


@needs_onnx
def test_onnx_cases_are_all_there():
    assert {case.model.graph.node[0].op_type for case in ONNX.values()} == OPERATORS
    assert len(ONNX) >= 40
