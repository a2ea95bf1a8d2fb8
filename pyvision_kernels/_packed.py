"""What a layer keeps between calls in eval mode: packed weights, folded batch norms; and when that is out of date."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from operator import attrgetter, is_, methodcaller
from typing import Any

import torch
from torch import Tensor, nn

_MOST = 4096  # results of one weight: a model may be called with pictures of any size
PLAIN = (torch.Tensor, nn.Parameter)  # subclasses may have no memory of their own


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
    """A weight as it was seen, and what was made of it. Replaced as a whole, so that threads may share it."""

    __slots__ = ("ref", "results", "stamp")

    def __init__(self, weight: Tensor):
        self.ref = weakref.ref(weight)
        self.stamp = stamp(weight)
        self.results: dict[Hashable, Any] = {}


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

    def get(self, weight: Tensor, key: Hashable, make: Callable[[], Any]) -> Any:
        """The packed weight for a key, made where it is not there; None where none can be kept."""
        kept = self._kept
        if kept is not None and kept.ref() is weight and stamp(weight) == kept.stamp:
            packed = kept.results.get(key)
            if packed is not None:
                return packed
        else:
            if type(weight) not in PLAIN or weight.is_meta or (weight.is_inference() and not self._pinned):
                return None
            kept = self._kept = _Kept(weight)
        packed = _outside_of_autograd(make)
        if len(kept.results) > _MOST:
            kept.results.clear()
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
    """The scale and shift per channel that a batch norm is in eval mode; kept as packed weights are.

    Of the four vectors only identity, address and version are compared, and they are kept alive, which is cheaper.
    """

    __slots__ = ("_kept", "norm")

    def __init__(self, norm: nn.Module):
        self.norm: Any = norm
        self._kept: tuple[Any, ...] | None = None

    def get(self) -> tuple[Tensor, Tensor]:
        """scale, shift: float64 where the norm is, else float32."""
        norm, kept = self.norm, self._kept
        vectors = tuple(held[name] for held, name in self.places())
        if kept is not None:
            seen, present, versions, addresses, eps, folded = kept
            if (
                all(map(is_, vectors, seen))
                and list(map(_version_of, present)) == versions
                and list(map(_address_of, present)) == addresses
                and norm.eps == eps
            ):
                return folded
        eps = norm.eps
        present = [vector for vector in vectors if vector is not None]
        if any(vector.is_inference() for vector in present):
            return _outside_of_autograd(lambda: _fold(vectors, eps))
        versions, addresses = list(map(_version_of, present)), list(map(_address_of, present))
        folded = _outside_of_autograd(lambda: _fold(vectors, eps))
        self._kept = (vectors, present, versions, addresses, eps, folded)
        return folded

    def places(self) -> tuple[tuple[dict[str, Any], str], ...]:
        """Where the mean, the variance, the weight and the bias are held."""
        buffers, parameters = self.norm._buffers, self.norm._parameters
        affine = parameters if "weight" in parameters else buffers  # of a frozen batch norm
        return (buffers, "running_mean"), (buffers, "running_var"), (affine, "weight"), (affine, "bias")

    def drop(self) -> None:
        self._kept = None


_version_of = attrgetter("_version")
_address_of = methodcaller("data_ptr")


kept_by = attrgetter("_kept")  # of Packs or a FoldedNorm: another object where what it kept is out of date


def keeps(keeper: Packs | FoldedNorm, made: Tensor) -> bool:
    """Whether a keeper still has what it made: a packed weight, or a scale."""
    kept = kept_by(keeper)
    if kept is None:
        return False
    results = kept.results.values() if isinstance(kept, _Kept) else kept[-1]
    return any(result is made for result in results)


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
