"""Whose kernel computes a convolution, or a gradient of one: what was asked for, what was measured, else the rule."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pyvision_kernels._backend import CHOICE
from pyvision_kernels._op import Emulation
from pyvision_kernels._packed import PLAIN, is_off
from pyvision_kernels._tuner import TUNER, Times, arch_of, fastest, gpu_name
from pyvision_kernels.ops.conv2d import algorithm
from pyvision_kernels.ops.conv2d.algorithm import TORCH, Problem
from pyvision_kernels.ops.conv2d.backward import backward_input_op, backward_weight_op

FORWARD, INPUT, WEIGHT = "forward", "grad_input", "grad_weight"
CPP, TRITON = "cuda", "triton"  # names of candidates in the tuner's records, beside the next
BY_TORCH = "torch"
ByKernel = Callable[[int], Any]

REASONS: list[list[str]] = []  # of the choices on CUDA within each `explain`, in order


_triton: Any = None  # the module of the Triton kernels, once has_triton has found it


@torch.compiler.assume_constant_result
def has_triton() -> bool:
    """Whether the Triton kernels can run here."""
    global _triton
    if _triton is None:
        try:
            from pyvision_kernels.ops.conv2d import triton
        except ImportError:
            _triton = False
        else:
            _triton = triton if triton.available() else False
    return bool(_triton)


def fusion_of(bias: Any, scale: Any, shift: Any, residual: Any, activation: str | None, pool: bool) -> str:
    """What is computed beside the convolution."""
    parts = {"bias": bias, "scale": scale, "shift": shift, "residual": residual}
    names = [name for name, value in parts.items() if value is not None]
    return "+".join([*names, *([activation] if activation else []), *(["pool"] if pool else [])])


def key_of(problem: Problem, direction: str, fusion: str, tf32: bool) -> str:
    """Of a record: all that a time depends on."""
    p = problem
    layout = "channels_last" if p.channels_last else "contiguous"
    sizes = f"N{p.N} C{p.C} H{p.H} W{p.W} K{p.K} R{p.R} S{p.S} OH{p.OH} OW{p.OW}"
    steps = f"stride {p.stride[0]},{p.stride[1]} dilation {p.dilation[0]},{p.dilation[1]} groups {p.groups}"
    dtype = "tf32" if tf32 else str(p.dtype).removeprefix("torch.")
    return f"conv2d {direction} {sizes} {steps} {dtype} {layout} {fusion}".rstrip()


def forward(*given: Any, kernel: int) -> Tensor:
    """A convolution by the Triton kernel of a number. given: of conv2d_op, but packed and algorithm."""
    return _triton.forward(*given, algorithm.in_cuda_cpp(kernel), _config_of(kernel))


def backward_input(*given: Any, kernel: int) -> Tensor:
    """The gradient of the input, or a transposed convolution, by the kernel of ours of a number.

    given: of backward_input_op, but algorithm.
    """
    if algorithm.is_triton(kernel):
        return _triton.backward_input(*given, algorithm.in_cuda_cpp(kernel), _config_of(kernel))
    return backward_input_op(*given, kernel)


def backward_weight(*given: Any, kernel: int) -> Tensor:
    """The gradient of the weight by the kernel of ours of a number. given: of backward_weight_op, but algorithm."""
    if algorithm.is_triton(kernel):
        return _triton.backward_weight(*given, algorithm.in_cuda_cpp(kernel), _config_of(kernel))
    return backward_weight_op(*given, kernel)


_configs: list[Any] = []  # of Triton; a kernel's number names one by its place


def _config_of(kernel: int) -> Any:
    return _configs[kernel // 8 - 1] if kernel >= 8 else None


def _fits_triton(problem: Problem, pool: bool) -> bool:
    return problem.padding_mode == 0 and has_triton() and _triton.supports(problem, pool)


_DIRECTIONS = {
    INPUT: "backward_input",
    WEIGHT: "backward_weight",
}  # others are forward, in the words of Triton's tables


def candidates(problem: Problem, direction: str, tf32: bool, pool: bool, gpu: str) -> Iterator[tuple[str, int]]:
    """What the tuner measures on a GPU, with the numbers of the kernels."""
    yield BY_TORCH, TORCH
    yield CPP, algorithm.TF32 if tf32 else algorithm.DIRECT
    if not _fits_triton(problem, pool):
        return
    kernel, precision = (algorithm.TRITON_TF32, "tf32") if tf32 else (algorithm.TRITON, "ieee")
    words = _DIRECTIONS.get(direction.removeprefix("linear "), "forward")
    for config in _triton.configs(arch_of(gpu), problem, words, precision):
        if config not in _configs:
            _configs.append(config)
        yield f"{TRITON} {config}", kernel + 8 * (_configs.index(config) + 1)


def choose(
    problem: Problem,
    packed: bool,
    direction: str = FORWARD,
    fusion: str = "",
    tf32: bool = False,
    gpu: str = "",
    backend: str | None = None,
) -> int:
    """The number of the algorithm, or TORCH.

    Args:
        problem: Of the convolution, also where a gradient of it is computed.
        packed: The packed weight is kept between calls.
        direction: FORWARD, INPUT or WEIGHT.
        fusion: Of fusion_of.
        tf32: float32 may be rounded to tf32.
        gpu: Its name, where records are to be looked for.
        backend: What was asked for; None: what is in force.
    """
    mode = CHOICE.backend if backend is None else backend
    if mode == "torch":
        return TORCH
    if problem.device != "cuda":
        if mode == "auto" and algorithm.torch_is_faster(problem, packed):
            return TORCH
        return algorithm.ours(problem, CHOICE.strict, packed)
    times = TUNER.times(gpu, key_of(problem, direction, fusion, tf32)) if gpu else None
    pool = fusion.endswith("pool")
    if times is not None:
        best = fastest(times, but=BY_TORCH if mode == "pvk" else "")
        kernel = dict(candidates(problem, direction, tf32, pool, gpu)).get(best or "")
        if kernel is not None:
            _note(f"tuned: {_as_text(times, best)}")
            return kernel
    _note("by the rule")
    if mode == "auto" and algorithm.torch_is_faster(problem, packed):
        return TORCH
    if algorithm.is_for_triton(problem) and _fits_triton(problem, pool):
        return algorithm.TRITON_TF32 if tf32 else algorithm.TRITON
    return algorithm.TF32 if tf32 else algorithm.DIRECT


def _note(reason: str) -> None:
    if REASONS:
        REASONS[-1].append(reason)


def _as_text(times: Times, best: str | None) -> str:
    """The best, and PyTorch's beside it."""
    names = [name for name in (best, BY_TORCH) if name in times]
    return ", ".join(f"{name} {times[name]:.1f} us" for name in dict.fromkeys(names))


def measure(
    problem: Problem, direction: str, fusion: str, tf32: bool, gpu: str, by_kernel: ByKernel, but: Sequence[str] = ()
) -> None:
    """Has the tuner time a call by every kernel, where it has not.

    Args:
        by_kernel: Makes the call by the kernel of a number.
        but: Candidates that cannot make it.
        Others: as of `choose`.
    """
    key = key_of(problem, direction, fusion, tf32)
    if CHOICE.backend == "torch" or TUNER.times(gpu, key) is not None:
        return
    calls = {
        name: functools.partial(_searching if name == BY_TORCH else _call, by_kernel, kernel)
        for name, kernel in candidates(problem, direction, tf32, fusion.endswith("pool"), gpu)
        if name not in but
    }
    with torch.no_grad():
        TUNER.measure(gpu, key, calls)


def _call(by_kernel: ByKernel, kernel: int) -> Any:
    return by_kernel(kernel)


def _searching(by_kernel: ByKernel, kernel: int) -> Any:
    """PyTorch's at its best: cuDNN picks the fastest of its kernels, as with `torch.backends.cudnn.benchmark`."""
    before = torch._C._get_cudnn_benchmark()
    torch._C._set_cudnn_benchmark(True)
    try:
        return by_kernel(kernel)
    finally:
        torch._C._set_cudnn_benchmark(before)


def gpu_of(tensor: Tensor) -> str:
    """The name of the tensor's GPU, where its records may be looked up; else empty."""
    if not tensor.is_cuda or type(tensor) not in PLAIN or is_off():
        return ""
    return gpu_name(tensor.device.index)


def precision_of(dtype: torch.dtype, device: str, matmul: bool = False) -> bool:
    """Whether a convolution, or a matrix product, of ours rounds float32 to tf32: where PyTorch's may."""
    if device != "cuda" or dtype != torch.float32 or CHOICE.strict:
        return False
    return algorithm.matmul_allows_tf32() if matmul else algorithm.convolution_allows_tf32()


# ---- gradients ----

_MOST = 4096
_gradients: dict[Any, int] = {}


def problem_of_gradient(
    input_size: Sequence[int], weight_size: Sequence[int], grad: Tensor, numbers: Sequence[int], last: bool
) -> Problem:
    """Of the convolution that a gradient is of.

    Args:
        grad: Of its output.
        numbers: Of its Geometry.
        last: Whether the maps are channels_last.
    """
    (images, channels, height, width), (outputs, _, rows, columns) = input_size, weight_size
    return Problem(
        *(images, channels, height, width, outputs, rows, columns, grad.shape[2], grad.shape[3]),
        (numbers[0], numbers[1]),
        (numbers[6], numbers[7]),
        numbers[8],
        grad.dtype,
        grad.device.type,
        last,
        alone=True,
    )


def choose_gradient(
    direction: str,
    input_size: Sequence[int],
    weight_size: Sequence[int],
    grad: Tensor,
    numbers: Sequence[int],
    last: bool,
    tf32: bool,
    backend: str,
    by_kernel: ByKernel,
    fusion: str = "",
) -> int:
    """The kernel of one gradient, measured first where the tuner is on. On the CPU PyTorch's; emulated, ours.

    Args:
        backend: What was asked for when the forward ran.
        by_kernel: Computes it by the kernel of a number.
        Others: as of `choose` and `problem_of_gradient`.
    """
    if Emulation.active:
        return algorithm.DIRECT
    if not grad.is_cuda:
        return TORCH
    gpu = gpu_of(grad)
    if not gpu:  # tensors stand for others, whose sizes may not be known
        problem = problem_of_gradient(input_size, weight_size, grad, numbers, last)
        return choose(problem, True, direction, fusion, tf32, backend=backend)
    measured = TUNER.wants(grad)
    key = (
        *(direction, tuple(input_size), tuple(weight_size), grad.shape, tuple(numbers), grad.dtype, grad.device),
        *(last, tf32, backend, fusion, CHOICE.key),
    )
    kernel = None if measured else _gradients.get(key)
    if kernel is None:
        problem = problem_of_gradient(input_size, weight_size, grad, numbers, last)
        if measured and backend != "torch":
            measure(problem, direction, fusion, tf32, gpu, by_kernel)
        kernel = choose(problem, True, direction, fusion, tf32, gpu, backend)
        if len(_gradients) >= _MOST:
            _gradients.clear()
        _gradients[key] = kernel
    return kernel
