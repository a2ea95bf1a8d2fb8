"""`override_torchvision`: torchvision's operators run our kernels, at the dispatcher, within a block."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pyvision_kernels._op import REGISTRY


@contextmanager
def override_torchvision() -> Iterator[Counter[str]]:
    """Within the block, torchvision's own operators run our kernels.

    For code that calls `torchvision.ops` itself; where layers can be replaced, :func:`convert` is the better way. The
    operators `nms`, `roi_align`, `roi_pool`, `ps_roi_align`, `ps_roi_pool` and their gradients are replaced for CPU
    and CUDA tensors, in the whole process, other threads too; on exit torchvision's kernels are back, also after an
    exception. A gradient is computed by whoever is in force when `backward` runs.

    Yields:
        Counter[str]: how often each operator ran our kernel so far ("nms", "_roi_align_backward"), by its name.

    Raises:
        ImportError: torchvision is not installed.
        RuntimeError: within the block: our kernels are not built for the device of a call, or refuse its input.
    """
    try:
        import torchvision
    except ImportError as error:
        raise ImportError("override_torchvision: expected torchvision to be installed") from error
    assert torchvision.extension._has_ops()
    calls: Counter[str] = Counter()
    library = torch.library.Library("torchvision", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Warning only once for all operators")  # of what is meant here
            for name, kernel in _KERNELS.items():
                for key in ("CPU", "CUDA"):
                    library.impl(name, _counted(name, kernel, calls), key, allow_override=True)
        yield calls
    finally:
        library._destroy()


def _counted(name: str, kernel: Callable[..., Any], calls: Counter[str]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        calls[name] += 1
        return kernel(*args)

    return call


def _ours(name: str, *args: Any) -> Any:
    return REGISTRY[name].overload(*args)


# torchvision's outputs are contiguous, as those who trace its operators expect; ours keep channels_last.


def _roi_align(input: Tensor, rois: Tensor, *rest: Any) -> Tensor:
    return _ours("roi_align", input, rois, *rest).contiguous()


def _roi_align_backward(
    grad: Tensor,
    rois: Tensor,
    spatial_scale: float,
    pooled_height: int,
    pooled_width: int,
    batch_size: int,
    channels: int,
    height: int,
    width: int,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    size = (batch_size, channels, height, width)
    return _ours("_roi_align_backward", grad, rois, spatial_scale, *size, sampling_ratio, aligned, False)


def _roi_pool(input: Tensor, rois: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    output, argmax = _ours("roi_pool", input, rois, *rest)
    return output.contiguous(), argmax.contiguous()


def _position_sensitive(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    def forward(input: Tensor, rois: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        output = _ours(name, input, rois, *rest).contiguous()
        # The channel that each element was read from: torchvision hands it to the gradient.
        _, channels, height, width = output.shape
        mapping = torch.arange(channels * height * width, dtype=torch.int32, device=input.device)
        return output, mapping.view(1, channels, height, width).expand(output.shape).contiguous()

    return forward


def _position_sensitive_backward(name: str) -> Callable[..., Tensor]:
    def backward(grad: Tensor, rois: Tensor, channel_mapping: Tensor, *rest: Any) -> Tensor:
        return _ours(name, grad, rois, *rest, False)

    return backward


_KERNELS: dict[str, Callable[..., Any]] = {
    "nms": lambda boxes, scores, iou_threshold: _ours("nms", boxes, scores, iou_threshold),
    "roi_align": _roi_align,
    "_roi_align_backward": _roi_align_backward,
    "roi_pool": _roi_pool,
    "_roi_pool_backward": lambda *args: _ours("_roi_pool_backward", *args, False),
    "ps_roi_align": _position_sensitive("ps_roi_align"),
    "_ps_roi_align_backward": _position_sensitive_backward("_ps_roi_align_backward"),
    "ps_roi_pool": _position_sensitive("ps_roi_pool"),
    "_ps_roi_pool_backward": _position_sensitive_backward("_ps_roi_pool_backward"),
}
