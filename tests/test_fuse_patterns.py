"""Which code is fused and which is not: patterns, what cannot be followed, layers, dtypes and modes."""

from __future__ import annotations

import copy
import operator
import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyvision_kernels as pvk
from tests.fused import Block, assert_close, block, forward, norms, operators, randomized

pytestmark = pytest.mark.usefixtures("one_thread")


class _Function(nn.Module):
    """A function of a convolution, a second one, a batch norm and an input."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())  # something is fused in any case

    def forward(self, x):
        return self.head(self.function(self, x))


def _in_place(value, other):
    value += other
    return value


FUNCTIONS = {
    "add": lambda m, x: m.a(x) + x,
    "norm_alone": lambda m, x: m.norm(x) + 1,
    "norm_and_relu": lambda m, x: (lambda y: m.a(F.relu(m.norm(y), inplace=True)) + y)(x.exp()),
    "norm_and_other": lambda m, x: m.a(F.silu(m.norm(x))),
    "norm_and_two": lambda m, x: (lambda y: F.relu(y) + y)(m.norm(x)),
    "norm_changed_between": lambda m, x: (lambda y: (lambda c: (y.mul_(2), F.relu(c)))(m.norm(y)))(x * 1)[1],
    "add_reversed": lambda m, x: x + m.norm(m.a(x)),
    "add_function": lambda m, x: torch.add(m.a(x), x).sigmoid(),
    "add_with_alpha": lambda m, x: torch.add(m.a(x), x, alpha=2),
    "add_number": lambda m, x: m.a(x) + 1,
    "add_itself": lambda m, x: (lambda y: y + y)(m.a(x)),
    "add_method": lambda m, x: m.a(x).add_(x).relu_(),
    "add_row": lambda m, x: m.a(x) + x[:, :, :1, :1],
    "add_larger": lambda m, x: m.a(x)[:, :, :1] + m.b(x),
    "add_of_two": lambda m, x: F.relu(m.norm(m.a(x)) + m.b(x)),
    "add_of_two_in_place": lambda m, x: F.silu(_in_place(m.norm(m.a(x)), m.b(x))),
    "add_into_input": lambda m, x: (lambda y: _in_place(y, m.a(y)) * y)(x * 2),
    "add_into_residual": lambda m, x: _in_place(m.b(x), m.norm(m.a(x))),
    "add_into_view": lambda m, x: (lambda y: _in_place(y[:, :4], m.a(x)) + y)(x.clone()),
    "activation_then_add": lambda m, x: F.relu6(m.a(x)) + x,
    "add_then_norm": lambda m, x: m.norm(m.a(x) + x),
    "two_uses": lambda m, x: (lambda y: F.relu(y) + y.sigmoid())(m.a(x)),
    "two_uses_in_place": lambda m, x: (lambda y: F.relu(y, inplace=True) + y)(m.norm(m.a(x))),
    "input_changed_after": lambda m, x: (lambda y: (lambda c: F.relu_(y) + c)(m.a(y)))(x * 1),
    "input_changed_between": lambda m, x: (lambda y: (lambda c: (y.mul_(2), F.relu(c + m.b(x))))(m.a(y)))(x * 1)[1],
    "residual_changed_between": lambda m, x: (lambda y: (lambda c: (y.mul_(2), F.relu(c)))(m.a(x) + y))(x * 1)[1],
    "view_changed_between": lambda m, x: (lambda y: (lambda c: (y[:, 0].zero_(), F.relu(c)))(m.a(y)))(x * 1)[1],
    "set_between": lambda m, x: (lambda y: (lambda c: (operator.setitem(y, 0, 0.0), F.relu(c)))(m.a(y)))(x * 1)[1],
    "shared_layer": lambda m, x: F.relu(m.norm(m.a(m.norm(m.a(x)).relu()))),
    "gelu_tanh": lambda m, x: F.gelu(m.a(x), approximate="tanh"),
    "gelu": lambda m, x: F.gelu(m.a(x)),
    "pool": lambda m, x: F.max_pool2d(F.relu(m.a(x)), 2),
    "pool_alone": lambda m, x: F.max_pool2d(m.a(x), kernel_size=(2, 2), stride=2),
    "pool_of_three": lambda m, x: F.max_pool2d(F.relu(m.a(x)), 3, 2, 1),
    "pool_overlapping": lambda m, x: F.max_pool2d(m.a(x), 2, 1),
    "pool_rounding_up": lambda m, x: F.max_pool2d(m.a(x), 2, ceil_mode=True),
    "pool_with_places": lambda m, x: F.max_pool2d(m.a(x), 2, return_indices=True)[0],
    "dropout": lambda m, x: F.relu(F.dropout(m.a(x), 0.5, m.training)),
    "always_dropout": lambda m, x: F.dropout(m.a(x), 1.0, True),
    "view": lambda m, x: m.b(m.a(x).view(2, 2, 2, 7, 6).view(x.shape)),
    "flattened": lambda m, x: m.a(x).view(x.size(0), -1)[:, :168].view(2, 4, 7, 6),
    "contiguity_asked": lambda m, x: m.a(x) * float(m.a(x).stride(1)),
    "strided": lambda m, x: m.a(x).as_strided((2, 4, 7, 6), (168, 42, 6, 1)),
    "transposed": lambda m, x: m.b(m.a(x).transpose(2, 3)).mT,
    "parameter": lambda m, x: m.a(x) * m.norm.weight.view(1, -1, 1, 1) + m.norm.running_mean[0],
    "keyword": lambda m, x: F.relu(input=m.a(input=x)),
    "channels_of_size": lambda m, x: m.a(x).reshape(x.shape[0], -1, *x.shape[2:]) / x.shape[-1],
}


NOT_FOLLOWED = ("contiguity_asked", "channels_of_size")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_patterns_in_code(name):
    model = randomized(_Function(FUNCTIONS[name]))
    picture = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    kept = picture.clone()
    expected = forward(copy.deepcopy(model), picture)
    pvk.convert(model, fuse=True)
    assert ("_pvk_plan" in model.__dict__) is (name not in NOT_FOLLOWED)
    for _ in range(2):
        assert_close(forward(model, picture), expected)
    assert torch.equal(picture, kept)


class _Branching(_Function):
    def forward(self, x):
        y = self.head(self.norm(self.a(x)))
        return y if y.sum() > 0 else self.b(-y)


class _TypeAsking(_Function):
    def forward(self, x):
        if not isinstance(x, torch.Tensor):
            x = x[0]
        return self.head(x) * (2.0 if isinstance(self.a(x), torch.Tensor) else 1.0)


class _Counting(_Function):
    count = 0

    def forward(self, x):
        self.count += 1
        self.last = x
        return self.head(x) * self.count


class _Optional(_Function):
    def forward(self, x, mask=None, scale: float = 1.0):
        y = F.relu(self.norm(self.a(x))) * scale
        return self.head(y if mask is None else y * mask)


class _Constant(_Function):
    def forward(self, x):
        return self.head(F.relu(self.a(x))) + torch.ones(4, 1, 1, dtype=torch.float64)


@pytest.mark.parametrize("kind", [_Branching, _TypeAsking, _Counting, _Optional, _Constant])
def test_code_that_cannot_be_followed_runs_as_it_is(kind):
    model, picture = randomized(kind(None)), torch.randn(2, 4, 7, 6, dtype=torch.float64)
    stock = copy.deepcopy(model)
    pvk.convert(model, fuse=True)
    assert ("_pvk_plan" in model.__dict__) is (kind is _Optional)
    for sign in (1, -1, 1):
        assert_close(forward(model, sign * picture), forward(stock, sign * picture))
    if kind is _Counting:
        assert (model.count, model.last.shape) == (3, picture.shape)
    if kind is _Optional:
        mask = torch.rand_like(picture)
        assert_close(forward(model, picture, mask, 2.0), forward(stock, picture, mask, 2.0))
        with torch.no_grad():
            assert_close(model(picture, scale=3.0), stock(picture, scale=3.0))
            assert_close(model(x=picture), stock(x=picture))
    pvk.conversion_report(model)


def test_what_surrounds_code_that_cannot_be_followed_is_fused():
    def block():
        return nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())

    model = randomized(nn.Sequential(block(), _Branching(None), block()))
    picture = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    expected = forward(model, picture)
    pvk.convert(model, fuse=True)
    assert_close(forward(model, picture), expected)
    assert norms(model, picture) == 1
    fused = {entry.name: entry.fused for entry in pvk.conversion_report(model) if entry.fused}
    assert fused == {"0.0": ("1", "2"), "1.head.0": ("1",), "2.0": ("1", "2")}


class _Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x, y):
        map = F.relu(self.conv(x))
        return OrderedDict(map=map, head=self.head(map), same=y, pair=(map.mean((2, 3)), [y + 1]))


def test_inputs_and_results_of_any_structure():
    model, x = randomized(_Several()), torch.randn(1, 3, 6, 6, dtype=torch.float64)
    y = torch.randn(2, dtype=torch.float64)
    expected = forward(model, x, y)
    pvk.convert(model, fuse=True)
    ours = forward(model, x, y)
    assert_close(ours, expected)
    assert ours["same"] is y
    assert type(ours["pair"]) is tuple
    assert operators(model, x, y).count("pvk::conv2d") == 2


def test_a_norm_by_itself_in_mixed_precision():
    model, picture = (
        randomized(_Function(FUNCTIONS["norm_and_relu"]), torch.bfloat16),
        torch.randn(2, 4, 7, 6).bfloat16(),
    )
    model.norm.float()
    expected = forward(model, picture)
    assert_close(forward(pvk.convert(model, fuse=True), picture).double(), expected.double(), 0.02)


def test_convolutions_of_torch_within_a_fused_model(monkeypatch):
    from pyvision_kernels.ops.conv2d import algorithm

    layers = [nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Hardswish(), nn.Conv2d(4, 4, 1), nn.SiLU()]
    for model, size in ((Block(), (2, 16, 9, 8)), (nn.Sequential(*layers, nn.MaxPool2d(2)), (1, 4, 8, 9))):
        for dtype, tolerance in ((torch.float64, 1e-9), (torch.bfloat16, 0.05)):
            model, picture = randomized(copy.deepcopy(model), dtype), torch.randn(size, dtype=dtype)
            expected = forward(model, picture).double()
            pvk.convert(model, fuse=True)
            monkeypatch.setattr(algorithm, "torch_is_faster", lambda *_: True)
            with pvk.backend("auto"):
                for _ in range(2):
                    assert_close(forward(model, picture).double(), expected, tolerance)
                assert "pvk::conv2d" not in operators(model, picture)
            monkeypatch.undo()


def test_layers_in_one_dimension_and_linear_layers():
    model = nn.Sequential(
        *(nn.Conv1d(4, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 1), nn.SiLU(), nn.Flatten()),
        *(nn.Linear(88, 6), nn.GELU(), nn.Dropout(), nn.Linear(6, 6), nn.ReLU6(), nn.Linear(6, 2), nn.Sigmoid()),
    )
    model, rows = randomized(model), torch.randn(3, 4, 11, dtype=torch.float64)
    expected = forward(model, rows)
    pvk.convert(model, fuse=True)
    assert_close(forward(model, rows), expected)
    calls = operators(model, rows)
    assert calls.count("pvk::conv2d") == 2
    assert calls.count("pvk::linear") == 3
    assert not {"aten::relu", "aten::gelu", "aten::silu", "aten::sigmoid", "aten::hardtanh"} & set(calls)


def test_a_layer_with_an_activation_of_its_own_takes_what_may_follow():
    layer = pvk.nn.Conv2d(3, 4, 3, activation="relu")
    model = randomized(
        nn.Sequential(layer, nn.MaxPool2d(2), pvk.nn.Conv2d(4, 4, 1, activation="silu"), nn.BatchNorm2d(4))
    )
    picture = torch.randn(1, 3, 9, 9, dtype=torch.float64)
    expected = forward(model, picture)
    pvk.convert(model, fuse=True)
    assert_close(forward(model, picture), expected)
    fused = {entry.name: entry.fused for entry in pvk.conversion_report(model) if entry.fused}
    assert fused == {"0": ("1",)}


def test_unbatched_and_empty_pictures():
    model, picture = block()
    stock = pvk.revert(copy.deepcopy(model))
    assert_close(forward(model, picture[:1]), forward(stock, picture[:1]))
    assert forward(model, picture[:0]).shape == (0, 3)
    pooling = randomized(nn.Sequential(nn.Conv2d(16, 4, 3), nn.ReLU(), nn.MaxPool2d(2)))
    expected = forward(pooling, picture[0])
    assert_close(forward(pvk.convert(pooling, fuse=True), picture[0]), expected)


def test_other_dtypes_subclasses_and_modes_take_the_stock_forward():
    model, picture = block()
    stock = pvk.revert(copy.deepcopy(model))
    forward(model, picture)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(forward(model.float(), picture.float()), forward(stock.float(), picture.float()))
    model.double(), stock.double()
    with torch.no_grad():
        many = torch.stack([picture, picture * 2])
        assert_close(torch.vmap(model)(many), torch.vmap(stock)(many))
        with pvk.backend("torch"):
            assert not [call for call in operators(model, picture) if call.startswith("pvk::")]
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert_close(compiled(picture), stock(picture))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # that jit.trace is deprecated
            traced = torch.jit.trace(model, picture)
        with torch.no_grad():
            model.conv1.weight.mul_(2), stock.conv1.weight.mul_(2)
        assert_close(traced(picture), stock(picture))
        graph = torch.fx.symbolic_trace(model)
        assert_close(graph(picture), stock(picture))
