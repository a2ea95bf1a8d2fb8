"""What is special to convolutions: algorithms, packed weights, padding, layouts, gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

import pyvision_kernels as pvk
from pyvision_kernels._activation import FUNCTIONS, NUMBERS
from pyvision_kernels._case import all_cases
from pyvision_kernels._op import REGISTRY
from pyvision_kernels._verify import run_case
from pyvision_kernels.ops.conv2d import algorithm, reference, run
from pyvision_kernels.ops.conv2d.geometry import Geometry
from pyvision_kernels.ops.conv2d.operator import conv2d_op, decide, pack

SPEC = next(spec for spec in all_cases() if spec.name == "conv2d")
MODES = ("zeros", "reflect", "replicate", "circular")
# name -> (algorithm, size of the input, outputs, taps, options)
PROBLEMS = {
    "direct": (algorithm.DIRECT, (2, 19, 11, 13), 21, (3, 3), {"padding": 1}),
    "pointwise": (algorithm.DIRECT, (2, 37, 9, 11), 70, (1, 1), {}),
    "grouped": (algorithm.DIRECT, (1, 24, 9, 10), 16, (3, 2), {"groups": 4, "stride": (2, 1), "dilation": (1, 2)}),
    "winograd2": (algorithm.WINOGRAD2, (2, 19, 11, 13), 21, (3, 3), {"padding": 1}),
    "winograd4": (algorithm.WINOGRAD4, (2, 19, 11, 13), 21, (3, 3), {"padding": 1}),
    "depthwise": (algorithm.DEPTHWISE, (2, 37, 9, 21), 37, (3, 3), {"groups": 37, "padding": 1}),
    "depthwise_strided": (algorithm.DEPTHWISE, (1, 20, 15, 22), 20, (5, 5), {"groups": 20, "padding": 2, "stride": 2}),
    "multiplier": (algorithm.DEPTHWISE, (1, 6, 9, 10), 18, (3, 5), {"groups": 6, "padding": 2}),
    "few_channels": (algorithm.FEW_CHANNELS, (2, 3, 15, 18), 21, (7, 7), {"padding": 3, "stride": 2}),
    "one_channel": (algorithm.FEW_CHANNELS, (2, 1, 15, 18), 33, (3, 4), {"padding": 2, "dilation": 2}),
}
every_problem = pytest.mark.parametrize("name", PROBLEMS)
of_cpu_algorithms = pytest.mark.slow_emulated("the CUDA kernel is one for all algorithms")


def _problem(name, dtype=torch.float32, padding_mode="zeros"):
    """The algorithm, input, weight, bias and Geometry."""
    kernel, size, outputs, taps, options = PROBLEMS[name]
    generator = torch.Generator().manual_seed(3)
    groups = options.get("groups", 1)
    x = torch.randn(size, generator=generator, dtype=torch.float64)
    w = torch.randn(outputs, size[1] // groups, *taps, generator=generator, dtype=torch.float64)
    b = torch.randn(outputs, generator=generator, dtype=torch.float64)
    geometry = Geometry.of(
        options.get("stride", 1), options.get("padding", 0), options.get("dilation", 1), groups, padding_mode, taps
    )
    return kernel, x.to(dtype), w.to(dtype), b.to(dtype), geometry


def _by(kernel, x, w, b, geometry, packed=None, pool=False, channels_last=False, activation=0, residual=None):
    return conv2d_op(x, w, b, None, None, residual, packed, geometry.numbers, activation, pool, channels_last, kernel)


def _expected(x, w, b, geometry):
    mode = MODES[geometry.padding_mode]
    options = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    return reference.conv2d(x, w, b, *options, padding_mode=mode)


@every_problem
@pytest.mark.parametrize("padding_mode", MODES)
def test_every_algorithm_in_every_padding_mode_and_layout(name, padding_mode, device):
    kernel, x, w, b, geometry = _problem(name, torch.float64, padding_mode)
    expected = _expected(x, w, b, geometry)
    x, w, b = (tensor.to(device) for tensor in (x, w, b))
    for image, weight in itertools.product(
        (x, x.contiguous(memory_format=torch.channels_last), x.mT.contiguous().mT), (w,)
    ):
        for channels_last in (False, True):
            out = _by(kernel, image, weight, b, geometry, channels_last=channels_last)
            torch.testing.assert_close(out.cpu(), expected)
            last = torch.channels_last if channels_last else torch.contiguous_format
            assert out.is_contiguous(memory_format=last)


@of_cpu_algorithms
@every_problem
def test_pooling_is_that_of_the_rounded_map(name, device):
    kernel, x, w, b, geometry = _problem(name)
    whole = _by(kernel, x.to(device), w.to(device), b.to(device), geometry)
    for channels_last in (False, True):
        pooled = _by(kernel, x.to(device), w.to(device), b.to(device), geometry, pool=True, channels_last=channels_last)
        torch.testing.assert_close(pooled, F.max_pool2d(whole, 2), rtol=1e-5, atol=1e-5)


@of_cpu_algorithms
@every_problem
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_a_packed_weight_changes_no_bit(name, dtype, device):
    kernel, x, w, b, geometry = _problem(name, dtype)
    x, w, b = (tensor.to(device) for tensor in (x, w, b))
    packed = pack(w, geometry, kernel)
    assert packed.dtype == torch.uint8
    assert torch.equal(_by(kernel, x, w, b, geometry, packed), _by(kernel, x, w, b, geometry))


def test_a_packed_weight_of_another_size_is_refused():
    kernel, x, w, b, geometry = _problem("winograd4")
    packed = pack(w, geometry, kernel)
    for wrong in (packed[:-1], torch.cat([packed, packed]), packed.float()):
        with pytest.raises(RuntimeError, match="conv2d: expected packed to be"):
            _by(kernel, x, w, b, geometry, wrong)


@every_problem
def test_threads_change_no_bit(name):
    kernel, x, w, b, geometry = _problem(name)
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            runs.append(_by(kernel, x, w, b, geometry, channels_last=True))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


@every_problem
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_stays_with_the_pixels_that_read_it(name, value, device):
    kernel, x, w, b, geometry = _problem(name)
    x[0, 0, 0, 0] = value  # beside the padding, which is zero: not to be multiplied with
    expected = _expected(x, w, b, geometry)
    out = _by(kernel, x.to(device), w.to(device), b.to(device), geometry).cpu()
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
            ours = _by(kernel, x.to(device), w.to(device), None, geometry, activation=number).cpu()
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


@pytest.mark.parametrize("channels", [64, 512])
def test_the_error_of_large_tiles_does_not_grow_with_the_channels(channels):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, channels, 16, 16, generator=generator)
    w = torch.randn(48, channels, 3, 3, generator=generator)
    exact = F.conv2d(x.double(), w.double(), padding=1)
    ours = _by(algorithm.WINOGRAD4, x, w, None, Geometry.of(1, 1, 1, 1, "zeros", (3, 3)))
    assert (ours - exact).norm() / exact.norm() <= 2e-6


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


def _layouts(tensor):
    """The tensor contiguous, in channels_last, and as a window of a larger map."""
    yield tensor
    yield tensor.contiguous(memory_format=torch.channels_last)
    yield F.pad(tensor, (2, 1, 1, 3)).contiguous(memory_format=torch.channels_last)[:, :, 1:-3, 2:-1]


def _check(kernel, x, w, geometry, channels_last, **options):
    b = torch.randn(w.shape[0], dtype=x.dtype, device=x.device)
    out = _by(kernel, x, w, b, geometry, channels_last=channels_last, **options)
    torch.testing.assert_close(out, _expected(x, w, b, geometry), rtol=1e-5, atol=1e-4)


# Registers along C hold 4 to 16 lanes: fewer channels, whole registers, and what is left over; blocks of channels.
@of_cpu_algorithms
@pytest.mark.parametrize("channels", [1, 7, 40, 300])
@pytest.mark.parametrize("taps", [(3, 3), (5, 5), (7, 7), (4, 3)])
def test_depthwise_of_any_size(channels, taps, device):
    for stride, dilation in ((1, 1), (2, 1), (1, (2, 3))):
        geometry = Geometry.of(stride, (taps[0] // 2, taps[1] // 2), dilation, channels, "zeros", taps)
        w = torch.randn(channels, 1, *taps, device=device)
        for x in _layouts(torch.randn(1, channels, 19, 23, device=device)):
            for channels_last in (False, True):
                _check(algorithm.DEPTHWISE, x, w, geometry, channels_last)


@of_cpu_algorithms
@pytest.mark.parametrize("outputs", [1, 33, 48, 100])
@pytest.mark.parametrize("channels", [1, 3, 6])
def test_few_channels_of_any_size(channels, outputs, device):
    for taps, stride, padding in ((3, 1, 1), (7, 2, 3), (4, 4, 0), (3, (1, 5), 2)):
        geometry = Geometry.of(stride, padding, 1, 1, "zeros", (taps, taps))
        w = torch.randn(outputs, channels, taps, taps, device=device)
        for x in _layouts(torch.randn(2, channels, 13, 29, device=device)):
            for channels_last in (False, True):
                _check(algorithm.FEW_CHANNELS, x, w, geometry, channels_last)


@of_cpu_algorithms
def test_few_channels_of_a_patch_embedding(device):
    geometry = Geometry.of(16, 0, 1, 1, "zeros", (16, 16))
    x, w = torch.randn(1, 3, 48, 64, device=device), torch.randn(80, 3, 16, 16, device=device)
    for channels_last in (False, True):
        _check(algorithm.FEW_CHANNELS, x, w, geometry, channels_last)


@of_cpu_algorithms
@pytest.mark.parametrize("name", ["depthwise", "depthwise_strided", "multiplier", "few_channels", "one_channel"])
@pytest.mark.parametrize("activation", [None, *FUNCTIONS])
def test_depthwise_and_few_channels_with_all_that_follows(name, activation, device):
    kernel, x, w, b, geometry = _problem(name)
    x, w, b = (tensor.to(device) for tensor in (x, w, b))
    plain = _by(kernel, x, w, b, geometry)
    residual = torch.randn_like(plain)
    function = FUNCTIONS.get(activation)
    expected = plain if function is None else function(plain)
    added = plain + residual if function is None else function(plain + residual)
    for image, channels_last in ((x, False), (x.contiguous(memory_format=torch.channels_last), True), (x, True)):
        options = {"channels_last": channels_last, "activation": NUMBERS[activation]}
        for pool in (False, True):
            out = _by(kernel, image, w, b, geometry, pool=pool, **options)
            torch.testing.assert_close(out, F.max_pool2d(expected, 2) if pool else expected, rtol=1e-5, atol=1e-5)
            for term in (residual, residual.contiguous(memory_format=torch.channels_last)):
                out = _by(kernel, image, w, b, geometry, pool=pool, residual=term, **options)
                torch.testing.assert_close(out, F.max_pool2d(added, 2) if pool else added, rtol=1e-5, atol=1e-5)


@of_cpu_algorithms
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("channels", [3, 20])
def test_depthwise_and_few_channels_multiply_no_weight_with_padding(channels, value, device):
    x = torch.ones(1, channels, 6, 7, device=device)
    w = torch.ones(channels, 1, 3, 3, device=device)
    b = torch.zeros(channels, device=device)
    w[:, :, 0, 0] = value  # read by all but the first row and column
    geometry = Geometry.of(1, 1, 1, channels, "zeros", (3, 3))
    dense = torch.ones(channels, channels, 3, 3, device=device)
    dense[:, :, 0, 0] = value
    for channels_last in (False, True):
        for out in (
            _by(algorithm.DEPTHWISE, x, w, b, geometry, channels_last=channels_last),
            _by(
                algorithm.FEW_CHANNELS,
                x,
                dense,
                b,
                Geometry.of(1, 1, 1, 1, "zeros", (3, 3)),
                None,
                False,
                channels_last,
            ),
        ):
            assert out[:, :, 0].isfinite().all()
            assert out[:, :, :, 0].isfinite().all()
            assert not out[:, :, 1:, 1:].isfinite().any()


def test_few_channels_of_none(device):
    x, w = torch.randn(2, 0, 5, 6, device=device), torch.randn(3, 0, 3, 3, device=device)
    out = _by(algorithm.FEW_CHANNELS, x, w, torch.arange(3.0, device=device), Geometry.of(1, 1, 1, 1, "zeros", (3, 3)))
    assert torch.equal(out, torch.arange(3.0, device=device).view(1, 3, 1, 1).expand(2, 3, 5, 6))


WINOGRADS = (algorithm.WINOGRAD2, algorithm.WINOGRAD4)


@pytest.mark.parametrize("kernel", WINOGRADS)
@pytest.mark.parametrize(
    ("size", "outputs", "padding"),
    [
        ((1, 1, 1, 1), 1, 1),
        ((1, 17, 3, 3), 130, 0),  # one pixel out; more than two panels of outputs, the last of two
        ((2, 5, 7, 9), 3, 2),
        ((1, 40, 5, 4), 33, (1, 2, 0, 5)),  # left, right, top, bottom
        ((2, 8, 4, 60), 24, 4),  # tiles that read nothing but padding
        ((1, 150, 10, 11), 80, 1),  # two chunks of channels
    ],
)
def test_winograd_of_any_size(kernel, size, outputs, padding):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(size, generator=generator)
    w = torch.randn(outputs, size[1], 3, 3, generator=generator) / (9 * size[1]) ** 0.5
    b = torch.randn(outputs, generator=generator)
    geometry = Geometry.of(1, padding, 1, 1, "zeros", (3, 3))
    exact = _expected(x.double(), w.double(), b.double(), geometry)
    ours = _by(kernel, x, w, b, geometry, channels_last=True)
    assert (ours - exact).norm() <= 2e-6 * exact.norm()
    if min(exact.shape[-2:]) > 1:
        pooled = F.max_pool2d(exact, 2)  # odd sizes lose their last row or column
        assert (_by(kernel, x, w, b, geometry, pool=True) - pooled).norm() <= 2e-6 * pooled.norm()


@pytest.mark.parametrize("kernel", WINOGRADS)
@pytest.mark.parametrize(("channels", "side"), [(32, 46), (136, 30), (136, 7)])
def test_winograd_is_the_same_for_every_division_of_the_work(kernel, channels, side):
    generator = torch.Generator().manual_seed(2)
    last = torch.channels_last
    x = torch.randn(2, channels, side, side, generator=generator).contiguous(memory_format=last)
    w = torch.randn(72, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
    b = torch.randn(72, generator=generator)
    residual = torch.randn(2, 72, side, side, generator=generator)
    geometry = Geometry.of(1, 1, 1, 1, "zeros", (3, 3))
    exact = (_expected(x.double(), w.double(), b.double(), geometry) + residual).relu()
    relu = list(FUNCTIONS).index("relu") + 1
    packed = pack(w, geometry, kernel)
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            for added in (residual, residual.contiguous(memory_format=last)):
                for weight in (None, packed):
                    options = {"channels_last": True, "activation": relu, "residual": added}
                    runs.append(_by(kernel, x, w, b, geometry, weight, **options))
    finally:
        torch.set_num_threads(threads)
    assert (runs[0] - exact).norm() <= 2e-6 * exact.norm()
    assert all(torch.equal(runs[0], other) for other in runs)


@pytest.mark.parametrize("kernel", WINOGRADS)
@pytest.mark.parametrize("padding_mode", range(1, len(MODES)))
def test_winograd_tiles_beyond_the_output_read_nothing(kernel, padding_mode):
    x = torch.randn(1, 3, 3, 2, generator=torch.Generator().manual_seed(1))
    w = torch.ones(2, 3, 3, 3)
    geometry = Geometry.of(1, 1, 1, 1, MODES[padding_mode], (3, 3))
    torch.testing.assert_close(_by(kernel, x, w, None, geometry), _expected(x, w, None, geometry))


def test_depthwise_of_a_map_larger_than_the_caches():  # its outputs go past them
    x = torch.randn(1, 64, 260, 201).contiguous(memory_format=torch.channels_last)
    w, geometry = torch.randn(64, 1, 3, 3), Geometry.of(1, 1, 1, 64, "zeros", (3, 3))
    _check(algorithm.DEPTHWISE, x, w, geometry, True)
