"""Which stock class is replaced by which of ours; named by strings, for nothing is imported before it is met."""

from __future__ import annotations

import importlib

from torch import nn

_DETECTION = "torchvision.models.detection"
_ATTENTION = "pyvision_kernels.convert.attention"
_OURS = "pyvision_kernels.convert.detection"

# Stock class -> ours, which an instance becomes by a change of its `__class__`: both have the same attributes.
TABLE = {
    "pyvision_kernels.models.attention.Attention": f"{_ATTENTION}.Attention",
    "timm.layers.attention.Attention": "pyvision_kernels.convert.timm.Attention",
    "torch.nn.modules.activation.MultiheadAttention": "pyvision_kernels.nn.MultiheadAttention",
    "torch.nn.modules.batchnorm.BatchNorm1d": "pyvision_kernels.nn.BatchNorm1d",
    "torch.nn.modules.batchnorm.BatchNorm2d": "pyvision_kernels.nn.BatchNorm2d",
    "torch.nn.modules.conv.Conv1d": "pyvision_kernels.nn.Conv1d",
    "torch.nn.modules.conv.Conv2d": "pyvision_kernels.nn.Conv2d",
    "torch.nn.modules.instancenorm.InstanceNorm2d": "pyvision_kernels.nn.InstanceNorm2d",
    "torch.nn.modules.linear.Linear": "pyvision_kernels.nn.Linear",
    "torch.nn.modules.linear.NonDynamicallyQuantizableLinear": "pyvision_kernels.nn.NonDynamicallyQuantizableLinear",
    "torch.nn.modules.loss.CrossEntropyLoss": "pyvision_kernels.nn.CrossEntropyLoss",
    "torch.nn.modules.normalization.GroupNorm": "pyvision_kernels.nn.GroupNorm",
    "torch.nn.modules.normalization.LayerNorm": "pyvision_kernels.nn.LayerNorm",
    "torch.nn.modules.pooling.AdaptiveAvgPool2d": "pyvision_kernels.nn.AdaptiveAvgPool2d",
    "torch.nn.modules.pooling.AdaptiveMaxPool2d": "pyvision_kernels.nn.AdaptiveMaxPool2d",
    "torch.nn.modules.pooling.AvgPool1d": "pyvision_kernels.nn.AvgPool1d",
    "torch.nn.modules.pooling.AvgPool2d": "pyvision_kernels.nn.AvgPool2d",
    "torch.nn.modules.pooling.MaxPool1d": "pyvision_kernels.nn.MaxPool1d",
    "torch.nn.modules.pooling.MaxPool2d": "pyvision_kernels.nn.MaxPool2d",
    "torch.nn.modules.pooling.MaxUnpool2d": "pyvision_kernels.nn.MaxUnpool2d",
    "torch.nn.modules.transformer.TransformerEncoderLayer": "pyvision_kernels.nn.TransformerEncoderLayer",
    "torch.nn.modules.upsampling.Upsample": "pyvision_kernels.nn.Upsample",
    "torch.nn.modules.upsampling.UpsamplingBilinear2d": "pyvision_kernels.nn.UpsamplingBilinear2d",
    "torch.nn.modules.upsampling.UpsamplingNearest2d": "pyvision_kernels.nn.UpsamplingNearest2d",
    "torchvision.ops.roi_align.RoIAlign": "pyvision_kernels.nn.RoIAlign",
    "torchvision.ops.roi_pool.RoIPool": "pyvision_kernels.nn.RoIPool",
    "torchvision.ops.ps_roi_align.PSRoIAlign": "pyvision_kernels.nn.PSRoIAlign",
    "torchvision.ops.ps_roi_pool.PSRoIPool": "pyvision_kernels.nn.PSRoIPool",
    "torchvision.ops.poolers.MultiScaleRoIAlign": "pyvision_kernels.nn.MultiScaleRoIAlign",
    f"{_DETECTION}.rpn.RegionProposalNetwork": f"{_OURS}.RegionProposalNetwork",
    f"{_DETECTION}.roi_heads.RoIHeads": f"{_OURS}.RoIHeads",
    f"{_DETECTION}.retinanet.RetinaNet": f"{_OURS}.RetinaNet",
    f"{_DETECTION}.retinanet.RetinaNetClassificationHead": f"{_OURS}.RetinaNetClassificationHead",
    f"{_DETECTION}.retinanet.RetinaNetRegressionHead": f"{_OURS}.RetinaNetRegressionHead",
    f"{_DETECTION}.fcos.FCOS": f"{_OURS}.FCOS",
    f"{_DETECTION}.fcos.FCOSHead": f"{_OURS}.FCOSHead",
    f"{_DETECTION}.ssd.SSD": f"{_OURS}.SSD",
}


def qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def load(name: str) -> type[nn.Module]:
    """The class of a qualified name."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def refusal_of(cls: type) -> str:
    """Why a stock class is left, though there is one of ours; empty: it is not."""
    name = TABLE.get(qualified_name(cls), "")
    return getattr(importlib.import_module(name.rpartition(".")[0]), "REFUSED", "") if name else ""


def replacement_of(cls: type) -> type[nn.Module] | None:
    """Ours for a stock class; a subclass of one has none, since it may override what would be replaced."""
    name = TABLE.get(qualified_name(cls))
    return load(name) if name else None


def stock_of(cls: type) -> type[nn.Module] | None:
    """The stock class that one of ours replaces."""
    for stock, ours in TABLE.items():
        module, _, name = ours.rpartition(".")
        if name == cls.__name__ and f"{cls.__module__}.".startswith(f"{module}.") and load(ours) is cls:
            return load(stock)
    return None
