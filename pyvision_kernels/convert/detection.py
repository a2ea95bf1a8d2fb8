"""torchvision's detection classes with our kernels in their methods.

A class here is a subclass of torchvision's of the same name, and an instance of that becomes one of this by a change of
its `__class__`. The methods are torchvision's own code, which looks up names in a copy of its module's namespace: there
`batched_nms`, `box_iou` and the others are ours. torchvision itself is not touched, and whatever else a release of it
does in these methods stays.
"""

from __future__ import annotations

import functools
import sys
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any, cast

import torchvision
from torchvision.models.detection import _utils, fcos, retinanet, roi_heads, rpn, ssd
from torchvision.ops import boxes

from pyvision_kernels import ops

# The functions of torchvision.ops that have the same name, arguments and results in ours.
OPERATORS: dict[str, Any] = {
    name: getattr(ops, name) for name in ops.__all__ if isinstance(getattr(torchvision.ops, name, None), FunctionType)
}
_BOXES = SimpleNamespace(**{**vars(boxes), **OPERATORS})


@functools.cache
def _namespace(module: ModuleType) -> dict[str, Any]:
    """A copy of a module's names with our operators; its own functions, and those of _utils, look names up in it."""
    space = dict(vars(module))
    for name, value in vars(module).items():
        if value is boxes:
            space[name] = _BOXES
        elif name in OPERATORS and value is getattr(torchvision.ops, name):
            space[name] = OPERATORS[name]
        elif isinstance(value, FunctionType) and value.__globals__ is vars(module):
            space[name] = _over(space, value)
        elif isinstance(value, FunctionType) and value.__globals__ is vars(_utils):
            space[name] = _namespace(_utils)[name]
    return space


def _over(space: dict[str, Any], function: FunctionType) -> FunctionType:
    """The function, looking up its global names in a namespace."""
    copy = FunctionType(function.__code__, space, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    functools.update_wrapper(copy, function)
    return copy


class _BoxSimilarity:
    """The attribute `box_similarity`, where the stock constructor puts torchvision's box_iou: ours instead of that."""

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        chosen = instance.__dict__["box_similarity"]
        return OPERATORS["box_iou"] if chosen is boxes.box_iou else chosen

    def __set__(self, instance: Any, value: Any) -> None:
        instance.__dict__["box_similarity"] = value


def _with_our_kernels(stock: type) -> Any:
    space = _namespace(sys.modules[stock.__module__])
    members: dict[str, Any] = {"__module__": __name__, "__doc__": stock.__doc__}
    for name, member in vars(stock).items():
        if isinstance(member, FunctionType) and name != "__init__":
            members[name] = _over(space, member)
        elif isinstance(member, staticmethod):
            members[name] = staticmethod(_over(space, cast(FunctionType, member.__func__)))
    if stock in (rpn.RegionProposalNetwork, roi_heads.RoIHeads):
        members["box_similarity"] = _BoxSimilarity()
    return type(stock)(stock.__name__, (stock,), members)


RegionProposalNetwork = _with_our_kernels(rpn.RegionProposalNetwork)
RoIHeads = _with_our_kernels(roi_heads.RoIHeads)
RetinaNet = _with_our_kernels(retinanet.RetinaNet)
RetinaNetClassificationHead = _with_our_kernels(retinanet.RetinaNetClassificationHead)
RetinaNetRegressionHead = _with_our_kernels(retinanet.RetinaNetRegressionHead)
FCOS = _with_our_kernels(fcos.FCOS)
FCOSHead = _with_our_kernels(fcos.FCOSHead)
SSD = _with_our_kernels(ssd.SSD)
