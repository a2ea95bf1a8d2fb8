"""What is special to layer_norm: the sum that it returns, gradients of both, hostile rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyvision_kernels as pvk


def _normal(*size, dtype=torch.float64):
    return torch.randn(size, generator=torch.Generator().manual_seed(sum(size)), dtype=torch.float64).to(dtype)


def test_gradients_and_theirs():
    x, w, b = (_normal(*size).requires_grad_() for size in ((3, 2, 5), (2, 5), (2, 5)))
    rest = _normal(3, 2, 5).mul(0.5).requires_grad_()

    def alone(x, w, b):
        return pvk.ops.layer_norm(x, (2, 5), w, b)

    def added(x, w, b, rest):
        return pvk.ops.layer_norm(x, (2, 5), w, b, residual=rest)

    for function, tensors in ((alone, (x, w, b)), (added, (x, w, b, rest))):
        assert torch.autograd.gradcheck(function, tensors)
        assert torch.autograd.gradgradcheck(function, tensors)
    plain = torch.autograd.gradcheck(lambda x, rest: pvk.ops.layer_norm(x, 5, residual=rest)[1], (x, rest))
    assert plain  # of the sum alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_with_a_residual_it_is_the_norm_of_the_rounded_sum(dtype, device):
    x, rest = (_normal(7, 40 + i, dtype=dtype)[:, :40].to(device) for i in range(2))
    w, b = (_normal(40, dtype=dtype).to(device) for _ in range(2))
    ours, total = pvk.ops.layer_norm(x, 40, w, b, residual=rest)
    assert torch.equal(total, x + rest)
    assert torch.equal(ours, pvk.ops.layer_norm(total, 40, w, b))


@pytest.mark.parametrize("size", [33, 768, 1500])
def test_a_row_does_not_depend_on_the_others(size, device):
    x = _normal(6, size, dtype=torch.float32).to(device)
    rows = torch.cat([pvk.ops.layer_norm(row.unsqueeze(0), size) for row in x])
    assert torch.equal(pvk.ops.layer_norm(x, size), rows)


def test_constants_give_the_bias_exactly(device):
    for value in (0.0, 0.1, -3e4, 1e30):
        x, b = torch.full((3, 77), value, device=device), _normal(77, dtype=torch.float32).to(device)
        assert torch.equal(pvk.ops.layer_norm(x, 77, None, b), b.expand(3, 77))


def test_rows_with_nan_or_infinity_are_nan_and_others_are_not(device):
    x = _normal(4, 50, dtype=torch.float32)
    expected = F.layer_norm(x, (50,))
    x[1, 4], x[2, 0], x[2, 9] = float("nan"), float("inf"), float("-inf")
    ours = pvk.ops.layer_norm(x.to(device), 50).cpu()
    assert ours[1:3].isnan().all()
    torch.testing.assert_close(ours[::3], expected[::3])


def test_large_mean_beside_small_deviations(device):
    x = (1e4 + 1e-2 * _normal(8, 768)).float()
    exact = F.layer_norm(x.double(), (768,))
    ours, theirs = (F_(x.to(device), (768,)).cpu().double() for F_ in (pvk.ops.layer_norm, F.layer_norm))
    assert (ours - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 1e-6


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torch_func():
    x, w, rest = _normal(3, 4, 5), _normal(3, 5), _normal(4, 5)
    for ours, theirs, dims, args in (
        (lambda x: pvk.ops.layer_norm(x, 5, w[0]), lambda x: F.layer_norm(x, (5,), w[0]), (0,), (x,)),
        (lambda x: pvk.ops.layer_norm(x, 5, w[0]), lambda x: F.layer_norm(x, (5,), w[0]), (1,), (x,)),
        (lambda x, w: pvk.ops.layer_norm(x, 5, w), lambda x, w: F.layer_norm(x, (5,), w), (0, 0), (x, w)),
        (
            lambda x: pvk.ops.layer_norm(x, 5, residual=rest)[0],
            lambda x: F.layer_norm(x + rest, (5,)),
            (0,),
            (x,),
        ),
    ):
        torch.testing.assert_close(torch.vmap(ours, dims)(*args), torch.vmap(theirs, dims)(*args))
    grads = [
        torch.func.grad(lambda w, op=op: op(x, (5,), w).square().sum())(w[1])
        for op in (pvk.ops.layer_norm, F.layer_norm)
    ]
    torch.testing.assert_close(*grads)
    leaf = x.clone().requires_grad_()
    many = _normal(2, 3, 4, 5)
    ours, theirs = (
        torch.autograd.grad(op(leaf, (5,), w[0]), leaf, many, is_grads_batched=True)
        for op in (pvk.ops.layer_norm, F.layer_norm)
    )
    torch.testing.assert_close(ours, theirs)


def test_layer_takes_a_residual_and_its_own_words():
    stock, ours = nn.LayerNorm((3, 4)), pvk.nn.LayerNorm((3, 4))
    nn.init.normal_(stock.weight)
    ours.load_state_dict(stock.state_dict())
    x, rest = _normal(2, 3, 4, dtype=torch.float32), _normal(2, 3, 4, dtype=torch.float32)
    torch.testing.assert_close(ours(x), stock(x))
    torch.testing.assert_close(ours(x, rest), (stock(x + rest), x + rest))
    with pytest.raises(RuntimeError, match=r"Given normalized_shape=\[3, 4\], expected input with shape"):
        ours(x.mT)
    bare = pvk.nn.LayerNorm(4, elementwise_affine=False)
    torch.testing.assert_close(bare(x), F.layer_norm(x, (4,)))


def test_backend_torch_takes_the_kernel_of_torch():
    x = _normal(5, 9, dtype=torch.float32)
    assert pvk.explain(pvk.ops.layer_norm, x, 9) == ["layer_norm [5, 9]: pvk"]
    with pvk.backend("torch"):
        assert pvk.explain(pvk.ops.layer_norm, x, 9) == ["layer_norm [5, 9]: torch aten::native_layer_norm"]


def test_auto_takes_the_kernel_of_torch_where_the_call_is_longer_than_its_work():
    with pvk.backend("auto"):
        (few,), (many,) = (
            pvk.explain(pvk.ops.layer_norm, _normal(*size, dtype=torch.float32), 8) for size in ((5, 8), (20000, 8))
        )
        leaf = _normal(*(20000, 8), dtype=torch.float32).requires_grad_()
        assert type(pvk.ops.layer_norm(leaf, 8).grad_fn).__name__ == "NativeLayerNormBackward0"
    assert few.endswith("torch aten::native_layer_norm")
    assert many.endswith(": pvk")
