"""Drop-in layers: same constructor and state_dict as the layer replaced."""

from typing import TYPE_CHECKING, Any

from pyvision_kernels.nn.attention import Attention
from pyvision_kernels.nn.avg_pool2d import AdaptiveAvgPool2d, AvgPool1d, AvgPool2d
from pyvision_kernels.nn.conv import Conv1d, Conv2d
from pyvision_kernels.nn.cross_entropy_loss import CrossEntropyLoss
from pyvision_kernels.nn.group_norm import GroupNorm, InstanceNorm2d
from pyvision_kernels.nn.linear import Linear
from pyvision_kernels.nn.max_pool2d import AdaptiveMaxPool2d, MaxPool1d, MaxPool2d, MaxUnpool2d
from pyvision_kernels.nn.multihead_attention import (
    MultiheadAttention,
    NonDynamicallyQuantizableLinear,
    TransformerEncoderLayer,
)
from pyvision_kernels.nn.norm import BatchNorm1d, BatchNorm2d, LayerNorm
from pyvision_kernels.nn.ps_roi_align import PSRoIAlign, PSRoIPool
from pyvision_kernels.nn.roi_align import RoIAlign
from pyvision_kernels.nn.roi_pool import RoIPool
from pyvision_kernels.nn.upsample import Upsample, UpsamplingBilinear2d, UpsamplingNearest2d

if TYPE_CHECKING:
    from pyvision_kernels.nn.multiscale_roi_align import MultiScaleRoIAlign

__all__ = [
    "AdaptiveAvgPool2d",
    "AdaptiveMaxPool2d",
    "Attention",
    "AvgPool1d",
    "AvgPool2d",
    "BatchNorm1d",
    "BatchNorm2d",
    "Conv1d",
    "Conv2d",
    "CrossEntropyLoss",
    "GroupNorm",
    "InstanceNorm2d",
    "LayerNorm",
    "Linear",
    "MaxPool1d",
    "MaxPool2d",
    "MaxUnpool2d",
    "MultiScaleRoIAlign",
    "MultiheadAttention",
    "NonDynamicallyQuantizableLinear",
    "PSRoIAlign",
    "PSRoIPool",
    "RoIAlign",
    "RoIPool",
    "TransformerEncoderLayer",
    "Upsample",
    "UpsamplingBilinear2d",
    "UpsamplingNearest2d",
]


def __getattr__(name: str) -> Any:
    if name == "MultiScaleRoIAlign":  # only when asked for: it imports torchvision, where that is installed
        from pyvision_kernels.nn.multiscale_roi_align import MultiScaleRoIAlign

        return MultiScaleRoIAlign
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
