"""The reference attention module: dot and general scores by one linear map."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Attention between decoder and encoder states, by a linear map `attn`.

    On single states, [B, D], the reference's arithmetic:

    - dot: ``softmax(attn(enc), 1)[:, :, None] @ dec[:, None, :]``, [B, enc_embed_dim, D]
    - general: ``softmax(attn(dec), 1)[:, :, None] @ enc[:, None, :]``, [B, 1, E]

    On sequences:

    - dot: scores ``attn(dec) @ enc.T``, softmax over the encoder's positions, the weighted sum of ``enc``: [B, L, E]
    - general: ``dec`` and ``enc`` have one length; weights ``softmax(attn(dec), 1)``, the weighted sum of ``enc``:
      [B, 1, E]

    Args:
        model: Anything with ``dec_embed_dim`` and ``enc_embed_dim``; only these are taken of it.
        attn_type (str): ``"dot"``: `attn` maps dec_embed_dim to enc_embed_dim; ``"general"``: to 1. Default: ``"dot"``.

    Raises:
        ValueError: ``attn_type`` is neither, or the states have neither two nor three dimensions.

    Reference: Luong et al., Effective Approaches to Attention-based Neural Machine Translation, 2015.
    """

    def __init__(self, model: Any, attn_type: str = "dot") -> None:
        if attn_type not in ("dot", "general"):
            raise ValueError(f"Attention: expected attn_type to be 'dot' or 'general', but got {attn_type!r}")
        super().__init__()
        self.attn_type = attn_type
        self.attn = nn.Linear(model.dec_embed_dim, model.enc_embed_dim if attn_type == "dot" else 1)

    def forward(self, dec: Tensor, enc: Tensor) -> Tensor:
        """Decoder states and encoder states -> their context."""
        if dec.dim() != enc.dim() or dec.dim() not in (2, 3):
            sizes = f"{list(dec.shape)} and {list(enc.shape)}"
            raise ValueError(f"Attention: expected dec and enc to have 2 dimensions, or 3, but got {sizes}")
        if dec.dim() == 2:
            by, to = (enc, dec) if self.attn_type == "dot" else (dec, enc)
            return F.softmax(self.attn(by), 1)[:, :, None] @ to[:, None, :]
        if self.attn_type == "dot":
            return self._over_states(self.attn(dec), enc)
        if dec.size(1) != enc.size(1):
            raise ValueError(f"Attention: expected enc to have {dec.size(1)} states as dec has, but got {enc.size(1)}")
        return F.softmax(self.attn(dec), 1).mT @ enc

    def _over_states(self, query: Tensor, enc: Tensor) -> Tensor:
        """softmax(query @ enc.T) @ enc."""
        return F.scaled_dot_product_attention(query, enc, enc, scale=1.0)
