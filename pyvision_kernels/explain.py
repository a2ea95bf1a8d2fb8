"""`explain`: which kernels a call takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pyvision_kernels._activation import NAMES
from pyvision_kernels._backend import CHOICE
from pyvision_kernels.ops.conv2d import algorithm, choice

# PyTorch's operators in whose place ours may run.
_TORCH = {
    "aten::convolution": "conv2d",
    "aten::conv1d": "conv1d",
    "aten::conv2d": "conv2d",
    "aten::mkldnn_convolution": "conv2d",
    "aten::addmm": "linear",
    "aten::mm": "linear",
    "aten::linear": "linear",
    "aten::_scaled_dot_product_cudnn_attention": "attention",
    "aten::_scaled_dot_product_efficient_attention": "attention",
    "aten::_scaled_dot_product_flash_attention": "attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "attention",
    "aten::cudnn_batch_norm": "batch_norm",
    "aten::native_batch_norm": "batch_norm",
    "aten::native_group_norm": "group_norm",
    "aten::native_layer_norm": "layer_norm",
}


def explain(layer_or_function: Callable[..., Any], *inputs: Any, **options: Any) -> list[str]:
    """Names the kernels that a layer, a model or a function takes for these inputs, by calling it once.

    The call is made without gradients, in the modes, and under the `pvk.backend`, that are in force. Listed are all
    operators of ours, and PyTorch's convolutions, matrix products, attention and normalisations, in their order.

    Args:
        layer_or_function (callable): A layer, a model, or a function such as `pvk.ops.conv2d`.
        inputs, options: What it is called with.

    Returns:
        list[str]: a line a call, such as ``"conv2d [1, 64, 56, 56] * [64, 64, 3, 3]: pvk winograd4 + relu"`` or
        ``"linear [1, 512] * [512, 10]: torch aten::addmm"``.

    Raises:
        What the call raises.
    """
    recorder = _Recorder()
    CHOICE.renew()  # so that every layer chooses again, and says why
    choice.REASONS.append(recorder.reasons)
    try:
        with torch.no_grad(), recorder:
            layer_or_function(*inputs, **options)
    finally:
        choice.REASONS.pop()
    return recorder.lines


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.reasons: list[str] = []  # of choices since the last operator; its own is the latest

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket._qualified_op_name
        space, _, op = name.partition("::")
        if space == "pvk" and not (op.startswith("_") and op.endswith("_pack")):
            values = {part.name: value for part, value in zip(func._schema.arguments, args, strict=False)}
            shown = op.replace("_triton_", "_")
            if op.endswith("_triton"):
                shown = op.removeprefix("_").removesuffix("_triton")
            self.lines.append(f"{shown} {_sizes(args)}: pvk{_how(op, values)}{self._why(op)}")
        elif name in _TORCH:
            self.lines.append(f"{_TORCH[name]} {_sizes(args)}: torch {name}{self._why(_TORCH[name])}")
        return func(*args, **(kwargs or {}))

    def _why(self, op: str) -> str:
        if not self.reasons or not op.removeprefix("_").startswith(_CHOSEN):
            return ""
        reason = self.reasons[-1]
        self.reasons.clear()
        return f" ({reason})"


_CHOSEN = ("conv2d", "linear")  # how operators begin whose kernels choice.py chooses


def _sizes(args: Any) -> str:
    """Of the first two tensors that are not vectors: input and weight."""
    sizes = [list(arg.shape) for arg in args if isinstance(arg, Tensor) and arg.dim() > 1]
    return " * ".join(map(str, sizes[:2]))


def _how(op: str, values: dict[str, Any]) -> str:
    parts = [algorithm.name_of(values["algorithm"])] if "algorithm" in values else []
    if "triton" in op:
        parts = ["triton tf32" if values.get("algorithm") == algorithm.TF32 else "triton"]
    if any(isinstance(values.get(name), Tensor) for name in ("scale", "shift")):
        parts.append("scale and shift")
    if "attention" in op and values.get("bias") is not None:
        parts.append("bias")
    if values.get("dropout_p"):
        parts.append("dropout")
    if values.get("residual") is not None:
        parts.append("residual")
    if values.get("activation"):
        parts.append(str(NAMES[values["activation"]]))
    if values.get("pool"):
        parts.append("2 x 2 pool")
    head = f" {parts.pop(0)}" if "algorithm" in values or "triton" in op else ""
    return head + "".join(f" + {part}" for part in parts)
