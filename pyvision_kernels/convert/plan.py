"""The fused forward of a module: a function made from its traced graph, and when that is out of date."""

from __future__ import annotations

import itertools
import operator
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from pyvision_kernels import nn as ours
from pyvision_kernels.convert.instructions import Found
from pyvision_kernels.convert.instructions import find as find_instruction
from pyvision_kernels.convert.patterns import Chain, find_chains, is_in_place, remove_identities
from pyvision_kernels.convert.program import CONV2D, FLATTEN, KIND_OF_STEP, Instruction, Stretch, graph_op
from pyvision_kernels.convert.steps import STEPS, Conv2dStep, NormStep, Step
from pyvision_kernels.convert.trace import (
    NotFollowed,
    has_hooks,
    hooks_of,
    is_frozen_norm,
    is_norm_with_activation,
    trace,
)
from pyvision_kernels.ops.conv2d.operator import conv2d_op


class Plan:
    """What a module runs in place of its forward, in the modes and with the hooks that its submodules have now.

    Attributes:
        function: Called with the arguments and whether 4-dimensional results are to be contiguous; None: nothing of the
            module can be fused.
        arguments: How many there are.
        chains: What was fused, by the names of the layers.
        reason: Why nothing was.
        absorbed: Names of the modules that are not called.
        opaque: Submodules that stay calls within the function.
        is_closed: Whether the function runs no code but ours and PyTorch's; then it is to be called below autograd.
        checked: Whether is_current suffices, since nothing has happened that asks for is_current_in_full.
    """

    def __init__(self, root: nn.Module):
        modules = dict(root.named_modules(remove_duplicate=False))
        self.function: Callable[..., Any] | None = None
        self.arguments = 0
        self.chains: dict[str, list[str]] = {}
        self.absorbed: set[str] = set()
        self.checked = True
        self.is_closed = False
        self.reason = ""
        self.opaque: list[str] = []
        self.steps: list[Step | NormStep] = []
        self.stretches: list[Stretch] = []
        watched = list(modules.values())
        try:
            graph, _ = trace(root)
        except NotFollowed as error:
            self.reason = str(error)
        else:
            self.absorbed.update(remove_identities(graph, modules))
            chains = find_chains(graph, modules)
            self.opaque = [
                str(node.target)
                for node in graph.nodes
                if node.op == "call_module" and _is_opaque(modules[node.target])
            ]
            within = tuple(f"{name}." for name in self.opaque)
            # What is below a call is for that call to watch.
            watched = [module for name, module in modules.items() if not name.startswith(within)] if within else watched
            if any(chain.absorbed for chain in chains):
                writer = _Writer(graph, modules, chains)
                self.function, self.arguments = writer.main, writer.arguments
                self.steps, self.stretches = list(writer.steps.values()), writer.stretches
                called = [modules[str(node.target)] for node in graph.nodes if node.op == "call_module"]
                self.is_closed = not any(has_hooks(module) or _is_opaque(module) for module in called)
                if self.is_closed:
                    for step in self.steps:
                        if isinstance(step, Conv2dStep):
                            step.operator = conv2d_op.overload
                    for stretch in writer.stretches:
                        stretch.operator = graph_op.overload
                for chain in chains:
                    self.chains.setdefault(chain.name, chain.absorbed)
                    self.absorbed.update(str(node.target) for node in chain.nodes[1:] if node.op == "call_module")
            else:
                self.reason = "nothing follows a layer of ours that could be fused into it"
        self._watch(root, watched)

    def _watch(self, root: nn.Module, modules: list[nn.Module]) -> None:
        unique = {id(module): module for module in modules}
        self.modules = list(unique.values())
        self.values = [module.__dict__ for module in unique.values()]
        self.training = list(map(_training, self.values))
        self.hooks = [
            hooks
            for module in unique.values()
            if module is not root and not has_hooks(module)
            for hooks in hooks_of(module)
        ]
        self.submodules = [values["_modules"] for values in self.values]
        self.submodules_seen = list(map(dict, self.submodules))
        self.seen = self._attributes()

    def is_current(self) -> bool:
        """Whether modes, hooks and submodules are those that the function was made for. A few nanoseconds a module."""
        return (
            list(map(_training, self.values)) == self.training
            and not any(self.hooks)
            and self.submodules == self.submodules_seen
        )

    def is_current_in_full(self) -> bool:
        """is_current, and whether the plain attributes of all modules are what they were; slower."""
        return self.is_current() and self._attributes() == self.seen

    def _attributes(self) -> list[dict[str, Any]]:
        plain = (bool, int, float, str, tuple, type(None))
        return [
            {key: value for key, value in values.items() if isinstance(value, plain) and key != "training"}
            | {"hooks": has_hooks(module)}
            for module, values in zip(self.modules, self.values, strict=True)
        ]

    def drop(self) -> None:
        """Forgets what was folded; the next call checks in full."""
        self.checked = False
        for step in self.steps:
            if step.norm is not None:
                step.norm.drop()
        for stretch in self.stretches:
            stretch.forget()


_training = operator.itemgetter("training")


def _is_opaque(module: nn.Module) -> bool:
    if is_frozen_norm(module) or is_norm_with_activation(module):
        return False
    home = type(module).__module__
    return any(True for _ in module.children()) or not home.startswith(("torch.nn.", "pyvision_kernels.nn."))


_UNSAFE_METHODS = ("as_strided", "stride", "is_contiguous", "data_ptr", "storage", "untyped_storage")


def _leaves(node: fx.Node) -> bool:
    """Whether a value is a result, and nothing else."""
    return all(user.op == "output" or _holds_outputs(user) for user in node.users)


def _holds_outputs(node: fx.Node) -> bool:
    """Whether a node is an OrderedDict or a named tuple that is a result."""
    is_container = node.target is OrderedDict or (isinstance(node.target, type) and issubclass(node.target, tuple))
    return node.op == "call_function" and is_container and all(user.op == "output" for user in node.users)


def _contiguous(value: Any) -> Any:
    return value.contiguous() if isinstance(value, Tensor) and value.dim() == 4 else value


def _reshape(value: Any, *size: Any) -> Any:
    """view, of maps that are channels_last where the model's own are contiguous."""
    if isinstance(value, Tensor) and size and not isinstance(size[0], torch.dtype):
        return value.reshape(*size)
    return value.view(*size)


class _Writer:
    """Writes the function of a graph: a line a call, with the memory of a value given back after its last use."""

    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module], chains: list[Chain]):
        self.modules = modules
        self.chain_at = {chain.nodes[-1]: chain for chain in chains}
        self.within = {node for chain in chains for node in chain.nodes[:-1]}
        self.names: dict[fx.Node, str] = {}
        self.space: dict[str, Any] = {}
        self.lines: list[str] = []
        self.steps: dict[fx.Node, Step | NormStep] = {}
        self.stretches: list[Stretch] = []
        self.arguments = 0
        # Code that asks for the layout of a map gets the layout that it knows.
        self.flows = not any(node.op == "call_method" and node.target in _UNSAFE_METHODS for node in graph.nodes)
        nodes = [node for node in graph.nodes if node not in self.within]
        self.readers: dict[fx.Node, list[fx.Node]] = {}  # in order
        for node in nodes:
            for argument in self._reads(node):
                self.readers.setdefault(argument, []).append(node)
        self.dying: dict[fx.Node, list[fx.Node]] = {}
        for argument, readers in self.readers.items():
            self.dying.setdefault(readers[-1], []).append(argument)
        # A result that may share memory with a value is one of its own in a stretch.
        self.writes = any(is_in_place(node, modules) for node in nodes if node not in self.chain_at)
        for found, run in itertools.groupby(nodes, lambda node: self._instruction(node) is not None):
            together = list(run)
            inside = set(together)
            leaving = [node for node in together if not inside.issuperset(self.readers.get(node, []))]
            if found and leaving and len(together) > 1 and any(node in self.chain_at for node in together):
                self._write_stretch(together, leaving)
            else:
                for node in together:
                    self._write(node)
        self.main = self._function("fused", self._parameters(graph), self.lines)

    def _function(self, name: str, parameters: list[str], lines: list[str]) -> Callable[..., Any]:
        source = f"def {name}({', '.join([*parameters, 'back'])}):\n" + "".join(f"    {line}\n" for line in lines)
        exec(compile(source, "<fused forward>", "exec"), self.space)
        return self.space[name]

    def _instruction(self, node: fx.Node) -> Found | None:
        if not self.flows:
            return None
        if node in self.chain_at:
            kind = KIND_OF_STEP.get(type(self._step_of(node)))
            return None if kind is None else (kind, self._reads(node), ())
        found = find_instruction(node, self.modules)
        return None if found is not None and found[0] == FLATTEN and self.writes else found

    def _write_stretch(self, nodes: list[fx.Node], outputs: list[fx.Node]) -> None:
        """A call of a Stretch, and the function that it calls where it does not fit."""
        inside = set(nodes)
        reads = dict.fromkeys(argument for node in nodes for argument in self._reads(node))
        arguments = [argument for argument in reads if argument not in inside]
        place = {node: index for index, node in enumerate([*arguments, *nodes])}
        instructions = []
        for node in nodes:
            kind, read, numbers = self._instruction(node)  # type: ignore[misc]
            step = self._step_of(node) if node in self.chain_at else None
            leaves = kind == CONV2D and _leaves(node)
            instructions.append(Instruction(kind, tuple(place[item] for item in read), step, numbers, leaves))
        before, self.lines = self.lines, []
        for node in nodes:
            self._write(node)
        results = ", ".join(self.names[node] for node in outputs)
        names = [self.names[argument] for argument in arguments]
        apart = self._function(f"apart{len(self.stretches)}", names, [*self.lines, f"return {results}"])
        self.lines = before
        stretch = Stretch(len(arguments), instructions, [place[node] for node in outputs], apart)
        self.stretches.append(stretch)
        self.lines.append(f"{results} = {self._bind(stretch, 'g')}({', '.join(names)}, back=back)")
        dead = [self.names[value] for node in nodes for value in self.dying.get(node, []) if value not in inside]
        if dead:
            self.lines.append("del " + ", ".join(dead))

    def _parameters(self, graph: fx.Graph) -> list[str]:
        names = [self.names[node] for node in graph.nodes if node.op == "placeholder"]
        self.arguments = len(names)
        return names

    def _reads(self, node: fx.Node) -> list[fx.Node]:
        chain = self.chain_at.get(node)
        if chain is None:
            return node.all_input_nodes
        return [chain.input] if chain.residual is None else [chain.input, chain.residual]

    def _bind(self, value: Any, kind: str = "c") -> str:
        name = f"{kind}{len(self.space)}"
        self.space[name] = value
        return name

    def _text(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self.names[value]
        if type(value) is tuple:
            return "(" + "".join(f"{self._text(item)}, " for item in value) + ")"
        if isinstance(value, tuple) and not hasattr(value, "_fields"):
            return self._text(tuple(value))
        if isinstance(value, list):
            return "[" + ", ".join(map(self._text, value)) + "]"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{self._text(key)}: {self._text(item)}" for key, item in value.items()) + "}"
        if isinstance(value, slice):
            return f"slice({self._text(value.start)}, {self._text(value.stop)}, {self._text(value.step)})"
        if value is None or type(value) in (bool, int, str):
            return repr(value)
        return self._bind(value)

    def _call(self, function: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        given = [*map(self._text, args), *(f"{key}={self._text(value)}" for key, value in kwargs.items())]
        return f"{function}({', '.join(given)})"

    def _write(self, node: fx.Node) -> None:
        name = self.names[node] = f"v{len(self.names)}"
        if node.op == "placeholder":
            return
        if node.op == "output":
            self.lines.append("return " + self._output(node.args[0]))
            return
        self.lines.append(f"{name} = {self._expression(node)}")
        if self.dying.get(node):
            self.lines.append("del " + ", ".join(self.names[argument] for argument in self.dying[node]))

    def _expression(self, node: fx.Node) -> str:
        chain = self.chain_at.get(node)
        if chain is not None:
            return self._step(node, chain)
        target, args, kwargs = node.target, node.args, dict(node.kwargs)
        if node.op == "get_attr":
            owner, _, attribute = str(target).rpartition(".")
            module = self.modules[owner]
            for held in (module._parameters, module._buffers):
                if attribute in held:
                    return f"{self._bind(held)}[{attribute!r}]"
            return f"{self._bind(module)}.{attribute}"
        if node.op == "call_module":
            module = self.modules[str(target)]
            if self.flows and _is_opaque(module):
                self.space["contiguous"] = _contiguous
                given = [f"contiguous({self._text(item)}) if back else {self._text(item)}" for item in args]
                given += [f"{key}={self._text(value)}" for key, value in kwargs.items()]
                return f"{self._bind(module, 'm')}({', '.join(given)})"
            return self._call(self._bind(module, "m"), args, kwargs)
        if node.op == "call_method":
            if target == "view" and self.flows:
                self.space["reshape"] = _reshape
                return self._call("reshape", args, kwargs)
            return self._call(f"{self._text(args[0])}.{target}", args[1:], kwargs)
        if _holds_outputs(node):
            return f"{self._bind(target, 'f')}({', '.join(map(self._output, args))})"
        return self._call(self._bind(target, "f"), args, kwargs)

    def _step_of(self, node: fx.Node) -> Step | NormStep:
        """Of the last node of a chain."""
        step = self.steps.get(node)
        if step is None:
            chain = self.chain_at[node]
            step = self.steps[node] = STEPS.get(type(chain.layer), NormStep)(chain)
        return step

    def _step(self, node: fx.Node, chain: Chain) -> str:
        step = self._step_of(node)
        given = [self.names[chain.input]]
        if chain.residual is not None:
            given.append(self.names[chain.residual])
        if type(chain.layer) is ours.Conv2d:
            # What leaves the module does so in the layout that its own forward gives.
            if not self.flows:
                given.append("channels_last=None")
            elif _leaves(node):
                given.append("channels_last=not back")
        return f"{self._bind(step, 's')}({', '.join(given)})"

    def _output(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            chain = self.chain_at.get(value)
            emitted = chain is not None and type(chain.layer) is ours.Conv2d
            if not self.flows or (emitted and _leaves(value)) or _holds_outputs(value):
                return self.names[value]
            self.space["contiguous"] = _contiguous
            return f"(contiguous({self.names[value]}) if back else {self.names[value]})"
        if type(value) is tuple:
            return "(" + "".join(f"{self._output(item)}, " for item in value) + ")"
        if isinstance(value, list):
            return "[" + ", ".join(map(self._output, value)) + "]"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{self._text(key)}: {self._output(item)}" for key, item in value.items()) + "}"
        return self._text(value)
