"""What convolutions and linear layers of ours share: an activation, packed weights, and when these are dropped."""

from __future__ import annotations

from typing import Any

import torch.fx
from torch import Tensor, nn

from pyvision_kernels import _activation
from pyvision_kernels._check import FLOATING
from pyvision_kernels._packed import Packs

_DTYPES = frozenset(FLOATING)


class Layer(nn.Module):
    """Beside a stock class, in front of it. Nothing here needs `__init__`: an instance may come by its `__class__`."""

    # In `__dict__` where they are set.
    activation: str | None = None
    _packs: Packs | None = None

    def _set_activation(self, activation: str | None) -> None:
        _activation.number_of(type(self).__name__, activation)
        if activation is not None:
            self.activation = activation

    def _kept(self) -> Packs:
        packs = self.__dict__.get("_packs")
        if packs is None:
            packs = self.__dict__["_packs"] = Packs()
        return packs

    def repack(self) -> None:
        """Drops the packed weights, which are made anew by the next call.

        For writes that PyTorch does not count: to ``weight.data``, through numpy, by a fused optimiser. Weights that
        are inference tensors, of which it counts no write, are packed at every call until this is called; thereafter
        call it after every write to them.
        """
        self._kept().drop(pinned=True)

    def _drop(self) -> None:
        packs = self.__dict__.get("_packs")
        if packs is not None:
            packs.drop()

    def train(self, mode: bool = True) -> Any:
        self._drop()
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._drop()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._drop()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        stock = super().extra_repr()
        return stock if self.activation is None else f"{stock}, activation={self.activation!r}"

    def _activated(self, output: Tensor) -> Tensor:
        return output if self.activation is None else _activation.FUNCTIONS[self.activation](output)


def is_for_torch(input: Any) -> bool:
    """Whether PyTorch's own function is to be called: it casts under autocast, knows more dtypes, ..."""
    if torch.compiler.is_compiling():
        return torch.is_autocast_enabled(input.device.type) or input.dtype not in FLOATING
    if type(input) is not Tensor and type(input) is not nn.Parameter:
        return not isinstance(input, torch.fx.Proxy)
    return (
        input.dtype not in _DTYPES
        or torch._C._is_any_autocast_enabled()
        or torch._C._functorch.maybe_current_level() is not None
        or torch._C._get_tracing_state() is not None
    )


def is_traced(input: Any) -> bool:
    """Whether the call is recorded, not run: the public function is a leaf of what is recorded."""
    return torch.compiler.is_compiling() or isinstance(input, torch.fx.Proxy)


def parameters_of(layer: Any) -> tuple[Tensor, Tensor | None, Packs | None]:
    """Weight, bias, and what is kept of the weight; that in eval mode, of a parameter that the layer holds.

    Parameters are looked up in a tenth of the time of ``layer.<name>``, which is for those that come otherwise.
    """
    parameters = layer._parameters
    held = parameters.get("weight")
    try:
        bias = parameters["bias"]
    except KeyError:
        bias = layer.bias
    if held is None:
        return layer.weight, bias, None
    return held, bias, None if layer.training else layer._kept()
