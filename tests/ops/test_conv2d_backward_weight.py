"""The gradient of conv2d with respect to its weight on CUDA, emulated, against float64 by the library's rule."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from pyvision_kernels import _simt
from pyvision_kernels.ops.conv2d.algorithm import DIRECT, TF32
from pyvision_kernels.ops.conv2d.backward import backward_input_op, backward_weight_op
from pyvision_kernels.ops.conv2d.geometry import Geometry
from tests.conftest import SEEDS
from tests.convolutions import in_layout, within_the_rule

pytestmark = [pytest.mark.simt, pytest.mark.usefixtures("emulator")]

# name -> (size of the input, outputs, taps, options)
PROBLEMS = {
    "vectors": ((2, 24, 9, 7), 40, (3, 3), {"padding": 1}),  # a tile that is not full; taps within a tile
    "tiles": ((1, 136, 6, 5), 136, (1, 1), {}),  # more than a large tile each way
    "parts": ((3, 8, 25, 23), 16, (3, 3), {"padding": 1}),  # pixels of three parts, the last one short
    "odd": ((2, 13, 8, 11), 9, (3, 2), {"padding": (2, 0, 1, 3)}),
    "outputs_alone": ((1, 5, 7, 9), 16, (3, 3), {"padding": 1}),  # vectors of grad_output, none of the input
    "first_layer": ((1, 3, 21, 18), 16, (7, 7), {"stride": 2, "padding": 3}),
    "strided": ((2, 16, 11, 12), 24, (3, 3), {"stride": (2, 3), "padding": 1}),
    "dilated": ((1, 16, 12, 13), 8, (3, 3), {"dilation": (2, 3), "padding": 2}),
    "grouped": ((2, 32, 7, 6), 48, (3, 3), {"groups": 2, "padding": 1}),
    "many_groups": ((1, 12, 7, 8), 18, (3, 3), {"groups": 6, "padding": 1}),
}
every_problem = pytest.mark.parametrize("name", PROBLEMS)


def _problem(name, dtype, layout="channels_last"):
    size, outputs, taps, options = PROBLEMS[name]
    options = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, **options}
    geometry = Geometry.of(*options.values(), "zeros", taps)
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(size, generator=generator).to(dtype)
    g = torch.randn(size[0], outputs, *geometry.output_size(size[2:], taps), generator=generator).to(dtype)
    return in_layout(g, layout), in_layout(x, layout), geometry, list(taps)


def _ours(g, x, geometry, taps, seed=SEEDS[-1], channels_last=False, kernel=DIRECT):
    with _simt.emulated(int(seed), global_races=True):
        return backward_weight_op(g, x, geometry.numbers, taps, channels_last, kernel)


def _expected(g, x, geometry, taps):
    weight = x.new_empty(g.shape[1], x.shape[1] // geometry.groups, *taps)
    return torch.ops.aten.convolution_backward(
        *(g, F.pad(x, geometry.padding), weight, None, geometry.stride, (0, 0), geometry.dilation),
        *(False, (0, 0), geometry.groups, (False, True, False)),
    )[1]


@every_problem
@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "window"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_at_most_twice_pytorchs(name, layout, dtype):
    given = _problem(name, dtype, layout)
    exact = _expected(given[0].double(), given[1].double(), *given[2:])
    within_the_rule(_ours(*given), exact, _expected(*given))


@every_problem
@pytest.mark.parametrize("layout", ["channels_last", "contiguous", "window"])
def test_sums_that_float64_holds_exactly_are_exact(name, layout):
    g, x, *rest = _problem(name, torch.float64, layout)
    g, x = (g * 8).round() / 8, (x * 8).round() / 8
    assert torch.equal(_ours(g, x, *rest), _expected(g, x, *rest))


@every_problem
def test_tf32_rounds_factors_and_nothing_else(name):
    g, x, geometry, taps = _problem(name, torch.float32)
    ours = _ours(g, x, geometry, taps, kernel=TF32)
    # To the nearest of 10 fraction bits, ties away from zero.
    g, x = (((tensor.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for tensor in (g, x))
    exact = _expected(g.double(), x.double(), geometry, taps)
    within_the_rule(ours, exact, _expected(g, x, geometry, taps))


@pytest.mark.parametrize("name", ["parts", "odd", "tiles"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_schedule_and_layout_of_the_result_gives_the_same_bits(name, dtype):
    given = _problem(name, dtype)
    expected = _ours(*given)
    for seed in (*SEEDS, 5):
        for last in (False, True):
            ours = _ours(*given, seed=seed, channels_last=last)
            assert torch.equal(ours, expected)
            layout = torch.channels_last if last else torch.contiguous_format
            assert ours.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("name", ["vectors", "odd", "first_layer"])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_a_value_that_is_not_finite_stays_with_the_taps_that_read_it(name, layout):
    g, x, geometry, taps = _problem(name, torch.bfloat16, layout)
    x[0, 1, 0, 0] = float("inf")  # in the corner: some taps never reach it
    ours = _ours(g, x, geometry, taps)
    expected = _expected(g.double(), x.double(), geometry, taps)
    assert torch.equal(ours.isfinite(), expected.isfinite())
    assert ours.isfinite().any()


def test_no_images_give_zeros_and_no_channels_nothing():
    geometry = Geometry.of(1, 1, 1, 1, "zeros", (3, 3))
    g, x = torch.ones(0, 8, 5, 5), torch.ones(0, 16, 5, 5)
    assert torch.equal(_ours(g, x, geometry, [3, 3]), torch.zeros(8, 16, 3, 3))
    assert _ours(torch.ones(2, 8, 5, 5), torch.ones(2, 0, 5, 5), geometry, [3, 3]).shape == (8, 0, 3, 3)


def test_gradients_of_the_gradient():
    geometry = Geometry.of((2, 1), (1, 0), 1, 2, "zeros", (3, 2))
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    g = torch.randn(2, 6, *geometry.output_size((5, 6), (3, 2)), dtype=torch.float64, requires_grad=True)
    with _simt.emulated():
        assert torch.autograd.gradcheck(
            lambda g, x: backward_weight_op(g, x, geometry.numbers, [3, 2], False, DIRECT), (g, x)
        )


@pytest.mark.parametrize(
    ("g", "x", "message"),
    [
        ((1, 8, 5, 5), (1, 16, 7), "expected input to have 4 dimensions"),
        ((1, 8, 5, 6), (1, 16, 7, 7), "expected grad_output to have size"),
        ((1, 9, 5, 5), (1, 16, 7, 7), "multiples of groups 2"),
    ],
)
def test_bad_input_raises_the_projects_words(g, x, message):
    geometry = Geometry.of(1, 0, 1, 2, "zeros", (3, 3))
    with pytest.raises(RuntimeError, match=message), _simt.emulated():
        backward_weight_op(torch.ones(g), torch.ones(x), geometry.numbers, [3, 3], False, DIRECT)


def test_autocast_casts_the_tensors_of_both_gradients():
    g, x, geometry, taps = _problem("vectors", torch.float32)
    w = torch.randn(g.shape[1], x.shape[1], *taps)
    with _simt.emulated(), torch.autocast("cpu", torch.bfloat16):
        by_weight = backward_weight_op(g, x, geometry.numbers, taps, False, DIRECT)
        by_input = backward_input_op(g, w, None, geometry.numbers, list(x.shape[2:]), 0, False, DIRECT)
    assert by_weight.dtype == by_input.dtype == torch.bfloat16
    assert torch.equal(by_weight, _ours(g.bfloat16(), x.bfloat16(), geometry, taps))
