"""`CrossEntropyLoss`, in place of torch.nn's."""

from __future__ import annotations

import torch
import torch.fx
from torch import Tensor, nn

from pyvision_kernels._backend import CHOICE
from pyvision_kernels.nn._layer import is_for_torch, is_traced
from pyvision_kernels.ops.softmax_cross_entropy import softmax_cross_entropy

torch.fx.wrap("softmax_cross_entropy")  # a leaf for torch.fx

_SMALL, _SMALL_WITH_GRADIENT = 1 << 10, 1 << 17  # logits on the CPU that PyTorch is through with before our call is


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """`torch.nn.CrossEntropyLoss` by our kernels: see :func:`pyvision_kernels.ops.softmax_cross_entropy`."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """[C], [N, C] or [N, C, ...] and labels or probabilities -> the loss."""
        if is_for_torch(input):
            return super().forward(input, target)
        options = self.weight, self.ignore_index, self.reduction, self.label_smoothing
        if is_traced(input):
            return softmax_cross_entropy(input, target, *options)
        if CHOICE.backend == "auto" and self.label_smoothing == 0 and not input.is_cuda:
            trains = input.requires_grad and torch.is_grad_enabled()
            if input.numel() < (_SMALL_WITH_GRADIENT if trains else _SMALL):
                return super().forward(input, target)
        try:
            return softmax_cross_entropy(input, target, *options)
        except (RuntimeError, ValueError, TypeError):  # PyTorch takes more, and words what both refuse
            return super().forward(input, target)
