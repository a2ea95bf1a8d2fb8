"""The fused forward of a module: a function made from its traced graph, and when that is out of date."""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from pyvision_kernels import _activation
from pyvision_kernels import nn as ours
from pyvision_kernels._backend import CHOICE
from pyvision_kernels._packed import FoldedNorm, Packs, PacksOf
from pyvision_kernels.convert.patterns import Chain, find_chains, remove_identities
from pyvision_kernels.convert.trace import (
    NotFollowed,
    has_hooks,
    hooks_of,
    is_frozen_norm,
    is_norm_with_activation,
    trace,
)
from pyvision_kernels.nn.conv import geometry_of
from pyvision_kernels.ops.conv2d import run as run_conv2d
from pyvision_kernels.ops.conv2d.operator import TORCH, conv2d_op, decide, pack
from pyvision_kernels.ops.linear import run as run_linear


class _Step:
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


class _Conv2dStep(_Step):
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
        key = input.shape, input.dtype, CHOICE.key
        decided = self.packs.get(weight, key, lambda: self._decide(input, weight))
        if decided is None or decided[0] == TORCH or channels_last is None:
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

    def _decide(self, input: Tensor, weight: Tensor) -> tuple[int, Tensor | None]:
        kernel, packed = decide(input, weight, self.geometry, True), None
        if kernel != TORCH:
            packed = self.packs.get(weight, (kernel, input.dtype), lambda: pack(weight, self.geometry, kernel))
        return kernel, packed

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
        )

    def result_size(self, input: Tensor) -> torch.Size:
        weight = self.parameters["weight"]
        rows, columns = self.geometry.output_size(input.shape[2:], weight.shape[2:])
        return torch.Size((input.shape[0], weight.shape[0], rows, columns))


class _Conv1dStep(_Conv2dStep):
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


class _LinearStep(_Step):
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


class _NormStep:
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


_STEPS: dict[type, type[Any]] = {ours.Conv2d: _Conv2dStep, ours.Conv1d: _Conv1dStep, ours.Linear: _LinearStep}


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
        self.steps: list[_Step | _NormStep] = []
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
                self.function, self.arguments, self.steps = writer.function(), writer.arguments, writer.steps
                called = [modules[str(node.target)] for node in graph.nodes if node.op == "call_module"]
                self.is_closed = not any(has_hooks(module) or _is_opaque(module) for module in called)
                for step in self.steps:
                    if self.is_closed and isinstance(step, _Conv2dStep):
                        step.operator = conv2d_op.overload
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
        self.steps: list[_Step | _NormStep] = []
        self.arguments = 0
        # Code that asks for the layout of a map gets the layout that it knows.
        self.flows = not any(node.op == "call_method" and node.target in _UNSAFE_METHODS for node in graph.nodes)
        nodes = [node for node in graph.nodes if node not in self.within]
        last_use = {argument: node for node in nodes for argument in self._reads(node)}
        dying: dict[fx.Node, list[fx.Node]] = {}
        for argument, node in last_use.items():
            dying.setdefault(node, []).append(argument)
        for node in nodes:
            self._write(node)
            if node.op != "output" and dying.get(node):
                self.lines.append("del " + ", ".join(self.names[argument] for argument in dying[node]))
        self.source = "def fused(" + ", ".join([*self._parameters(graph), "back"]) + "):\n"
        self.source += "".join(f"    {line}\n" for line in self.lines)

    def function(self) -> Callable[..., Any]:
        exec(compile(self.source, "<fused forward>", "exec"), self.space)
        return self.space["fused"]

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

    def _step(self, node: fx.Node, chain: Chain) -> str:
        step = _STEPS.get(type(chain.layer), _NormStep)(chain)
        self.steps.append(step)
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
