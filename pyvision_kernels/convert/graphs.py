"""Models whose forward is captured: in eval mode a call on CUDA replays a graph of all its launches.

An instance becomes one of a subclass of its class, as a fused one does (fuse.py). A graph is kept for each structure,
size, dtype, layout and device of the arguments. It reads inputs from memory of its own, into which a call copies its
arguments; results are copies of what it wrote. All are dropped where a submodule, parameter or buffer is another, or a
tensor was moved or written, for packed weights and folded batch norms in them would be out of date.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable
from operator import is_, methodcaller
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from pyvision_kernels._backend import CHOICE
from pyvision_kernels._packed import is_off

_GRAPHS = "_pvk_graphs"  # in the `__dict__` of a model; never copied or pickled
_MOST = 8  # graphs of a model: the one that was not used for longest goes
_WARM_UPS = 3  # calls before a capture: what is packed, compiled or measured once is not to be captured
Replay = Callable[[], Any]


class Graphs:
    """The graphs of one model. They share the memory between their layers, so one runs after the other."""

    def __init__(self) -> None:
        self.kept: OrderedDict[Any, _Graph] = OrderedDict()
        self.seen: _Seen | None = None
        self.lock = threading.Lock()
        self.pool: Any = None
        self.stream: Any = None  # that the last one was queued on

    def suits(self, model: nn.Module) -> bool:
        """Whether a graph computes what a call does now; those that are out of date are dropped."""
        with self.lock:
            if self.seen is None or not self.seen.is_current():
                self.kept.clear()
                self.seen = _Seen(model)
            return self.seen.is_plain()

    def call(self, model: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        leaves, structure = tree_flatten((args, kwargs))
        key = structure, CHOICE.key, _autocast(), tuple(map(_described, leaves))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        with self.lock:
            self._follow(tensors[0].device)
            graph = self.kept.get(key)
            if graph is None:
                graph = _Graph(model, forward, leaves, structure, self.pool)
                self.pool = graph.pool
                self.kept[key] = graph
                if len(self.kept) > _MOST:
                    self.kept.popitem(last=False)
            self.kept.move_to_end(key)
            return graph.run(tensors)

    def drop(self) -> None:
        self.kept.clear()

    def _follow(self, device: torch.device) -> None:
        """Has the current stream wait for what another one still does with the graphs' memory."""
        current: Any = torch.cuda.current_stream(device) if device.type == "cuda" else None
        if self.stream is not None and self.stream != current:
            current.wait_stream(self.stream)
        self.stream = current


class _Seen:
    """What graphs depend on of a model, as it was. All is held, so that no identity or address is given out again."""

    def __init__(self, model: nn.Module) -> None:
        states = [module.__dict__ for module in model.modules()]
        self.parts = states[1:]  # a hook of the model itself is called around its forward
        self.holders = [state[kind] for state in states for kind in ("_modules", "_parameters", "_buffers")]
        items = [(holder, name, value) for holder in self.holders for name, value in holder.items()]
        self.places, self.names, self.values = ([item[i] for item in items] for i in range(3))
        self.tensors = [value for value in self.values if isinstance(value, Tensor)]
        self.written = self._written()

    def is_current(self) -> bool:
        return (
            sum(map(len, self.holders)) == len(self.names)
            and all(map(is_, self.values, map(dict.get, self.places, self.names)))
            and self._written() == self.written
        )

    def is_plain(self) -> bool:
        """No layer has a hook, which a replay would not call, or is in train mode."""
        return not any(
            state["training"] or state["_forward_hooks"] or state["_forward_pre_hooks"] for state in self.parts
        )

    def _written(self) -> tuple[Any, ...]:
        return list(map(_address_of, self.tensors)), list(map(_version_of, self.tensors))


_address_of = methodcaller("data_ptr")


def _version_of(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version  # inference tensors count no writes


class _Graph:
    def __init__(self, model: nn.Module, forward: Callable[..., Any], leaves: list[Any], structure: Any, pool: Any):
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.inputs = list(map(torch.empty_like, given))
        self._fill(given)
        own = iter(self.inputs)
        args, kwargs = tree_unflatten([next(own) if isinstance(leaf, Tensor) else leaf for leaf in leaves], structure)
        call = functools.partial(forward, model, *args, **kwargs)
        try:
            self.replay, self.outputs, self.pool = capture(call, given[0].device, pool)
        except RuntimeError as error:
            raise RuntimeError(
                f"convert: expected {type(model).__name__} to be one that a CUDA graph can capture (without "
                f"synchronisation, without sizes that depend on values), but got: {error}"
            ) from error

    def run(self, given: list[Tensor]) -> Any:
        self._fill(given)
        self.replay()
        return tree_map_only(Tensor, torch.clone, self.outputs)

    def _fill(self, given: list[Tensor]) -> None:
        for own, tensor in zip(self.inputs, given, strict=True):
            own.copy_(tensor)


def capture(call: Callable[[], Any], device: torch.device, pool: Any) -> tuple[Replay, Any, Any]:
    """What replays a call, its outputs, which each replay writes anew, and the pool of memory that it is in."""
    with torch.cuda.device(device):
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                call()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            outputs = call()
    return graph.replay, outputs, graph.pool()


def _described(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    return type(leaf), leaf


def _autocast() -> Any:
    return torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")


def _replays(model: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether a call is one for a graph.

    Raises:
        RuntimeError: an argument is not on a CUDA device.
    """
    if model.training or is_off() or torch_module._has_any_global_hook():
        return False
    leaves = tree_flatten((args, kwargs))[0]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, *model.parameters())):
        return False
    elsewhere = next((tensor.device for tensor in tensors if not on_gpu(tensor)), None)
    if not tensors or elsewhere is not None:
        raise RuntimeError(
            f"convert: expected tensors on a CUDA device, for a model converted with cuda_graph=True, but got "
            f"{'none' if elsewhere is None else f'one on {elsewhere}'}"
        )
    return not torch.cuda.is_current_stream_capturing()  # within another graph it is a part of that


def on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


# ---- the class of a model that is captured ----


def graph(model: nn.Module) -> None:
    """Has a model captured from its next call on."""
    model.__class__ = graphed_class(type(model))


def ungraph(module: nn.Module) -> None:
    """Gives one module the class back that it had."""
    module.__class__ = without_graph(type(module))
    module.__dict__.pop(_GRAPHS, None)


def without_graph(cls: type) -> Any:
    """The class that a captured class was made of; another class itself."""
    return vars(cls).get("_pvk_captured_class", cls)


_CLASSES: dict[Any, Any] = {}


def graphed_class(own: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a class whose instances are captured."""
    return _CLASSES.get(own) or _CLASSES.setdefault(own, _make_graphed_class(own))


def _make_graphed_class(own: Any) -> Any:
    def graphs_of(model: Any) -> Graphs:
        return model.__dict__.setdefault(_GRAPHS, Graphs())

    @functools.wraps(own.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _replays(self, args, kwargs) or not graphs_of(self).suits(self):
            return own.forward(self, *args, **kwargs)
        with torch.no_grad():
            return graphs_of(self).call(self, own.forward, args, kwargs)

    def train(self: Any, mode: bool = True) -> Any:
        graphs_of(self).drop()
        return own.train(self, mode)

    def _apply(self: Any, *args: Any, **kwargs: Any) -> Any:
        graphs_of(self).drop()
        return own._apply(self, *args, **kwargs)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        make, given, state, *rest = own.__reduce_ex__(self, protocol)
        state = {key: value for key, value in state.items() if key != _GRAPHS}
        given = tuple(own if item is type(self) else item for item in given)
        return _new_graphed, (make, given), state, *rest

    members = {
        "__module__": __name__,
        "__qualname__": own.__qualname__,
        "__doc__": own.__doc__,
        "_pvk_captured_class": own,
        **{function.__name__: function for function in (forward, train, _apply, __reduce_ex__)},
    }
    return type(own)(own.__name__, (own,), members)


def _new_graphed(make: Callable[..., nn.Module], given: tuple[Any, ...]) -> nn.Module:
    model = make(*given)
    model.__class__ = graphed_class(type(model))
    return model
