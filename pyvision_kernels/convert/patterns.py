"""What of a traced graph one call of a kernel computes: chains of layer, batch norm, addition, activation, pooling."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from pyvision_kernels import nn as ours
from pyvision_kernels.convert.trace import EXCLUDED, has_hooks, is_frozen_norm, is_norm_with_activation

ACTIVATION_MODULES: dict[type, str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.Hardswish: "hardswish",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Sigmoid: "sigmoid",
}
ACTIVATION_FUNCTIONS: dict[Callable[..., Any], str] = {
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu: "relu",
    F.relu_: "relu",
    F.relu6: "relu6",
    F.hardswish: "hardswish",
    F.silu: "silu",
    F.gelu: "gelu",
    torch.sigmoid: "sigmoid",
    torch.sigmoid_: "sigmoid",
    F.sigmoid: "sigmoid",
}
_ACTIVATION_METHODS = {"relu": "relu", "relu_": "relu", "sigmoid": "sigmoid", "sigmoid_": "sigmoid"}
_ADD_FUNCTIONS = (operator.add, operator.iadd, torch.add)
_ADD_METHODS = ("add", "add_")
_POOL_FUNCTIONS = (F.max_pool2d, torch.max_pool2d)
_POOL_OF_TWO = ((2, 2), (2, 2), (0, 0))
_DROPOUT_MODULES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_DROPOUT_FUNCTIONS = {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "stochastic_depth"}
_NORMS = {
    ours.Conv2d: (nn.BatchNorm2d, ours.BatchNorm2d, nn.SyncBatchNorm),
    ours.Conv1d: (nn.BatchNorm1d, ours.BatchNorm1d, nn.SyncBatchNorm),
}
LAYERS = (ours.Conv2d, ours.Conv1d, ours.Linear)

# Stages of a chain, in the order of a kernel's epilogue.
_NORM, _ADD, _ACTIVATION, _POOL = range(1, 5)


@dataclass
class Chain:
    """A layer and what is computed from its result alone, up to the last of `nodes`.

    The layer may be a batch norm, by itself or with a relu.
    """

    layer: Any
    name: str
    nodes: list[fx.Node]
    activation: str | None
    norm: nn.Module | None = None
    residual: fx.Node | None = None
    add_into: str | None = None  # an addition in place: into the chain's "result", or the "residual"
    pool: bool = False
    absorbed: list[str] = field(default_factory=list)

    @property
    def input(self) -> fx.Node:
        return self.nodes[0].args[0]  # type: ignore[return-value]


def remove_identities(graph: fx.Graph, modules: dict[str, nn.Module]) -> list[str]:
    """Takes out what gives its argument back: Identity, dropout in eval mode. Returns the names of the modules."""
    removed = []
    for node in list(graph.nodes):
        if not (node.args and isinstance(node.args[0], fx.Node)) or not _is_identity(node, modules):
            continue
        if node.op == "call_module":
            removed.append(node.target)
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
    return removed


def _is_identity(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        module = modules[node.target]  # type: ignore[index]
        kind = type(module)
        if len(node.args) != 1 or node.kwargs or not _may_go(module):
            return False
        return kind is nn.Identity or (kind in _DROPOUT_MODULES and not module.training)
    if node.op == "call_function" and getattr(node.target, "__name__", "") in _DROPOUT_FUNCTIONS:
        return _arguments(node).get("training") is False
    return False


def find_chains(graph: fx.Graph, modules: dict[str, nn.Module]) -> list[Chain]:
    """The chains of a graph; none shares a node with another."""
    memory = _Memory(graph, modules)
    chains, taken = [], set[fx.Node]()
    # From the end: of two layers that are added, the later one finds the other's result ready.
    for node in reversed(graph.nodes):
        chain = _begin(node, modules)
        if chain is None:
            continue
        ends = [(chain.nodes[0], _copy(chain))]
        for grown in _grow(chain, modules, memory, taken):
            ends.append((grown.nodes[-1], _copy(grown)))
        while len(ends) > 1 and not memory.may_move(ends[-1][1]):
            ends.pop()
        chain = ends[-1][1]
        taken.update(chain.nodes)
        chains.append(chain)
    chains += [norm for node in graph.nodes if node not in taken and (norm := _norm(node, modules, memory, taken))]
    return chains


def _norm(node: fx.Node, modules: dict[str, nn.Module], memory: _Memory, taken: set[fx.Node]) -> Chain | None:
    """A batch norm that follows no convolution, with the relu after it."""
    module = modules[str(node.target)] if node.op == "call_module" else None
    if module is None or not is_foldable(module, ours.Conv2d) or not _may_go(module):
        return None
    if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
        return None
    within = activation_within(module) if is_norm_with_activation(module) else None
    if within not in (None, "relu"):
        return None
    chain = Chain(module, str(node.target), [node], within)
    if len(node.users) == 1 and within is None:
        user = next(iter(node.users))
        after = modules[str(user.target)] if user.op == "call_module" else None
        if user not in taken and (after is None or _may_go(after)) and activation_of(user, after, node) == "relu":
            grown = Chain(module, chain.name, [node, user], "relu", absorbed=[_label(user, after, chain.name)])
            if memory.may_move(grown):
                return grown
    return chain


def _copy(chain: Chain) -> Chain:
    return Chain(**{**vars(chain), "nodes": list(chain.nodes), "absorbed": list(chain.absorbed)})


def _may_go(module: nn.Module) -> bool:
    return not has_hooks(module) and EXCLUDED not in module.__dict__


def _begin(node: fx.Node, modules: dict[str, nn.Module]) -> Chain | None:
    if node.op != "call_module":
        return None
    layer: Any = modules[node.target]  # type: ignore[index]
    if type(layer) not in LAYERS or not _may_go(layer) or layer._parameters.get("weight") is None:
        return None
    if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
        return None
    return Chain(layer, str(node.target), [node], layer.activation)


def _grow(chain: Chain, modules: dict[str, nn.Module], memory: _Memory, taken: set[fx.Node]) -> Iterator[Chain]:
    """The chain after each step that can be taken into it."""
    stage = 0 if chain.activation is None else _ACTIVATION
    while True:
        last = chain.nodes[-1]
        if len(last.users) != 1:
            return
        user = next(iter(last.users))
        if user in taken or sum(arg is last for arg in user.all_input_nodes) != 1:
            return
        step = _step(chain, last, user, modules, memory)
        if step is None or step[0] <= stage:
            return
        stage = step[0]
        chain.nodes.append(user)
        chain.absorbed.append(step[1])
        yield chain


def _step(
    chain: Chain, last: fx.Node, user: fx.Node, modules: dict[str, nn.Module], memory: _Memory
) -> tuple[int, str] | None:
    """The stage of a user of the last node, written into the chain; None: it does not belong there."""
    module = modules[user.target] if user.op == "call_module" else None  # type: ignore[index]
    if module is not None and not _may_go(module):
        return None
    label = _label(user, module, chain.name)
    if module is not None and is_foldable(module, type(chain.layer)) and len(user.args) == 1 and not user.kwargs:
        if chain.residual is not None or chain.activation is not None:
            return None
        chain.norm = module
        if is_norm_with_activation(module):
            chain.activation = activation_within(module)
            return (_NORM if chain.activation is None else _ACTIVATION), label
        return _NORM, label
    other = _added(user, last)
    if other is not None:
        if chain.activation is not None or chain.pool:
            return None
        into = None
        if is_in_place(user, modules):
            into = "result" if user.args[0] is last else "residual"
            if into == "residual" and not memory.is_own(other):
                return None
        chain.residual, chain.add_into = other, into
        return _ADD, "add"
    activation = activation_of(user, module, last)
    if activation is not None:
        if chain.activation is not None or chain.pool:
            return None
        chain.activation = activation
        return _ACTIVATION, label
    if isinstance(chain.layer, ours.Conv2d) and max_pool_of(user, module) == _POOL_OF_TWO:
        chain.pool = True
        return _POOL, label
    return None


def _label(node: fx.Node, module: nn.Module | None, beside: str) -> str:
    """The name of a function, or of a module without what it shares with another: bn1 beside layer1.0.conv1."""
    if module is None:
        return getattr(node.target, "__name__", str(node.target))
    return str(node.target).removeprefix(beside.rpartition(".")[0] + ".")


def is_foldable(module: nn.Module, layer: type) -> bool:
    """Whether a batch norm scales and shifts the channels by running statistics, now."""
    if layer not in _NORMS:
        return False
    if is_frozen_norm(module):
        return layer is ours.Conv2d
    if module.training or module._buffers.get("running_mean") is None:
        return False
    if is_norm_with_activation(module):
        known = type(module.act) is nn.Identity or activation_within(module) is not None
        return layer is ours.Conv2d and known and type(module.drop) is nn.Identity
    return type(module) in _NORMS[layer] and getattr(module, "activation", None) is None


def activation_within(module: nn.Module) -> str | None:
    """The activation that follows a batch norm within a module of timm."""
    act: Any = module.act
    return ACTIVATION_MODULES.get(type(act)) if getattr(act, "approximate", "none") == "none" else None


def _added(node: fx.Node, value: fx.Node) -> fx.Node | None:
    """The other operand where the node adds something to a value."""
    is_sum = (node.op == "call_function" and node.target in _ADD_FUNCTIONS) or (
        node.op == "call_method" and node.target in _ADD_METHODS
    )
    if not is_sum or len(node.args) != 2 or any(key != "alpha" or by != 1 for key, by in node.kwargs.items()):
        return None
    left, right = node.args
    other = right if left is value else left
    return other if isinstance(other, fx.Node) and other is not value else None


def activation_of(node: fx.Node, module: nn.Module | None, value: fx.Node) -> str | None:
    """The name of an activation of a value, in place or not."""
    if not node.args or node.args[0] is not value:
        return None
    rest, named = node.args[1:], dict(node.kwargs)
    if module is not None:
        name = ACTIVATION_MODULES.get(type(module))
        plain = not rest and not named and getattr(module, "approximate", "none") == "none"
        return name if plain else None
    if node.op == "call_method":
        return _ACTIVATION_METHODS.get(str(node.target)) if not rest and not named else None
    if node.op != "call_function":
        return None
    name = ACTIVATION_FUNCTIONS.get(node.target)  # type: ignore[arg-type]
    if name == "gelu":
        return name if not rest and named.get("approximate", "none") == "none" else None
    named.pop("inplace", None)
    return name if not named and all(isinstance(item, bool) for item in rest) else None


Pair = tuple[int, int]


def max_pool_of(node: fx.Node, module: nn.Module | None) -> tuple[Pair, Pair, Pair] | None:
    """Kernel, stride and padding (rows, columns) of a max pooling; None: of another call, or with other options."""
    if module is not None:
        if type(module) not in (nn.MaxPool2d, ours.MaxPool2d):
            return None
        values = vars(module)
    elif node.op == "call_function" and node.target in _POOL_FUNCTIONS:
        names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
        values = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False}
        values.update(zip(names, node.args[1:], strict=False))
        values.update(node.kwargs)
    else:
        return None
    kernel, padding, dilation = (_pair(values[name]) for name in ("kernel_size", "padding", "dilation"))
    stride = kernel if values["stride"] in (None, []) else _pair(values["stride"])
    if kernel is None or stride is None or padding is None or dilation != (1, 1):
        return None
    return (kernel, stride, padding) if values["ceil_mode"] is values["return_indices"] is False else None


def _pair(value: Any) -> Pair | None:
    items = tuple(value) if isinstance(value, tuple | list) else (value,)
    items = items * 2 if len(items) == 1 else items
    return items if len(items) == 2 and all(type(item) is int for item in items) else None


# Modules and functions whose result shares no memory with an argument.
_FRESH_MODULES = (
    *LAYERS,
    *(nn.Conv2d, nn.Conv1d, nn.ConvTranspose2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm),
    *(nn.LayerNorm, nn.GroupNorm, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, *ACTIVATION_MODULES),
    *(ours.BatchNorm1d, ours.BatchNorm2d, ours.LayerNorm, ours.MaxPool2d, ours.AvgPool2d, ours.AdaptiveAvgPool2d),
)
_FRESH_FUNCTIONS = frozenset(
    {operator.add, operator.sub, operator.mul, operator.truediv, operator.matmul, torch.add, torch.mul, torch.cat}
    | {function for function in ACTIVATION_FUNCTIONS if not function.__name__.endswith("_")}
    | {F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.hardsigmoid, F.batch_norm}
)


def is_in_place(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a call may write to its first argument."""
    if node.op == "call_module":
        module = modules[node.target]  # type: ignore[index]
        known = type(module).__module__.startswith(("torch.nn.modules.", "pyvision_kernels.nn."))
        known = known or is_frozen_norm(module) or is_norm_with_activation(module)
        return not known or has_hooks(module) or getattr(module, "inplace", False) is True
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "_")
        in_operator = node.target in (operator.setitem, operator.iadd) or (
            getattr(node.target, "__module__", "") == "_operator" and name.startswith("i") and name not in _NOT_IN_PLACE
        )
        return (
            in_operator
            or name.endswith("_")
            or _arguments(node).get("inplace", False) is not False
            or "out" in node.kwargs
        )
    return False


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a function by their names, with defaults; those of a built-in one, as far as they are named."""
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return dict(node.kwargs)
    bound.apply_defaults()
    return bound.arguments


_NOT_IN_PLACE = ("inv", "invert", "is_", "is_not", "index", "indexOf", "itemgetter")


class _Memory:
    """Which values of a graph may share memory, and where it is written."""

    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module]):
        self.modules = modules
        self.order = {node: index for index, node in enumerate(graph.nodes)}
        self.bases: dict[fx.Node, frozenset[Any]] = {}
        self.writes: list[fx.Node] = []
        for node in graph.nodes:
            if node.op == "placeholder":
                self.bases[node] = frozenset(["input"])
            elif self._is_fresh(node):
                self.bases[node] = frozenset([node])
            else:
                shared = (self.bases[argument] for argument in node.all_input_nodes)
                self.bases[node] = frozenset([node]).union(*shared)
            if is_in_place(node, modules):
                self.writes.append(node)

    def _is_fresh(self, node: fx.Node) -> bool:
        if is_in_place(node, self.modules):
            return False
        if node.op == "call_module":
            return type(self.modules[node.target]) in _FRESH_MODULES  # type: ignore[index]
        return node.op == "call_function" and node.target in _FRESH_FUNCTIONS

    def is_own(self, node: fx.Node) -> bool:
        """Whether nothing but its one user sees the memory of a value."""
        return len(node.users) == 1 and len(self.bases[node]) == 1 and node.op != "placeholder" and self._is_fresh(node)

    def may_move(self, chain: Chain) -> bool:
        """Whether what a chain reads is at its last node what it was where the chain would read it."""
        first, last = self.order[chain.nodes[0]], self.order[chain.nodes[-1]]
        read = self.bases[chain.input] | (self.bases[chain.residual] if chain.residual is not None else frozenset())
        for node in self.writes:
            if first < self.order[node] < last and node not in chain.nodes:
                written = frozenset().union(*(self.bases[argument] for argument in node.all_input_nodes))
                if written & read:
                    return False
        return True
