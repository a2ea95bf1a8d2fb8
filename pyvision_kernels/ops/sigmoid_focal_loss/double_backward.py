"""Derivatives of the sigmoid focal loss in PyTorch, for gradients of gradients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus


def second_derivatives(x: Tensor, t: Tensor, alpha: float, gamma: float) -> tuple[Tensor, ...]:
    """Lx, Lt, Lxx, Lxt, Ltt of `L = a * u * w`: weight a(t), cross entropy u(x, t), and w = m(x, t)^gamma.

    m = 1 - p_t is bilinear in p and t. Where m is 0, so are the derivatives of its powers.
    """
    p, q = torch.sigmoid(x), torch.sigmoid(-x)
    if alpha >= 0:
        a, a_t = alpha * t + (1 - alpha) * (1 - t), 2 * alpha - 1
    else:
        a, a_t = torch.ones_like(t), 0.0

    u = torch.where(x >= 0, x * (1 - t), -x * t) + softplus(-x.abs())
    u_x, u_t, u_xx, u_xt = p - t, -x, p * q, -1.0

    m = p * (1 - t) + q * t
    m_x, m_t, m_xx, m_xt = p * q * (1 - 2 * t), q - p, p * q * (q - p) * (1 - 2 * t), -2 * p * q

    def power(exponent: float, factor: float) -> Tensor:
        if factor == 0:
            return torch.zeros_like(m)
        return torch.where(m == 0, 0.0, factor * torch.where(m == 0, 1.0, m) ** exponent)

    w, w_m, w_mm = m**gamma, power(gamma - 1, gamma), power(gamma - 2, gamma * (gamma - 1))
    w_x, w_t = w_m * m_x, w_m * m_t
    w_xx, w_xt, w_tt = w_mm * m_x**2 + w_m * m_xx, w_mm * m_x * m_t + w_m * m_xt, w_mm * m_t**2

    by_x, by_t = u_x * w + u * w_x, u_t * w + u * w_t
    return (
        a * by_x,
        a_t * u * w + a * by_t,
        a * (u_xx * w + 2 * u_x * w_x + u * w_xx),
        a_t * by_x + a * (u_xt * w + u_x * w_t + u_t * w_x + u * w_xt),
        2 * a_t * by_t + a * (2 * u_t * w_t + u * w_tt),
    )
