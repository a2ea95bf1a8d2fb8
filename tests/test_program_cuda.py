"""Stretches of a fused forward as one launch on CUDA: what they compute, which fit, and wrong code."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import pyvision_kernels as pvk
from pyvision_kernels import _simt
from pyvision_kernels.convert import chain, program
from pyvision_kernels.convert.fuse import plan_of

UNIT = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def on_the_emulator(test):
    return pytest.mark.simt(pytest.mark.usefixtures("emulator")(test))


class _Strided(nn.Sequential):
    """Strides, dilation, taps that are not square, a batch norm; channels of no multiple; ends as a map."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(5, 20, (3, 5), stride=(2, 1), padding=(2, 1), bias=False),
            nn.BatchNorm2d(20),
            nn.SiLU(),
            nn.Conv2d(20, 33, 3, dilation=2, padding=1),
            nn.Hardswish(),
            nn.Conv2d(33, 7, 2, padding="same"),
            nn.Sigmoid(),
            nn.MaxPool2d(2),
        )


class _Flat(nn.Sequential):
    """Begins with channels beyond one tile, pools odd sizes, ends flattened."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(19, 17, 3), nn.GELU(), nn.MaxPool2d(2), nn.Conv2d(17, 6, 1), nn.ReLU6(), nn.Flatten()
        )


class _Rows(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(37, 50), nn.ReLU(), nn.Linear(50, 21, bias=False), nn.SiLU())


class _FromMaps(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(6 * 5 * 3, 18), nn.ReLU(), nn.Linear(18, 3))


class _Large(nn.Sequential):
    """Every warp has tiles of the largest size, the last of which is not whole."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 40, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(40, 24, 1), nn.ReLU())


class _Wide(nn.Sequential):
    """Maps of which one image, or two, fill a multiprocessor: blocks without clusters."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 2, stride=30), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))


MODELS = {
    "cnn": (pvk.models.CNN, (1, 3, 24, 24)),
    "cnn of odd size": (lambda: pvk.models.CNN(num_classes=19, image_size=13), (5, 3, 13, 13)),
    "strided": (_Strided, (2, 5, 11, 14)),
    "flat": (_Flat, (3, 19, 9, 7)),
    "rows": (_Rows, (9, 37)),
    "from maps": (_FromMaps, (20, 6, 5, 3)),
    "large": (_Large, (2, 3, 34, 33)),
    "wide": (_Wide, (133, 3, 112, 112)),
}


def _stock(make, dtype=torch.float32):
    torch.manual_seed(0)
    model = make().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 2)
    return model.to(dtype)


def _programs(model):
    return [made for stretch in plan_of(model).stretches for made in stretch.programs.values()]


def _ran_at_once(model):
    programs = _programs(model)
    return len(programs) == 1 and programs[0].code is not None


class _CallByCall(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_graph" not in func.name()
        return func(*args, **(kwargs or {}))


def _check(name, dtype, seed, layout=torch.contiguous_format, device="cpu"):
    make, size = MODELS[name]
    stock = _stock(make, dtype).to(device)
    wide, picture = copy.deepcopy(stock).double(), torch.randn(size).to(device, dtype)
    if len(size) == 4:
        picture = picture.contiguous(memory_format=layout)
    with torch.no_grad():
        exact, theirs = wide(picture.double()), stock(picture)
        with _simt.emulated(seed, global_races=True) if device == "cpu" else contextlib.nullcontext():
            model = pvk.convert(copy.deepcopy(stock), fuse=True)
            ours = model(picture)
            assert _ran_at_once(model)
    assert ours.stride() == theirs.stride()
    allowed = 2 * (theirs - exact).abs().max() + UNIT[dtype] * exact.abs().max()
    assert (ours - exact).abs().max() <= allowed


@on_the_emulator
@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_chain_is_as_exact_as_its_layers(name, dtype):
    _check(name, dtype, seed=1)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize("images", [1, 7, 300])
@pytest.mark.parametrize("name", MODELS)
def test_a_chain_on_a_gpu(name, images, dtype, monkeypatch):
    make, size = MODELS[name]
    monkeypatch.setitem(MODELS, name, (make, (images, *size[1:])))
    _check(name, dtype, seed=0, device="cuda")


@on_the_emulator
@pytest.mark.parametrize("seed", [0, 3])
@pytest.mark.parametrize("name", ["cnn of odd size", "strided", "flat"])
def test_no_schedule_changes_it(name, seed):
    _check(name, torch.bfloat16, seed, torch.channels_last)


@on_the_emulator
@torch.no_grad()
def test_layers_one_by_one_differ_by_rounding():
    stock, picture = _stock(pvk.models.CNN, torch.bfloat16), torch.randn(2, 3, 24, 24, dtype=torch.bfloat16)
    with _simt.emulated(1):
        model = pvk.convert(stock, fuse=True)
        at_once = model(picture)
        with _CallByCall():
            one_by_one = model(picture)
    # Sums in another order round a few values of each map to a neighbour.
    torch.testing.assert_close(at_once, one_by_one, rtol=2.0**-7, atol=2.0**-9)
    # Images do not depend on those beside them.
    with _simt.emulated(1):
        torch.testing.assert_close(model(picture[:1]), at_once[:1], rtol=2.0**-7, atol=2.0**-9)


def _rounded(tensor):
    return ((tensor.float().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@on_the_emulator
@pytest.mark.parametrize("size", [(1, 3, 9, 9), (2, 3, 34, 33)], ids=str)
@torch.no_grad()
def test_tf32_rounds_factors_alone(monkeypatch, size):
    monkeypatch.setattr(program, "_allow_tf32", lambda argument: (True, True))
    stock, picture = _stock(_Large), torch.randn(size)
    first, second = stock[0], stock[3]
    expected = F.conv2d(_rounded(picture).double(), _rounded(first.weight).double(), first.bias.double(), padding=1)
    expected = F.max_pool2d(F.relu(expected), 2).float()
    expected = F.conv2d(_rounded(expected).double(), _rounded(second.weight).double(), second.bias.double())
    expected = F.relu(expected)
    with _simt.emulated(1):
        model = pvk.convert(stock, fuse=True)
        ours = model(picture)
        assert _ran_at_once(model)
    # Where a sum is rounded to the other neighbour, its factor in the next layer may be too: by 2^-10.
    difference = (ours - expected).abs()
    assert difference.max() <= 2.0**-10 * expected.abs().max()
    assert difference.mean() <= 2.0**-17 * expected.abs().max()


@on_the_emulator
@torch.no_grad()
def test_values_that_are_not_finite_stay_where_they_are():
    stock = _stock(_Flat)
    for value in (float("nan"), float("inf"), -float("inf")):
        picture = torch.randn(2, 19, 9, 7)
        picture[1, 1, 4, 4] = value
        with _simt.emulated(1):
            model = pvk.convert(copy.deepcopy(stock), fuse=True)
            ours = model(picture)
            assert _ran_at_once(model)
        torch.testing.assert_close(ours, stock(picture), equal_nan=True)


class _Added(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = F.relu(self.one(x))
        return F.relu(self.other(x) + x)


def _convolutions(*layers):
    return lambda: nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))


@on_the_emulator
@pytest.mark.parametrize(
    ("make", "size", "dtype"),
    [
        (_convolutions(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1, stride=64)), (1, 3, 80, 75), torch.float32),
        (_convolutions(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), (1, 3, 8, 8), torch.float64),
        (_convolutions(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3)), (1, 4, 8, 8), torch.float32),
        (_convolutions(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")), (1, 3, 8, 8), torch.float32),
        (_convolutions(*(nn.Conv2d(3, 3, 1) for _ in range(17))), (1, 3, 4, 4), torch.float32),
        (_convolutions(nn.Linear(1024, 600), nn.Linear(600, 2)), (1, 1024), torch.float32),
        (_convolutions(nn.Conv2d(4, 900, 1), nn.Conv2d(900, 128, 1)), (1, 4, 20, 15), torch.bfloat16),
        (_Added, (1, 3, 8, 8), torch.float32),
    ],
    ids=["maps", "float64", "groups", "padding", "layers", "weights", "products", "addition"],
)
@torch.no_grad()
def test_what_does_not_fit_runs_layer_by_layer(make, size, dtype):
    stock, picture = _stock(make, dtype), torch.randn(size).to(dtype)
    with _simt.emulated(1):
        model = pvk.convert(copy.deepcopy(stock), fuse=True)
        ours = model(picture)
        assert all(made.code is None for made in _programs(model))
    torch.testing.assert_close(ours, stock(picture))


@on_the_emulator
@torch.no_grad()
def test_changes_of_weights_are_seen():
    picture = torch.randn(1, 3, 13, 13)
    with _simt.emulated(1):
        model = pvk.convert(_stock(lambda: pvk.models.CNN(image_size=13)), fuse=True)
        before = model(picture)
        (made,) = _programs(model)
        assert torch.equal(model(picture), before)
        assert _programs(model) == [made]
        model.classifier[3].weight.neg_()
        model.classifier[3].bias.neg_()
        assert torch.equal(model(picture), -before)
        assert _programs(model) != [made]
    model.train()
    with torch.enable_grad(), _simt.emulated(1):
        assert model.eval()(picture).requires_grad


def test_packed_weights_are_in_the_order_of_lanes():
    weight = torch.arange(20 * 3 * 2).reshape(20, 3, 1, 2)
    packed = chain.pack(weight.to(torch.float16)).view(torch.float16).view(2, 1, 8, 4, 2, 2, 2)
    exact = chain.pack(weight.float()).view(torch.float32).view(2, 1, 2, 8, 4, 4)
    for k, c, s in ((0, 0, 0), (9, 2, 1), (17, 1, 0)):
        m, half, g = k // 16, k // 8 % 2, k % 8
        assert packed[m, 0, g, s, c // 2, half, c % 2] == exact[m, 0, half, g, s, c] == weight[k, c, 0, s]
    assert packed.count_nonzero() == exact.count_nonzero() == weight.numel() - 1


def _captured():
    """How a model of each kind calls the operator."""
    calls = []
    with torch.no_grad():
        for name in ("strided", "from maps"):
            make, size = MODELS[name]
            model = pvk.convert(_stock(make), fuse=True)
            (stretch,) = plan_of(model).stretches
            run = stretch.operator
            stretch.operator = lambda *args, run=run: calls.append(args) or run(*args)
            model(torch.randn(1, *size[1:]))
    return calls


@on_the_emulator
@torch.no_grad()
def test_wrong_code_is_an_error():
    with _simt.emulated(0):
        operator, fits = program.graph_op.overload, chain.fits_op.overload
        for inputs, constants, outputs, code in _captured():
            for length in range(len(code)):
                with pytest.raises(RuntimeError):
                    operator(inputs, constants, outputs, code[:length])
                with contextlib.suppress(RuntimeError):  # the first instructions are a chain too
                    assert fits(inputs, constants, code[:length])
            messages = []
            for place in range(len(code)):
                for value in (-7, -1, 50, 2**40, 2**62, -(2**63)):
                    wrong = code.clone()
                    wrong[place] = value
                    try:
                        operator(inputs, constants, outputs, wrong)
                    except RuntimeError as error:
                        messages.append(str(error))
            assert len(messages) > 3 * len(code)
            assert not any("simt:" in message for message in messages)  # no kernel ran wild
            for place in range(len(outputs)):
                if place == 1:  # the layout, in which a map is free
                    continue
                for value in (-1, 50, 2**62):
                    with pytest.raises(RuntimeError, match="expected"):
                        operator(inputs, constants, [*outputs[:place], value, *outputs[place + 1 :]], code)
            for wrong in ([], outputs[:-1], outputs + outputs):
                with pytest.raises(RuntimeError, match="expected"):
                    operator(inputs, constants, wrong, code)
            for wrong in (code.int(), code[None], code.double(), code[:0]):
                with pytest.raises(RuntimeError, match="expected"):
                    operator(inputs, constants, outputs, wrong)
            unaligned = [
                torch.cat([item, item])[1 : 1 + len(item)] if item.dtype == torch.uint8 else item for item in constants
            ]
            for wrong in (constants[::-1], [item[:-1] for item in constants], unaligned):
                with pytest.raises(RuntimeError, match="expected"):
                    operator(inputs, wrong, outputs, code)
            (given,) = inputs
            for wrong in ([given.double()], [given, given], [given[..., :1]], [given.flatten()], []):
                with pytest.raises(RuntimeError, match="expected"):
                    operator(wrong, constants, outputs, code)
