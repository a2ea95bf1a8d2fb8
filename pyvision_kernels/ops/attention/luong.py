"""Luong's attention between decoder and encoder states: dot and general scores, by the kernels of attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pyvision_kernels._backend import CHOICE
from pyvision_kernels._check import FLOATING, autocasts, require, require_tensors
from pyvision_kernels.ops.attention import attention, reference
from pyvision_kernels.ops.attention.operator import MAX_FEATURES
from pyvision_kernels.ops.attention.weights import attention_weights
from pyvision_kernels.ops.linear import linear


def _check(op: str, decoder: Tensor, key_lengths: Tensor | None, **others: Tensor) -> None:
    """others: the encoder, and the weight where there is one."""
    given = {"decoder": decoder, **others}
    require_tensors(op, **given, **({} if key_lengths is None else {"key_lengths": key_lengths}))
    encoder = others["encoder"]
    require(decoder.dim() == 3, op, "decoder to have 3 dimensions [B, L, D]", decoder.shape)
    require(encoder.dim() == 3, op, "encoder to have 3 dimensions [B, S, E]", encoder.shape)
    require(encoder.size(0) == decoder.size(0), op, f"encoder to have {decoder.size(0)} batches", encoder.shape)
    for name, tensor in given.items():
        if tensor.dtype not in FLOATING:
            raise NotImplementedError(
                f"{op}: expected {name} to be float16, bfloat16, float32 or float64, but got {tensor.dtype}"
            )
        same = tensor.dtype == decoder.dtype or autocasts(decoder)
        require(same, op, f"{name} to be {decoder.dtype} as decoder is", tensor.dtype)
        require(tensor.device == decoder.device, op, f"{name} to be on {decoder.device} as decoder is", tensor.device)
    if key_lengths is not None:
        size = [decoder.size(0)]
        require(list(key_lengths.shape) == size, op, f"key_lengths to have size {size}", key_lengths.shape)
        require(not key_lengths.is_floating_point(), op, "key_lengths to be integers", key_lengths.dtype)


def _attend(query: Tensor, encoder: Tensor, keys: Tensor, key_lengths: Tensor | None, return_weights: bool) -> Any:
    """The context of queries [B, L, E] over encoder states, and the weights."""
    query, key, value = query.unsqueeze(1), keys.unsqueeze(1), encoder.unsqueeze(1)
    by_torch = CHOICE.backend == "torch" or max(query.size(3), value.size(3)) > MAX_FEATURES
    attend = reference.attention if by_torch else attention
    context = attend(query, key, value, scale=1.0, key_lengths=key_lengths).squeeze(1)
    if not return_weights:
        return context
    seen = reference.allowed(query, key, None, False, None, key_lengths)
    return context, attention_weights(query, key, seen, 1.0).squeeze(1)


def dot_attention(
    decoder: Tensor, encoder: Tensor, *, key_lengths: Tensor | None = None, return_weights: bool = False
) -> Any:
    """Luong's dot attention: the encoder states, weighted by the softmax of their products with each decoder state.

    ``softmax(decoder @ encoder.T) @ encoder``; scores are not scaled.

    Args:
        decoder (Tensor[B, L, E]): float16, bfloat16, float32 or float64.
        encoder (Tensor[B, S, E]): Of decoder's dtype.
        key_lengths (Tensor[B] of integers): Encoder states of each batch, others being padding. Default: all.
        return_weights (bool): Return the weights too. Default: False.

    Returns:
        Tensor[B, L, E], the context; with ``return_weights`` (it, Tensor[B, L, S]).

    Raises:
        RuntimeError: sizes, dtypes or devices do not fit each other.
        NotImplementedError: a dtype is another.
        TypeError: an argument is not a Tensor.

    Note: deterministic. The weights are made beside the fused pass, by PyTorch's operators. States of more than 256
        features are multiplied by these altogether, with all scores in memory.
    Reference: Luong et al., Effective Approaches to Attention-based Neural Machine Translation, 2015, section 3.1.
    """
    _check("dot_attention", decoder, key_lengths, encoder=encoder)
    features = decoder.size(2)
    require(encoder.size(2) == features, "dot_attention", f"encoder to have {features} features", encoder.shape)
    return _attend(decoder, encoder, encoder, key_lengths, return_weights)


def general_attention(
    decoder: Tensor,
    encoder: Tensor,
    weight: Tensor,
    *,
    key_lengths: Tensor | None = None,
    return_weights: bool = False,
) -> Any:
    """Luong's general attention: scores ``decoder @ weight @ encoder.T``.

    ``softmax(decoder @ weight @ encoder.T) @ encoder``. Whichever of the states are fewer are projected.

    Args:
        decoder (Tensor[B, L, D]): float16, bfloat16, float32 or float64.
        encoder (Tensor[B, S, E]): Of decoder's dtype.
        weight (Tensor[D, E]): Of decoder's dtype.
        key_lengths, return_weights: As of `dot_attention`.

    Returns:
        Tensor[B, L, E], the context; with ``return_weights`` (it, Tensor[B, L, S]).

    Raises:
        RuntimeError: sizes, dtypes or devices do not fit each other.
        NotImplementedError: a dtype is another.
        TypeError: an argument is not a Tensor.

    Note: as of `dot_attention`; the projection is `linear`'s.
    Reference: Luong et al., Effective Approaches to Attention-based Neural Machine Translation, 2015, section 3.1.
    """
    _check("general_attention", decoder, key_lengths, encoder=encoder, weight=weight)
    sizes = (decoder.size(2), encoder.size(2))
    require(weight.shape == sizes, "general_attention", f"weight to have size {list(sizes)}", weight.shape)
    if decoder.size(1) <= encoder.size(1) or sizes[0] > MAX_FEATURES:
        return _attend(linear(decoder, weight.t()), encoder, encoder, key_lengths, return_weights)
    return _attend(decoder, encoder, linear(encoder, weight), key_lengths, return_weights)
