"""Stretches of a fused forward as one operator: what they compute, when they are out of date, and wrong code."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import pyvision_kernels as pvk
from pyvision_kernels._extension import cpu_capabilities, force_cpu_capability
from pyvision_kernels.convert import program
from pyvision_kernels.convert.fuse import plan_of

UNIT = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


class Everything(nn.Module):
    """Every instruction, and every way to write it."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 20, 3, padding=1)
        self.before = nn.BatchNorm2d(20)
        self.wide = nn.Conv2d(20, 33, 1)
        self.norm = nn.BatchNorm2d(33)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.squeeze = nn.AdaptiveAvgPool2d(1)
        self.down = nn.Conv2d(33, 5, 1)
        self.up = nn.Conv2d(5, 33, 1)
        self.gate = nn.Hardsigmoid()
        self.depthwise = nn.Conv2d(33, 33, 3, padding=1, groups=33, bias=False)
        self.last = nn.Conv2d(53, 7, 3, stride=2)
        self.flat = nn.Flatten()
        self.hidden = nn.Linear(7, 9)
        self.gated = nn.Linear(18, 6)
        self.out = nn.Linear(6, 4)

    def forward(self, x):
        first = F.max_pool2d(F.silu(self.first(x)), (2, 3), (2, 1), (1, 0))
        x = self.norm(self.wide(F.relu(self.before(first))))
        kept = x
        x = self.pool(x)
        x = self.gate(self.up(F.relu(self.down(self.squeeze(x))))) * x
        x = self.depthwise(x) + x
        x = x * torch.sigmoid(x.mean((2, 3), keepdim=True))
        small = F.adaptive_avg_pool2d(kept, 1) * F.hardsigmoid(x)
        x = torch.cat([small, first[:, :, ::2, ::2][:, :, : x.shape[2], : x.shape[3]]], 1)
        x = F.hardswish(F.gelu(self.last(x)))
        mean = self.flat(x.mean([-2, -1], keepdim=True))
        x = torch.flatten(F.adaptive_max_pool2d(x, 1), 1) + mean
        x = self.hidden(x)
        x = self.gated(torch.cat([x, F.silu(x)], 1))
        return self.out(x * F.hardsigmoid(torch.sigmoid(x))), kept


def _model(make=Everything, dtype=torch.float32, convert=True):
    torch.manual_seed(0)
    model = make().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.5, 2)
    return pvk.convert(model.to(dtype), fuse=True) if convert else model.to(dtype)


def _stretches(model):
    return [value for value in plan_of(model).function.__globals__.values() if isinstance(value, program.Stretch)]


class _CallByCall(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not program.graph_op.overload
        return func(*args, **(kwargs or {}))


def _layout(picture, layout):
    if layout == "strided":
        return torch.stack([picture, picture], -1)[..., 1]
    return picture.contiguous(memory_format=getattr(torch, layout))


@pytest.mark.parametrize("layout", ["contiguous_format", "channels_last", "strided"])
@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize("capability", cpu_capabilities())
@torch.no_grad()
def test_a_stretch_computes_what_its_calls_do(capability, dtype, layout):
    with force_cpu_capability(capability), pvk.strict_numerics():
        stock, model = _model(convert=False, dtype=dtype), _model(dtype=dtype)
        wide = copy.deepcopy(stock).double()
        units = 8 if dtype == torch.float64 else 1  # there PyTorch's own is what ours is measured by
        for size in ((2, 3, 19, 26), (1, 3, 12, 12)):
            picture = _layout(torch.randn(size).to(dtype), layout)
            with _CallByCall():
                one_by_one = model(picture)
            for ours, calls, theirs, exact in zip(
                model(picture), one_by_one, stock(picture), wide(picture.double()), strict=True
            ):
                assert ours.shape == calls.shape
                assert ours.stride() == calls.stride()
                allowed = 2 * (theirs - exact).abs().max() + units * UNIT[dtype] * exact.abs().max()
                assert (ours - exact).abs().max() <= allowed
    stretches = _stretches(model)
    kinds = {item.kind for stretch in stretches for item in stretch.instructions}
    assert kinds == set(range(10))
    assert all(made.code is not None for stretch in stretches for made in stretch.programs.values())


@torch.no_grad()
def test_values_that_are_not_finite_pass():
    class Model(nn.Sequential):
        def __init__(self):
            super().__init__(
                nn.Conv2d(3, 24, 1),
                nn.BatchNorm2d(24),
                nn.MaxPool2d(3, 2, 1),
                nn.AdaptiveAvgPool2d(1),
                nn.Hardsigmoid(),
            )

    model = _model(Model)
    for value in (float("nan"), float("inf"), -float("inf")):
        picture = torch.randn(2, 3, 9, 9)
        picture[1, 1, 4, 4] = value
        with _CallByCall():
            expected = model(picture)
        torch.testing.assert_close(model(picture), expected, equal_nan=True)
    assert all(made.code is not None for made in _stretches(model)[0].programs.values())


@torch.no_grad()
def test_results_are_memory_of_their_own():
    model = pvk.convert(pvk.models.CNN().eval(), fuse=True)
    one, other = torch.randn(2, 1, 3, 24, 24)
    first = model(one)
    kept = first.clone()
    second = model(other)
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)
    assert torch.equal(model(one), kept)


@torch.no_grad()
def test_sizes_without_instructions_run_call_by_call():
    model = _model()
    with pytest.raises(RuntimeError, match="expected input"):
        model(torch.randn(1, 4, 12, 12))
    model = pvk.convert(pvk.models.CNN().eval(), fuse=True)
    assert model(torch.randn(0, 3, 24, 24)).shape == (0, 10)
    with pytest.raises(RuntimeError, match="expected input"):
        model(torch.randn(1, 3, 30, 30))
    assert model(torch.randn(5, 3, 24, 24)).shape == (5, 10)


@torch.no_grad()
def test_results_that_nobody_reads():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 4, 1)

        def forward(self, x):
            left = F.relu(self.one(x))
            torch.flatten(left, 1)
            y = x + 1
            F.relu(self.other(y)).mean((2, 3), keepdim=True)
            return left, y

    model, picture = _model(Model), torch.randn(1, 3, 8, 8)
    left, right = model(picture)
    torch.testing.assert_close(left, F.relu(F.conv2d(picture, model.one.weight, model.one.bias)))
    assert torch.equal(right, picture + 1)


class _Scaled(nn.Module):
    """A stretch that begins with a product, of whatever `factor` makes of the picture."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor
        self.one, self.other = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return F.relu(self.other(F.relu(self.one(self.factor(x) * x))))


@pytest.mark.parametrize("factor", [lambda x: x.size(1), lambda x: x.shape[-1] ** -0.5], ids=["int", "float"])
@torch.no_grad()
def test_factors_that_are_numbers(factor):
    model, picture = _model(lambda: _Scaled(factor)), torch.randn(1, 3, 8, 8)
    with _CallByCall():
        expected = model(picture)
    torch.testing.assert_close(model(picture), expected)


@pytest.mark.parametrize(
    "write",
    [lambda x: F.hardsigmoid(x, True), lambda x: F.relu(x, inplace=True), torch.sigmoid_],
    ids=["positional", "named", "underscore"],
)
@torch.no_grad()
def test_what_is_written_over_is_no_instruction(write):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            x = self.one(x)
            y = self.other(x)
            write(y)
            return F.relu(x) * y

    stock, model, picture = _model(Model, convert=False), _model(Model), torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(model(picture), stock(picture))


@torch.no_grad()
def test_a_write_while_a_program_is_made(monkeypatch):
    model, picture = _model(lambda: _Scaled(lambda x: x + 1)), torch.randn(1, 3, 8, 8)
    assemble = program._Assembler.assemble

    def written_after(*args):
        code = assemble(*args)
        model.one.weight.data.mul_(2)
        model.one.repack()
        return code

    with monkeypatch.context() as context:
        context.setattr(program._Assembler, "assemble", written_after)
        model(picture)
    with _CallByCall():
        expected = model(picture)
    torch.testing.assert_close(model(picture), expected)


@torch.no_grad()
def test_what_is_out_of_date_is_not_kept():
    model = _model()
    for side in (12, 13, 14):
        model(torch.randn(1, 3, side, side))
    first = _stretches(model)[0]
    assert len(first.programs) == 3
    model.down.weight.mul_(2)
    model(torch.randn(1, 3, 12, 12))
    assert len(first.programs) == 1
    model.eval()
    assert not first.programs


@torch.no_grad()
def test_threads_share_a_model():
    model = pvk.convert(pvk.models.CNN().eval(), fuse=True)
    pictures = [torch.randn(batch, 3, 24, 24) for batch in (1, 2, 3, 4)]
    expected = [model(picture) for picture in pictures]
    wrong = []

    def call(index):
        with torch.no_grad():
            for _ in range(30):
                if not torch.equal(model(pictures[index]), expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=call, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
def test_a_profiler_sees_each_layer():
    model = pvk.convert(pvk.models.CNN().eval(), fuse=True)
    picture = torch.randn(1, 3, 24, 24)
    model(picture)
    with torch.profiler.profile(acc_events=True) as profile:
        model(picture)
    names = [event.name for event in profile.events()]
    assert names.count("pvk::conv2d") == 2
    assert "pvk::_graph" not in names


@torch.no_grad()
def test_a_program_is_made_once():
    model = _model()
    picture = torch.randn(1, 3, 12, 12)
    model(picture)
    before = [dict(stretch.programs) for stretch in _stretches(model)]
    model(picture)
    assert [stretch.programs for stretch in _stretches(model)] == before
    model.down.weight.mul_(2)
    model(picture)
    after = [stretch.programs for stretch in _stretches(model)]
    assert after != before


def _captured():
    """A model's stretch as the operator is called."""
    model, picture = _model(), torch.randn(1, 3, 12, 12)
    calls = []
    with torch.no_grad():
        for stretch in _stretches(model):
            run = stretch.operator
            stretch.operator = lambda *args, run=run: calls.append(args) or run(*args)
        model(picture)
    return calls


def test_opcheck():
    for inputs, constants, *rest in _captured():
        torch.library.opcheck(program.graph_op.overload, (inputs, [item.detach() for item in constants], *rest))


_WRONG = (-7, -1, 50, 2**40, 2**62, -(2**63))


@torch.no_grad()
def test_wrong_code_is_an_error():
    operator = program.graph_op.overload
    for inputs, constants, outputs, code in _captured():
        for length in range(len(code)):
            with pytest.raises(RuntimeError):
                operator(inputs, constants, outputs, code[:length])
        refused = 0
        for place in range(len(code)):
            for value in _WRONG:
                wrong = code.clone()
                wrong[place] = value
                try:
                    operator(inputs, constants, outputs, wrong)
                except RuntimeError:
                    refused += 1
        assert refused > 3 * len(code)
        for wrong in (code.int(), code[None], torch.stack([code, code], 1)[:, 0], code.double()):
            with pytest.raises(RuntimeError, match="expected code to be int64"):
                operator(inputs, constants, outputs, wrong)
        with pytest.raises(RuntimeError, match="expected"):
            operator(inputs, constants[::-1], outputs, code)
        with pytest.raises(RuntimeError, match="expected"):
            operator([item.double() for item in inputs], constants, outputs, code)
        with pytest.raises(RuntimeError, match="expected"):
            operator([item[..., :1, :1] for item in inputs], constants, outputs, code)
        with pytest.raises(RuntimeError, match="at least one input"):
            operator([], constants, outputs, code)
    huge = torch.zeros(1, 1, 1, 1).expand(2**31, 1, 2**31, 1)
    for kind in (program.MEAN, program.HARDSIGMOID, program.FLATTEN):
        with pytest.raises(RuntimeError, match="expected"):
            operator([huge], [], [1, 1, 4, *huge.shape], torch.tensor([kind, 0, 0]))


@torch.no_grad()
def test_wrong_outputs_are_an_error():
    operator = program.graph_op.overload
    for inputs, constants, outputs, code in _captured():
        begins = [0]
        while begins[-1] < len(outputs):
            begins.append(begins[-1] + 3 + outputs[begins[-1] + 2])
        for length in set(range(len(outputs))) - set(begins):
            with pytest.raises(RuntimeError, match="expected more numbers"):
                operator(inputs, constants, outputs[:length], code)
        for place in range(len(outputs)):
            if place - 1 in begins:  # the layout, which a convolution's map is free in
                continue
            for value in _WRONG:
                with pytest.raises(RuntimeError, match="expected"):
                    operator(inputs, constants, [*outputs[:place], value, *outputs[place + 1 :]], code)
        with pytest.raises(RuntimeError, match="named once"):
            operator(inputs, constants, outputs + outputs, code)
