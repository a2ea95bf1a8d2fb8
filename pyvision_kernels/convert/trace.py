"""The graph of what a module computes in the mode it is in, by torch.fx; what it cannot follow stays a call.

Beside what torch.fx does itself: a submodule whose forward cannot be followed becomes a leaf, and the rest is still
traced; a check of a value's type in the model's code, and a constant tensor that it makes, count as not to be followed,
for the graph would hold the answer for ever; and tracing leaves the model as it was.
"""

from __future__ import annotations

import inspect
import operator
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

_LOCK = threading.RLock()  # torch.fx replaces nn.Module.__call__ while it traces
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
EXCLUDED = "_pvk_excluded"  # on a module that convert was told to leave
_FROZEN = "torchvision.ops.misc.FrozenBatchNorm2d"
_NORM_ACT = "timm.layers.norm_act.BatchNormAct2d"


class NotFollowed(Exception):
    """What a model does with a value that only a call with tensors can do."""


def has_hooks(module: nn.Module) -> bool:
    """Whether someone watches the calls of a module, or has replaced its forward: it must be called as it is."""
    values = module.__dict__
    return any(values[name] for name in _HOOKS) or "forward" in values


def hooks_of(module: nn.Module) -> list[Any]:
    return [module.__dict__[name] for name in _HOOKS]


def is_frozen_norm(module: nn.Module) -> bool:
    return _name_of(module) == _FROZEN


def is_norm_with_activation(module: nn.Module) -> bool:
    """timm's batch norm that is followed by its submodules `drop` and `act`; where nobody watches these."""
    return _name_of(module) == _NORM_ACT and not any(map(has_hooks, module.children()))


def _name_of(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


class _Value(fx.Proxy):
    """A traced value. Its type is not known: isinstance() of it in a model's code is not answered."""

    @property
    def __class__(self) -> Any:
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_globals.get("__name__") in ("abc", "typing"):
            frame = frame.f_back
        if frame.f_globals.get("__name__", "").partition(".")[0] == "torch":
            return _Value
        raise NotFollowed("its code depends on the type of a value")

    @__class__.setter
    def __class__(self, value: Any) -> None:
        raise AttributeError("__class__")


def _recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    def record(*args: Any) -> Any:
        return args[0].tracer.create_proxy("call_function", function, args, {})

    return record


# torch.fx takes `x += y` for `x = x + y`, which other names of x would not see, and refuses `x[i] = y`.
for _operation in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "setitem"):
    setattr(_Value, f"__{_operation}__", _recorded(getattr(operator, _operation)))


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        super().__init__()
        self.proxy_buffer_attributes = True
        self.opaque: dict[str, str] = {}  # submodules that could not be followed, and why
        self._thread = threading.get_ident()
        self._parameters: dict[str, fx.Proxy] = {}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        stock = type(m).__module__.startswith(("torch.nn.", "torch.ao.nn.", "pyvision_kernels.nn."))
        known = is_frozen_norm(m) or is_norm_with_activation(m) or (stock and not isinstance(m, nn.Sequential))
        return known or EXCLUDED in m.__dict__ or has_hooks(m)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        self._parameters = parameter_proxy_cache
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        name = self.path_of_module(m)
        if not self.is_leaf_module(m, name):
            known, lists = set(self.graph.nodes), _lengths(args, kwargs)
            try:
                return forward(*args, **kwargs)
            except Exception as error:
                if _lengths(args, kwargs) != lists:
                    raise NotFollowed("a part that cannot be followed changes a list that it is given") from error
                self.opaque[name] = str(error).partition("\n")[0]
                self._forget(known)
        return self.create_proxy("call_module", name, args, kwargs)

    def _forget(self, known: set[fx.Node]) -> None:
        for node in reversed(self.graph.nodes):
            if node not in known:
                self.graph.erase_node(node)
        for name in [name for name, proxy in self._parameters.items() if proxy.node not in known]:
            del self._parameters[name]

    def create_arg(self, a: Any) -> Any:
        kind = type(a)
        if issubclass(kind, Tensor) and not isinstance(a, nn.Parameter):
            if not any(a is buffer for buffer in self.root.buffers()):
                raise NotFollowed("it makes a tensor that depends on no input")
        elif kind is OrderedDict:
            pairs = [(key, value) for key, value in a.items()]
            return self.create_proxy("call_function", OrderedDict, (pairs,), {}).node
        elif issubclass(kind, dict) and kind is not dict:
            raise NotFollowed(f"it makes a {kind.__name__}")
        return super().create_arg(a)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        # Arguments with a default keep it: another value of theirs is not for the traced graph.
        required = []
        for parameter in list(inspect.signature(root_fn).parameters.values())[1:]:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                raise NotFollowed("it takes any number of arguments")
            if parameter.default is parameter.empty:
                if parameter.kind is parameter.KEYWORD_ONLY:
                    raise NotFollowed("it takes an argument by its name alone")
                required.append(parameter.name)
        values = [self.create_proxy("placeholder", name, (), {}) for name in required]
        return root_fn, [self.root, *values]


def _lengths(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    return [len(value) for value in (*args, *kwargs.values()) if type(value) in (list, dict, OrderedDict)]


def trace(module: nn.Module, forward: str = "forward") -> tuple[fx.Graph, dict[str, str]]:
    """The graph of a module's method in its present mode, and the submodules that stay calls, with reasons.

    Raises:
        NotFollowed: the module itself cannot be followed.
    """
    tracer = _Tracer()
    tracer.traced_func_name = forward
    with _LOCK, torch.no_grad():
        before = _contents(module)
        try:
            graph = tracer.trace(module)
        except Exception as error:
            raise NotFollowed(str(error).partition("\n")[0]) from error
        finally:
            changed = _restore(before)
        if changed:
            raise NotFollowed("its forward changes its attributes")
    return graph, tracer.opaque


# Of a module, all that a forward may replace.
_HELD = ("_parameters", "_buffers", "_modules")


def _contents(root: nn.Module) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    held = []
    for module in root.modules():
        values = module.__dict__
        held.append((values, dict(values)))
        held += [(values[name], dict(values[name])) for name in _HELD]
    return held


def _restore(contents: list[tuple[dict[str, Any], dict[str, Any]]]) -> bool:
    changed = False
    for values, before in contents:
        if len(values) != len(before) or any(values.get(key, values) is not item for key, item in before.items()):
            values.clear()
            values.update(before)
            changed = True
    return changed
