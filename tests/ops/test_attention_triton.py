"""The Triton kernels of attention on the CPU, by Triton's interpreter, against float64."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from pyvision_kernels._op import REGISTRY
from pyvision_kernels.ops.attention import reference
from pyvision_kernels.ops.attention import triton as ours
from pyvision_kernels.ops.attention.triton import Config, attention_triton_op
from pyvision_kernels.ops.conv2d import triton_run
from pyvision_kernels.ops.conv2d.triton_launch import Machine
from tests.errors import assert_as_good

triton = pytest.importorskip("triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def interpreted() -> Iterator[object]:
    """The kernels once more, for the interpreter: triton.jit asks which it is where it decorates a function."""
    spec = importlib.util.find_spec("pyvision_kernels.ops.attention.triton_kernels")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    language = triton.language
    library = {name: getattr(language, name) for name in ("cdiv", "max", "sum", "zeros")}
    before = triton.knobs.runtime.interpret
    triton.knobs.runtime.interpret = True
    try:
        spec.loader.exec_module(module)
        for name, function in library.items():  # which were decorated when Triton was imported
            setattr(language, name, triton.jit(function.fn))
        yield module
    finally:
        triton.knobs.runtime.interpret = before
        for name, function in library.items():
            setattr(language, name, function)


@pytest.fixture
def launched(interpreted, monkeypatch) -> list:
    """Runs the operators by the interpreter, with small tiles; what they launched."""
    monkeypatch.setattr(ours, "triton_kernels", interpreted)
    monkeypatch.setattr(ours, "config_of", lambda *args, **options: Config(16, 16, 4, 1))
    launches: list = []
    run = ours._run

    def record(these, tensor):
        launches.extend(these)
        run(these, tensor)

    monkeypatch.setattr(ours, "_run", record)
    return launches


@dataclass(frozen=True)
class Case:
    name: str
    sizes: tuple[int, ...]  # B, H, L, D
    keys: tuple[int, int]  # G, S
    features: int
    left: int = -1
    right: int = -1
    lengths: tuple[int, ...] | None = None

    def tensors(self, dtype: torch.dtype, offset: int = 0) -> list[Tensor]:
        """query, key, value; offset: rows that much longer in memory, so that no descriptor can be made."""
        B, H, L, D = self.sizes
        sizes = ((B, H, L, D), (B, *self.keys, D), (B, *self.keys, self.features))
        return [torch.randn(*size[:3], size[3] + offset).to(dtype)[..., : size[3]] for size in sizes]

    def exact(self, *rows: Tensor) -> tuple[Tensor, Tensor]:
        ends = (self.left if self.left >= 0 else None, self.right if self.right >= 0 else None)
        lengths = None if self.lengths is None else torch.tensor(self.lengths)
        return reference.attention(*rows, window=ends, scale=0.3, key_lengths=lengths, return_lse=True)


CASES = (
    Case("features in two parts", (1, 2, 40, 72), (2, 50), 80),
    Case("one tile", (1, 1, 5, 16), (1, 9), 16),
    Case("shared keys, odd features", (2, 4, 37, 24), (2, 50), 40),
    Case("causal", (2, 2, 37, 16), (2, 50), 16, right=0),
    Case("a window, rows without a key", (1, 2, 67, 16), (2, 50), 16, left=5, right=3),
    Case("lengths", (2, 1, 20, 16), (1, 33), 16, lengths=(7, 0)),
)


def _run(case: Case, dtype: torch.dtype, offset: int):
    """Outputs and gradients of ours, of PyTorch in the dtype, and in float64."""
    rows = case.tensors(dtype, offset)
    lengths = None if case.lengths is None else torch.tensor(case.lengths)
    double = [one.double().requires_grad_() for one in rows]
    stock = [one.detach().requires_grad_() for one in rows]
    leaves = [one.detach().requires_grad_() for one in rows]
    output, lse = attention_triton_op(*leaves, lengths, 0.3, case.left, case.right)
    exact, sums = case.exact(*double)
    theirs, _ = case.exact(*stock)
    torch.testing.assert_close(lse.double(), sums, rtol=1e-5, atol=1e-5)
    grad, by_sums = torch.randn_like(output), torch.randn_like(lse).masked_fill(lse == -torch.inf, 0)
    finite = sums.masked_fill(sums == -torch.inf, 0)
    found = torch.autograd.grad((output, lse), leaves, (grad, by_sums))
    right = torch.autograd.grad((exact, finite), double, (grad.double(), by_sums.double()))
    plain = torch.autograd.grad(theirs, stock, grad)
    return (output, *found), (theirs, *plain), (exact, *right)


@pytest.mark.parametrize("offset", [0, 1], ids=["described", "by pointers"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float32_against_float64(case, offset, launched):
    for index, (found, _, exact) in enumerate(zip(*_run(case, torch.float32, offset), strict=True)):
        torch.testing.assert_close(
            found.double(), exact, rtol=2e-5, atol=2e-6 * exact.abs().max().item(), msg=str(index)
        )
    assert launched[0].arguments["DESCRIPTORS"] is (offset == 0)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda dtype: str(dtype)[6:])
def test_16_bits_are_as_exact_as_pytorchs(dtype, launched):
    rows = [torch.randn(2, 2, 40, 32).to(dtype) for _ in range(3)]
    grad = torch.randn(2, 2, 40, 32).to(dtype)
    results = []
    for function, convert in (
        (lambda *x: attention_triton_op(*x, None, 32**-0.5, -1, -1)[0], lambda x: x),
        (F.scaled_dot_product_attention, lambda x: x),
        (F.scaled_dot_product_attention, torch.Tensor.double),
    ):
        leaves = [convert(one).detach().requires_grad_() for one in rows]
        output = function(*leaves)
        results.append((output.detach(), *torch.autograd.grad(output, leaves, convert(grad))))
    assert_as_good(*results)


def test_padding_that_is_not_finite_is_not_looked_at(launched):
    query, key, value = (torch.randn(2, 1, 20, 16) for _ in range(3))
    key[:, :, 9:], value[:, :, 9:] = torch.nan, torch.inf
    leaves = [one.requires_grad_() for one in (query, key, value)]
    output, _ = attention_triton_op(*leaves, torch.tensor([9, 9]), 0.3, -1, -1)
    grads = torch.autograd.grad(output.sum(), leaves)
    assert all(tensor.isfinite().all() for tensor in (output, *grads))
    assert (grads[1][:, :, 9:] == 0).all()


def test_gradients_of_gradients_autocast_and_vmap(launched):
    rows = [torch.randn(2, 1, 6, 16) for _ in range(3)]
    leaves = [one.requires_grad_() for one in rows]
    double = [one.detach().double().requires_grad_() for one in rows]
    seconds = []
    for function, given in (
        (lambda *x: attention_triton_op(*x, None, 0.25, -1, -1)[0], leaves),
        (lambda *x: reference.attention(*x, scale=0.25), double),
    ):
        first = torch.autograd.grad(function(*given).square().sum(), given, create_graph=True)
        seconds.append(torch.autograd.grad(sum(one.square().sum() for one in first), given))
    for found, exact in zip(*seconds, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention_triton_op(*rows, None, 0.25, -1, -1)[0].dtype == torch.bfloat16
    batch = [torch.randn(3, 2, 1, 6, 16) for _ in range(3)]
    found = torch.vmap(lambda *x: attention_triton_op(*x, None, 0.25, -1, -1)[0])(*batch)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(*batch))


def test_operators_hold_their_contract(launched):
    rows = [torch.randn(1, 2, 9, 16).transpose(1, 2).contiguous().transpose(1, 2) for _ in range(3)]
    output, lse = attention_triton_op(*rows, None, 0.25, -1, -1)
    checks = ("test_schema", "test_faketensor")
    forward, backward = (REGISTRY[name].overload for name in ("_attention_triton", "_attention_triton_backward"))
    torch.library.opcheck(forward, (*rows, None, 0.25, -1, -1), test_utils=checks)
    given = (torch.randn_like(output), None, *rows, None, output, lse, 0.25, -1, -1)
    torch.library.opcheck(backward, given, test_utils=checks)


def test_a_traced_graph_holds_the_kernels(monkeypatch):
    monkeypatch.setattr(triton_run, "_machine", lambda index: Machine(90, 132))

    def attend(query, key, value):
        output, lse = attention_triton_op(query, key, value, None, 0.125, -1, 0)
        backward = REGISTRY["_attention_triton_backward"]
        return backward(output, None, query, key, value, None, output, lse, 0.125, -1, 0)

    with FakeTensorMode():
        rows = [torch.empty(2, 4, 600, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        graph = make_fx(dispatch_functionalize(attend), tracing_mode="fake")(*rows).graph
    calls = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert sum("triton_kernel_wrapper" in call for call in calls) == 4
    assert not any("pvk" in call for call in calls)


def test_features_are_cut_in_two_where_that_is_less():
    assert ours.parts_of(72, False) == (128, 0)
    assert [ours.parts_of(features, True) for features in (1, 16, 17, 40, 64, 72, 80, 96, 100, 128, 160, 256)] == [
        *((16, 0), (16, 0), (32, 0), (32, 16), (64, 0), (64, 16), (64, 16), (64, 32), (128, 0), (128, 0)),
        *((128, 32), (256, 0)),
    ]


def test_long_calls_by_tensor_cores_are_supported_and_others_not():
    with FakeTensorMode():
        rows = [torch.empty(2, 4, 600, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        assert ours.supports(*rows, None, 0.0)
        assert not ours.supports(*(one.float() for one in rows), None, 0.0)
        assert not ours.supports(*rows, rows[0], 0.0)
        assert not ours.supports(*rows, None, 0.1)
        assert not ours.supports(*(one[:, :, :300] for one in rows), None, 0.0)
        assert not ours.supports(*(one.cpu() for one in rows), None, 0.0)


def test_without_triton_or_a_gpu_the_operator_says_so(monkeypatch):
    rows = [torch.randn(1, 1, 4, 16) for _ in range(3)]
    with pytest.raises(NotImplementedError, match="_attention_triton: expected tensors on a CUDA device"):
        attention_triton_op(*rows, None, 0.25, -1, -1)
    monkeypatch.setattr(ours, "MISSING", "ModuleNotFoundError: No module named 'triton'")
    assert not ours.available()
    with pytest.raises(NotImplementedError, match=r"expected triton to be installed.* No module named 'triton'"):
        attention_triton_op(*rows, None, 0.25, -1, -1)
