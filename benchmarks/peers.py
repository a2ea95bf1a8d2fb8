"""Other ways to run a whole model on the CPU: PyTorch's own, ONNX Runtime, OpenVINO.

Each maker takes the model in eval mode and its input, and returns a call that gives the output. All run with as many
threads as torch. A maker raises `Absent` where its package is missing or cannot take the model.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.pair import Call

Maker = Callable[[nn.Module, Tensor], Call]


class Absent(Exception):
    """Why a peer is left out."""


def eager(model: nn.Module, input: Tensor) -> Call:
    return lambda: model(input)


def channels_last(model: nn.Module, input: Tensor) -> Call:
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)
    input = input.contiguous(memory_format=torch.channels_last)
    return lambda: model(input)


def compiled(model: nn.Module, input: Tensor) -> Call:
    """torch.compile in its default mode, weights frozen into the code."""
    from torch._inductor import config

    torch._dynamo.reset()
    call = torch.compile(copy.deepcopy(model))
    try:
        with config.patch(freezing=True), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call(input)
    except Exception as error:  # whatever the compiler or its C++ compiler raise
        raise Absent(f"torch.compile: {str(error).splitlines()[0]}") from error
    return lambda: call(input)


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


# Of a table in a dtype; the input is float32 for all.
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


def exported(model: nn.Module, input: Tensor) -> bytes:
    """The model as ONNX, by the exporter that needs nothing but onnx."""
    _package("onnx")
    if _LAST and _LAST[0] is model and _LAST[1] == input.shape:
        return _LAST[2]
    file: Any = io.BytesIO()  # which the exporter takes, whatever its type says
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (input,), file, dynamo=False, input_names=["input"], output_names=["output"])
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
