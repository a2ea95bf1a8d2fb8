"""batch_norm in readable PyTorch: the definition."""

from __future__ import annotations

from torch import Tensor

from pyvision_kernels import _activation


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """activation(batch_norm(input) + residual); running statistics are left as they are."""
    dims = [dim for dim in range(input.dim()) if dim != 1]
    shape = [-1 if dim == 1 else 1 for dim in range(input.dim())]
    if training:
        # Beside the first value of a channel: of constants the difference is 0, and a large mean costs no digits.
        first = input.transpose(0, 1).flatten(1)[:, :1].reshape(shape)
        centered = (input - first) - (input - first).mean(dims, keepdim=True)
        variance = centered.square().mean(dims, keepdim=True)
    else:
        assert running_mean is not None
        assert running_var is not None
        centered, variance = input - running_mean.view(shape), running_var.view(shape)
    out = centered / (variance + eps).sqrt()
    if weight is not None:
        out = out * weight.view(shape)
    if bias is not None:
        out = out + bias.view(shape)
    if residual is not None:
        out = out + residual
    return _activation.apply(_activation.number_of("batch_norm", activation), out)
