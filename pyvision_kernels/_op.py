"""The one way to declare an op: schema, fake, autograd, autocast, vmap, and the path below autograd.

The kernels are registered in C++ (`csrc/ops/<op>/<op>.cpp`), or given with the op, where they are of Triton; everything
that Python decides about an op is declared here. What `torch.library` registers for autograd costs tens of microseconds
a call. So where nothing is tracing, a call is dispatched below autograd where nothing can ask for a gradient, and else
made by a `torch.autograd.Function`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pyvision_kernels._extension import LIBRARIES

_library = torch.library.Library("pvk", "DEF")

REGISTRY: dict[str, Op] = {}


class Emulation:
    """Whether ops on CPU tensors run the CUDA kernels: within `_simt.emulated`."""

    active = False


def runs_cuda_kernels(tensor: Tensor) -> bool:
    """Whether an op on this tensor takes our CUDA kernels: on a GPU, or emulated."""
    return tensor.is_cuda or Emulation.active


@dataclass(frozen=True)
class Contract:
    """All that Python decides about an op; `declare` says what each part is."""

    schema: str
    fake: Callable[..., Any]
    setup_context: Callable[..., None] | None
    backward: Callable[..., Any] | None
    autocast: Callable[..., tuple[Any, ...]] | None
    vmap: Callable[..., Any] | None
    cuda_only: bool = False
    implementation: Callable[..., Any] | None = None

    @property
    def name(self) -> str:
        return self.schema.split("(", 1)[0]

    @property
    def returns_list(self) -> bool:
        return self.schema.endswith("-> Tensor[]")


class Op:
    """The operator `torch.ops.pvk.<name>`, called with its schema's positional arguments."""

    def __init__(self, contract: Contract, overload: torch._ops.OpOverload):
        self.name = contract.name
        self.contract = contract
        self.overload = overload
        self.function: type[torch.autograd.Function] | None = None
        self.eager: type[torch.autograd.Function] | None = None
        # Where tensors, or lists of them, stand among the arguments: nothing else is looked at in a call.
        self.tensors = tuple(
            index for index, argument in enumerate(overload._schema.arguments) if "Tensor" in str(argument.type)
        )
        self.takes_lists = contract.returns_list or "Tensor[]" in contract.schema or "Tensor?[]" in contract.schema

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.overload(*args)
        if self.function is not None and torch._C._functorch.maybe_current_level() is not None:
            layout, leaves = _flatten(args)
            result = self.function.apply(layout, *leaves)
            return list(result) if self.contract.returns_list else result
        if forward_ad._current_level >= 0:
            _refuse_tangents(self.name, args)
        tensors = [arg for index in self.tensors if (arg := args[index]) is not None]
        if self.takes_lists:
            tensors = _flatten(tuple(tensors))[1]
        needs_grad = False
        for tensor in tensors:
            kind = type(tensor)
            if kind is torch.Tensor or kind is torch.nn.Parameter:
                needs_grad = needs_grad or tensor.requires_grad
            elif isinstance(tensor, torch.Tensor):
                return self.overload(*args)
        if torch._C._get_tracing_state() is not None:
            return self.overload(*args)
        if needs_grad and torch.is_grad_enabled():
            if self.eager is None or torch._C._is_any_autocast_enabled():
                return self.overload(*args)
            return self.eager.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*args)


def _refuse_tangents(name: str, args: tuple[Any, ...]) -> None:
    # The dispatcher would drop them without a word.
    for arg in _flatten(args)[1]:
        if isinstance(arg, torch.Tensor) and forward_ad.unpack_dual(arg).tangent is not None:
            raise NotImplementedError(f"{name}: expected inputs without tangents (forward-mode AD is not supported)")


def _flatten(args: tuple[Any, ...]) -> tuple[tuple[int | None, ...], list[Any]]:
    """Arguments with their lists replaced by the elements, and the lengths of the lists (None: not a list)."""
    layout = tuple(len(arg) if isinstance(arg, list) else None for arg in args)
    return layout, [item for arg in args for item in (arg if isinstance(arg, list) else (arg,))]


def _unflatten(layout: tuple[int | None, ...], leaves: Iterable[Any]) -> tuple[Any, ...]:
    remaining = iter(leaves)
    return tuple(next(remaining) if length is None else list(islice(remaining, length)) for length in layout)


def declare(
    schema: str,
    *,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    autocast: Callable[..., tuple[Any, ...]] | None = None,
    vmap: Callable[..., Any] | None = None,
    cuda_only: bool = False,
    implementation: Callable[..., Any] | None = None,
) -> Op:
    """Declares `pvk::<name>`.

    Args:
        schema: The operator's schema, without the namespace.
        fake: Takes the arguments, checks what shapes, dtypes and devices can show, returns empty outputs.
        setup_context, backward, vmap: As on a `torch.autograd.Function`; an op without them has no gradient, no vmap.
        autocast: Maps the arguments to those that the op gets under autocast, on CPU and CUDA.
        cuda_only: No kernel of ours runs it on the CPU.
        implementation: Of an op in Python, with kernels of Triton's; its annotations are to give the schema.
    """
    contract = Contract(schema, fake, setup_context, backward, autocast, vmap, cuda_only, implementation)
    op = Op(contract, define(contract, _library))
    for key, library in LIBRARIES.items() if implementation is None else ():
        if key == "CPU" and cuda_only:
            _library.impl(op.name, _refuser(op.name), key)
        elif library.handle is None:
            _library.impl(op.name, _raiser(op.name, key), key)
    if backward is not None and setup_context is not None:
        op.function = _function(op, setup_context, backward, vmap)
        if not op.takes_lists:
            op.eager = _eager_function(op, setup_context, backward)
    REGISTRY[op.name] = op
    return op


def define(contract: Contract, library: torch.library.Library) -> torch._ops.OpOverload:
    """Declares an op in the namespace of a library: all but its kernels."""
    name = f"{library.ns}::{contract.name}"
    if contract.implementation is None:
        library.define(contract.schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(name, contract.fake, lib=library)
    else:
        definition: Any = torch.library.triton_op(name, contract.implementation, mutates_args=())
        definition.register_fake(contract.fake)  # so far the implementation: launches are planned there
        for key in ("CPU", "CUDA"):  # past what triton_op puts around it, for a third of a call's time
            library.impl(contract.name, contract.implementation, key)
    overload = getattr(getattr(torch.ops, library.ns), contract.name).default
    if contract.backward is not None and contract.setup_context is not None:
        torch.library.register_autograd(name, contract.backward, setup_context=contract.setup_context, lib=library)
    if contract.vmap is not None:
        torch.library.register_vmap(name, contract.vmap, lib=library)
    if contract.autocast is not None:
        for key in ("AutocastCPU", "AutocastCUDA"):
            library.impl(contract.name, _autocaster(overload, contract.autocast, key), key)
    return overload


class _OpContext:
    """The context of a Function of leaves, as the gradient of the op knows it: `needs_input_grad` by its arguments."""

    def __init__(self, ctx: Any):
        self._ctx = ctx
        self.needs_input_grad = _unflatten(ctx.layout, ctx.needs_input_grad[1:])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def _function(
    op: Op, setup: Callable[..., None], gradient: Callable[..., Any], batch: Callable[..., Any] | None
) -> type[torch.autograd.Function]:
    """The op for functorch: what `register_autograd` makes does not compose with torch.func.grad."""

    class Function(torch.autograd.Function):
        # A Function sees no tensor in a list: it gets the elements, and the lengths of the lists.
        @staticmethod
        def forward(layout: tuple[int | None, ...], *leaves: Any) -> Any:
            result = op(*_unflatten(layout, leaves))
            return tuple(result) if op.contract.returns_list else result

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.layout, *leaves = inputs
            setup(ctx, _unflatten(ctx.layout, leaves), output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            of_op = _OpContext(ctx)
            grad_args = gradient(of_op, list(grads)) if op.contract.returns_list else gradient(of_op, *grads)
            grad_args = grad_args if isinstance(grad_args, tuple) else (grad_args,)
            pairs = zip(grad_args, ctx.layout, strict=True)
            lists = ([None] * length if grad is None and length is not None else grad for grad, length in pairs)
            return None, *_flatten(tuple(lists))[1]

        if batch is not None:

            @staticmethod
            def vmap(info: Any, in_dims: tuple[Any, ...], layout: tuple[int | None, ...], *leaves: Any) -> Any:
                result, dims = batch(info, _unflatten(layout, in_dims[1:]), *_unflatten(layout, leaves))
                return (tuple(result), tuple(dims)) if op.contract.returns_list else (result, dims)

    return Function


def _eager_function(op: Op, setup: Callable[..., None], gradient: Callable[..., Any]) -> type[torch.autograd.Function]:
    """The op for plain tensors: apply() of a Function with a `setup_context` inspects a signature at every call."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                result = op.overload(*args)
            setup(ctx, args, result)
            return result

        backward = staticmethod(gradient)

    return Function


def _raiser(name: str, key: str) -> Callable[..., NoReturn]:
    def unavailable(*args: Any) -> NoReturn:
        raise LIBRARIES[key].error(name)

    return unavailable


def _refuser(name: str) -> Callable[..., NoReturn]:
    def only_on_cuda(*args: Any) -> NoReturn:
        raise NotImplementedError(f"{name}: expected tensors on a CUDA device, but got some on the CPU")

    return only_on_cuda


def _autocaster(
    overload: torch._ops.OpOverload, autocast: Callable[..., tuple[Any, ...]], key: str
) -> Callable[..., Any]:
    off = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def cast_and_call(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(off):
            return overload(*autocast(*args))

    return cast_and_call
