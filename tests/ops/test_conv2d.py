"""What is special to convolutions: algorithms, packed weights, padding, layouts, gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

import pyvision_kernels as pvk
from pyvision_kernels._activation import FUNCTIONS
from pyvision_kernels._case import all_cases
from pyvision_kernels._op import REGISTRY
from pyvision_kernels._verify import run_case
from pyvision_kernels.ops.conv2d import algorithm, reference, run
from pyvision_kernels.ops.conv2d.geometry import Geometry
from pyvision_kernels.ops.conv2d.operator import decide, pack
from tests.convolutions import MODES, by, every_problem, expected_of, of_cpu_algorithms, problem

SPEC = next(spec for spec in all_cases() if spec.name == "conv2d")


@every_problem
@pytest.mark.parametrize("padding_mode", MODES)
def test_every_algorithm_in_every_padding_mode_and_layout(name, padding_mode, device):
    kernel, x, w, b, geometry = problem(name, torch.float64, padding_mode)
    expected = expected_of(x, w, b, geometry)
    x, w, b = (tensor.to(device) for tensor in (x, w, b))
    for image, weight in itertools.product(
        (x, x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT), (w,)
    ):
        for channels_last in (False, True):
            out = by(kernel, image, weight, b, geometry, channels_last=channels_last)
            torch.testing.assert_close(out.cpu(), expected)
            last = torch.channels_last if channels_last else torch.contiguous_format
            assert out.is_contiguous(memory_format=last)


@of_cpu_algorithms
@every_problem
def test_pooling_is_that_of_the_rounded_map(name, device):
    kernel, x, w, b, geometry = problem(name)
    whole = by(kernel, x.to(device), w.to(device), b.to(device), geometry)
    for channels_last in (False, True):
        pooled = by(kernel, x.to(device), w.to(device), b.to(device), geometry, pool=True, channels_last=channels_last)
        torch.testing.assert_close(pooled, F.max_pool2d(whole, 2), rtol=1e-5, atol=1e-5)


@of_cpu_algorithms
@every_problem
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_a_packed_weight_changes_no_bit(name, dtype, device):
    kernel, x, w, b, geometry = problem(name, dtype)
    x, w, b = (tensor.to(device) for tensor in (x, w, b))
    packed = pack(w, geometry, kernel)
    assert packed.dtype == torch.uint8
    assert torch.equal(by(kernel, x, w, b, geometry, packed), by(kernel, x, w, b, geometry))


def test_a_packed_weight_of_another_size_is_refused():
    kernel, x, w, b, geometry = problem("winograd4")
    packed = pack(w, geometry, kernel)
    for wrong in (packed[:-1], torch.cat([packed, packed]), packed.float()):
        with pytest.raises(RuntimeError, match="conv2d: expected packed to be"):
            by(kernel, x, w, b, geometry, wrong)


@every_problem
def test_threads_change_no_bit(name):
    kernel, x, w, b, geometry = problem(name)
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            runs.append(by(kernel, x, w, b, geometry, channels_last=True))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


@every_problem
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_stays_with_the_pixels_that_read_it(name, value, device):
    kernel, x, w, b, geometry = problem(name)
    x[0, 0, 0, 0] = value  # beside the padding, which is zero: not to be multiplied with
    expected = expected_of(x, w, b, geometry)
    out = by(kernel, x.to(device), w.to(device), b.to(device), geometry).cpu()
    if name.startswith("winograd") and device == "cpu":  # it spreads within a tile, and never beyond
        reach = 4 if name == "winograd4" else 2
        assert not out[~expected.isfinite()].isfinite().any()
        assert out[0, :, reach:].isfinite().all()
        assert out[0, :, :, reach:].isfinite().all()
        assert out[1:].isfinite().all()
        return
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_no_channels_in_gives_the_bias_and_none_out_nothing(device):
    x, w, b = torch.ones(2, 0, 6, 7), torch.ones(3, 0, 3, 3), torch.arange(3.0)
    ours = pvk.ops.conv2d(x.to(device), w.to(device), b.to(device), padding=1, activation="relu")
    assert torch.equal(ours.cpu(), b.view(1, 3, 1, 1).expand(2, 3, 6, 7))
    x, w = torch.ones(2, 4, 6, 7), torch.ones(0, 4, 3, 3)
    assert pvk.ops.conv2d(x.to(device), w.to(device)).shape == (2, 0, 4, 5)


def test_activations_pass_nan_and_infinities_as_pytorch_does(device):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 3.0, -3.0, 6.0, 90.0, -90.0]).view(1, 1, 3, 3)
    w = torch.ones(1, 1, 1, 1)
    for name, function in FUNCTIONS.items():
        for kernel in (algorithm.DIRECT, algorithm.DEPTHWISE, algorithm.FEW_CHANNELS):
            number = list(FUNCTIONS).index(name) + 1
            geometry = Geometry.of(1, 0, 1, 1, "zeros", (1, 1))
            ours = by(kernel, x.to(device), w.to(device), None, geometry, activation=number).cpu()
            expected = function(x.double()).float()  # PyTorch's gelu of infinity is NaN in float32
            torch.testing.assert_close(ours, expected, equal_nan=True, msg=lambda text, name=name: name + text)


def test_strict_numerics_leaves_out_the_large_tiles():
    case = next(case for case in SPEC.cases if case.name == "winograd4")
    inputs = case.inputs(torch.float32)
    geometry = Geometry.of(1, 1, 1, 1, "zeros", (3, 3))
    assert decide(inputs["input"], inputs["weight"], geometry, True, True) == algorithm.WINOGRAD4
    with pvk.strict_numerics():
        assert decide(inputs["input"], inputs["weight"], geometry, True, True) == algorithm.WINOGRAD2
        exact = reference.conv2d(**{k: v.double() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()})
        ours, peer = pvk.ops.conv2d(**inputs).double(), SPEC.peer(**inputs).double()
        assert (ours - exact).abs().max() <= 2 * (peer - exact).abs().max() + 1e-7 * exact.abs().max()
    assert decide(inputs["input"], inputs["weight"], geometry, True, True) == algorithm.WINOGRAD4


def test_backend_torch_runs_pytorchs_convolution_and_pvk_ours():
    x, w = torch.randn(1, 8, 9, 9), torch.randn(4, 8, 3, 3)
    seen = {}
    for name in pvk._backend.BACKENDS:
        with pvk.backend(name), torch.profiler.profile(acc_events=True) as profile:
            pvk.ops.conv2d(x, w)
        seen[name] = {event.key for event in profile.key_averages()}
    assert "aten::conv2d" in seen["torch"]
    assert "pvk::conv2d" not in seen["torch"]
    assert "pvk::conv2d" in seen["pvk"]
    assert "aten::conv2d" not in seen["pvk"]
    with pytest.raises(ValueError, match="backend: expected name to be"), pvk.backend("cudnn"):
        pass


def test_unbatched_maps(device):
    x, w, rest = torch.randn(5, 9, 8), torch.randn(6, 5, 3, 3), torch.randn(6, 7, 6)
    ours = pvk.ops.conv2d(x.to(device), w.to(device), residual=rest.to(device))
    torch.testing.assert_close(ours.cpu(), F.conv2d(x, w) + rest, rtol=1e-4, atol=1e-4)
    assert pvk.ops.conv2d_max_pool2d(x.to(device), w.to(device)).shape == (6, 3, 3)
    assert pvk.ops.conv1d(x[:, 0].to(device), w[:, :, 0].to(device)).shape == (6, 6)
    assert pvk.ops.conv_transpose2d(x.to(device), w.to(device)[:5].contiguous()).shape == (5, 11, 10)
    with pytest.raises(RuntimeError, match="conv2d: expected residual to have 3 dimensions"):
        pvk.ops.conv2d(x, w, residual=rest[None])


def test_the_layout_is_that_of_the_input_or_the_weight():
    x, w = torch.randn(2, 8, 9, 9), torch.randn(4, 8, 3, 3)
    last = {"memory_format": torch.channels_last}
    for image, weight in itertools.product((x, x.contiguous(**last)), (w, w.contiguous(**last))):
        ours, theirs = pvk.ops.conv2d(image, weight), F.conv2d(image, weight)
        assert ours.stride() == theirs.stride()
    geometry = Geometry.of(1, 0, 1, 1, "zeros", (3, 3))
    assert run(x, w, None, geometry, channels_last=True).is_contiguous(**last)


@pytest.mark.parametrize("options", [
    {"activation": name} for name in FUNCTIONS
] + [
    {"padding": (1, 0, 2, 1), "stride": 2},
    {"padding": 1, "padding_mode": "reflect"},
    {"padding": (2, 0, 1, 1), "padding_mode": "circular", "dilation": 2},
    {"padding": 2, "padding_mode": "replicate", "groups": 2},
])  # fmt: skip
@pytest.mark.parametrize("pool", [False, True])
def test_gradients_of_all_arguments(options, pool):
    generator = torch.Generator().manual_seed(0)
    groups = options.get("groups", 1)

    def normal(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64)

    x, w, b, scale, shift = normal(1, 4, 6, 5), normal(2, 4 // groups, 2, 2), normal(2), normal(2), normal(2)
    residual = normal(*reference.conv2d(x, w, **options).shape)
    arguments = [tensor.requires_grad_() for tensor in (x, w, b, scale, shift, residual)]
    op = pvk.ops.conv2d_max_pool2d if pool else pvk.ops.conv2d

    def function(x, w, b, scale, shift, residual):
        return op(x, w, b, scale=scale, shift=shift, residual=residual, **options)

    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


def test_gradients_of_variants():
    x = torch.randn(1, 4, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: pvk.ops.conv1d(x, w, padding=1, activation="silu"), (x, w))
    x = torch.randn(1, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 2, 3, 2, dtype=torch.float64, requires_grad=True)

    def transposed(x, w):
        return pvk.ops.conv_transpose2d(x, w, None, 2, 1, 1, 2, activation="gelu")

    assert torch.autograd.gradcheck(transposed, (x, w))
    assert torch.autograd.gradgradcheck(transposed, (x, w))


def test_only_gradients_that_are_asked_for():
    x, w = torch.randn(1, 4, 6, 6), torch.randn(3, 4, 3, 3, requires_grad=True)
    b = torch.randn(3, requires_grad=True)
    pvk.ops.conv2d(x, w, b, activation="relu").sum().backward()
    assert w.grad is not None
    assert b.grad is not None
    assert x.grad is None


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torch_func():
    x, w = torch.randn(3, 2, 4, 6, 6, dtype=torch.float64), torch.randn(5, 4, 3, 3, dtype=torch.float64)
    each = torch.stack([F.conv2d(image, w) for image in x])
    torch.testing.assert_close(torch.vmap(lambda image: pvk.ops.conv2d(image, w))(x), each)
    both = torch.vmap(pvk.ops.conv2d)(x, w.expand(3, *w.shape))
    torch.testing.assert_close(both, each)
    ours = torch.func.grad(lambda w: pvk.ops.conv2d(x[0], w, activation="silu").sum())(w)
    torch.testing.assert_close(ours, torch.func.grad(lambda w: F.silu(F.conv2d(x[0], w)).sum())(w))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x[0], x[0])
        with pytest.raises(NotImplementedError, match="conv2d: expected inputs without tangents"):
            pvk.ops.conv2d(dual, w)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_channel_values_in_float32_beside_16_bits(dtype, device):
    x, w = torch.randn(1, 8, 6, 7).to(device, dtype), torch.randn(5, 8, 3, 3).to(device, dtype)
    b, scale, shift = (torch.randn(5, device=device) for _ in range(3))
    exact = reference.conv2d(*(tensor.double() for tensor in (x, w, b)), scale=scale.double(), shift=shift.double())
    ours = pvk.ops.conv2d(x, w, b, scale=scale, shift=shift)
    assert ours.dtype == dtype
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(ours.double(), exact, rtol=unit, atol=4 * unit)
    mixed = pvk.ops.conv2d(x, w, b.to(dtype), scale=scale, shift=shift)
    torch.testing.assert_close(mixed.float(), ours.float(), rtol=8 * unit, atol=16 * unit)


HOSTILE = {
    "algorithm": ({"kernel": 9}, "expected algorithm to be 0 to 4"),
    "negative_algorithm": ({"kernel": -2}, "expected algorithm to be 0 to 4"),
    "activation": ({"activation": 7}, "expected activation to be 0 to 6"),
    "winograd_of_5x5": ({"kernel": algorithm.WINOGRAD4, "taps": (5, 5)}, "expected a 3 x 3 weight"),
    "depthwise_of_dense": ({"kernel": algorithm.DEPTHWISE}, "expected one input channel a group"),
    "stride": ({"numbers": (0, 1, 0, 0, 0, 0, 1, 1, 1, 0)}, "expected stride to be positive"),
    "dilation": ({"numbers": (1, 1, 0, 0, 0, 0, 1, -1, 1, 0)}, "expected dilation to be positive"),
    "huge_dilation": ({"numbers": (1, 1, 0, 0, 0, 0, 1 << 62, 1, 1, 0)}, "expected dilation"),
    "huge_padding": ({"numbers": (1, 1, 1 << 62, 1 << 62, 0, 0, 1, 1, 1, 0)}, "expected padding"),
    "padding": ({"numbers": (1, 1, -1, 0, 0, 0, 1, 1, 1, 0)}, "expected padding not to be negative"),
    "groups": ({"numbers": (1, 1, 0, 0, 0, 0, 1, 1, 0, 0)}, "expected groups to be positive"),
    "too_few_numbers": ({"numbers": (1, 1, 0, 0)}, "expected geometry to have 10 numbers"),
    "mode": ({"numbers": (1, 1, 0, 0, 0, 0, 1, 1, 1, 4)}, "expected padding_mode to be 0 to 3"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_the_operator_itself_checks(name):
    change, message = HOSTILE[name]
    numbers = change.get("numbers", (1, 1, 0, 0, 0, 0, 1, 1, 1, 0))
    x, w = torch.ones(1, 4, 8, 8), torch.ones(4, 4, *change.get("taps", (3, 3)))
    arguments = (x, w, *(None,) * 5, list(numbers), change.get("activation", 0), False, False, change.get("kernel", 0))
    with pytest.raises(RuntimeError, match=message):
        REGISTRY["conv2d"].overload(*arguments)


def test_large_strides_and_dilations_stay_inside(device):
    x, w = torch.randn(1, 3, 40, 9, device=device), torch.randn(4, 3, 3, 3, device=device)
    ours = pvk.ops.conv2d(x, w, stride=(7, 50), dilation=(13, 3), padding=(1, 0))
    torch.testing.assert_close(ours, F.conv2d(x, w, None, (7, 50), (1, 0), (13, 3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["winograd4", "pointwise", "depthwise", "first_layer"])
def test_error_rule_in_bfloat16_of_larger_maps(name):
    case = next(case for case in SPEC.cases if case.name == name)
    for result in run_case(SPEC, case, torch.bfloat16, "cpu", "channels_last"):
        assert result.ok, result
