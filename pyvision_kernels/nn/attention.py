"""`Attention`: a layer over dot, general or query/key/value attention."""

from __future__ import annotations

import torch.fx
from torch import Tensor, nn

from pyvision_kernels.nn.linear import Linear
from pyvision_kernels.ops.attention import attention
from pyvision_kernels.ops.attention.luong import dot_attention, general_attention

# Leaves for torch.fx.
torch.fx.wrap("attention")
torch.fx.wrap("dot_attention")
torch.fx.wrap("general_attention")

TYPES = ("dot", "general", "qkv")


class Attention(nn.Module):
    """Attention of one of three kinds.

    ``"dot"`` and ``"general"`` are Luong's, of decoder states over encoder states; ``"qkv"`` is the self-attention of
    vision transformers, with timm's names of parameters.

    Args:
        dim (int): Features of the decoder's states; of the tokens.
        attn_type (str): ``"dot"``, ``"general"`` or ``"qkv"``. Default: ``"qkv"``.
        encoder_dim (int): Of "general": features of the encoder's states. Default: ``dim``.
        num_heads (int): Of "qkv". Default: 8.
        qkv_bias (bool): Of "qkv": whether the projection to query, key and value has a bias. Default: False.
        attn_drop, proj_drop (float): Of "qkv": dropout of the weights, of the output. Default: 0.

    Shape: "dot" and "general": decoder [B, L, dim], encoder [B, S, encoder_dim] -> [B, L, encoder_dim]. "qkv": tokens
        [B, L, dim] -> [B, L, dim].

    Raises:
        ValueError: ``attn_type`` is none of these, or ``dim`` not a multiple of ``num_heads``.

    Reference: Luong et al., 2015; Dosovitskiy et al., An Image is Worth 16x16 Words, 2021.
    """

    def __init__(
        self,
        dim: int,
        attn_type: str = "qkv",
        *,
        encoder_dim: int | None = None,
        num_heads: int = 8,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        if attn_type not in TYPES:
            raise ValueError(f"Attention: expected attn_type to be 'dot', 'general' or 'qkv', but got {attn_type!r}")
        if attn_type == "qkv" and dim % num_heads:
            raise ValueError(f"Attention: expected dim to be a multiple of num_heads, but got {dim} and {num_heads}")
        super().__init__()
        self.attn_type = attn_type
        if attn_type == "general":
            self.weight = nn.Parameter(torch.empty(dim, dim if encoder_dim is None else encoder_dim))
            nn.init.xavier_uniform_(self.weight)
        elif attn_type == "qkv":
            self.num_heads, self.attn_drop = num_heads, attn_drop
            self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
            self.proj = Linear(dim, dim)
            self.proj_drop = nn.Dropout(proj_drop)

    def forward(
        self,
        query: Tensor,
        encoder: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        key_lengths: Tensor | None = None,
    ) -> Tensor:
        """Decoder states and encoder states, or tokens alone.

        Args:
            query (Tensor[B, L, dim]): Decoder states; tokens.
            encoder (Tensor[B, S, encoder_dim]): Encoder states; of "qkv" None.
            bias (Tensor): Of "qkv": as of `pvk.ops.attention`.
            key_lengths (Tensor[B]): States, or tokens, of each batch that are no padding. Default: all.
        """
        if (encoder is None) != (self.attn_type == "qkv"):
            wanted = "None" if self.attn_type == "qkv" else "a Tensor"
            raise TypeError(
                f"Attention: expected encoder to be {wanted} for {self.attn_type!r}, but got {type(encoder).__name__}"
            )
        if self.attn_type == "qkv":
            return self._over_tokens(query, bias, key_lengths)
        if bias is not None:
            raise TypeError(f"Attention: expected bias to be None for {self.attn_type!r}, but got a Tensor")
        assert encoder is not None
        if self.attn_type == "dot":
            return dot_attention(query, encoder, key_lengths=key_lengths)
        return general_attention(query, encoder, self.weight, key_lengths=key_lengths)

    def _over_tokens(self, tokens: Tensor, bias: Tensor | None, key_lengths: Tensor | None) -> Tensor:
        heads = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # [3, B, H, L, D]
        query, key, value = heads.unbind(0)
        dropout = self.attn_drop if self.training else 0.0
        output = attention(query, key, value, bias, dropout_p=dropout, key_lengths=key_lengths)
        return self.proj_drop(self.proj(output.transpose(1, 2).flatten(2)))

    def extra_repr(self) -> str:
        return f"attn_type={self.attn_type!r}"
