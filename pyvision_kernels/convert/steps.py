"""What a fused forward calls: a chain of the graph by one kernel, or call by call where that does not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyvision_kernels import _activation
from pyvision_kernels import nn as ours
from pyvision_kernels._backend import CHOICE
from pyvision_kernels._packed import FoldedNorm, Packs, PacksOf
from pyvision_kernels._tuner import TUNER
from pyvision_kernels.convert.patterns import Chain
from pyvision_kernels.convert.trace import is_norm_with_activation
from pyvision_kernels.nn.conv import geometry_of
from pyvision_kernels.ops.conv2d import run as run_conv2d
from pyvision_kernels.ops.conv2d.algorithm import TORCH, is_triton
from pyvision_kernels.ops.conv2d.choice import fusion_of
from pyvision_kernels.ops.conv2d.operator import conv2d_op, decide, pack, state_of
from pyvision_kernels.ops.linear import run as run_linear


class Step:
    """One chain, called with its input and what is added."""

    def __init__(self, chain: Chain):
        self.layer: Any = chain.layer
        self.norm = None if chain.norm is None else FoldedNorm(chain.norm)
        self.norm_activates = chain.norm is not None and is_norm_with_activation(chain.norm)
        self.activation, self.pool, self.add_into = chain.activation, chain.pool, chain.add_into
        self.parameters = chain.layer._parameters
        self.packs: Packs = chain.layer._kept()
        self.fits: dict[Any, bool] = {}

    def apart(self, input: Tensor, residual: Any) -> Tensor:
        """Call by call, where shapes or types are not those of one kernel."""
        out = self.layer(input)
        if self.norm is not None:
            out = self.norm.norm(out)
        if residual is not None:
            if self.add_into is None:
                out = out + residual
            elif self.add_into == "result":
                out += residual
            else:
                residual += out
                out = residual
        if self.activation is not None and self.layer.activation is None and not self.norm_activates:
            out = _activation.FUNCTIONS[self.activation](out)
        return F.max_pool2d(out, 2) if self.pool else out

    def takes(self, input: Tensor, residual: Any) -> bool:
        """Whether a residual has the size and the type of the result."""
        if type(residual) is not Tensor or residual.dtype is not input.dtype:
            return False
        key = input.shape, residual.shape
        fits = self.fits.get(key)
        if fits is None:
            if len(self.fits) > 256:
                self.fits.clear()
            fits = self.fits[key] = residual.shape == self.result_size(input) and residual.device == input.device
        return fits

    def result_size(self, input: Tensor) -> torch.Size:
        raise NotImplementedError


_IN_PLACE: dict[str | None, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "relu6": lambda x: F.relu6(x, inplace=True),
    "hardswish": lambda x: F.hardswish(x, inplace=True),
    "silu": lambda x: F.silu(x, inplace=True),
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid_,
}


class Conv2dStep(Step):
    """The way of `run`, shorter: what it finds out of a call is kept beside the packed weight."""

    def __init__(self, chain: Chain):
        super().__init__(chain)
        self.geometry = geometry_of(chain.layer)
        self.number = _activation.NUMBERS[self.activation]
        self.operator: Callable[..., Any] = conv2d_op

    def __call__(self, input: Tensor, residual: Any = None, channels_last: bool | None = True) -> Tensor:
        if input.dim() != 4 or (residual is not None and not self.takes(input, residual)):
            return self.apart(input, residual)
        parameters = self.parameters
        weight, bias = parameters["weight"], parameters["bias"]
        scale, shift = (None, None) if self.norm is None else self.norm.get()
        key: Any = (input.shape, input.dtype, CHOICE.key)
        if input.is_cuda:
            key = key, state_of(input), residual is None
            if TUNER.active:
                return self._run(input, weight, bias, scale, shift, residual, channels_last)
        decided = self.packs.get(weight, key, lambda: self._decide(input, weight, residual))
        if decided is not None and decided[0] == TORCH:
            return self._by_torch(input, residual, channels_last)
        if decided is None or channels_last is None or is_triton(decided[0]):
            return self._run(input, weight, bias, scale, shift, residual, channels_last)
        kernel, packed = decided
        return self.operator(
            input,
            weight,
            bias,
            scale,
            shift,
            residual,
            packed,
            self.geometry.numbers,
            self.number,
            self.pool,
            channels_last,
            kernel,
        )

    def _decide(self, input: Tensor, weight: Tensor, residual: Any) -> tuple[int, Tensor | None]:
        fusion = ""
        if input.is_cuda:
            held = self.parameters["bias"], self.norm, self.norm, residual
            fusion = fusion_of(*held, self.activation, self.pool)
        kernel = decide(input, weight, self.geometry, packed=True, alone=False, fusion=fusion)
        by_others = kernel == TORCH or is_triton(kernel)
        return kernel, None if by_others else self.pack_for(weight, kernel, input.dtype)

    def pack_for(self, weight: Tensor, kernel: int, dtype: torch.dtype) -> Tensor | None:
        """The packed weight; None where none can be kept."""
        return self.packs.get(weight, (kernel, dtype), lambda: pack(weight, self.geometry, kernel))

    def _by_torch(self, input: Tensor, residual: Any, channels_last: bool | None) -> Tensor:
        """PyTorch's convolution, and what follows written over it."""
        weight, bias = self.parameters["weight"], self.parameters["bias"]
        out = run_conv2d(input, weight, bias, self.geometry, channels_last=channels_last)
        activates = self.activation is not None
        if self.norm is not None:
            scale, shift = self.norm.get()
            if scale.dtype == out.dtype:
                out = torch.addcmul(shift.view(1, -1, 1, 1), out, scale.view(1, -1, 1, 1))
            else:
                out, activates = self.norm.norm(out), activates and not self.norm_activates
        if residual is not None:
            out += residual
        if activates:
            out = _IN_PLACE[self.activation](out)
        return F.max_pool2d(out, 2) if self.pool else out

    def _run(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        shift: Tensor | None,
        residual: Any,
        channels_last: bool | None,
    ) -> Tensor:
        return run_conv2d(
            input,
            weight,
            bias,
            self.geometry,
            scale=scale,
            shift=shift,
            residual=residual,
            activation=self.activation,
            pool=self.pool,
            packs=self.packs,
            channels_last=channels_last,
            fused=True,
        )

    def result_size(self, input: Tensor) -> torch.Size:
        weight = self.parameters["weight"]
        rows, columns = self.geometry.output_size(input.shape[2:], weight.shape[2:])
        return torch.Size((input.shape[0], weight.shape[0], rows, columns))


class Conv1dStep(Conv2dStep):
    def __call__(self, input: Tensor, residual: Any = None, channels_last: bool | None = True) -> Tensor:
        if input.dim() != 3 or (residual is not None and not self.takes(input, residual)):
            return self.apart(input, residual)
        weight = self.parameters["weight"]
        scale, shift = (None, None) if self.norm is None else self.norm.get()
        return run_conv2d(
            input.unsqueeze(2),
            weight.unsqueeze(2),
            self.parameters["bias"],
            self.geometry,
            scale=scale,
            shift=shift,
            residual=None if residual is None else residual.unsqueeze(2),
            activation=self.activation,
            packs=PacksOf(self.packs, weight),
            channels_last=False,
        ).squeeze(2)

    def result_size(self, input: Tensor) -> torch.Size:
        weight = self.parameters["weight"]
        columns = self.geometry.output_size((1, input.shape[2]), (1, weight.shape[2]))[1]
        return torch.Size((input.shape[0], weight.shape[0], columns))


class LinearStep(Step):
    def __call__(self, input: Tensor, residual: Any = None) -> Tensor:
        if residual is not None and not self.takes(input, residual):
            return self.apart(input, residual)
        parameters = self.parameters
        return run_linear(
            input,
            parameters["weight"],
            parameters["bias"],
            residual=residual,
            activation=self.activation,
            packs=self.packs,
        )

    def result_size(self, input: Tensor) -> torch.Size:
        return torch.Size((*input.shape[:-1], self.parameters["weight"].shape[0]))


class NormStep:
    """A batch norm of 4-dimensional maps by itself: one pass, with the relu written over it."""

    def __init__(self, chain: Chain):
        self.norm = FoldedNorm(chain.layer)
        self.relu = chain.activation is not None
        self.is_whole = is_norm_with_activation(chain.layer)

    def __call__(self, input: Tensor) -> Tensor:
        scale, shift = self.norm.get()
        if input.dim() != 4 or input.dtype != scale.dtype:
            out = self.norm.norm(input)
            if self.is_whole:
                return out
        else:
            out = torch.addcmul(shift.view(1, -1, 1, 1), input, scale.view(1, -1, 1, 1))
        return out.relu_() if self.relu else out


STEPS: dict[type, type[Any]] = {ours.Conv2d: Conv2dStep, ours.Conv1d: Conv1dStep, ours.Linear: LinearStep}
