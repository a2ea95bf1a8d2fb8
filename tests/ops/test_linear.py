"""What is special to linear: rows of any rank, packed weights, gradients."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import pyvision_kernels as pvk
from pyvision_kernels._activation import FUNCTIONS
from pyvision_kernels.ops.linear import linear_op, linear_pack_op

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _normal(*size, dtype=torch.float32):
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("size", [(20,), (2, 3, 20), (2, 0, 20), (1, 1, 1, 20)])
def test_rows_of_any_rank(size, device):
    x, w, b = _normal(*size), _normal(7, 20), _normal(7)
    ours = pvk.ops.linear(x.to(device), w.to(device), b.to(device), activation="relu")
    torch.testing.assert_close(ours.cpu(), F.relu(F.linear(x, w, b)))
    rest = _normal(*size[:-1], 7)
    ours = pvk.ops.linear(x.to(device), w.to(device), residual=rest.to(device))
    torch.testing.assert_close(ours.cpu(), F.linear(x, w) + rest)


def test_a_weight_of_one_output_without_its_dimension():
    x, w, b = _normal(4, 9), _normal(9), torch.tensor(0.5)
    torch.testing.assert_close(pvk.ops.linear(x, w), F.linear(x, w))
    torch.testing.assert_close(pvk.ops.linear(x, w, b), F.linear(x, w) + b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 5, 33])
def test_a_packed_weight_changes_no_bit(rows, dtype, device):
    x, w, b = (
        tensor.to(device)
        for tensor in (_normal(rows, 70, dtype=dtype), _normal(45, 70, dtype=dtype), _normal(45, dtype=dtype))
    )
    packed = linear_pack_op(w)
    assert torch.equal(linear_op(x, w, b, None, packed, 0), linear_op(x, w, b, None, None, 0))
    with pytest.raises(RuntimeError, match="linear: expected packed to be"):
        linear_op(x, w, b, None, torch.cat([packed, packed, packed[:0], packed.new_zeros(1)]), 0)


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_threads_change_no_bit(rows):
    x, w = _normal(rows, 300), _normal(77, 300)
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            runs.append(pvk.ops.linear(x, w))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("activation", [None, *FUNCTIONS])
def test_gradients(activation):
    tensors = [_normal(*size, dtype=torch.float64).requires_grad_() for size in ((3, 5), (4, 5), (4,), (3, 4))]

    def function(x, w, b, residual):
        return pvk.ops.linear(x, w, b, residual=residual, activation=activation)

    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torch_func():
    x, w = _normal(3, 4, 5, dtype=torch.float64), _normal(6, 5, dtype=torch.float64)
    torch.testing.assert_close(torch.vmap(lambda rows: pvk.ops.linear(rows, w))(x), F.linear(x, w))
    ours = torch.func.grad(lambda w: pvk.ops.linear(x[0], w, activation="silu").sum())(w)
    torch.testing.assert_close(ours, torch.func.grad(lambda w: F.silu(F.linear(x[0], w)).sum())(w))


@pytest.mark.parametrize("rows", [1, 20])
def test_values_that_are_not_finite_stay_in_their_rows_and_columns(rows, device):
    x, w = _normal(rows, 40), _normal(30, 40)
    x[0, 3], w[5, 7] = float("nan"), float("inf")
    ours = pvk.ops.linear(x.to(device), w.to(device)).cpu()
    torch.testing.assert_close(ours, F.linear(x, w), equal_nan=True, rtol=1e-4, atol=1e-4)


def test_transposed_and_strided_operands(device):
    x, w = _normal(40, 6).t(), _normal(40, 30).t()
    ours = pvk.ops.linear(x.to(device), w.to(device)).cpu()
    torch.testing.assert_close(ours, F.linear(x, w), rtol=1e-5, atol=1e-5)
    rows = _normal(6, 80)[:, ::2]
    torch.testing.assert_close(
        pvk.ops.linear(rows.to(device), w.to(device)).cpu(), F.linear(rows, w), rtol=1e-5, atol=1e-5
    )
