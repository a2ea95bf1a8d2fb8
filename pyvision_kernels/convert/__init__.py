"""`convert`, `revert` and `conversion_report`: a model's layers replaced by ours, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from pyvision_kernels.convert.fuse import fuse as fuse_model
from pyvision_kernels.convert.fuse import is_fused, own_class, plan_in_eval_mode, unfuse
from pyvision_kernels.convert.graphs import graph, ungraph, without_graph
from pyvision_kernels.convert.table import TABLE, qualified_name, refusal_of, replacement_of, stock_of
from pyvision_kernels.convert.trace import EXCLUDED

__all__ = ["LayerReport", "conversion_report", "convert", "revert"]

Choice = str | type[nn.Module]  # a pattern of names, or the class of a layer

# On the converted model: names of layers that `convert` was told to leave, and why.
_LEFT = "_pvk_left"
# What a layer of ours keeps between calls.
_KEPT = ("_packs",)


def convert(
    model: nn.Module,
    *,
    include: Iterable[Choice] | None = None,
    exclude: Iterable[Choice] | None = None,
    fuse: bool = False,
    cuda_graph: bool = False,
) -> nn.Module:
    """Replaces the layers of a model that have a counterpart with our kernels, in place.

    Replaced are the layers of `torch.nn` that `pyvision_kernels.nn` has under the same name, torchvision's
    `RoIAlign`, `RoIPool`, `PSRoIAlign`, `PSRoIPool` and `MultiScaleRoIAlign`, and the calls of NMS, IoU and losses
    within its Faster, Mask and Keypoint R-CNN, RetinaNet, FCOS and SSD. A layer is replaced by a change of its class:
    parameters, buffers, state_dict keys, hooks, mode and device are the same objects as before, and neither torchvision
    nor another model is touched. Only instances of a stock class itself are replaced, not of a subclass. Called again,
    it decides anew for every layer: what is now refused gets its stock class back.
    `conversion_report` says what was done, `revert` undoes it.

    Args:
        model (nn.Module): Any model; what has no counterpart stays as it is.
        include (iterable of str or class): Only these layers: patterns of their names in ``model.named_modules()``
            ("roi_heads.*", where * matches dots too), or stock classes. Default: all.
        exclude (iterable of str or class): Not these, even where included. Default: none.
        fuse (bool): In eval mode and without gradients, compute batch norm, activation, residual addition and 2 x 2 max
            pooling in the pass of the convolution (or linear layer) before them. Default: False.
        cuda_graph (bool): In eval mode and without gradients, capture the launches of a call of the model for each
            size, dtype, layout and device of its arguments, and replay them. Arguments are copied in, results out. A
            parameter or buffer that is replaced or written is seen. Default: False.

    Returns:
        nn.Module: ``model`` itself.

    Raises:
        TypeError: ``model`` is not a module, or a choice neither a string nor a class.
        ValueError: a choice matches no layer of the model.
        RuntimeError: when called, a model with ``cuda_graph`` is given tensors that are not on a CUDA device, or
            cannot be captured.

    Note: a converted model computes what the stock one does, up to rounding. It cannot be scripted or exported to ONNX:
        revert it first.
    """
    _require_module("convert", model)
    chosen = _Chooser("include", model, include)
    refused = _Chooser("exclude", model, exclude)
    left: dict[str, str] = {}
    for module in model.modules():
        ungraph(module)
        unfuse(module)
    for name, module in model.named_modules():
        module.__dict__.pop(EXCLUDED, None)
        if refused.matches(name, module):
            reason = "excluded"
            module.__dict__[EXCLUDED] = True
        elif include is not None and not chosen.matches(name, module):
            reason = "not included"
        elif not (reason := refusal_of(type(module))):
            _change_class(module, replacement_of)
            continue
        _change_class(module, stock_of)  # an earlier call may have replaced it
        if qualified_name(type(module)) in TABLE:
            left[name] = reason
    model.__dict__[_LEFT] = left
    if fuse:
        fuse_model(model)
    if cuda_graph:
        graph(model)
    return model


def revert(model: nn.Module) -> nn.Module:
    """Gives every layer of ours in a model its stock class back, in place; `convert` undone.

    Args:
        model (nn.Module): Any model.

    Returns:
        nn.Module: ``model`` itself.

    Raises:
        TypeError: ``model`` is not a module.
    """
    _require_module("revert", model)
    for module in model.modules():
        ungraph(module)
        unfuse(module)
        _change_class(module, stock_of)
        module.__dict__.pop(EXCLUDED, None)
    model.__dict__.pop(_LEFT, None)
    return model


@dataclass(frozen=True)
class LayerReport:
    """A layer, or several of a class that have no counterpart.

    Attributes:
        name: In ``model.named_modules()``; empty for the model itself, or where ``count`` layers share the entry.
        layer: The stock class.
        replaced: Whether the layer runs our kernels.
        reason: By what it was replaced, and what is fused into it ("... <- bn1, relu"); or why it was left.
        fused: What is fused into the layer, in its order.
    """

    name: str
    layer: str
    replaced: bool
    reason: str
    count: int = 1
    fused: tuple[str, ...] = ()


def conversion_report(model: nn.Module) -> list[LayerReport]:
    """Prints which layers of a model run our kernels, which were left, and why.

    Args:
        model (nn.Module): Any model, converted or not.

    Returns:
        list[LayerReport]: what was printed: replaced layers first, then those that could be or were refused, then the
        classes of layers that have no counterpart.

    Raises:
        TypeError: ``model`` is not a module.

    Note: calls of `torchvision.ops` in a model's own code are no layers; `override_torchvision` is for them.
    """
    _require_module("conversion_report", model)
    entries = sorted(_entries(model), key=lambda entry: not entry.replaced)
    table = Table(title=f"{type(model).__name__}: layers that run our kernels, and layers that do not")
    for column in ("layer", "class", "kernels", "by, or why not"):
        table.add_column(column)
    for entry in entries:
        name = entry.name or ("(the model)" if entry.count == 1 else f"{entry.count} layers")
        table.add_row(*map(escape, (name, entry.layer, "ours" if entry.replaced else "stock", entry.reason)))
    Console(width=None if Console().is_terminal else 140).print(table)
    return entries


def _entries(model: nn.Module) -> Iterator[LayerReport]:
    left: dict[str, str] = model.__dict__.get(_LEFT, {})
    others: Counter[str] = Counter()
    fused, absorbed = _fused_parts(model)
    for name, module in model.named_modules():
        held = without_graph(type(module))
        cls = own_class(held)
        stock = stock_of(cls)
        if is_fused(held):
            count = sum(layer.startswith(f"{name}." if name else "") for layer in fused)
            yield LayerReport(name, (stock or cls).__name__, True, f"in eval mode a fused forward: {count} layers")
        elif stock is not None and name in absorbed:
            continue  # named beside the layer that it is fused into
        elif stock is not None:
            parts = tuple(fused.get(name, ()))
            arrow = f" <- {', '.join(parts)}" if parts else ""
            yield LayerReport(name, stock.__name__, True, qualified_name(cls) + arrow, fused=parts)
        elif qualified_name(cls) in TABLE:
            yield LayerReport(name, cls.__name__, False, left.get(name, "convert was not called, or not on this layer"))
        elif ancestors := [base.__name__ for base in cls.__mro__[1:] if qualified_name(base) in TABLE]:
            yield LayerReport(
                name, cls.__name__, False, f"a subclass of {ancestors[0]}, which may override what would be replaced"
            )
        elif name in fused:
            arrow = f" <- {', '.join(fused[name])}" if fused[name] else ""
            yield LayerReport(name, cls.__name__, True, f"scale and shift{arrow}", fused=tuple(fused[name]))
        elif not module._modules and name not in absorbed:
            others[cls.__name__] += 1
    for layer, count in others.most_common():
        yield LayerReport("", layer, False, "no counterpart in pyvision_kernels", count)


def _fused_parts(model: nn.Module) -> tuple[dict[str, list[str]], set[str]]:
    """What is fused into which layer, and the modules that are not called, by their names in the model."""
    fused: dict[str, list[str]] = {}
    absorbed: set[str] = set()
    for name, module in model.named_modules():
        if is_fused(without_graph(type(module))):
            plan, prefix = plan_in_eval_mode(module), f"{name}." if name else ""
            fused |= {prefix + layer: parts for layer, parts in plan.chains.items()}
            absorbed |= {prefix + part for part in plan.absorbed}
    return fused, absorbed


class _Chooser:
    """Layers chosen by patterns of names and by classes."""

    def __init__(self, argument: str, model: nn.Module, choices: Iterable[Choice] | None):
        if isinstance(choices, str | type):
            raise TypeError(f"convert: expected {argument} to be a list of names or classes, but got {choices!r}")
        self.choices = list(choices or ())
        for choice in self.choices:
            if not isinstance(choice, str | type):
                raise TypeError(
                    f"convert: expected {argument} to hold names or classes, but got {type(choice).__name__}"
                )
            if not any(_fits(choice, name, module) for name, module in model.named_modules()):
                shown = choice if isinstance(choice, str) else choice.__name__
                raise ValueError(f"convert: expected {argument} to match layers of the model, but {shown} matches none")

    def matches(self, name: str, module: nn.Module) -> bool:
        return any(_fits(choice, name, module) for choice in self.choices)


def _fits(choice: Choice, name: str, module: nn.Module) -> bool:
    if isinstance(choice, str):
        return fnmatchcase(name, choice)
    return choice in (type(module), stock_of(type(module)))


def _change_class(module: nn.Module, counterpart: Callable[[type], type[nn.Module] | None]) -> None:
    cls = counterpart(type(module))
    if cls is not None:
        module.__class__ = cls
        for name in _KEPT:
            module.__dict__.pop(name, None)


def _require_module(function: str, model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: expected model to be a torch.nn.Module, but got {type(model).__name__}")
