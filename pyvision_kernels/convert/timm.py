"""timm's self-attention by our kernels; imported where timm is met."""

from __future__ import annotations

import inspect

import torch.fx
from timm.layers.attention import Attention as StockAttention
from torch import Tensor

from pyvision_kernels.nn._layer import is_for_torch
from pyvision_kernels.ops.attention import attention

# A leaf for torch.fx.
torch.fx.wrap("attention")

_KNOWN = {
    "forward": "self x attn_mask is_causal",
    "__init__": (
        "self dim num_heads attn_head_dim dim_out qkv_bias qk_norm scale_norm proj_bias gated attn_drop proj_drop "
        "norm_layer device dtype"
    ),
}
_CHANGED = [
    name
    for name, arguments in _KNOWN.items()
    if " ".join(inspect.signature(getattr(StockAttention, name)).parameters) != arguments
]
# Why `convert` leaves the class alone; empty: it does not.
REFUSED = f"of a version of timm with other arguments of {_CHANGED[0]}" if _CHANGED else ""


class Attention(StockAttention):
    """`timm.layers.Attention`: the heads are read where the projection left them."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, L, dim] -> [B, L, dim_out]."""
        if is_for_torch(x):
            return super().forward(x, attn_mask, is_causal)
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = self.q_norm(query), self.k_norm(key)
        dropout = self.attn_drop.p if self.training else 0.0
        heads = attention(query, key, value, attn_mask, is_causal=is_causal, dropout_p=dropout)
        output = self.norm(heads.transpose(1, 2).flatten(2))
        if self.gate is not None:
            output = output * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(output))
