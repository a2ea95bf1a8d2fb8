"""Fused attention: the public function, and the rule of `auto`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyvision_kernels._backend import CHOICE
from pyvision_kernels._check import autocasts, require, require_tensors
from pyvision_kernels._norm import HALF
from pyvision_kernels.ops.attention import reference, triton
from pyvision_kernels.ops.attention.operator import attention_op, by_rows, check

_OP = "attention"


def _four(tensor: Tensor, lead: Sequence[int]) -> Tensor:
    """[..., L, D] as [B, H, L, D]: a view where there is one. A single leading dimension is B."""
    heads = lead[-1] if len(lead) > 1 else 1
    batches = math.prod(lead[:-1]) if len(lead) > 1 else math.prod(lead)
    return tensor.reshape(batches, heads, *tensor.shape[-2:])


def torch_is_faster(query: Tensor, key: Tensor, bias: Tensor | None, key_lengths: Tensor | None) -> bool:
    """By what was measured: few queries, and calls too small to be worth one of ours. On CUDA ours has not been timed.

    With lengths ours runs, and with a bias on the CPU: what is padding, or masked for all, may be NaN.
    """
    if key_lengths is not None:
        return False
    if query.is_cuda:
        return True
    if bias is not None or torch.compiler.is_compiling():  # compiled: no guard on sizes
        return False
    products = query.numel() * key.size(2)
    if query.dtype in HALF:
        return products < 1 << 20
    return query.size(2) < 16 or products < 1 << 23


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
    A row that looks at no key gives zeros, with zero gradients. Keys and values that no query of a head looks at do not
    matter, even where they are NaN; one that is masked for some queries alone acts on the others as there.

    Args:
        query (Tensor[B, H, L, D]): float16, bfloat16, float32 or float64; D is 1 to 256. Any strides, packed ones too;
            a last one other than 1 is copied. Fewer dimensions, or more before the last two, as PyTorch takes them.
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
    whole = query.dim() == key.dim() == value.dim() == 4
    if not whole or (not enable_gqa and not query.shape[:2] == key.shape[:2] == value.shape[:2]):
        lead, query, key, value, bias = _as_four(query, key, value, bias)
    else:
        lead = query.shape[:-2]
    if bias is not None and bias.dim() < 4:
        bias = bias[(None,) * (4 - bias.dim())]
    if not autocasts(query):
        check(query, key, value, bias, key_lengths)
    if scale is None:
        scale = 1 / math.sqrt(query.size(-1)) if query.size(-1) else 1.0
    mode = CHOICE.backend
    if not return_lse and (mode == "torch" or (mode == "auto" and torch_is_faster(query, key, bias, key_lengths))):
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
    rows = by_rows(query), by_rows(key), by_rows(value)
    if triton.supports(query, key, value, bias, dropout_p):
        output, lse = triton.attention_triton_op(*rows, key_lengths, scale, left, right)
    else:
        output, lse = attention_op(*rows, bias, key_lengths, seed, scale, left, right, dropout_p)
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
    """Leading dimensions, of which PyTorch takes any number and broadcasts them, as two."""
    for name, rows in (("query", query), ("key", key), ("value", value)):
        require(rows.dim() >= 2, _OP, f"{name} to have at least 2 dimensions", rows.shape)
    try:
        lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    except RuntimeError:
        sizes = [list(key.shape), list(value.shape)]
        require(False, _OP, f"key and value to broadcast to query's first sizes {list(query.shape[:-2])}", sizes)
    if bias is not None and bias.dim() > 2:
        if len(lead) > 2 or bias.dim() != len(lead) + 2:
            bias = bias.expand(*lead, *bias.shape[-2:])
        bias = _four(bias, bias.shape[:-2])
    return lead, *(_four(rows.expand(*lead, *rows.shape[-2:]), lead) for rows in (query, key, value)), bias
