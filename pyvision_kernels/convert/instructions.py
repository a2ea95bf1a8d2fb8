"""Which nodes of a traced graph have an instruction of `program.py`, beside those that end a chain."""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from pyvision_kernels import _activation
from pyvision_kernels import nn as ours
from pyvision_kernels.convert import program
from pyvision_kernels.convert.patterns import activation_of, is_in_place, max_pool_of

Found = tuple[int, list[fx.Node], tuple[int, ...]]  # kind, what it reads, other operands


def find(node: fx.Node, modules: dict[str, nn.Module]) -> Found | None:
    """The instruction of a node that belongs to no chain; None: PyTorch is to be called."""
    if is_in_place(node, modules) or not node.args:
        return None
    first, rest = node.args[0], node.args[1:]
    if node.target in (torch.cat, torch.concat):
        return _concatenation(node)
    if node.target in (operator.mul, torch.mul) or (node.op == "call_method" and node.target == "mul"):
        factors = [item for item in node.args if isinstance(item, fx.Node)]
        return (program.SCALE, factors, ()) if len(factors) == len(node.args) == 2 and not node.kwargs else None
    module = modules[str(node.target)] if node.op == "call_module" else None
    if not isinstance(first, fx.Node) or (module is not None and (rest or node.kwargs)):
        return None
    activation, window = activation_of(node, module, first), max_pool_of(node, module)
    if activation is not None:
        return program.ACTIVATE, [first], (_activation.NUMBERS[activation],)
    if window is not None:
        return program.MAX_POOL, [first], (*window[0], *window[1], *window[2])
    kind = _of_module(module) if module is not None else _of_function(node)
    return None if kind is None else (kind, [first], ())


def _concatenation(node: fx.Node) -> Found | None:
    values = _bound(torch.cat, node)
    maps = values.get("tensors")
    if not isinstance(maps, tuple | list) or not maps or values["dim"] not in (1, -3):
        return None
    nodes = [item for item in maps if isinstance(item, fx.Node)]
    return (program.CONCATENATE, nodes, ()) if len(nodes) == len(maps) else None


def _of_module(module: nn.Module) -> int | None:
    kind, values = type(module), vars(module)
    if kind in (nn.AdaptiveAvgPool2d, ours.AdaptiveAvgPool2d) and values["output_size"] in _ONE_PIXEL:
        return program.MEAN
    if kind is nn.Flatten and (values["start_dim"], values["end_dim"]) == (1, -1):
        return program.FLATTEN
    return program.HARDSIGMOID if kind is nn.Hardsigmoid else None


_ONE_PIXEL = (1, (1, 1), [1, 1])
_METHODS: dict[Any, Any] = {"flatten": torch.flatten, "mean": torch.mean}
# Arguments by name and default.
_SIGNATURES: dict[Any, inspect.Signature] = {
    torch.cat: inspect.signature(lambda tensors, dim=0: None),
    torch.flatten: inspect.signature(lambda input, start_dim=0, end_dim=-1: None),
    torch.mean: inspect.signature(lambda input, dim=None, keepdim=False, *, dtype=None: None),
    F.adaptive_avg_pool2d: inspect.signature(lambda input, output_size: None),
    F.hardsigmoid: inspect.signature(lambda input, inplace=False: None),
}


def _bound(function: Any, node: fx.Node) -> dict[str, Any]:
    """The arguments by name; none where they are not those of the function."""
    try:
        given = _SIGNATURES[function].bind(*node.args, **node.kwargs)
    except TypeError:
        return {}
    given.apply_defaults()
    return given.arguments


def _of_function(node: fx.Node) -> int | None:
    function = _METHODS.get(node.target) if node.op == "call_method" else node.target
    values = _bound(function, node) if function in _SIGNATURES else {}
    if not values:
        return None
    if function is torch.flatten:
        return program.FLATTEN if (values["start_dim"], values["end_dim"]) == (1, -1) else None
    if function is torch.mean:
        pixels = isinstance(values["dim"], tuple | list) and tuple(values["dim"]) in ((2, 3), (-2, -1))
        return program.MEAN if pixels and values["keepdim"] is True and values["dtype"] is None else None
    if function is F.adaptive_avg_pool2d:
        return program.MEAN if values["output_size"] in _ONE_PIXEL else None
    return program.HARDSIGMOID if function is F.hardsigmoid else None
