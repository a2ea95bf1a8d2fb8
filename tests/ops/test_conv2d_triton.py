"""The Triton kernels of conv2d on the CPU, by Triton's interpreter, against float64."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional as F

import pyvision_kernels as pvk
from pyvision_kernels import _activation
from pyvision_kernels._op import REGISTRY
from pyvision_kernels.ops.conv2d import algorithm, triton_configs, triton_launch, triton_run
from pyvision_kernels.ops.conv2d import triton as ours
from pyvision_kernels.ops.conv2d.algorithm import DIRECT, TF32
from pyvision_kernels.ops.conv2d.triton_configs import Config

triton = pytest.importorskip("triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SMALL = Config(32, 16, 16, 4, 2)
# Layout and type are chosen apart in the kernels.
DTYPES_OF_LAYOUTS = [(False, DTYPES[0]), (True, DTYPES[0]), (False, DTYPES[1]), (True, DTYPES[2])]
layouts = pytest.mark.parametrize("channels_last", [True, False], ids=["channels_last", "contiguous"])


@pytest.fixture(scope="module")
def interpreted() -> object:
    """The kernels once more, for the interpreter: triton.jit asks which it is where it decorates a function."""
    spec = importlib.util.find_spec("pyvision_kernels.ops.conv2d.triton_kernels")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = triton.knobs.runtime.interpret
    triton.knobs.runtime.interpret = True
    try:
        spec.loader.exec_module(module)
    finally:
        triton.knobs.runtime.interpret = before
    return module


@pytest.fixture
def launched(interpreted, monkeypatch) -> list[triton_launch.Launch]:
    """Runs the operators by the interpreter; what they planned to launch."""
    for name in ("INTERPRETED", "conv2d_kernel", "conv2d_weight_kernel", "conv2d_weight_sum_kernel"):
        monkeypatch.setattr(triton_run, name, getattr(interpreted, name))
    monkeypatch.setattr(triton_run, "plans", {})
    launches: list[triton_launch.Launch] = []

    def record(these, tensors, key):
        launches.extend(these)
        triton_run.run(these, tensors, key)

    monkeypatch.setattr(ours, "run", record)
    return launches


@dataclass(frozen=True)
class Case:
    """boxes: whether forward, gradient of input, gradient of weight read channels_last maps by descriptors."""

    name: str
    sizes: tuple[int, ...]  # N, C, H, W, K, R, S
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)  # left, right, top, bottom
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    boxes: tuple[bool, bool, bool] = (False, False, False)

    @property
    def numbers(self) -> list[int]:
        return [*self.stride, *self.padding, *self.dilation, self.groups, 0]

    def tensors(self, dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Input, weight, gradient of the output."""
        n, c, h, w, k, r, s = self.sizes
        layout = torch.channels_last if channels_last else torch.contiguous_format
        input = torch.randn(n, c, h, w).to(dtype).to(memory_format=layout)
        weight = (torch.randn(k, c // self.groups, r, s) / (c * r * s / self.groups) ** 0.5).to(dtype)
        weight = weight.to(memory_format=layout)
        grad = torch.randn(self.exact(input, weight).shape).to(dtype).to(memory_format=layout)
        return input, weight, grad

    def exact(self, input: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(F.pad(input, self.padding), weight, None, self.stride, 0, self.dilation, self.groups)


CASES = [
    Case("3x3, edges of boxes", (2, 16, 7, 9, 24, 3, 3), padding=(1, 1, 1, 1), boxes=(True, True, True)),
    Case("1x1 is a product", (2, 40, 6, 5, 24, 1, 1), boxes=(True, True, True)),
    Case("stride 2", (2, 16, 15, 16, 24, 3, 3), (2, 2), (1, 1, 1, 1), boxes=(False, True, False)),
    Case("1x1, stride 2: phases of no taps", (2, 16, 15, 16, 16, 1, 1), (2, 2), boxes=(True, True, True)),
    Case("linear", (64, 32, 1, 1, 24, 1, 1), boxes=(True, True, True)),
    Case(
        "strides and dilations of a common factor",
        (1, 16, 11, 13, 16, 3, 2),
        (2, 4),
        (1, 0, 2, 1),
        (2, 2),
        boxes=(False, True, False),
    ),
    Case("dilated, padded on the left only", (1, 16, 8, 16, 16, 2, 3), (1, 1), (4, 0, 0, 1), (1, 2), boxes=(True,) * 3),
    Case("odd channels", (2, 9, 5, 7, 17, 3, 3), padding=(1, 1, 1, 1)),
    Case("groups", (2, 12, 5, 6, 10, 2, 3), (1, 2), (1, 1, 0, 0), (2, 2), groups=2),
    Case("a row of taps", (1, 16, 4, 33, 16, 1, 7), padding=(3, 3, 0, 0), boxes=(True, True, True)),
    Case("taps wholly in the padding", (1, 16, 2, 16, 16, 5, 1), padding=(0, 0, 2, 2), boxes=(True, True, False)),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def close(result: Tensor, exact: Tensor, peer: Tensor) -> None:
    """The library's rule: at most twice the error of PyTorch's kernel, and a unit."""
    assert result.shape == exact.shape
    assert result.dtype == peer.dtype
    largest = exact.abs().max()
    allowed = 2 * (peer.double() - exact).abs().max() + torch.finfo(result.dtype).eps * largest
    assert (result.double() - exact).abs().max() <= allowed


def descriptors(launches: list[triton_launch.Launch]) -> list[bool]:
    return [launch.arguments["DESCRIPTORS"] for launch in launches if "DESCRIPTORS" in launch.arguments]


@every_case
@pytest.mark.parametrize(("channels_last", "dtype"), DTYPES_OF_LAYOUTS)
def test_convolution_and_gradients_equal_float64(case, channels_last, dtype, launched):
    input, weight, grad = case.tensors(dtype, channels_last)
    numbers, (size, taps) = case.numbers, (list(input.shape[2:]), list(weight.shape[2:]))
    results = [
        ours.forward(input, weight, *(None,) * 4, numbers, 0, False, channels_last, DIRECT, SMALL),
        ours.backward_input(grad, weight, None, numbers, size, 0, channels_last, DIRECT, SMALL),
        ours.backward_weight(grad, input, numbers, taps, channels_last, DIRECT, SMALL._replace(parts=3)),
    ]
    found = []
    for kind in (torch.float64, dtype):
        leaves = [tensor.to(kind).requires_grad_() for tensor in (input, weight)]
        output = case.exact(*leaves)
        found.append([output.detach(), *torch.autograd.grad(output, leaves, grad.to(kind))])
    for result, exact, peer in zip(results, *found, strict=True):
        close(result, exact, peer)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert result.is_contiguous(memory_format=layout)
    if channels_last:
        assert tuple(descriptors(launched)) == case.boxes


@pytest.mark.parametrize(
    "case",
    [Case("1x1", (2, 24, 8, 8, 16, 1, 1)), Case("a column of taps", (2, 16, 4, 32, 24, 3, 1), padding=(0, 0, 1, 2))],
    ids=lambda case: case.name,
)
def test_contiguous_maps_are_read_by_descriptors_where_no_tap_shifts_columns(case, launched):
    input, weight, grad = case.tensors(torch.float32, False)
    leaves = [tensor.double().requires_grad_() for tensor in (input, weight)]
    exact = case.exact(*leaves)
    exact_gradients = torch.autograd.grad(exact, leaves, grad.double())
    options = (False, DIRECT, SMALL)
    taps, size = list(weight.shape[2:]), list(input.shape[2:])
    results = (
        ours.forward(input, weight, *(None,) * 4, case.numbers, 0, False, *options),
        ours.backward_input(grad, weight, None, case.numbers, size, 0, *options),
        ours.backward_weight(grad, input, case.numbers, taps, *options),
    )
    for result, expected in zip(results, (exact.detach(), *exact_gradients), strict=True):
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)
    assert descriptors(launched) == [True] * 3


def _fused(activation, input, weight, bias, scale, shift, residual, padding, pool):
    out = F.conv2d(input, weight, bias, padding=padding) * scale.view(-1, 1, 1) + shift.view(-1, 1, 1) + residual
    out = _activation.apply(activation, out)
    return F.max_pool2d(out, 2) if pool else out


@pytest.mark.parametrize("pool", [False, True])
@layouts
@pytest.mark.parametrize("activation", range(1, len(_activation.NAMES)), ids=lambda number: _activation.NAMES[number])
def test_epilogue_equals_float64(activation, channels_last, pool, launched):
    # A size of 7 leaves a row out of the pooled map; what is pooled is read by boxes in channels_last.
    dtype = DTYPES[activation % 3]
    case = Case("", (1, 16, 7, 8, 24, 3, 3), padding=(1, 1, 1, 1))
    input, weight, residual = case.tensors(dtype, channels_last)
    vectors = [torch.randn(24).to(kind) for kind in (dtype, torch.float32, torch.float32)]
    given = (input, weight, *vectors, residual)
    result = ours.forward(*given, case.numbers, activation, pool, channels_last, DIRECT, SMALL)
    exact = _fused(activation, *(tensor.double() for tensor in given), 1, pool)
    close(result, exact, _fused(activation, *(tensor.to(dtype) for tensor in given), 1, pool))
    assert descriptors(launched) == [channels_last]


@layouts
def test_nan_wins_the_pool_and_passes_the_activation(channels_last, launched):
    case = Case("", (1, 16, 8, 8, 16, 1, 1))
    input, weight, _ = case.tensors(torch.float32, channels_last)
    input[0, 3, 2, 5] = float("nan")
    result = ours.forward(input, weight, *(None,) * 4, case.numbers, 1, True, channels_last, DIRECT, SMALL)
    expected = F.max_pool2d(F.relu(case.exact(input, weight)), 2)
    assert torch.equal(result.isnan(), expected.isnan())
    assert expected.isnan().sum() == 16


def test_infinity_in_the_map_reaches_no_tap_that_does_not_read_it(launched):
    # Boxes of the gradient of the weight, of 8 columns, go over its 7: the first column of taps reads 0 to 6.
    case = Case("", (1, 16, 9, 9, 16, 3, 3))
    input, weight, grad = case.tensors(torch.float32, True)
    input[..., 7] = float("inf")
    grad = grad.abs()
    result = ours.backward_weight(grad, input, case.numbers, [3, 3], True, DIRECT, SMALL)
    exact = torch.nn.grad.conv2d_weight(input, list(weight.shape), grad)
    assert torch.equal(result.isfinite(), exact.isfinite())
    assert 0 < result.isfinite().sum() < result.numel()
    assert descriptors(launched) == [True]


@layouts
def test_transposed_convolution_with_bias_and_activation_equals_float64(channels_last, launched):
    case = Case("", (1, 16, 9, 10, 24, 3, 3), (2, 2), (1, 1, 1, 1))
    _, weight, grad = case.tensors(torch.bfloat16, channels_last)
    bias = torch.randn(16)
    result = ours.backward_input(grad, weight, bias, case.numbers, [9, 10], 5, channels_last, DIRECT, SMALL)
    exact, peer = (
        F.gelu(F.conv_transpose2d(grad.to(kind), weight.to(kind), bias.to(kind), 2, 1, (0, 1)))
        for kind in (torch.float64, torch.bfloat16)
    )
    close(result, exact, peer)


def test_a_slice_and_an_expanded_map_are_read_where_they_lie(launched):
    case = Case("", (2, 16, 6, 8, 16, 3, 3), padding=(1, 1, 1, 1))
    _, weight, _ = case.tensors(torch.float32, True)
    whole = torch.randn(2, 24, 8, 8).to(memory_format=torch.channels_last)
    for input in (whole[:, 8:, 1:7], whole[:, 5:21, 1:7], whole[:1, 8:, 1:7].expand(2, -1, -1, -1)):
        result = ours.forward(input, weight, *(None,) * 4, case.numbers, 0, False, True, DIRECT, SMALL)
        close(result, case.exact(input.double(), weight.double()), case.exact(input, weight))
    assert descriptors(launched) == [True, False, False]  # 5 channels on is no multiple of 16 bytes; a stride of 0


def test_a_second_call_runs_the_plan_of_the_first_on_other_tensors(launched):
    case = CASES[0]
    options = (True, DIRECT, SMALL._replace(parts=4))
    for seed in (1, 2):
        torch.manual_seed(seed)
        input, weight, grad = case.tensors(torch.float32, True)
        weight = weight.contiguous()  # turned in each call
        bias, residual = torch.randn(24), torch.randn(2, 24, 7, 9)
        result = ours.forward(input, weight, bias, None, None, residual, case.numbers, 0, False, *options)
        exact = case.exact(input.double(), weight.double()) + bias.view(-1, 1, 1) + residual
        torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-5)
        result = ours.backward_input(grad, weight, None, case.numbers, [7, 9], 0, *options)
        torch.testing.assert_close(result, torch.nn.grad.conv2d_input(input.shape, weight, grad, padding=1))
        result = ours.backward_weight(grad, input, case.numbers, [3, 3], *options)
        torch.testing.assert_close(result, torch.nn.grad.conv2d_weight(input, weight.shape, grad, padding=1))
        assert result.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(result, ours.backward_weight(grad, input, case.numbers, [3, 3], *options))
    kernels = [launch.kernel for launch in launched]
    assert kernels == ["conv2d_kernel", "conv2d_kernel", "conv2d_weight_kernel", "conv2d_weight_sum_kernel"]


def test_explain_names_triton(launched):
    case = Case("", (1, 16, 4, 4, 16, 1, 1))
    input, weight, _ = case.tensors(torch.float32, True)
    given = input, weight, *(None,) * 4, case.numbers, 0, False, True
    lines = pvk.explain(lambda: [ours.forward(*given, kernel, SMALL) for kernel in (DIRECT, TF32)])
    assert [line.partition(": ")[2] for line in lines] == ["pvk triton", "pvk triton tf32"]
    assert all(line.startswith("conv2d [1, 16, 4, 4] * [16, 16, 1, 1]") for line in lines)


def test_a_plan_made_where_one_tensor_was_two_arguments_serves_two(launched):
    case = Case("", (1, 16, 4, 4, 16, 1, 1))
    input, weight, other = case.tensors(torch.float32, True)
    for residual in (input, other):
        result = ours.forward(input, weight, None, None, None, residual, case.numbers, 0, False, True, DIRECT, SMALL)
        torch.testing.assert_close(result, case.exact(input, weight) + residual)
    assert len(launched) == 1


@layouts
def test_offsets_of_64_bits_give_the_same(channels_last, launched, monkeypatch):
    case = CASES[0]
    input, weight, grad = case.tensors(torch.float32, channels_last)
    input, grad = input[:, :, :6, :], grad[:, :, :6, :]
    if channels_last:  # by pointers
        input, weight = input[:, 1:], weight[:, 1:]
    run = ours.run

    def widen(launches, tensors, key):
        run(
            [
                launch._replace(arguments=launch.arguments | {"WIDE": True}) if "WIDE" in launch.arguments else launch
                for launch in launches
            ],
            tensors,
            key,
        )

    def compute():
        triton_run.plans.clear()
        return (
            ours.forward(input, weight, None, None, None, grad, case.numbers, 0, False, channels_last, DIRECT, SMALL),
            ours.backward_input(grad, weight, None, case.numbers, [6, 9], 0, channels_last, DIRECT, SMALL),
            ours.backward_weight(grad, input, case.numbers, [3, 3], channels_last, DIRECT, SMALL),
        )

    plain = compute()
    monkeypatch.setattr(ours, "run", widen)
    assert all(map(torch.equal, plain, compute()))
    assert [launch.arguments["WIDE"] for launch in launched] == [False] * 3 + [True] * 3
    assert not any(descriptors(launched)[::3])


def test_gradients_of_gradients_are_by_the_same_kernels(launched):
    case = Case("", (1, 4, 5, 4, 3, 2, 2), (2, 1), (1, 0, 0, 1))
    input, weight, _ = (tensor.detach().requires_grad_() for tensor in case.tensors(torch.float32, False))
    bias = torch.randn(3, requires_grad=True)
    stock = [tensor.detach().double().requires_grad_() for tensor in (input, weight, bias)]
    out = ours.forward(input, weight, bias, *(None,) * 3, case.numbers, 4, False, False, DIRECT, None)
    exact = F.silu(case.exact(*stock[:2]) + stock[2].view(-1, 1, 1))
    first, first_exact = (
        torch.autograd.grad(result.square().sum(), leaves, create_graph=True)
        for result, leaves in ((out, (input, weight, bias)), (exact, stock))
    )
    for result, expected in zip(first, first_exact, strict=True):
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)
    second, second_exact = (
        torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves)
        for grads, leaves in ((first, (input, weight, bias)), (first_exact, stock))
    )
    for result, expected in zip(second, second_exact, strict=True):
        torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-4)
    kernels = {launch.kernel: launch.arguments.get("TRANSPOSED") for launch in launched}
    assert set(kernels) == {"conv2d_kernel", "conv2d_weight_kernel"}


def test_autocast_and_vmap(launched):
    case = Case("", (2, 8, 4, 4, 8, 1, 1))
    input, weight, _ = case.tensors(torch.float32, False)

    def convolve(input):
        return ours.forward(input, weight, *(None,) * 4, case.numbers, 0, False, False, DIRECT)

    with torch.autocast("cpu", torch.bfloat16):
        assert convolve(input).dtype == torch.bfloat16
    batch = torch.func.vmap(convolve)(input.unsqueeze(1))
    torch.testing.assert_close(batch[:, 0], convolve(input))


@pytest.mark.parametrize("name", ["_conv2d_triton", "_conv2d_triton_backward_input", "_conv2d_triton_backward_weight"])
def test_operators_hold_their_contract(name, launched):
    case = Case("", (1, 8, 4, 4, 8, 2, 2))
    input, weight, grad = case.tensors(torch.float32, False)
    options = (False, DIRECT, None)
    arguments = {
        "_conv2d_triton": (input, weight, *(None,) * 4, case.numbers, 0, False, *options),
        "_conv2d_triton_backward_input": (grad, weight, None, case.numbers, [4, 4], 0, *options),
        "_conv2d_triton_backward_weight": (grad, input, case.numbers, [2, 2], *options),
    }[name]
    torch.library.opcheck(REGISTRY[name].overload, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("sizes", ["fake", "symbolic"])
def test_a_traced_graph_holds_the_kernels(sizes, monkeypatch):
    monkeypatch.setattr(triton_run, "_machine", lambda index: triton_launch.Machine(90, 132))

    def convolve(input, weight):
        output = ours.forward(input, weight, *(None,) * 4, [1, 1, 1, 1, 1, 1, 1, 1, 1, 0], 1, False, True, DIRECT)
        return output, ours.backward_weight(output, input, [1, 1, 1, 1, 1, 1, 1, 1, 1, 0], [3, 3], True, DIRECT)

    with FakeTensorMode(shape_env=ShapeEnv() if sizes == "symbolic" else None):
        input, weight = (torch.empty(*size, 8, 8, device="cuda") for size in ((64, 32), (32, 32)))
        weight = weight[..., :3, :3].contiguous()
        graph = make_fx(dispatch_functionalize(convolve), tracing_mode=sizes)(input, weight).graph
    calls = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert sum("triton_kernel_wrapper" in call for call in calls) == 3  # the last is the sum of parts
    assert not any("pvk" in call for call in calls)


def test_what_is_not_supported_is_refused_by_name(launched):
    case = CASES[0]
    input, weight, grad = case.tensors(torch.float64, False)
    rest = (case.numbers, 0, False, False, DIRECT)
    with pytest.raises(NotImplementedError, match="_conv2d_triton: expected float16, bfloat16 or float32, but got"):
        ours.forward(input, weight, *(None,) * 4, *rest)
    with pytest.raises(NotImplementedError, match="_conv2d_triton_backward_weight: expected float16"):
        ours.backward_weight(grad, input, case.numbers, [3, 3], False, DIRECT)
    reflected = [*case.numbers[:9], 1]
    with pytest.raises(NotImplementedError, match="expected zero padding"):
        ours.forward(input.float(), weight.float(), *(None,) * 4, reflected, *rest[1:])
    with pytest.raises(RuntimeError, match="expected config to have 5 numbers"):
        ours.conv2d_triton_op(input.float(), weight.float(), *(None,) * 4, *rest, [64, 64])


def test_tensors_on_the_cpu_are_refused():
    case = CASES[0]
    input, weight, _ = case.tensors(torch.float32, False)
    with pytest.raises(NotImplementedError, match="_conv2d_triton: expected tensors on a CUDA device"):
        ours.forward(input, weight, *(None,) * 4, case.numbers, 0, False, False, DIRECT)


def test_without_triton_the_operators_say_what_is_missing(monkeypatch):
    monkeypatch.setattr(triton_run, "MISSING", "ModuleNotFoundError: No module named 'triton'")
    case = CASES[0]
    input, weight, _ = case.tensors(torch.float32, False)
    assert not ours.available()
    with pytest.raises(NotImplementedError, match=r"expected triton to be installed.* No module named 'triton'"):
        ours.forward(input, weight, *(None,) * 4, case.numbers, 0, False, False, DIRECT)


def _problem(dtype=torch.bfloat16, device="cuda", channels=64, groups=1, size=56) -> algorithm.Problem:
    sizes = (8, channels, size, size, channels, 3, 3, size, size)
    return algorithm.Problem(*sizes, (1, 1), (1, 1), groups, dtype, device, True, True)


def test_large_dense_problems_are_supported_and_others_not():
    assert ours.supports(_problem(), False)
    assert ours.supports(_problem(torch.float32), True)
    assert ours.supports(_problem(channels=256, groups=4), False)
    for other in (
        _problem(torch.float64),
        _problem(device="cpu"),
        _problem(channels=16),
        _problem(groups=64),
        _problem(size=7),
    ):
        assert not ours.supports(other, False)


@pytest.mark.parametrize("direction", ["forward", "backward_input", "backward_weight"])
def test_configurations_are_of_the_architecture_and_start_with_the_default(direction):
    for arch in (80, 86, 90, 100, 120):
        for dtype, precision in ((torch.bfloat16, "ieee"), (torch.float32, "tf32"), (torch.float32, "ieee")):
            found = ours.configs(arch, _problem(dtype), direction, precision)
            assert found[0] in triton_configs.shapes(arch, dtype, precision)["narrow"]
            assert len(set(found)) == len(found) > 1


def test_tf32_is_taken_by_the_algorithm_and_of_float32_only(launched):
    case = Case("", (1, 16, 4, 4, 16, 1, 1))
    for dtype in (torch.float32, torch.bfloat16):
        for kernel in (TF32, DIRECT):
            input, weight, _ = case.tensors(dtype, True)
            ours.forward(input, weight, *(None,) * 4, case.numbers, 0, False, True, kernel)
    assert [launch.arguments["PRECISION"] for launch in launched] == ["tf32", "ieee", "ieee", "ieee"]
