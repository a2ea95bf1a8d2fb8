"""What is special to attention: packed rows, dropout, sums, masks, PyTorch's shapes, gradients of gradients."""

from __future__ import annotations

import functools
import math
import warnings

import pytest
import torch
from torch.nn import functional as F

import pyvision_kernels as pvk
from pyvision_kernels.ops import attention
from pyvision_kernels.ops.attention import attention_op, reference
from tests.errors import assert_as_good

with warnings.catch_warnings():  # of packages that it would like to have
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db

NAN, INFINITY = math.nan, math.inf


def _rows(*size, heads=None, keys=None, dtype=torch.float32, grad=False):
    """query, key, value of a size [B, H, L, D]."""
    B, H, L, D = size
    sizes = (size, *[(B, heads or H, keys or L, D)] * 2)
    return [torch.randn(one, dtype=dtype).requires_grad_(grad) for one in sizes]


def _gradients(function, tensors, grad=None):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = function(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, torch.ones_like(output) if grad is None else grad)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_samples_of_op_db(dtype, device):
    entry = next(entry for entry in op_db if entry.name == "nn.functional.scaled_dot_product_attention")
    samples = [one for one in entry.sample_inputs("cpu", dtype, requires_grad=True) if not one.kwargs.get("dropout_p")]
    assert len(samples) >= 10
    for sample in samples:
        rows = (sample.input, *sample.args[:2])
        options = {name: value for name, value in sample.kwargs.items() if name not in ("attn_mask", "dropout_p")}
        mask = sample.kwargs.get("attn_mask")
        ours = _gradients(functools.partial(attention, bias=mask, **options), rows)
        theirs = _gradients(functools.partial(F.scaled_dot_product_attention, attn_mask=mask, **options), rows)
        mask = mask.double() if mask is not None and mask.dtype != torch.bool else mask
        double = [one.detach().double() for one in rows]
        exact = _gradients(functools.partial(F.scaled_dot_product_attention, attn_mask=mask, **options), double)
        # Samples are of up to 9 in size: an error of a large score is one of its weight, and sums cancel.
        q, k, v = (one.abs().max().item() for one in double)
        size, features = max(rows[0].size(-2), rows[1].size(-2)), rows[0].size(-1)
        scores = 1 + q * k * features**0.5
        by_score = v * rows[2].size(-1) * scores / features**0.5
        for *results, largest in zip(
            ours, theirs, exact, (v * scores, by_score * k, by_score * q, size * scores), strict=True
        ):
            assert_as_good(*results, sample, largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_packed_rows_are_read_where_they_lie(dtype, device):
    packed = torch.randn(2, 21, 3, 4, 24, dtype=dtype)
    views = packed.permute(2, 0, 3, 1, 4)
    grad = torch.randn(2, 4, 21, 24).to(dtype)
    ours = _gradients(lambda rows: attention(*rows), [views], grad)
    apart = _gradients(lambda rows: attention(*(one.contiguous() for one in rows)), [views], grad)
    assert ours[0].transpose(1, 2).is_contiguous(), "heads beside each other, as they came"
    assert all(map(torch.equal, ours, apart))
    assert_as_good(
        ours[1],
        _gradients(lambda rows: F.scaled_dot_product_attention(*rows), [views], grad)[1],
        _gradients(lambda rows: F.scaled_dot_product_attention(*rows), [views.double()], grad.double())[1],
        "packed",
    )


def test_expanded_and_overlapping_rows(device):
    query = torch.randn(1, 3, 1, 16).expand(2, 3, 9, 16)
    line = torch.randn(100)
    key = line.as_strided((2, 3, 7, 16), (20, 10, 4, 1))
    value = torch.randn(2, 1, 7, 16).expand(2, 3, 7, 16)
    torch.testing.assert_close(attention(query, key, value), F.scaled_dot_product_attention(query, key, value))


def test_rows_are_not_contiguous(device):
    rows = [torch.randn(2, 3, 16, 9).mT for _ in range(3)]
    torch.testing.assert_close(attention(*rows), F.scaled_dot_product_attention(*rows))


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 2, 3)], ids=str)
def test_leading_dimensions_are_pytorchs(lead, device):
    query, key, value = (torch.randn(*lead, rows, 8) for rows in (5, 7, 7))
    for mask in (None, torch.randn(5, 7), torch.randn(*lead, 5, 7)):
        ours = attention(query, key, value, mask)
        torch.testing.assert_close(ours, F.scaled_dot_product_attention(query, key, value, mask))
    output, lse = attention(query, key, value, return_lse=True)
    assert (output.shape, lse.shape) == ((*lead, 5, 8), (*lead, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=lambda dtype: str(dtype)[6:])
def test_sums_and_their_gradient(dtype, device):
    rows = _rows(2, 2, 13, 16, keys=20, dtype=dtype)
    mask = torch.randn(13, 20) > -1
    mask[4] = False
    double = [one.double().requires_grad_() for one in rows]
    ours = [one.requires_grad_() for one in rows]
    output, lse = attention(*ours, mask, return_lse=True)
    exact, sums = reference.attention(*double, mask, return_lse=True)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (lse[:, :, 4] == -INFINITY).all()
    assert (output[:, :, 4] == 0).all()
    torch.testing.assert_close(lse.double(), sums, rtol=1e-5, atol=1e-5)
    weight = torch.randn(2, 2, 13)
    weight[:, :, 4] = 0
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float64: 1e-12}[dtype]

    def both(output, lse):
        return output.double().sum() + (lse.masked_fill(lse == -INFINITY, 0).double() * weight).sum()

    found = torch.autograd.grad(both(output, lse), ours)
    for one, right in zip(found, torch.autograd.grad(both(exact, sums), double), strict=True):
        torch.testing.assert_close(one.double(), right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_dropout_is_of_the_seed(dtype, device):
    sizes, p = (2, 3, 17, 22), 0.3
    rows = _rows(*sizes[:3], 8, keys=22, dtype=dtype)
    bias = torch.randn(3, 17, 22, dtype=dtype)[None]
    for number in (5, -(2**62) + 12345):
        seed = torch.tensor([number])
        kept = reference.dropout_keeps(number, sizes, p)
        assert abs(kept.double().mean().item() - (1 - p)) < 0.05
        ours = _gradients(lambda *x, s=seed: attention_op(*x, None, s, 0.4, -1, -1, p)[0], [*rows, bias])
        exact = _gradients(
            lambda *x, k=kept: reference.attention(*x, scale=0.4, dropout_p=p, kept=k),
            [one.double() for one in (*rows, bias)],
        )
        for found, right in zip(ours, exact, strict=True):
            bound = (4e-6 if dtype == torch.float32 else 2e-2) * right.abs().max().item()
            torch.testing.assert_close(found.double(), right, rtol=0, atol=bound)


def test_dropout_follows_manual_seed(device):
    rows = _rows(1, 2, 30, 8)
    runs = []
    for number in (1, 1, 2):
        torch.manual_seed(number)
        runs.append(attention(*rows, dropout_p=0.5))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_a_value_that_is_masked_for_some_queries_acts_on_the_others(device):
    query, key, value = _rows(1, 1, 6, 8)
    value[0, 0, 5, 0] = INFINITY
    output = attention(query, key, value, is_causal=True)
    assert torch.isinf(output[0, 0, 5, 0])
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(output[0, 0, 5], expected[0, 0, 5])
    torch.testing.assert_close(output[..., 1:], expected[..., 1:])


def test_gradients_of_absent_keys_are_zero(device):
    query, key, value = _rows(2, 2, 9, 8, keys=12)
    key[:, :, 7:], value[:, :, 7:] = NAN, INFINITY
    key[0, :, 4:], value[0, :, 4:] = NAN, NAN
    lengths = torch.tensor([4, 7])
    _, *grads = _gradients(lambda *rows: attention(*rows, key_lengths=lengths), (query, key, value))
    assert grads[0].isfinite().all()
    for grad in grads[1:]:
        assert (grad[0, :, 4:] == 0).all()
        assert (grad[1, :, 7:] == 0).all()
        assert grad.isfinite().all()


def test_rows_without_a_key_have_no_gradient(device):
    rows = _rows(1, 2, 9, 8)
    bias = torch.randn(1, 2, 9, 9)
    bias[:, :, 3] = -INFINITY
    output, *grads = _gradients(attention, (*rows, bias))
    assert (output[:, :, 3] == 0).all()
    assert (grads[0][:, :, 3] == 0).all()
    assert (grads[3][:, :, 3] == 0).all()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("size", [(1, 2, 11, 14), (3, 1, 11, 14), (1, 1, 11, 14), (1, 2, 1, 14), (1, 1, 1, 14)])
def test_gradient_of_a_broadcast_bias(size, device):
    rows, bias = _rows(3, 2, 11, 8, keys=14), torch.randn(size)
    ours = _gradients(attention, (*rows, bias))[4]
    exact = _gradients(F.scaled_dot_product_attention, [one.double() for one in (*rows, bias)])[4]
    largest = float(size[3] == 1)  # the same for all keys: its gradients, of about 1, add up to 0
    assert_as_good(ours, _gradients(F.scaled_dot_product_attention, (*rows, bias))[4], exact, size, largest)


@pytest.mark.parametrize("size", [(3, 2, 11, 1), (1, 1, 11, 1), (1, 1, 1, 1)])
def test_a_bias_that_is_the_same_for_all_keys_has_no_gradient(size, device):
    rows, bias = _rows(3, 2, 11, 8, keys=14), torch.randn(size)
    output, *_, grad = _gradients(attention, (*rows, bias))
    torch.testing.assert_close(output, attention(*rows))
    assert grad.shape == bias.shape
    assert grad.abs().max() < 1e-4 * 66 / bias.numel() ** 0.5


def test_one_key_has_a_weight_of_one(device):
    query, key, value = _rows(2, 2, 9, 8, keys=1)
    output, by_query, by_key, by_value = _gradients(attention, (query, key, value))
    torch.testing.assert_close(output, value.expand_as(output))
    assert max(by_query.abs().max(), by_key.abs().max()) < 1e-5
    torch.testing.assert_close(by_value, torch.full_like(value, 9.0))


def test_the_number_of_threads_does_not_matter():
    rows, bias = _rows(4, 3, 70, 16), torch.randn(1, 3, 70, 70)
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            runs.append(_gradients(attention, (*rows, bias)))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(map(torch.equal, runs[0], run))


@pytest.mark.slow_emulated("each element of each input by itself")
@pytest.mark.parametrize(
    "options", [{}, {"window": (2, 1)}, {"key_lengths": torch.tensor([4, 0])}, {"is_causal": True}]
)
def test_gradcheck(options, device):
    rows, bias = _rows(2, 2, 4, 3, keys=5, dtype=torch.float64), torch.randn(2, 1, 4, 5, dtype=torch.float64)
    leaves = [one.requires_grad_() for one in (*rows, bias)]

    def function(*leaves):
        return attention(*leaves, **options)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.slow_emulated("each element of each input by itself")
def test_gradcheck_of_shared_keys_and_sums(device):
    rows = _rows(2, 4, 3, 2, heads=2, keys=4, dtype=torch.float64, grad=True)

    def function(*rows):
        return attention(*rows, enable_gqa=True, return_lse=True)

    assert torch.autograd.gradcheck(function, rows)
    assert torch.autograd.gradgradcheck(function, rows)


def test_vmap_and_torch_func(device):
    query, key, value = (torch.randn(4, 2, 3, 5, 8) for _ in range(3))
    for bias, dim in ((torch.randn(4, 1, 3, 5, 5), 0), (torch.randn(1, 3, 5, 5), None), (None, None)):
        ours = torch.vmap(attention, (0, 0, 0, dim))(query, key, value, bias)
        one_by_one = [
            attention(*rows, bias if dim is None else bias[i])
            for i, rows in enumerate(zip(query, key, value, strict=True))
        ]
        torch.testing.assert_close(ours, torch.stack(one_by_one), rtol=0, atol=0)
    shared = torch.vmap(attention, (0, None, None))(query, key[0], value[0])
    torch.testing.assert_close(shared, torch.stack([attention(one, key[0], value[0]) for one in query]))
    grads = torch.func.grad(lambda rows: attention(rows, key[0], value[0]).sum())(query[0])
    torch.testing.assert_close(grads, _gradients(lambda rows: attention(rows, key[0], value[0]), [query[0]])[1])
    each = torch.vmap(torch.func.grad(lambda q, k, v: attention(q, k, v).sum()))(query, key, value)
    torch.testing.assert_close(each[0], _gradients(lambda q: attention(q, key[0], value[0]), [query[0]])[1])


@pytest.mark.parametrize("name", ["torch", "auto", "pvk"])
def test_every_backend_gives_the_same(name):
    rows, bias = _rows(2, 2, 9, 8, keys=12), torch.randn(1, 2, 9, 12)
    for options in (
        {},
        {"bias": bias},
        {"is_causal": True},
        {"window": (3, 1), "bias": bias},
        {"key_lengths": torch.tensor([12, 3])},
        {"is_causal": True, "bias": bias[0, 0] > 0},
        {"return_lse": True},
    ):
        with pvk.backend(name):
            found = attention(*rows, **options)
        torch.testing.assert_close(found, reference.attention(*rows, **options))
    with pvk.backend(name), torch.no_grad():
        half = [one.bfloat16() for one in rows]
        found = attention(*half, bias)
    assert_as_good(
        found, reference.attention(*half, bias), reference.attention(*(x.double() for x in half), bias), name
    )


def test_autocast_casts_all_but_masks_and_float64(device):
    rows, bias = _rows(2, 2, 9, 8), torch.randn(2, 2, 9, 9)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(*rows, bias).dtype == torch.bfloat16
        assert attention(rows[0].bfloat16(), *rows[1:], bias > 0).dtype == torch.bfloat16
        assert attention(*(one.double() for one in rows)).dtype == torch.float64
