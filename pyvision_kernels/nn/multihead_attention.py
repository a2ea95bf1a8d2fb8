"""`MultiheadAttention` and `TransformerEncoderLayer`, in place of torch.nn's."""

from __future__ import annotations

import math
from typing import Any

import torch.fx
from torch import Tensor, nn
from torch.nn import functional as F

from pyvision_kernels._packed import Packs
from pyvision_kernels.nn._layer import Layer, is_for_torch, is_traced
from pyvision_kernels.nn.linear import Linear
from pyvision_kernels.nn.norm import LayerNorm
from pyvision_kernels.ops.attention import attention
from pyvision_kernels.ops.attention.operator import MAX_FEATURES
from pyvision_kernels.ops.attention.weights import attention_weights
from pyvision_kernels.ops.linear import linear
from pyvision_kernels.ops.linear import run as run_linear

# A leaf for torch.fx.
torch.fx.wrap("linear")

_ACTIVATIONS: dict[Any, str] = {F.relu: "relu", torch.relu: "relu", F.gelu: "gelu"}


class NonDynamicallyQuantizableLinear(Linear, nn.modules.linear.NonDynamicallyQuantizableLinear):
    """The projection of the output in torch's `MultiheadAttention`, which has a class of its own."""


class MultiheadAttention(Layer, nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` by our kernels; same arguments, parameters and state_dict.

    Query, key and value are projected in one product where they are one tensor, and the heads are read where the
    product left them. The weights of ``need_weights=True`` are made beside the output, which is the same with and
    without them, in memory of N * num_heads * L * S; a query that looks at no key gets zeros, where torch's may have
    NaN. torch's layer runs under autocast, as of `Linear`, for nested tensors, for heads of more than 256 features, and
    for whatever it refuses.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.out_proj.__class__ = NonDynamicallyQuantizableLinear

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """[L, N, E], [S, N, kdim], [S, N, vdim] -> [L, N, E], and weights [N, L, S] or [N, H, L, S]; as torch's."""
        options = key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        if isinstance(query, torch.fx.Proxy):  # a leaf, as torch's is
            path = query.tracer.path_of_module(self)
            return query.tracer.create_proxy("call_module", path, (query, key, value, *options), {})
        if not self._takes(query, key, value, key_padding_mask, attn_mask, is_causal):
            return super().forward(query, key, value, *options)
        batched = query.dim() == 3
        if not batched:
            dim = 0 if self.batch_first else 1
            lifted = {id(rows): rows.unsqueeze(dim) for rows in (query, key, value)}  # one tensor stays one
            query, key, value = (lifted[id(rows)] for rows in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        heads = self._with_more_keys(*self._projected(query, key, value))
        plainly_causal = is_causal and key_padding_mask is None and not need_weights
        bias = None if plainly_causal else self._bias(key_padding_mask, attn_mask, query.dtype)
        dropout = self.dropout if self.training else 0.0
        weights = attention_weights(*heads[:2], bias, self.head_dim**-0.5) if need_weights else None
        if weights is not None and dropout:  # torch's layer returns those that it left
            weights = F.dropout(weights, dropout)
            output = weights @ heads[2]
        else:
            output = attention(*heads, bias, is_causal=plainly_causal, dropout_p=dropout)
        rows = output.transpose(1, 2).flatten(2)  # [N, L, E]
        result = self.out_proj(rows if self.batch_first else rows.transpose(0, 1))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if batched:
            return result, weights
        return result.squeeze(0 if self.batch_first else 1), None if weights is None else weights.squeeze(0)

    def _takes(
        self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None, mask: Tensor | None, is_causal: bool
    ) -> bool:
        """Whether our kernels take the arguments. What torch's layer refuses is for it to refuse, by its words."""
        rows, dtype, dims = (query, key, value), self.out_proj.weight.dtype, query.dim()
        if any(is_for_torch(tensor) or tensor.is_nested for tensor in rows):
            return False
        if self.head_dim > MAX_FEATURES or (self.training and self.dropout >= 1) or (is_causal and mask is None):
            return False
        if dims not in (2, 3) or any(tensor.dim() != dims or tensor.dtype != dtype for tensor in rows):
            return False
        batch, length = (0, 1) if self.batch_first else (1, 0)
        N = query.size(batch) if dims == 3 else 1
        L, S = (tensor.size(length if dims == 3 else 0) for tensor in (query, key))
        return (
            key.shape[:-1] == value.shape[:-1]
            and (dims == 2 or key.size(batch) == N)
            and [tensor.size(-1) for tensor in rows] == [self.embed_dim, self.kdim, self.vdim]
            and _fits(padding, dtype, (N, S) if dims == 3 else (S,))
            and _fits(mask, dtype, (L, S), (N * self.num_heads, L, S))
        )

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The heads [N, H, L, head_dim] of all three: views of the products."""
        if self._qkv_same_embed_dim and query is key and key is value:
            packs = None if self.training or is_traced(query) else self._kept()
            product = _linear(query, self.in_proj_weight, self.in_proj_bias, packs).unflatten(-1, (3, -1))
            return tuple(self._heads(part) for part in product.unbind(-2))  # type: ignore[return-value]
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        rows = zip((query, key, value), weights, biases, strict=True)
        return tuple(self._heads(_linear(*given)) for given in rows)  # type: ignore[return-value]

    def _heads(self, rows: Tensor) -> Tensor:
        heads = rows.unflatten(-1, (self.num_heads, self.head_dim))
        return heads.transpose(1, 2) if self.batch_first else heads.permute(1, 2, 0, 3)

    def _with_more_keys(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """With the learned key and value, and with the zeros, that the layer adds at the end."""
        batches = query.size(0)
        if self.bias_k is not None and self.bias_v is not None:
            more = (bias.view(self.num_heads, 1, -1).expand(batches, -1, -1, -1) for bias in (self.bias_k, self.bias_v))
            key, value = (torch.cat(pair, 2) for pair in zip((key, value), more, strict=True))
        if self.add_zero_attn:
            key, value = (F.pad(rows, (0, 0, 0, 1)) for rows in (key, value))
        return query, key, value

    def _bias(self, padding: Tensor | None, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Both masks as one bias [N or 1, H or 1, L or 1, S]: bool, True where a key is looked at, or added."""
        parts = []
        if mask is not None:
            parts.append(mask.unflatten(0, (-1, self.num_heads)) if mask.dim() == 3 else mask[None, None])
        if padding is not None:
            parts.append(padding[:, None, None, :])
        if not parts:
            return None
        as_bool = all(part.dtype == torch.bool for part in parts)
        parts = [~part if as_bool else _added(part, dtype) for part in parts]
        bias = parts[0] if len(parts) == 1 else parts[0] & parts[1] if as_bool else parts[0] + parts[1]
        more = int(self.bias_k is not None) + int(self.add_zero_attn)
        return F.pad(bias, (0, more), value=as_bool) if more else bias


def _fits(mask: Tensor | None, dtype: torch.dtype, *sizes: tuple[int, ...]) -> bool:
    return mask is None or (mask.shape in sizes and mask.dtype in (torch.bool, dtype))


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf)


def _linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, packs: Packs | None = None, activation: str | None = None
) -> Tensor:
    if is_traced(input):
        return linear(input, weight, bias, activation=activation)
    return run_linear(input, weight, bias, activation=activation, packs=packs)


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer` by its layers, of ours where they are; same arguments and state_dict.

    torch's calls one fused operator in eval mode. Nested tensors, which `torch.nn.TransformerEncoder` makes of padded
    batches there, still go to it.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.self_attn.__class__ = MultiheadAttention
        self.self_attn.out_proj.__class__ = NonDynamicallyQuantizableLinear
        self.linear1.__class__ = self.linear2.__class__ = Linear
        self.norm1.__class__ = self.norm2.__class__ = LayerNorm

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """[L, N, E], or [N, L, E] where ``batch_first`` -> the same."""
        if is_for_torch(src) or (not isinstance(src, torch.fx.Proxy) and src.is_nested):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        masks = src_mask, src_key_padding_mask, is_causal
        if not self.norm_first:
            x = self._normed_sum(self.norm1, self._sa_block(src, *masks), src)[0]
            return self._normed_sum(self.norm2, self._ff_block(x), x)[0]
        update = self._sa_block(self.norm1(src), *masks)
        normed, x = self._normed_sum(self.norm2, update, src)
        return x + self._ff_block(normed)

    @staticmethod
    def _normed_sum(norm: nn.Module, update: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """norm(x + update), and the sum."""
        if isinstance(norm, LayerNorm):
            return norm(update, x)
        total = x + update
        return norm(total), total

    def _ff_block(self, x: Tensor) -> Tensor:
        activation, layer = _ACTIVATIONS.get(self.activation), self.linear1
        watched = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
        if type(layer) is not Linear or activation is None or layer.activation is not None or watched:
            return super()._ff_block(x)
        packs = None if self.training or is_traced(x) else layer._kept()
        hidden = _linear(x, layer.weight, layer.bias, packs, activation)
        return self.dropout2(self.linear2(self.dropout(hidden)))
