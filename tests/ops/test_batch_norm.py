"""What is special to batch_norm: running statistics, residual and activation, memory formats, gradients."""

from __future__ import annotations

import copy
import functools
import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyvision_kernels as pvk
from pyvision_kernels._activation import FUNCTIONS
from tests.errors import assert_as_good, in_double


def _normal(*size, dtype=torch.float64):
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)), dtype=torch.float64).to(dtype)


def _same(value):
    return value


def _vectors(channels, dtype=torch.float64):
    return [_normal(channels, dtype=dtype), *(_normal(channels + i, dtype=dtype)[i:].abs() + 0.5 for i in (1, 2, 3))]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [(5, 3), (2, 3, 4), (2, 3, 2, 3)])
def test_gradients_and_theirs(training, size):
    x, rest = _normal(*size).requires_grad_(), _normal(*size).mul(0.5).requires_grad_()
    mean, var, w, b = _vectors(3)
    w, b = w.requires_grad_(), b.requires_grad_()

    def function(x, w, b, rest, activation=None):
        statistics = (None, None) if training else (mean, var)
        return pvk.ops.batch_norm(x, *statistics, w, b, training, residual=rest, activation=activation)

    assert torch.autograd.gradcheck(function, (x, w, b, rest))
    assert torch.autograd.gradgradcheck(function, (x, w, b, rest))


@pytest.mark.parametrize("activation", FUNCTIONS)
def test_gradients_of_activations(activation):
    x, rest = _normal(2, 3, 4).requires_grad_(), _normal(2, 3, 4).mul(0.5).requires_grad_()
    _, _, w, b = (value.requires_grad_() for value in _vectors(3))

    def function(x, w, b, rest):
        return pvk.ops.batch_norm(x, None, None, w, b, True, residual=rest, activation=activation)

    assert torch.autograd.gradcheck(function, (x, w, b, rest))
    assert torch.autograd.gradgradcheck(function, (x, w, b, rest))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, -0.5])
def test_running_statistics_move_as_torchs(dtype, momentum, device):
    x = _normal(3, 5, 6, 7, dtype=dtype).to(device)
    kept = torch.float32 if dtype == torch.bfloat16 else dtype
    for format in (torch.contiguous_format, torch.channels_last):
        x, runs = x.contiguous(memory_format=format), []
        for function, change in ((pvk.ops.batch_norm, _same), (F.batch_norm, _same), (F.batch_norm, in_double)):
            mean, var, w, b = (change(value.to(device)) for value in _vectors(5, kept))
            for _ in range(2):
                function(change(x), mean, var, w, b, True, momentum)
            runs.append((mean, var))
        assert runs[0][0]._version > 0  # what is folded from them elsewhere is seen to be stale
        assert_as_good(*runs, format)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_mean_far_below_the_deviations_is_as_exact_as_torchs(dtype, format, device):
    # It is small beside the rounding of single differences: sums in float would not do.
    for size in ((4, 3, 16, 16), (2, 5, 7, 7), (1, 2, 70, 90)):
        x = _normal(*size)
        x = (x - x.mean((0, 2, 3), keepdim=True)).to(device, dtype).contiguous(memory_format=format)
        runs = []
        for function, change in ((pvk.ops.batch_norm, _same), (F.batch_norm, _same), (F.batch_norm, in_double)):
            mean, var = (change(torch.zeros(size[1], device=device)) for _ in range(2))
            function(change(x), mean, var, training=True, momentum=1.0)
            runs.append((mean, var))
        assert_as_good(*runs, size)


def test_layout_of_the_result_is_that_of_the_input(device):
    x = _normal(2, 6, 5, 4, dtype=torch.float32).to(device)
    for map in (x, x.contiguous(memory_format=torch.channels_last), x.permute(0, 1, 3, 2), x[:, ::2], x[..., :1]):
        ours, theirs = (op(map, None, None, training=True) for op in (pvk.ops.batch_norm, F.batch_norm))
        torch.testing.assert_close(ours, theirs)
        if map.is_contiguous() or map.is_contiguous(memory_format=torch.channels_last):
            assert ours.stride() == theirs.stride()


def test_both_layouts_and_any_number_of_threads():
    x = _normal(4, 40, 31, 29, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        for format in (torch.contiguous_format, torch.channels_last):
            leaf = x.contiguous(memory_format=format).requires_grad_()
            runs = []
            for count in (1, 2, 7):
                torch.set_num_threads(count)
                out = pvk.ops.batch_norm(leaf, None, None, training=True, activation="relu")
                runs.append((out, *torch.autograd.grad(out, leaf, x)))
            for run in runs[1:]:
                assert all(map(torch.equal, run, runs[0]))
    finally:
        torch.set_num_threads(threads)


def test_constants_give_the_bias_exactly_and_no_variance(device):
    for value in (0.0, 0.1, -3e4, 1e18):
        x, b = torch.full((2, 3, 5, 5), value, device=device), _normal(3, dtype=torch.float32).to(device)
        mean, var = torch.zeros(3, device=device), torch.ones(3, device=device)
        ours = pvk.ops.batch_norm(x, mean, var, None, b, True, 1.0)
        assert torch.equal(ours, b.view(3, 1, 1).expand_as(ours))
        assert torch.equal(mean, x[0, :, 0, 0])
        assert not var.any()


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_variance_beside_a_large_mean(format, device):
    x = (1e4 + 1e-2 * _normal(4, 3, 40, 40)).float().contiguous(memory_format=format)
    exact = x.double().var((0, 2, 3))
    var = torch.zeros(3, device=device)
    pvk.ops.batch_norm(x.to(device), torch.zeros(3, device=device), var, training=True, momentum=1.0)
    torch.testing.assert_close(var.cpu().double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_doubles_beside_a_large_mean_are_as_exact_as_torchs(format, device):
    x = (1e4 + 1e-2 * _normal(4, 3, 9, 9)).contiguous(memory_format=format)
    np = pytest.importorskip("numpy")
    long = x.numpy().astype(np.longdouble)
    centered = long - long.mean((0, 2, 3), keepdims=True)
    exact = centered / np.sqrt(np.square(centered).mean((0, 2, 3), keepdims=True) + np.longdouble(1e-5))
    ours, theirs = (op(x.to(device), None, None, training=True).cpu() for op in (pvk.ops.batch_norm, F.batch_norm))
    error, peer_error = (float(abs(out.numpy() - exact).max() / abs(exact).max()) for out in (ours, theirs))
    assert error <= 2 * peer_error + torch.finfo(torch.float64).eps


def test_values_whose_squares_leave_the_range_of_floats(device):
    for scale in (1e25, 1e-25):
        x = scale * _normal(2, 3, 9, 9)
        var = torch.zeros(3, device=device)
        options = {"training": True, "momentum": 1.0, "eps": 1e-60}
        ours = pvk.ops.batch_norm(x.float().to(device), torch.zeros_like(var), var, **options)
        exact = F.batch_norm(x.float().double(), None, None, **options)
        torch.testing.assert_close(ours.cpu().double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0])
def test_a_variance_beyond_floats_is_infinite(momentum, device):
    x = torch.full((2, 3, 9, 9), 1e38)
    x[0, 0] *= 0.9
    runs = []
    for op, input in ((pvk.ops.batch_norm, x.to(device)), (F.batch_norm, x)):
        mean, var = torch.ones(3, device=input.device), torch.ones(3, device=input.device)
        op(input, mean, var, training=True, momentum=momentum)
        runs.append((mean.cpu(), var.cpu()))
    torch.testing.assert_close(*runs)


def test_a_guess_of_the_mean_that_is_far_off(device):
    # The first pixels say nothing of the others.
    for format in (torch.contiguous_format, torch.channels_last):
        x = _normal(2, 3, 40, 40, dtype=torch.float32)
        x[0, :, :2] = torch.tensor([1e4, -30.0, 3.0]).view(3, 1, 1)
        x = x.contiguous(memory_format=format)
        runs = []
        for op, change in ((pvk.ops.batch_norm, x.to(device)), (F.batch_norm, x), (F.batch_norm, x.double())):
            mean, var = (torch.zeros(3, dtype=change.dtype, device=change.device) for _ in range(2))
            out = op(change, mean, var, training=True, momentum=1.0)
            runs.append(tuple(value.cpu() for value in (out, mean, var)))
        assert_as_good(*runs)


def test_nan_and_infinity_stay_in_their_channels(device):
    x = _normal(2, 4, 6, dtype=torch.float32)
    expected = F.batch_norm(x, None, None, training=True)
    x[0, 1, 2], x[1, 2, 0] = float("nan"), float("inf")
    ours = pvk.ops.batch_norm(x.to(device), None, None, training=True, activation="relu").cpu()
    assert ours[:, 1:3].isnan().all()
    torch.testing.assert_close(ours[:, ::3], expected[:, ::3].relu())


def test_denormals(device):
    x = 1e-40 * _normal(2, 3, 7, dtype=torch.float32).to(device)
    ours, theirs = (op(x, None, None, training=True) for op in (pvk.ops.batch_norm, F.batch_norm))
    torch.testing.assert_close(ours, theirs)


def test_empty_maps(device):
    for size in ((0, 3), (0, 3, 4, 5), (2, 3, 0), (2, 0, 4)):
        for training in (True, False):
            x = torch.ones(size, device=device, requires_grad=True)
            mean, var = torch.zeros(size[1], device=device), torch.ones(size[1], device=device)
            out = pvk.ops.batch_norm(x, mean, var, training=training, activation="relu")
            assert out.shape == x.shape
            assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape
            assert not mean.any()


def _normalised(op, kept, x, w):
    return op(x, *kept, w, training=kept[0] is None)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torch_func():
    x, w = _normal(3, 4, 5, 2), _normal(3, 5)
    mean, var = _normal(5), _normal(5).abs() + 1
    for kept in ((None, None), (mean, var)):
        ours, theirs = (
            torch.vmap(functools.partial(_normalised, op, kept))(x, w) for op in (pvk.ops.batch_norm, F.batch_norm)
        )
        torch.testing.assert_close(ours, theirs)
    grads = [
        torch.func.grad(lambda w, op=op: op(x[0], None, None, w, training=True).square().sum())(w[1])
        for op in (pvk.ops.batch_norm, F.batch_norm)
    ]
    torch.testing.assert_close(*grads)


LAYERS = {
    "vectors": (nn.BatchNorm1d, (6, 5), {}),
    "sequences": (nn.BatchNorm1d, (3, 5, 4), {"momentum": None}),
    "maps": (nn.BatchNorm2d, (3, 5, 4, 3), {"eps": 1e-3}),
    "not_affine": (nn.BatchNorm2d, (3, 5, 4, 3), {"affine": False, "momentum": None}),
    "not_tracked": (nn.BatchNorm2d, (3, 5, 4, 3), {"track_running_stats": False}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_compute_and_track_what_torchs_do(name):
    stock_class, size, options = LAYERS[name]
    stock = stock_class(size[1], **options, dtype=torch.float64)
    ours = getattr(pvk.nn, stock_class.__name__)(size[1], **options, dtype=torch.float64)
    if stock.affine:
        nn.init.normal_(stock.weight), nn.init.normal_(stock.bias)
    ours.load_state_dict(stock.state_dict())
    for training in (True, True, False, True):
        x = torch.randn(size, dtype=torch.float64, requires_grad=True)
        results = []
        for layer in (stock.train(training), ours.train(training)):
            out = layer(x)
            results.append((out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])))
        torch.testing.assert_close(*results)
        torch.testing.assert_close(ours.state_dict(), stock.state_dict())
    assert isinstance(ours, stock_class)


def test_layer_with_activation_and_residual():
    x, rest = _normal(2, 5, 4, 3, dtype=torch.float32), _normal(2, 5, 4, 3, dtype=torch.float32) + 1
    ours = pvk.nn.BatchNorm2d(5, activation="relu")
    assert "activation='relu'" in repr(ours)
    expected = F.batch_norm(x, None, None, training=True)
    torch.testing.assert_close(ours(x), expected.relu())
    torch.testing.assert_close(ours(x, rest), (expected + rest).relu())
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ours(x, rest), (expected + rest).relu())
    with pytest.raises(ValueError, match="BatchNorm2d: expected activation to be None or one of"):
        pvk.nn.BatchNorm2d(5, activation="tan")


def test_layer_refuses_in_the_words_of_torch():
    for layer, bad in (
        (pvk.nn.BatchNorm2d(3), torch.ones(2, 3)),
        (pvk.nn.BatchNorm1d(3), torch.ones(1, 3)),
        (pvk.nn.BatchNorm1d(3), torch.ones(4, 2)),
        (pvk.nn.BatchNorm2d(3).eval(), torch.ones(2, 4, 1, 1)),
    ):
        stock = getattr(nn, type(layer).__name__)(3).train(layer.training)
        with pytest.raises((ValueError, RuntimeError)) as theirs:
            stock(bad)
        with pytest.raises(theirs.type, match=re.escape(str(theirs.value))):
            layer(bad)


def test_layer_under_compile_and_fx():
    ours, twin = (pvk.nn.BatchNorm2d(4, activation="relu") for _ in range(2))
    x = _normal(2, 4, 3, 3, dtype=torch.float32)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), twin(x))
    torch.testing.assert_close(ours.state_dict(), twin.state_dict())
    traced = torch.fx.symbolic_trace(ours.eval())
    torch.testing.assert_close(traced(x), twin.eval()(x))


class _Stem(nn.Sequential):
    def __init__(self, norm=None):
        norm = norm or nn.BatchNorm2d(8)
        head = nn.Flatten(), nn.Linear(8 * 36, 6), nn.BatchNorm1d(6)
        super().__init__(nn.Conv2d(3, 8, 3, padding=1), norm, nn.ReLU(), *head)


def test_convert_covers_them_in_training():
    stock = _Stem().double()
    ours = pvk.convert(copy.deepcopy(stock))
    assert type(ours[1]) is pvk.nn.BatchNorm2d
    assert type(ours[5]) is pvk.nn.BatchNorm1d
    x = _normal(4, 3, 6, 6)
    results = []
    with pvk.backend("pvk"):
        for model in (stock, ours):
            out = model(x)
            results.append((out, *torch.autograd.grad(out.square().sum(), list(model.parameters()))))
    torch.testing.assert_close(*results)
    torch.testing.assert_close(ours.state_dict(), stock.state_dict())
    assert type(pvk.revert(ours)[1]) is nn.BatchNorm2d


def test_fused_where_it_has_no_activation_of_its_own():
    for norm, parts in ((pvk.nn.BatchNorm2d(8), ("1", "relu")), (pvk.nn.BatchNorm2d(8, activation="silu"), ())):
        model = _Stem(norm).double()
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias), model(_normal(4, 3, 6, 6))
        x = _normal(2, 3, 6, 6)
        expected = model.eval()(x)
        fused = pvk.convert(model, fuse=True)
        entries = {entry.name: entry for entry in pvk.conversion_report(fused)}
        assert entries["0"].fused == tuple(part.replace("relu", "2") for part in parts)
        with torch.no_grad():
            torch.testing.assert_close(fused(x), expected)
