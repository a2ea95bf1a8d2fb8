"""The operators of attention: schemas, checks, gradients, and what autocast and vmap make of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyvision_kernels._check import require
from pyvision_kernels._norm import HALF, one_by_one, opmath
from pyvision_kernels._op import Op, declare
from pyvision_kernels.ops.attention import reference

_OP = "attention"
MAX_FEATURES = 256
_FLOATING = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))


def check(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, key_lengths: Tensor | None) -> None:
    for name, rows in (("query", query), ("key", key), ("value", value)):
        require(rows.dim() == 4, _OP, f"{name} to have 4 dimensions [B, H, L, D]", rows.shape)
        if rows.dtype not in _FLOATING:
            raise NotImplementedError(
                f"{_OP}: expected {name} to be float16, bfloat16, float32 or float64, but got {rows.dtype}"
            )
        require(rows.dtype == query.dtype, _OP, f"{name} to be {query.dtype} as query is", rows.dtype)
        require(rows.device == query.device, _OP, f"{name} to be on {query.device} as query is", rows.device)
    B, H, L, D = query.shape
    G, S = key.shape[1:3]
    require(
        key.size(0) == B and key.size(3) == D,
        _OP,
        "key to have {} batches and {} features as query has",
        key.shape,
        B,
        D,
    )
    require(
        value.shape[:3] == key.shape[:3], _OP, "value to have size [{}, {}, {}, E] as key has", value.shape, B, G, S
    )
    require(H == G or (G > 0 and H % G == 0), _OP, "query to have a multiple of key's {} heads", query.shape, G)
    for name, features in (("query", D), ("value", value.size(3))):
        require(1 <= features <= MAX_FEATURES, _OP, f"{name} to have 1 to {MAX_FEATURES} features", features)
    if bias is not None:
        _check_bias(bias, query, S)
    if key_lengths is not None:
        require(key_lengths.shape == (B,), _OP, "key_lengths to have size [{}]", key_lengths.shape, B)
        require(not key_lengths.is_floating_point(), _OP, "key_lengths to be integers", key_lengths.dtype)
        require(key_lengths.device == query.device, _OP, f"key_lengths to be on {query.device}", key_lengths.device)


def _check_bias(bias: Tensor, query: Tensor, S: int) -> None:
    B, H, L = query.shape[:3]
    fits = bias.dim() == 4 and all(size in (1, wanted) for size, wanted in zip(bias.shape, (B, H, L, S), strict=True))
    require(fits, _OP, "bias to broadcast to [{}, {}, {}, {}]", bias.shape, B, H, L, S)
    beside = bias.dtype == torch.float32 and query.dtype in HALF
    require(
        bias.dtype in (torch.bool, query.dtype) or beside,
        _OP,
        f"bias to be bool or {query.dtype} as query is" + (", or float32" if query.dtype in HALF else ""),
        bias.dtype,
    )
    require(bias.device == query.device, _OP, f"bias to be on {query.device} as query is", bias.device)


def rows_like(like: Tensor, features: int) -> Tensor:
    """[B, H, L, features], in memory [B, L, H, features] where that is how `like` lies."""
    B, H, L = like.shape[:3]
    if like.stride(1) < like.stride(2):
        return like.new_empty((B, L, H, features)).transpose(1, 2)
    return like.new_empty((B, H, L, features))


def fake(query, key, value, bias, key_lengths, seed, scale, left, right, dropout_p):
    check(query, key, value, bias, key_lengths)
    return rows_like(query, value.size(3)), query.new_empty(query.shape[:3], dtype=opmath(query.dtype))


def _fake_backward(grad, grad_lse, query, key, value, bias, *rest):
    grads = (rows_like(query, query.size(3)), rows_like(key, query.size(3)), rows_like(value, value.size(3)))
    return (*grads, bias.new_empty(bias.shape) if rest[-1] else query.new_empty((0,)))


def _setup(ctx, inputs, output):
    query, key, value, bias, key_lengths, seed, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, bias, key_lengths, seed, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, grad_lse):
    query, key, value, bias, key_lengths, seed, output, lse = ctx.saved_tensors
    nothing = (None,) * 10
    if grad is None and grad_lse is None:
        return nothing
    grad = torch.zeros_like(output) if grad is None else by_rows(grad)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    needs = ctx.needs_input_grad[:4]
    inputs = (grad, grad_lse, query, key, value, bias, key_lengths, seed, output, lse, *ctx.options, needs[3])
    if torch.is_grad_enabled():
        grads = composed(*inputs)
    else:
        grads = attention_backward_op(*inputs)
    return (*(found if needed else None for found, needed in zip(grads, needs, strict=True)), *nothing[4:])


def composed(grad, grad_lse, query, key, value, bias, key_lengths, seed, output, lse, scale, left, right, p, needs):
    """The gradients by PyTorch's operators, which are differentiable again."""
    window = (left if left >= 0 else None, right if right >= 0 else None)
    options: dict[str, Any] = {"window": window, "scale": scale, "key_lengths": key_lengths, "dropout_p": p}
    if p:
        sizes = (*query.shape[:3], key.size(2))
        options["kept"] = reference.dropout_keeps(int(seed), sizes, p).to(query.device)
    leaves = [tensor for tensor in (query, key, value, *([bias] if needs else [])) if tensor.requires_grad]
    result, sums = reference.attention(query, key, value, bias, **options, return_lse=True)
    outputs, grads = [result], [grad]
    if grad_lse is not None:
        outputs, grads = [result, sums], [grad, grad_lse]
    found = iter(torch.autograd.grad(outputs, leaves, grads, create_graph=True))
    return [
        next(found) if tensor is not None and tensor.requires_grad else None for tensor in (query, key, value, bias)
    ]


def _vmap(info, in_dims, query, key, value, bias, key_lengths, seed, *options):
    size = info.batch_size
    if in_dims[5] is not None:
        raise NotImplementedError(f"{_OP}: expected dropout_p to be 0 under vmap with different randomness")
    *rows, key_lengths = folded(size, in_dims, query, key, value, key_lengths)
    if bias is not None:
        bias = _batched(bias, in_dims[3], size)
        if in_dims[3] is None and bias.size(1) == 1:
            bias = bias[0]
        else:
            bias = bias.expand(size, rows[0].size(0) // max(size, 1), *bias.shape[2:]).flatten(0, 1)
    results = attention_op(*rows, bias, key_lengths, seed, *options)
    return tuple(result.unflatten(0, (size, -1)) for result in results), (0, 0)


def folded(size: int, in_dims: Any, query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None) -> Any:
    """With the dimension of vmap in that of batches. in_dims: of an operator's arguments, key_lengths but one behind."""
    rows = [_batched(one, dim, size).flatten(0, 1) for one, dim in zip((query, key, value), in_dims, strict=False)]
    if key_lengths is not None:
        key_lengths = _batched(key_lengths, in_dims[4], size).flatten()
    return *rows, key_lengths


def _batched(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _vmap_backward(info: Any, in_dims: Any, *args: Any) -> Any:
    return one_by_one(attention_backward_op)(info, in_dims, *args)


def cast(query, key, value, bias, *rest):
    dtype = torch.get_autocast_dtype(query.device.type)
    rows = [tensor.to(dtype) if tensor.dtype in (*HALF, torch.float32) else tensor for tensor in (query, key, value)]
    if bias is not None and bias.dtype in (*HALF, torch.float32):
        bias = bias.to(dtype)
    return (*rows, bias, *rest)


attention_backward_op: Op = declare(
    "_attention_backward(Tensor grad_output, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor? bias, "
    "Tensor? key_lengths, Tensor? seed, Tensor output, Tensor lse, float scale, int left, int right, float dropout_p, "
    "bool needs_bias) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    vmap=_vmap_backward,
)

attention_op: Op = declare(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? key_lengths, Tensor? seed, float scale, "
    "int left, int right, float dropout_p) -> (Tensor, Tensor)",
    fake=fake,
    setup_context=_setup,
    backward=_backward,
    autocast=cast,
    vmap=_vmap,
)


def by_rows(tensor: Tensor) -> Tensor:
    """With a last stride of 1: as it is, or a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.size(-1) <= 1 else tensor.contiguous()
