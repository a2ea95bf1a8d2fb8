"""Custom C++ and CUDA kernels for vision models, as drop-in PyTorch layers.

`pvk.convert(model)` replaces a model's layers by ours. `pvk.ops`: functions. `pvk.nn`: layers.
`pvk.models`: reference models. `python -m pyvision_kernels info | verify` says what is built and whether it computes
the right thing here.
"""

from pyvision_kernels import models, nn, ops
from pyvision_kernels._backend import backend, strict_numerics
from pyvision_kernels._extension import build_info, cpu_capability
from pyvision_kernels._tuner import tuning
from pyvision_kernels.convert import conversion_report, convert, revert
from pyvision_kernels.explain import explain
from pyvision_kernels.override import override_torchvision

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "backend",
    "build_info",
    "conversion_report",
    "convert",
    "cpu_capability",
    "explain",
    "models",
    "nn",
    "ops",
    "override_torchvision",
    "revert",
    "strict_numerics",
    "tuning",
]
