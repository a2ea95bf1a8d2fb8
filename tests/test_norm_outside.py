"""Normalisation against test inputs that others wrote: PyTorch's own (op_db, module_db) and ONNX's."""

from __future__ import annotations

import importlib
import pkgutil
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
    "nn.functional.batch_norm": pvk.ops.batch_norm,
    "nn.functional.group_norm": pvk.ops.group_norm,
    "nn.functional.layer_norm": pvk.ops.layer_norm,
}
LAYERS = ("BatchNorm1d", "BatchNorm2d", "GroupNorm", "InstanceNorm2d", "LayerNorm")
THEIRS = {entry.name: entry for entry in op_db if entry.name in OURS and not entry.variant_test_name}
NATIVE = {"native_layer_norm": "nn.functional.layer_norm"}  # whose error inputs are those of the function
MODULES = {entry.module_cls: entry for entry in module_db}
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
REFUSED = (RuntimeError, ValueError, TypeError, NotImplementedError)
OUR_WORDS = re.compile(r"^(layer_norm|group_norm|batch_norm): expected .*, but got ", re.DOTALL)

by_op = pytest.mark.parametrize("name", OURS)


@pytest.fixture(autouse=True)
def our_kernels():
    torch.manual_seed(0)
    with pvk.backend("pvk"):
        yield


def _copy(value: Any) -> Any:
    """Running statistics are written."""
    return value.detach().clone() if isinstance(value, Tensor) else value


@by_op
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_samples_of_op_db(name, dtype, device):
    count = 0
    for sample in THEIRS[name].sample_inputs(device, dtype):
        results = [
            function(*map(change, (sample.input, *sample.args)), **{k: change(v) for k, v in sample.kwargs.items()})
            for function, change in ((OURS[name], _copy), (THEIRS[name].op, _copy), (THEIRS[name].op, in_double))
        ]
        assert_as_good(*results, sample)
        count += 1
    assert count >= 5


@by_op
def test_gradients_of_the_samples_of_op_db(name, device):
    for sample in THEIRS[name].sample_inputs(device, torch.float64, requires_grad=True):
        arguments = (sample.input, *sample.args)
        leaves = [v for v in (*arguments, *sample.kwargs.values()) if isinstance(v, Tensor) and v.requires_grad]
        results = [function(*arguments, **sample.kwargs) for function in (OURS[name], THEIRS[name].op)]
        direction = torch.randn_like(results[0])
        ours, theirs = (torch.autograd.grad(result, leaves, direction) for result in results)
        torch.testing.assert_close(ours, theirs)


def _error_inputs(device: str) -> list[tuple[str, Any]]:
    entries = [(entry, NATIVE.get(entry.name, entry.name)) for entry in op_db]
    return [
        (name, wrong.sample_input)
        for entry, name in entries
        if name in OURS and entry.error_inputs_func
        for wrong in entry.error_inputs(device)
    ]


def test_error_inputs_of_op_db(device):
    found = _error_inputs(device)
    for name, sample in found:
        arguments, options = list(sample.args), dict(sample.kwargs)
        if name == "nn.functional.layer_norm" and len(arguments) == 4:
            options["eps"] = arguments.pop()
        with pytest.raises(REFUSED) as caught:
            OURS[name](sample.input, *arguments, **options)
        assert OUR_WORDS.match(str(caught.value)), (sample, caught.value)
    assert len(found) >= 2


@by_op
def test_integers_and_complex_numbers_are_refused(name, device):
    sample = next(iter(THEIRS[name].sample_inputs(device, torch.float32)))
    for dtype in (torch.int64, torch.uint8, torch.complex64):
        with pytest.raises(REFUSED, match=r"float16, bfloat16, float32 or float64, but got"):
            OURS[name](sample.input.to(dtype), *sample.args, **sample.kwargs)


def _exact_group_norm(layer: torch.nn.GroupNorm, input: Tensor) -> Tensor:
    """By the definition in numpy's widest float: of two values beside each other float64 is not exact."""
    wide = input.cpu().numpy().astype("longdouble")
    groups = wide.reshape(wide.shape[0], layer.num_groups, -1)
    centered = groups - groups.mean(-1, keepdims=True)
    deviation = ((centered**2).mean(-1, keepdims=True) + layer.eps) ** 0.5
    out = (centered / deviation).reshape(*wide.shape[:2], -1)
    for values, combine in ((layer.weight, "__mul__"), (layer.bias, "__add__")):
        if values is not None:
            out = getattr(out, combine)(values.detach().cpu().numpy().astype("longdouble")[:, None])
    return torch.tensor(out.reshape(wide.shape).astype("float64"), device=input.device)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_samples_of_module_db(layer, dtype, training, device):
    stock_class, our_class = getattr(torch.nn, layer), getattr(pvk.nn, layer)
    entry = MODULES[stock_class]
    assert dtype in entry.dtypes
    count = 0
    for sample in entry.module_inputs_func(entry, device, dtype, requires_grad=False, training=training):
        made, given = sample.constructor_input, sample.forward_input
        kwargs = {**made.kwargs, "device": device, "dtype": dtype}
        ours, stock, exact = (
            cls(*made.args, **kwargs).train(training) for cls in (our_class, stock_class, stock_class)
        )
        for other in (stock, exact):
            other.load_state_dict(ours.state_dict())
        exact.double()
        results = [
            module(*map(change, given.args)) for module, change in ((ours, _copy), (stock, _copy), (exact, in_double))
        ]
        if layer == "GroupNorm":
            results[2] = _exact_group_norm(exact, *given.args)
        assert_as_good(*results, sample)
        for name, kept in ours.named_buffers():  # running statistics
            theirs = stock.get_buffer(name)
            if theirs.is_floating_point():
                assert_as_good(kept, theirs, exact.get_buffer(name), (sample, name))
            else:
                assert kept == theirs, (sample, name)
        count += 1
    assert count >= 1


OPERATORS = ("BatchNormalization", "GroupNormalization", "InstanceNormalization", "LayerNormalization")


def _onnx_cases() -> dict[str, Any]:
    """ONNX's backend node tests of these operators by name; none where onnx is absent.

    Its public loader makes the cases of all operators, which takes half a minute: these are those of single modules.
    """
    package = "onnx.backend.test.case.node"
    try:
        folder = importlib.import_module(package).__path__
    except ImportError:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for module in pkgutil.iter_modules(folder):
            if "norm" in module.name:
                importlib.import_module(f"{package}.{module.name}")
    made = importlib.import_module(package)._NodeTestCases
    # Each comes a second time with the operator expanded into others.
    return {case.name: case for case in made if case.model.graph.node[0].op_type in OPERATORS}


ONNX = _onnx_cases()
needs_onnx = pytest.mark.skipif(not ONNX, reason="onnx is not installed")


def _layer_norm(options: dict[str, Any], input: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[Tensor]:
    """The output, and by the definition the mean and the inverse deviation that ONNX returns beside it."""
    axis = options.get("axis", -1) % input.dim()
    shape = input.shape[axis:]
    eps = options.get("epsilon", 1e-5)
    bias = None if bias is None else bias.expand(shape)
    dims = tuple(range(axis, input.dim()))
    rstd = (input.var(dims, correction=0, keepdim=True) + eps).rsqrt()
    return [pvk.ops.layer_norm(input, shape, weight.expand(shape), bias, eps), input.mean(dims, keepdim=True), rstd]


def _batch_norm(options: dict[str, Any], input: Tensor, *vectors: Tensor) -> list[Tensor]:
    """ONNX's momentum is one minus ours, and its running variance is the biased one."""
    weight, bias, mean, var = vectors
    training, momentum = bool(options.get("training_mode", 0)), 1 - options.get("momentum", 0.9)
    kept, count = (mean.clone(), var.clone()), input.numel() // input.shape[1]
    out = pvk.ops.batch_norm(input, *kept, weight, bias, training, momentum, options.get("epsilon", 1e-5))
    if not training:
        return [out]
    biased = (kept[1] - (1 - momentum) * var) * (count - 1) / count + (1 - momentum) * var
    return [out, kept[0], biased]


def _group_norm(options: dict[str, Any], input: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    groups = options.get("num_groups", input.shape[1])  # InstanceNormalization has none
    return [pvk.ops.group_norm(input, groups, weight, bias, options.get("epsilon", 1e-5))]


RUN = {
    "BatchNormalization": _batch_norm,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _group_norm,
    "LayerNormalization": _layer_norm,
}


@needs_onnx
@pytest.mark.parametrize("name", sorted(ONNX))
def test_onnx_backend_node(name, device):
    import onnx

    case = ONNX[name]
    (node,) = case.model.graph.node
    options = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    for inputs, outputs in case.data_sets:
        found = RUN[node.op_type](options, *(torch.tensor(array, device=device) for array in inputs))
        for ours, expected in zip(found, outputs, strict=False):
            torch.testing.assert_close(ours.cpu(), torch.tensor(expected), rtol=case.rtol, atol=case.atol)


@needs_onnx
def test_onnx_cases_are_all_there():
    assert {case.model.graph.node[0].op_type for case in ONNX.values()} == set(OPERATORS)
    assert len(ONNX) >= 15


ACTIVATIONS = (None, "relu", "hardswish", "silu", "gelu", "sigmoid")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("twice", [False, True], ids=["", "create_graph"])
def test_checkpoints_unpack_what_is_saved_once(activation, twice):
    from torch.utils.checkpoint import checkpoint

    input = torch.randn(4, 8, 6, 6, requires_grad=True)
    for layer in (pvk.nn.BatchNorm2d(8, activation=activation), pvk.nn.GroupNorm(4, 8, activation=activation)):
        output = checkpoint(layer, input, use_reentrant=False)
        (grad,) = torch.autograd.grad(output.sum(), input, create_graph=twice)
        torch.testing.assert_close(grad, torch.autograd.grad(layer(input).sum(), input)[0])


def test_maps_whose_dimensions_of_one_have_any_strides(device):
    image = torch.rand(12, 14, 8, device=device).permute(2, 0, 1)[None]
    column = torch.rand(4, 8, 6, 1, device=device).to(memory_format=torch.channels_last)[::2]
    for input in (image, column):
        leaf = input.detach().requires_grad_()
        arguments = torch.zeros(8, device=device), torch.ones(8, device=device), None, None, True
        results = []
        for ours, stock in ((pvk.ops.batch_norm, F.batch_norm), (pvk.ops.group_norm, F.group_norm)):
            options = arguments if stock is F.batch_norm else (2,)
            results += [(function(leaf, *options), leaf) for function in (ours, stock)]
        grads = [torch.autograd.grad(output, leaf, input)[0] for output, leaf in results]
        for pair in (0, 2):
            torch.testing.assert_close(results[pair][0], results[pair + 1][0])
            torch.testing.assert_close(grads[pair], grads[pair + 1])


def test_auto_takes_every_pair_of_dtypes():
    input = torch.randn(2, 4, 6, 6).bfloat16().requires_grad_()
    single, half = (lambda: torch.rand(4) + 0.5), (lambda: (torch.rand(4) + 0.5).bfloat16())
    with pvk.backend("auto"):
        for statistics, vector in ((single, half), (half, single), (single, single), (half, half)):
            pvk.ops.batch_norm(input, statistics(), statistics(), vector(), vector()).sum().backward()
        pvk.ops.group_norm(input, 2, None, single()).sum().backward()
        pvk.ops.layer_norm(input, (6,), None, torch.rand(6)).sum().backward()


@pytest.mark.parametrize("momentum", [None, 0.1])
def test_traced_batch_norms_count_batches(momentum):
    stock, ours = (cls(4, momentum=momentum) for cls in (torch.nn.BatchNorm2d, pvk.nn.BatchNorm2d))
    traced = torch.fx.symbolic_trace(ours)
    for step in range(3):
        input = torch.randn(2, 4, 5, 5) + step
        torch.testing.assert_close(stock(input), traced(input))
    for mine, theirs in zip(traced.buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_traced_instance_norms_keep_their_statistics():
    layer = pvk.nn.InstanceNorm2d(4, affine=True, track_running_stats=True).eval()
    layer.running_mean.fill_(5)
    input = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(torch.fx.symbolic_trace(layer)(input), layer(input))


def test_a_call_that_fails_leaves_the_statistics():
    mean = torch.zeros(4)
    with pytest.raises(RuntimeError, match=r"expected running_var to have size \[4\]"):
        pvk.ops.batch_norm(torch.randn(2, 4), mean, torch.ones(5), training=True)
    assert (mean == 0).all()


def test_what_a_backward_does_not_need_may_change():
    layer, input = pvk.nn.BatchNorm2d(4).eval(), torch.randn(2, 4, 6, 6, requires_grad=True)
    output = layer(input)
    layer.train()(input)
    torch.autograd.grad(output.sum(), input)
    weight, bias = torch.rand(4, requires_grad=True), torch.rand(4, requires_grad=True)
    output = pvk.ops.group_norm(input, 2, weight, bias)
    with torch.no_grad():
        bias.add_(1)
    torch.autograd.grad(output.sum(), (input, weight, bias))


@pytest.mark.parametrize("backend", ["auto", "pvk"])
def test_a_residual_of_another_size_is_refused(backend):
    with pvk.backend(backend), pytest.raises(RuntimeError, match="expected residual to have size"):
        pvk.nn.BatchNorm2d(4)(torch.randn(2, 4, 6, 6), torch.randn(1, 4, 1, 1))
