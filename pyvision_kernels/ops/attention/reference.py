"""Attention in readable PyTorch: the definition, the oracle in float64, and what `pvk.backend("torch")` calls."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def allowed(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    is_causal: bool,
    window: tuple[int | None, int | None] | None,
    key_lengths: Tensor | None,
) -> Tensor | None:
    """Which keys a query looks at, by all but a floating bias: bool, broadcastable to [B, H, L, S]; None: all."""
    L, S = query.size(-2), key.size(-2)
    left, right = window or (None, None)
    if is_causal:
        right = 0 if right is None else min(right, 0)
    rows = torch.arange(L, device=query.device)[:, None]
    columns = torch.arange(S, device=query.device)
    parts = []
    if left is not None:
        parts.append(columns >= rows - left)
    if right is not None:
        parts.append(columns <= rows + right)
    if key_lengths is not None:
        parts.append(columns < key_lengths.view(-1, 1, 1, 1))
    if bias is not None and bias.dtype == torch.bool:
        parts.append(bias)
    if not parts:
        return None
    seen = parts[0]
    for part in parts[1:]:
        seen = seen & part
    return seen


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
    kept: Tensor | None = None,
) -> Any:
    """As `pvk.ops.attention`, of [B, H, L, D]; kept: which weights a dropout keeps, [B, H, L, S], instead of chance."""
    shared = query.size(1) // max(key.size(1), 1)
    if shared > 1:
        key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    seen = allowed(query, key, bias, is_causal, window, key_lengths)
    if seen is None:
        seen = torch.ones((), dtype=torch.bool, device=query.device)
    if bias is not None and bias.dtype != torch.bool:
        seen = seen & (bias != -math.inf)
    seen = seen.expand(*query.shape[:-1], key.size(-2))
    absent = ~seen.any(-2)[..., None]
    key, value = key.masked_fill(absent, 0), value.masked_fill(absent, 0)
    scores = scale * (query @ key.mT)
    if bias is not None and bias.dtype != torch.bool:
        scores = scores + bias.to(scores.dtype)
    scores = scores.masked_fill(~seen, -math.inf)
    nothing = (scores == -math.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(nothing, 0).softmax(-1).masked_fill(nothing, 0)
    lse = scores.masked_fill(nothing, 0).logsumexp(-1).masked_fill(nothing[..., 0], -math.inf)
    if kept is not None:
        weights = weights * kept / (1 - dropout_p)
    elif dropout_p:
        weights = F.dropout(weights, dropout_p)
    output = weights @ value
    return (output, lse.to(torch.float64 if lse.dtype == torch.float64 else torch.float32)) if return_lse else output


def by_torch(
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
) -> Tensor:
    """By `F.scaled_dot_product_attention`, with a mask made for what it lacks."""
    plain_causal = is_causal and window is None and bias is None and key_lengths is None
    mask = bias
    if not plain_causal and (is_causal or window is not None or key_lengths is not None):
        seen = allowed(query, key, bias, is_causal, window, key_lengths)
        mask = seen
        if seen is not None and bias is not None and bias.dtype != torch.bool:
            mask = bias.masked_fill(~seen, -math.inf)
    if mask is not None and mask.dtype not in (torch.bool, query.dtype):
        mask = mask.to(query.dtype)
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout_p, plain_causal, scale=scale, enable_gqa=enable_gqa
    )


def dropout_keeps(seed: int, sizes: tuple[int, int, int, int], dropout_p: float) -> Tensor:
    """Which weights [B, H, L, S] the kernels keep: words of Philox4x32-10 by the place of a weight."""
    places = torch.arange(math.prod(sizes), dtype=torch.int64)
    counter = places // 4
    low = (1 << 32) - 1
    words = [counter & low, counter >> 32, torch.zeros_like(counter), torch.zeros_like(counter)]
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        high0, low0 = _product(0xD2511F53, words[0])
        high2, low2 = _product(0xCD9E8D57, words[2])
        words = [high2 ^ words[1] ^ k0, low2, high0 ^ words[3] ^ k1, low0]
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    word = torch.stack(words, -1).gather(-1, (places % 4)[:, None])[:, 0]
    return (word >= int(dropout_p * 2**32)).view(sizes)


def _product(factor: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product of two words of 32 bits, in int64."""
    low = (1 << 32) - 1
    small = (factor & 0xFFFF) * word  # below 2^48
    large = (factor >> 16) * word
    total = small + ((large & 0xFFFF) << 16)  # below 2^49
    return ((large >> 16) + (total >> 32)) & low, total & low


def dot_attention(decoder: Tensor, encoder: Tensor, **options: Any) -> Any:
    return _luong(decoder @ encoder.mT, encoder, **options)


def general_attention(decoder: Tensor, encoder: Tensor, weight: Tensor, **options: Any) -> Any:
    return _luong(decoder @ weight @ encoder.mT, encoder, **options)


def _luong(scores: Tensor, encoder: Tensor, key_lengths: Tensor | None = None, return_weights: bool = False) -> Any:
    if key_lengths is not None:
        columns = torch.arange(encoder.size(1), device=encoder.device)
        scores = scores.masked_fill(columns >= key_lengths.view(-1, 1, 1), -math.inf)
    weights = scores.softmax(-1)
    return (weights @ encoder, weights) if return_weights else weights @ encoder
