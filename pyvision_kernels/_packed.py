"""What a layer keeps between calls in eval mode: packed weights, folded batch norms; and when that is out of date."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (torch.Tensor, nn.Parameter)  # subclasses may have no memory of their own


def stamp(tensor: Tensor) -> tuple[Any, ...]:
    """What differs after a write to the tensor, or a change of its memory; its identity aside."""
    try:
        version = tensor._version
    except RuntimeError:  # inference tensors count no writes
        version = None
    return version, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def is_off() -> bool:
    """Whether tensors may stand for others here: while compiling, tracing, or within torch.func's transforms."""
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.maybe_current_level() is not None
        or torch._C._get_tracing_state() is not None
    )


class _Kept:
    """A state of tensors, and what was computed from it. Replaced as a whole, so that threads may share it."""

    __slots__ = ("refs", "results", "stamps")

    def __init__(self, tensors: tuple[Tensor | None, ...]):
        self.refs = tuple(None if tensor is None else weakref.ref(tensor) for tensor in tensors)
        self.stamps = tuple(None if tensor is None else stamp(tensor) for tensor in tensors)
        self.results: dict[Hashable, Any] = {}

    def is_of(self, tensors: tuple[Tensor | None, ...]) -> bool:
        for tensor, ref, seen in zip(tensors, self.refs, self.stamps, strict=True):
            if tensor is None or ref is None:
                if tensor is not ref:
                    return False
            elif ref() is not tensor or stamp(tensor) != seen:
                return False
        return True


class Packs:
    """Packed weights of one layer, by what they were packed for.

    Kept for one tensor as it was last seen: another one, or the same after a write, drops them. A copy or a pickle of
    the layer starts with none.
    """

    __slots__ = ("_kept", "_pinned", "geometry")

    def __init__(self) -> None:
        self._kept: _Kept | None = None
        self._pinned = False
        self.geometry: tuple[tuple[Any, ...], Any] = ((), None)  # of a convolution: its arguments, and these checked

    def get(self, weight: Tensor, key: Hashable, make: Callable[[], Tensor]) -> Tensor | None:
        """The packed weight for a key, made where it is not there; None where none can be kept."""
        kept = self._kept
        if kept is not None and kept.refs[0]() is weight and stamp(weight) == kept.stamps[0]:  # type: ignore[misc]
            packed = kept.results.get(key)
            if packed is not None:
                return packed
        else:
            if type(weight) not in _PLAIN or (weight.is_inference() and not self._pinned):
                return None
            kept = self._kept = _Kept((weight,))
        packed = _outside_of_autograd(make)
        kept.results[key] = packed
        return packed

    def drop(self, pinned: bool = False) -> None:
        """Forgets everything. pinned: keep what is packed next of inference tensors too, whose writes none counts."""
        self._kept, self._pinned = None, pinned

    def __reduce__(self) -> tuple[Any, ...]:
        return Packs, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Packs:
        return Packs()


class PacksOf:
    """The packs of a layer for a run that is given a view of its weight."""

    __slots__ = ("packs", "weight")

    def __init__(self, packs: Packs, weight: Tensor):
        self.packs, self.weight = packs, weight

    def get(self, weight: Tensor, key: Hashable, make: Callable[[], Tensor]) -> Tensor | None:
        return self.packs.get(self.weight, key, make)


class FoldedNorm:
    """The scale and shift per channel that a batch norm is in eval mode, kept as packed weights are."""

    __slots__ = ("_kept", "norm")

    def __init__(self, norm: nn.Module):
        self.norm = norm
        self._kept: _Kept | None = None

    def get(self) -> tuple[Tensor, Tensor]:
        """scale, shift: float64 where the norm is, else float32."""
        norm = self.norm
        tensors, eps = _of_norm(norm), float(norm.eps)  # type: ignore[arg-type]
        kept = self._kept
        if kept is not None and kept.is_of(tensors):
            folded = kept.results.get(eps)
            if folded is not None:
                return folded
        folded = _outside_of_autograd(lambda: _fold(tensors, eps))
        if not any(tensor is not None and tensor.is_inference() for tensor in tensors):
            kept = _Kept(tensors)
            kept.results[eps] = folded
            self._kept = kept
        return folded

    def drop(self) -> None:
        self._kept = None


def _of_norm(norm: nn.Module) -> tuple[Tensor | None, ...]:
    """Mean, variance, weight, bias; the last two are buffers in a frozen batch norm."""
    buffers, parameters = norm._buffers, norm._parameters
    return (
        buffers["running_mean"],
        buffers["running_var"],
        parameters["weight"] if "weight" in parameters else buffers["weight"],
        parameters["bias"] if "bias" in parameters else buffers["bias"],
    )


def _fold(tensors: tuple[Any, ...], eps: float) -> tuple[Tensor, Tensor]:
    mean, variance, weight, bias = tensors
    wide = torch.float64
    scale = (variance.to(wide) + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.to(wide)
    shift = -mean.to(wide) * scale
    if bias is not None:
        shift = shift + bias.to(wide)
    kept = wide if mean.dtype == wide else torch.float32
    return scale.to(kept), shift.to(kept)


def _outside_of_autograd(make: Callable[[], Any]) -> Any:
    # What is made under inference_mode could not be used by a call outside of it.
    with torch.inference_mode(False), torch.no_grad():
        return make()
