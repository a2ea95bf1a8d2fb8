"""Fused attention: schema, checks, gradient, the rule of `auto`, and the public function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyvision_kernels._backend import CHOICE
from pyvision_kernels._check import autocasts, require, require_tensors
from pyvision_kernels._norm import HALF, opmath
from pyvision_kernels._op import Op, declare
from pyvision_kernels.ops.attention import reference

_OP = "attention"
MAX_FEATURES = 256
_FLOATING = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))


def _check(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, key_lengths: Tensor | None) -> None:
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


def _rows_like(like: Tensor, features: int) -> Tensor:
    """[B, H, L, features], in memory [B, L, H, features] where that is how `like` lies."""
    B, H, L = like.shape[:3]
    if like.stride(1) < like.stride(2):
        return like.new_empty((B, L, H, features)).transpose(1, 2)
    return like.new_empty((B, H, L, features))


def _fake(query, key, value, bias, key_lengths, seed, scale, left, right, dropout_p):
    _check(query, key, value, bias, key_lengths)
    return _rows_like(query, value.size(3)), query.new_empty(query.shape[:3], dtype=opmath(query.dtype))


def _fake_backward(grad, grad_lse, query, key, value, bias, *rest):
    grads = (_rows_like(query, query.size(3)), _rows_like(key, query.size(3)), _rows_like(value, value.size(3)))
    return (*grads, bias.new_empty(bias.shape) if rest[-1] else query.new_empty((0,)))


def _setup(ctx, inputs, outputs):
    query, key, value, bias, key_lengths, seed, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, bias, key_lengths, seed, *outputs)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, grad_lse):
    query, key, value, bias, key_lengths, seed, output, lse = ctx.saved_tensors
    nothing = (None,) * 10
    if grad is None and grad_lse is None:
        return nothing
    grad = torch.zeros_like(output) if grad is None else _by_rows(grad)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    needs = ctx.needs_input_grad[:4]
    inputs = (grad, grad_lse, query, key, value, bias, key_lengths, seed, output, lse, *ctx.options, needs[3])
    if torch.is_grad_enabled():
        grads = _composed(*inputs)
    else:
        grads = attention_backward_op(*inputs)
    return (*(found if needed else None for found, needed in zip(grads, needs, strict=True)), *nothing[4:])


def _composed(grad, grad_lse, query, key, value, bias, key_lengths, seed, output, lse, scale, left, right, p, needs):
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
    dims = dict(zip(("query", "key", "value", "bias", "key_lengths", "seed"), in_dims, strict=False))
    if dims["seed"] is not None:
        raise NotImplementedError(f"{_OP}: expected dropout_p to be 0 under vmap with different randomness")
    rows = [
        _batched(tensor, dims[name], size).flatten(0, 1)
        for name, tensor in (("query", query), ("key", key), ("value", value))
    ]
    if key_lengths is not None:
        key_lengths = _batched(key_lengths, dims["key_lengths"], size).flatten()
    if bias is not None:
        bias = _batched(bias, dims["bias"], size)
        if dims["bias"] is None and bias.size(1) == 1:
            bias = bias[0]
        else:
            bias = bias.expand(size, rows[0].size(0) // max(size, 1), *bias.shape[2:]).flatten(0, 1)
    results = attention_op(*rows, bias, key_lengths, seed, *options)
    return tuple(result.unflatten(0, (size, -1)) for result in results), (0, 0)


def _batched(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _vmap_backward(info: Any, in_dims: Any, *args: Any) -> Any:
    from pyvision_kernels._norm import one_by_one

    return one_by_one(attention_backward_op)(info, in_dims, *args)


def _autocast(query, key, value, bias, *rest):
    dtype = torch.get_autocast_dtype(query.device.type)
    cast = [tensor.to(dtype) if tensor.dtype in (*HALF, torch.float32) else tensor for tensor in (query, key, value)]
    if bias is not None and bias.dtype in (*HALF, torch.float32):
        bias = bias.to(dtype)
    return (*cast, bias, *rest)


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
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    autocast=_autocast,
    vmap=_vmap,
)


def _by_rows(tensor: Tensor) -> Tensor:
    """With a last stride of 1: as it is, or a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.size(-1) <= 1 else tensor.contiguous()


def _four(tensor: Tensor, lead: Sequence[int]) -> Tensor:
    """[..., L, D] as [B, H, L, D]: a view where there is one. A single leading dimension is B."""
    heads = lead[-1] if len(lead) > 1 else 1
    batches = math.prod(lead[:-1]) if len(lead) > 1 else math.prod(lead)
    return tensor.reshape(batches, heads, *tensor.shape[-2:])


def torch_is_faster(query: Tensor, key: Tensor, bias: Tensor | None) -> bool:
    """By what was measured. On CUDA ours has not been timed."""
    return query.is_cuda


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    *,
    is_causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    dropout_p: float = 0.0,
    key_lengths: Tensor | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention in one pass, with a learned bias: ``softmax(scale * query @ key.T + bias) @ value``.

    Matches `torch.nn.functional.scaled_dot_product_attention`; more than that: a gradient of ``bias`` that is reduced
    over its broadcast dimensions as it is made, ``window``, ``key_lengths``, causal together with a bias, and the
    logarithms of the sums. Query i looks at key j where ``i - left <= j <= i + right``, counted from the first of each.
    A row that looks at no key gives zeros, with zero gradients. Keys and values that no query of a head looks at, for
    whatever reason, do not matter, even where they are NaN; one that is masked for some queries alone acts on the others
    as there.

    Args:
        query (Tensor[B, H, L, D]): float16, bfloat16, float32 or float64; D is 1 to 256. Any strides, packed ones too; a
            last one other than 1 is copied. Fewer dimensions, or more before the last two, as PyTorch takes them.
        key (Tensor[B, H, S, D]): Of query's dtype.
        value (Tensor[B, H, S, E]): Of query's dtype; E is 1 to 256.
        bias (Tensor, broadcastable to [B, H, L, S]): Added to the scores; of query's dtype, or float32 beside 16 bits.
            bool: keys are masked where it is False.
        is_causal (bool): Query i looks at no key beyond i. Default: False.
        window (tuple of left, right): Keys before and after i that query i looks at; None: no end. Default: all.
        scale (float): Default: ``1 / sqrt(D)``.
        enable_gqa (bool): Each key head serves H / key heads query heads. Default: False.
        dropout_p (float): Of weights that are zeroed, others being scaled by ``1 / (1 - dropout_p)``; in [0, 1).
        key_lengths (Tensor[B] of integers): Keys of each batch, others being padding.
        return_lse (bool): Return the logarithms of the sums too. Default: False.

    Returns:
        Tensor[B, H, L, E] of query's dtype, in memory [B, L, H, E] where query lies like that; with ``return_lse`` (it,
        Tensor[B, H, L] of float32, or float64 of float64), -infinity for a row that looks at no key.

    Raises:
        RuntimeError: sizes, dtypes or devices do not fit each other.
        NotImplementedError: a dtype is another.
        TypeError: an argument is not a Tensor.
        ValueError: ``dropout_p`` or ``window`` is out of its range.

    Note: deterministic forward and backward, but for the choice of what is dropped. Double backward is a composition of
        PyTorch's operators. Memory beside inputs and outputs grows with B * H * (L + S) * D.
    Reference: Vaswani et al., Attention Is All You Need, 2017; Dao et al., FlashAttention, 2022.
    """
    require_tensors(_OP, query=query, key=key, value=value)
    optional = {name: value for name, value in (("bias", bias), ("key_lengths", key_lengths)) if value is not None}
    require_tensors(_OP, **optional)
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{_OP}: expected dropout_p to be in [0, 1), but got {dropout_p}")
    left, right = _ends(window, is_causal)
    lead = query.shape[:-2]
    if query.dim() != 4:
        query, key, value, bias = _as_four(query, key, value, bias)
    if bias is not None and bias.dim() < 4:
        bias = bias[(None,) * (4 - bias.dim())]
    if not enable_gqa and query.dim() == key.dim() == 4:
        require(query.size(1) == key.size(1), _OP, "key to have {} heads as query has", key.shape, query.size(1))
    if not autocasts(query):
        _check(query, key, value, bias, key_lengths)
    if scale is None:
        scale = 1 / math.sqrt(query.size(-1)) if query.size(-1) else 1.0
    mode = CHOICE.backend
    if not return_lse and (mode == "torch" or (mode == "auto" and torch_is_faster(query, key, bias))):
        window = (left if left >= 0 else None, right if right >= 0 else None)
        output = reference.by_torch(
            query,
            key,
            value,
            bias,
            window=window if window != (None, None) else None,
            scale=scale,
            enable_gqa=enable_gqa,
            dropout_p=dropout_p,
            key_lengths=key_lengths,
        )
        return output if len(lead) == 2 else output.reshape(*lead, *output.shape[-2:])
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=query.device) if dropout_p else None
    if key_lengths is not None:
        key_lengths = key_lengths.to(torch.int64).contiguous()
    output, lse = attention_op(
        _by_rows(query), _by_rows(key), _by_rows(value), bias, key_lengths, seed, scale, left, right, dropout_p
    )
    if len(lead) != 2:
        output, lse = output.reshape(*lead, *output.shape[-2:]), lse.reshape(*lead, lse.size(-1))
    return (output, lse) if return_lse else output


def _ends(window: Any, is_causal: bool) -> tuple[int, int]:
    """Keys before and after that a query looks at; -1: no end."""
    pair = (None, None) if window is None else tuple(window) if isinstance(window, Sequence) else ()
    if len(pair) != 2 or not all(end is None or (isinstance(end, int) and end >= 0) for end in pair):
        raise ValueError(f"{_OP}: expected window to be (left, right), each None or at least 0, but got {window}")
    left, right = (-1 if end is None else end for end in pair)
    return left, 0 if is_causal else right


def _as_four(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
    """Leading dimensions, of which PyTorch takes any number, as two."""
    lead = query.shape[:-2]
    for name, rows in (("query", query), ("key", key), ("value", value)):
        require(rows.dim() == query.dim() >= 2, _OP, f"{name} to have query's dimensions, at least 2", rows.shape)
        require(rows.shape[:-2] == lead, _OP, f"{name} to have the sizes {list(lead)} of query first", rows.shape)
    if bias is not None and bias.dim() > 2:
        if len(lead) > 2 or bias.dim() != query.dim():
            bias = bias.expand(*lead, *bias.shape[-2:])
        bias = _four(bias, bias.shape[:-2])
    return _four(query, lead), _four(key, lead), _four(value, lead), bias
