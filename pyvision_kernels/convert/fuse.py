"""Fused modules: an instance becomes one of a subclass of its class, whose forward in eval mode is a fused graph.

Nothing else of the instance changes. In train mode, with gradients, under autocast, torch.compile or torch.func, and
for arguments that the graph was not made for, the forward of its own class runs.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from pyvision_kernels._backend import CHOICE
from pyvision_kernels._packed import is_off
from pyvision_kernels._tuner import TUNER, gpu_name
from pyvision_kernels.convert.plan import Plan
from pyvision_kernels.convert.trace import EXCLUDED

_PLAN = "_pvk_plan"  # in the `__dict__` of a fused module; never copied or pickled


def fuse(model: nn.Module) -> None:
    """Fuses the largest submodules of a model that can be traced, as they are in eval mode."""
    with _in_eval_mode(model):
        _fuse(model, set())


def _fuse(module: nn.Module, seen: set[int]) -> None:
    if id(module) in seen or not module._modules or EXCLUDED in module.__dict__:
        return
    seen.add(id(module))
    plan = None if "forward" in module.__dict__ or not _may_swap(type(module)) else Plan(module)
    if plan is None or plan.function is None:
        for child in module.children():
            _fuse(child, seen)
        return
    module.__class__ = fused_class(type(module))
    module.__dict__[_PLAN] = plan
    for name in plan.opaque:
        _fuse(module.get_submodule(name), seen)


def _may_swap(cls: type) -> bool:
    return "__slots__" not in vars(cls) and not issubclass(cls, torch.jit.ScriptModule)


def unfuse(module: nn.Module) -> None:
    """Gives one module its own class back."""
    cls = type(module)
    if is_fused(cls):
        module.__class__ = own_class(cls)
    module.__dict__.pop(_PLAN, None)


def is_fused(cls: type) -> bool:
    return "_pvk_own_class" in vars(cls)


def own_class(cls: type) -> type[nn.Module]:
    """The class that a fused class was made of; another class itself."""
    return vars(cls).get("_pvk_own_class", cls)


def plan_of(module: nn.Module) -> Plan:
    """The plan of a fused module, made anew where it is out of date."""
    plan: Plan | None = module.__dict__.get(_PLAN)
    if plan is not None:
        if plan.checked:
            if plan.is_current():
                return plan
        elif plan.is_current_in_full():
            plan.checked = True
            return plan
    plan = module.__dict__[_PLAN] = Plan(module)
    plan.checked = True
    return plan


def plan_in_eval_mode(module: nn.Module) -> Plan:
    """The plan that a fused module has in eval mode, whatever mode it is in."""
    with _in_eval_mode(module):
        return plan_of(module)


def _is_plain(args: tuple[Any, ...]) -> bool:
    """Whether the graph was made for these arguments, and nobody is to see the calls that it leaves out."""
    for arg in args:
        if type(arg) is not Tensor or not arg.is_floating_point():
            return False
        if not (arg.is_cpu or (arg.is_cuda and _fuses_on_cuda(arg))):
            return False
    return not (
        CHOICE.backend == "torch"
        or is_off()
        or torch._C._is_any_autocast_enabled()
        or forward_ad._current_level >= 0
        or torch_module._has_any_global_hook()
    )


def _fuses_on_cuda(arg: Tensor) -> bool:
    """Where ours are asked for, or were measured: a fused model keeps its maps in channels_last, which PyTorch's
    kernels may not gain from."""
    return CHOICE.backend == "pvk" or TUNER.active or bool(TUNER.table(gpu_name(arg.device.index)).records)


def _needs_grad(module: nn.Module, args: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and (
        any(arg.requires_grad for arg in args) or any(parameter.requires_grad for parameter in module.parameters())
    )


_CLASSES: dict[Any, Any] = {}


def fused_class(own: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a class whose instances run fused in eval mode."""
    return _CLASSES.get(own) or _CLASSES.setdefault(own, _make_fused_class(own))


def _make_fused_class(own: Any) -> Any:

    @functools.wraps(own.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.training or kwargs or not args or torch.compiler.is_compiling() or not _is_plain(args):
            return own.forward(self, *args, **kwargs)
        plan = plan_of(self)
        if plan.function is None or plan.arguments != len(args) or _needs_grad(self, args):
            return own.forward(self, *args)
        back = args[0].dim() != 4 or args[0].is_contiguous()
        if not plan.is_closed:
            return plan.function(*args, back)
        with torch._C._AutoDispatchBelowAutograd():
            return plan.function(*args, back)

    def train(self: Any, mode: bool = True) -> Any:
        _out_of_date(self)
        return own.train(self, mode)

    def _apply(self: Any, *args: Any, **kwargs: Any) -> Any:
        _out_of_date(self)
        return own._apply(self, *args, **kwargs)

    def _load_from_state_dict(self: Any, *args: Any, **kwargs: Any) -> None:
        _out_of_date(self)
        own._load_from_state_dict(self, *args, **kwargs)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        reduced = own.__reduce_ex__(self, protocol)
        if reduced[0] is not copyreg.__newobj__ or not isinstance(reduced[2], dict):  # type: ignore[attr-defined]
            return reduced
        state = {key: value for key, value in reduced[2].items() if key != _PLAN}
        return _new_fused, (own, *reduced[1][1:]), state, *reduced[3:]

    members = {
        "__module__": __name__,
        "__qualname__": own.__qualname__,
        "__doc__": own.__doc__,
        "_pvk_own_class": own,
        **{function.__name__: function for function in (train, _apply, _load_from_state_dict, __reduce_ex__)},
        "forward": forward,
    }
    return type(own)(own.__name__, (own,), members)


def _new_fused(own: type[nn.Module], *args: Any) -> nn.Module:
    cls = fused_class(own)
    return cls.__new__(cls, *args)


def _out_of_date(module: nn.Module) -> None:
    plan = module.__dict__.get(_PLAN)
    if plan is not None:
        plan.drop()


@contextlib.contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """The flags of eval mode alone: no module is told, none drops what it keeps."""
    modes = [(module.__dict__, module.__dict__["training"]) for module in model.modules()]
    try:
        for values, _ in modes:
            values["training"] = False
        yield
    finally:
        for values, training in modes:
            values["training"] = training
