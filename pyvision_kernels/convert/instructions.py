"""Which nodes of a traced graph have an instruction of `program.py`."""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from pyvision_kernels import _activation
from pyvision_kernels.convert import program
from pyvision_kernels.convert.patterns import ACTIVATION_FUNCTIONS, ACTIVATION_MODULES
from pyvision_kernels.convert.trace import has_hooks

Found = tuple[int, list[fx.Node], tuple[int, ...]]  # kind, what it reads, other operands


def find(node: fx.Node, modules: dict[str, nn.Module]) -> Found | None:
    """The instruction of a node that belongs to no chain; None: PyTorch is to be called."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        if has_hooks(module) or node.kwargs or len(node.args) != 1 or not isinstance(node.args[0], fx.Node):
            return None
        numbers = _of_module(module)
        return None if numbers is None else (numbers[0], [node.args[0]], numbers[1])
    if node.op == "call_method":
        function = _METHODS.get(str(node.target))
    elif node.op == "call_function":
        function = node.target
    else:
        return None
    return None if function is None else _of_function(function, node)


_METHODS: dict[str, Any] = {
    "flatten": torch.flatten,
    "mean": torch.mean,
    "mul": torch.mul,
    "relu": torch.relu,
    "sigmoid": torch.sigmoid,
}


def _of_module(module: nn.Module) -> tuple[int, tuple[int, ...]] | None:
    kind = type(module)
    values = vars(module)
    if kind is nn.AdaptiveAvgPool2d and values["output_size"] in (1, (1, 1), [1, 1]):
        return program.MEAN, ()
    if kind is nn.MaxPool2d and not (values["ceil_mode"] or values["return_indices"]):
        return _max_pool(values["kernel_size"], values["stride"], values["padding"], values["dilation"])
    if kind is nn.Flatten and (values["start_dim"], values["end_dim"]) == (1, -1):
        return program.FLATTEN, ()
    if values.get("inplace") is True:
        return None
    if kind is nn.Hardsigmoid:
        return program.HARDSIGMOID, ()
    name = ACTIVATION_MODULES.get(kind)
    if name is not None and getattr(module, "approximate", "none") == "none":
        return program.ACTIVATE, (_activation.NUMBERS[name],)
    return None


def _max_pool(kernel: Any, stride: Any, padding: Any, dilation: Any) -> tuple[int, tuple[int, ...]] | None:
    stride = kernel if stride is None or stride == [] else stride
    pairs = [_pair(value) for value in (kernel, stride, padding, dilation)]
    if None in pairs or pairs[3] != (1, 1):
        return None
    return program.MAX_POOL, tuple(number for pair in pairs[:3] for number in pair)  # type: ignore[union-attr]


def _pair(value: Any) -> tuple[int, int] | None:
    items = tuple(value) if isinstance(value, tuple | list) else (value, value)
    return items if len(items) == 2 and all(type(item) is int for item in items) else None


# Arguments by name and default, where the function itself does not say them.
_SIGNATURES: dict[Any, inspect.Signature] = {
    torch.flatten: inspect.signature(lambda input, start_dim=0, end_dim=-1: None),
    torch.mean: inspect.signature(lambda input, dim=None, keepdim=False, *, dtype=None: None),
    F.adaptive_avg_pool2d: inspect.signature(lambda input, output_size: None),
    **dict.fromkeys((torch.cat, torch.concat), inspect.signature(lambda tensors, dim=0: None)),
    **dict.fromkeys((operator.mul, torch.mul), inspect.signature(lambda input, other: None)),
    **dict.fromkeys(
        (F.max_pool2d, torch.max_pool2d),
        inspect.signature(
            lambda input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False: None
        ),
    ),
    F.hardsigmoid: inspect.signature(lambda input, inplace=False: None),
    **{
        function: inspect.signature(lambda input, inplace=False, approximate="none": None)
        for function in ACTIVATION_FUNCTIONS
        if not function.__name__.endswith("_") and function is not F.gelu
    },
    F.gelu: inspect.signature(lambda input, *, approximate="none": None),
}


def _of_function(function: Any, node: fx.Node) -> Found | None:
    try:
        given = _SIGNATURES[function].bind(*node.args, **node.kwargs)
    except (KeyError, TypeError):
        return None
    given.apply_defaults()
    values = given.arguments
    if function in (torch.cat, torch.concat):
        maps = values["tensors"]
        if not isinstance(maps, tuple | list) or not maps or not all(isinstance(item, fx.Node) for item in maps):
            return None
        return (program.CONCATENATE, list(maps), ()) if values["dim"] in (1, -3) else None
    read = [values[name] for name in ("input", "other") if name in values]
    if not all(isinstance(item, fx.Node) for item in read) or values.get("inplace"):
        return None
    numbers = _numbers(function, values)
    return None if numbers is None else (numbers[0], read, numbers[1])


def _numbers(function: Any, values: dict[str, Any]) -> tuple[int, tuple[int, ...]] | None:
    if function is torch.flatten:
        return (program.FLATTEN, ()) if (values["start_dim"], values["end_dim"]) == (1, -1) else None
    if function is torch.mean:
        pixels = isinstance(values["dim"], tuple | list) and tuple(values["dim"]) in ((2, 3), (-2, -1))
        return (program.MEAN, ()) if pixels and values["keepdim"] is True and values["dtype"] is None else None
    if function is F.adaptive_avg_pool2d:
        return (program.MEAN, ()) if values["output_size"] in (1, (1, 1), [1, 1]) else None
    if function in (operator.mul, torch.mul):
        return program.SCALE, ()
    if function in (F.max_pool2d, torch.max_pool2d):
        if values["ceil_mode"] is not False or values["return_indices"] is not False:
            return None
        return _max_pool(*(values[name] for name in ("kernel_size", "stride", "padding", "dilation")))
    if function is F.hardsigmoid:
        return program.HARDSIGMOID, ()
    if values["approximate"] != "none":
        return None
    return program.ACTIVATE, (_activation.NUMBERS[ACTIVATION_FUNCTIONS[function]],)
