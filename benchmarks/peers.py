"""Other ways to run a model: PyTorch's own, on the CPU also ONNX Runtime and OpenVINO.

Each maker takes the model in eval mode and its inputs, and returns a call that gives the output. On the CPU all run
with as many threads as torch; on CUDA cuDNN searches for its fastest kernels, for all of them (`searching`). A maker
raises `Absent` where its package is missing or cannot take the model.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.pair import Call, Timing, graphed

Maker = Callable[..., Call]
FAR_OFF = 10  # Times as far off as ours may be: such a peer is left out.
WARM_UPS = 3  # Calls: the mode reduce-overhead records its CUDA graphs at the second


class Absent(Exception):
    """Why a peer is left out."""


@dataclass(frozen=True)
class Compared:
    """Ours against each peer, their errors, and why others are left out; by the peer's name."""

    timings: dict[str, Timing] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def fastest(self) -> str | None:
        return min(self.timings, key=lambda name: self.timings[name].ratio.median, default=None)


def compare(
    makers: Mapping[str, Maker],
    given: tuple[Any, ...],
    error_of: Callable[[Any], float],
    allowed: float,
    time: Callable[[str, Call], Timing],
) -> Compared:
    """Times every peer that is there and right.

    Args:
        given: What a maker is called with.
        error_of: The error of a result.
        allowed: What ours may have.
        time: Takes the name and the call of a peer.
    """
    found = Compared()
    with nothing_kept():
        for name, make in makers.items():
            try:
                call = make(*given)
                error = error_of(call())
            except Absent as reason:
                found.left_out[name] = str(reason)
                continue
            found.errors[name] = error
            if not error <= FAR_OFF * allowed:
                found.left_out[name] = f"its error is {error:.1e}"
                continue
            found.timings[name] = time(name, call)
    return found


def eager(model: nn.Module, *inputs: Tensor) -> Call:
    return lambda: model(*inputs)


def channels_last(model: nn.Module, *inputs: Tensor) -> Call:
    return eager(*in_channels_last(model, *inputs))


def in_channels_last(model: nn.Module, *inputs: Tensor) -> tuple[Any, ...]:
    """A copy of the model, and the inputs."""
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    return model, *(input.contiguous(memory_format=torch.channels_last) for input in inputs)


def compiled(model: nn.Module, *inputs: Tensor, freezing: bool = True, **options: Any) -> Call:
    """torch.compile, in its default mode if no other is given; freezing: the weights are a part of the code."""
    from torch._inductor import config

    torch._dynamo.reset()
    call = torch.compile(copy.deepcopy(model), **options)
    try:
        with config.patch(freezing=freezing), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(WARM_UPS if options else 1):
                call(*inputs)
    except Exception as error:  # whatever the compiler or its C++ compiler raise
        raise Absent(f"torch.compile: {str(error).splitlines()[0]}") from error
    return lambda: call(*inputs)


def compiled_channels_last(model: nn.Module, *inputs: Tensor, mode: str = "default") -> Call:
    """Of a mode, for these sizes alone."""
    return compiled(*in_channels_last(model, *inputs), freezing=False, dynamic=False, mode=mode)


def replayed(model: nn.Module, *inputs: Tensor) -> Call:
    """Eager in channels_last, captured in a CUDA graph; unlike ours, inputs and output are not copied."""
    try:
        return graphed(channels_last(model, *inputs))
    except RuntimeError as error:
        raise Absent(f"CUDA graph: {str(error).splitlines()[0]}") from error


def onnx_runtime(model: nn.Module, input: Tensor) -> Call:
    runtime = _package("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = runtime.InferenceSession(exported(model, input), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: input.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def openvino(model: nn.Module, input: Tensor, precision: str = "f32") -> Call:
    """precision: in which it computes, for it takes bfloat16 by itself where the machine has it."""
    package = _package("openvino")
    core = package.Core()
    graph = core.read_model(exported(model, input), b"")
    graph.reshape(list(input.shape))
    threads = torch.get_num_threads()
    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    request = core.compile_model(graph, "CPU", options).create_infer_request()
    array = input.numpy()
    return lambda: torch.from_numpy(request.infer({0: array}, share_inputs=True)[0])


def bfloat16_channels_last(model: nn.Module, input: Tensor) -> Call:
    return channels_last(copy.deepcopy(model).bfloat16(), input.bfloat16())


# On the CPU, of a table in a dtype; the input is float32 for all.
PEERS: dict[torch.dtype, dict[str, Maker]] = {
    torch.float32: {
        "eager": eager,
        "eager, channels_last": channels_last,
        "torch.compile, freezing": compiled,
        "ONNX Runtime": onnx_runtime,
        "OpenVINO": openvino,
    },
    torch.bfloat16: {
        "eager bf16, channels_last": bfloat16_channels_last,
        "OpenVINO bf16": functools.partial(openvino, precision="bf16"),
    },
}

# Of one layer, and of a whole model on CUDA; model and inputs are in the dtype of the row.
LAYER_PEERS: dict[str, Maker] = {
    "eager": eager,
    "eager, channels_last": channels_last,
    "torch.compile": compiled_channels_last,
}
CUDA_PEERS: dict[str, Maker] = {
    **LAYER_PEERS,
    "torch.compile, reduce-overhead": functools.partial(compiled_channels_last, mode="reduce-overhead"),
    "eager, channels_last, CUDA graph": replayed,
}


def of_models(device: str, dtype: torch.dtype) -> dict[str, Maker]:
    return CUDA_PEERS if device == "cuda" else PEERS[dtype]


@contextlib.contextmanager
def searching() -> Iterator[None]:
    """cuDNN measures its kernels for each new convolution, and takes the fastest."""
    before = torch._C._get_cudnn_benchmark()
    torch._C._set_cudnn_benchmark(True)  # the property can be locked
    try:
        yield
    finally:
        torch._C._set_cudnn_benchmark(before)


def exported(model: nn.Module, input: Tensor) -> bytes:
    """The model as ONNX, by the exporter that needs nothing but onnx."""
    _package("onnx")
    if _LAST and _LAST[0] is model and _LAST[1] == input.shape:
        return _LAST[2]
    file: Any = io.BytesIO()  # which the exporter takes, whatever its type says
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its operators have no counterpart in ONNX
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(model, (input,), file, dynamo=False, input_names=["input"], output_names=["output"])
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    _LAST[:] = [model, input.shape, file.getvalue()]
    return _LAST[2]


_LAST: list[Any] = []  # model, size and bytes of what was exported last: two peers read them


@contextlib.contextmanager
def nothing_kept() -> Iterator[None]:
    """Frees what was exported, and what was compiled, at the end."""
    try:
        yield
    finally:
        _LAST.clear()
        torch._dynamo.reset()


def _package(name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return __import__(name)
    except ImportError as error:
        raise Absent(f"{name} is not installed") from error
