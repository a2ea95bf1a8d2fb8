"""Whole models, converted with `fuse=True`, against other ways to run them; on CUDA captured in a CUDA graph.

Weights are random and seeded; the statistics of the batch norms are those of the input, so that no map vanishes. Every
output is compared with the model's in float64 first. Then each peer is timed against ours, in pairs of one process,
with the same number of threads.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import pyvision_kernels as pvk
from benchmarks import ceilings, pair, peers, report
from benchmarks.layers import torchvision_model

PAUSE = 0.06  # Seconds, in which the threads of who ran before go to sleep: ONNX Runtime's spin for 0.05.
LEAST = 0.005  # Seconds of a timed stretch; shorter calls are repeated.
# Relative l2 error of an output, beside twice that of eager PyTorch: Winograd F(4x4) has 2e-6 in each layer.
BESIDE = {torch.float32: 2e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Time box of a peer, by device and size of the run.
SECONDS = {
    "cpu": {"smoke": 0.02, "quick": 1.0, "full": 8.0},
    "cuda": {"smoke": 0.02, "quick": 0.3, "full": 1.0},
}


@dataclass(frozen=True)
class Model:
    """A row of the table.

    Attributes:
        name: As the table has it.
        make: Makes it.
        size: Of the input [N, 3, H, W].
        dtype: In which ours computes, and the peers.
        against: Peers that each get a row; none: the fastest of all.
        quick: Whether it is timed without `--full`.
        device: On which it is timed.
    """

    name: str
    make: Callable[[], nn.Module]
    size: tuple[int, ...] = (1, 3, 224, 224)
    dtype: torch.dtype = torch.float32
    against: tuple[str, ...] = ()
    quick: bool = False
    device: str = "cpu"

    @property
    def label(self) -> str:
        return f"{self.name}, {' x '.join(map(str, self.size))}"


_CNN_PEERS = ("eager", "ONNX Runtime")
MODELS = (
    Model("CNN", pvk.models.CNN, (1, 3, 24, 24), against=_CNN_PEERS, quick=True),
    Model("CNN", pvk.models.CNN, (64, 3, 24, 24), against=_CNN_PEERS),
    Model("VGG-16", pvk.models.vgg16, quick=True),
    Model("ResNet-50", torchvision_model("resnet50"), quick=True),
    Model("U-Net", pvk.models.UNet, (1, 3, 256, 256)),
    Model("MobileNetV3-Large", torchvision_model("mobilenet_v3_large"), quick=True),
    Model("ResNet-18", torchvision_model("resnet18")),
    Model("DenseNet-121", torchvision_model("densenet121")),
    Model("EfficientNet-B0", torchvision_model("efficientnet_b0")),
    Model("VGG-16", pvk.models.vgg16, dtype=torch.bfloat16),
    Model("ResNet-50", torchvision_model("resnet50"), dtype=torch.bfloat16, quick=True),
)
# name, what makes it, side of the picture, batches
_ON_CUDA: tuple[tuple[str, Callable[[], nn.Module], int, tuple[int, ...]], ...] = (
    ("CNN", pvk.models.CNN, 24, (1, 64, 1024)),
    ("ResNet-50", torchvision_model("resnet50"), 224, (1, 8, 32)),
    ("VGG-16", pvk.models.vgg16, 224, (1, 8, 32)),
    ("U-Net", pvk.models.UNet, 256, (1, 8, 32)),
    ("MobileNetV3-Large", torchvision_model("mobilenet_v3_large"), 224, (1, 8, 32)),
)
CUDA_MODELS = tuple(
    Model(
        name,
        make,
        (batch, 3, side, side),
        dtype,
        quick=dtype == torch.bfloat16 and (name == "CNN" or (name, batch) == ("ResNet-50", 8)),
        device="cuda",
    )
    for dtype, (name, make, side, batches) in itertools.product(
        (torch.bfloat16, torch.float16, torch.float32), _ON_CUDA
    )
    for batch in batches
)


@dataclass(frozen=True)
class Outcome:
    """Ours against each peer; errors are relative, l2, against float64."""

    model: Model
    compared: peers.Compared
    error: float
    allowed: float


def calibrated(model: Model) -> tuple[nn.Module, Tensor]:
    """The model in eval mode and an input; batch norms have the statistics of two such inputs."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = model.make().eval().to(model.device)
        input = torch.randn(model.size).to(model.device)
        more = torch.randn(2, *model.size[1:]).to(model.device)
    norms = [module for module in made.modules() if isinstance(module, nn.BatchNorm2d)]
    if norms:
        kept = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
            norm.train()
        with torch.no_grad():
            made(more)
        for norm, momentum in zip(norms, kept, strict=True):
            norm.momentum = momentum
            norm.eval()
    return made, input


def _error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def converted(model: nn.Module, input: Tensor, dtype: torch.dtype) -> pair.Call:
    """Ours; its input is converted once, as the peers' is. On CUDA in channels_last, and captured in a CUDA graph."""
    model, input = copy.deepcopy(model).to(dtype), input.to(dtype)
    if input.is_cuda:
        model, input = peers.in_channels_last(model, input)
    ours = pvk.convert(model, fuse=True, cuda_graph=input.is_cuda)
    return lambda: ours(input)


def timed_against(ours: pair.Call, peer: pair.Call, seconds: float, device: str = "cpu") -> pair.Timing:
    """Seconds of a call of each, in stretches by turns.

    Before a stretch the other's threads go to sleep, which else take the CPUs, and an untimed call wakes those of who
    is next. On CUDA a stretch ends when the GPU is done.
    """

    def seconds_of(call: pair.Call) -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    count = max(1, math.ceil(LEAST / seconds_of(ours)))

    def stretch(call: pair.Call) -> float:
        if device == "cpu":
            time.sleep(PAUSE)
        call()
        return seconds_of(pair.repeated(call, count)) / count

    stretches: list[tuple[float, float]] = []
    end = time.perf_counter() + seconds
    while len(stretches) < pair.MIN_ROUNDS or (time.perf_counter() < end and len(stretches) < pair.MAX_ROUNDS):
        stretches.append((stretch(peer), stretch(ours)))
    return pair.Timing.of([mine for _, mine in stretches], [theirs for theirs, _ in stretches])


@torch.no_grad()
def run(model: Model, seconds: float, only: tuple[str, ...] | None = None) -> Outcome:
    """Compares outputs, then times.

    Args:
        model: Of MODELS.
        seconds: Time box of each peer; at least 3 rounds are run.
        only: These peers alone.

    Raises:
        AssertionError: our output is wrong.
    """
    made, input = calibrated(model)
    exact = copy.deepcopy(made).double()(input.double())
    makers = peers.of_models(model.device, model.dtype)
    with _in_force(model.device):
        eager = copy.deepcopy(made).to(model.dtype)(input.to(model.dtype))
        ours = converted(made, input, model.dtype)
        error = _error(ours(), exact)
        allowed = 2 * _error(eager, exact) + BESIDE[model.dtype]
        assert error <= allowed, f"expected an error of at most {allowed:.1e}, but got {error:.1e}"
        if model.device == "cuda":  # on the CPU the makers convert
            made, input = made.to(model.dtype), input.to(model.dtype)
        compared = peers.compare(
            makers if only is None else {name: makers[name] for name in only},
            (made, input),
            lambda output: _error(output, exact),
            allowed,
            lambda name, call: timed_against(ours, call, seconds, model.device),
        )
    return Outcome(model, compared, error, allowed)


def _in_force(device: str) -> contextlib.ExitStack:
    """What holds for ours and all peers: on CUDA no tf32, and cuDNN at its fastest."""
    stack = contextlib.ExitStack()
    if device == "cuda":
        for setting in (pvk.backend("pvk"), ceilings.tf32(False), peers.searching()):
            stack.enter_context(setting)
    return stack


def work_of(model: Model) -> dict[str, Any]:
    """Reading weights and input and writing the output, and the operations of all products."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        made = model.make().eval()
        input = torch.empty(model.size)
        tensors = [input, made(input), *made.parameters()]
    moved = sum(tensor.numel() for tensor in tensors) * model.dtype.itemsize
    return ceilings.work_of(moved, counter.get_total_flops(), str(model.dtype)[6:])


def as_rows(outcome: Outcome) -> list[report.Row]:
    """A row against the fastest peer, or one against each that the model names; all peers are in each."""
    model, compared = outcome.model, outcome.compared
    timings, fastest = compared.timings, compared.fastest
    names = [name for name in model.against if name in timings] or ([fastest] if fastest else [])
    cuda = model.device == "cuda"
    return [
        {
            "op": "models",
            "case": model.label,
            "dtype": str(model.dtype)[6:],
            "layout": "channels_last" if cuda else "contiguous",
            "direction": "forward",
            "mode": "graph" if cuda else "eager",
            "provider": name,
            **asdict(timings[name]),
            "error": outcome.error,
            "peer_error": compared.errors[name],
            "allowed": outcome.allowed,
            "peers": {peer: asdict(timing) for peer, timing in timings.items()},
            "left_out": compared.left_out,
            "work": work_of(model),
        }
        for name in names
    ]


def run_all(
    size: str, console: Console, device: str = "cpu", budget: float = math.inf, match: str = ""
) -> tuple[list[report.Row], list[str], list[str]]:
    """All models of a device and a size ("smoke", "quick", "full"); prints a table.

    Args:
        budget: Seconds after which no model is begun.
        match: A part of the names of the models that are wanted.

    Returns:
        The rows, what was wrong, and what the budget did not reach.
    """
    known = CUDA_MODELS if device == "cuda" else MODELS
    chosen = known[:1] if size == "smoke" else [model for model in known if model.quick or size == "full"]
    outcomes, failed, skipped = [], [], []
    end = time.monotonic() + budget
    for model in chosen:
        name = f"models {model.label} {str(model.dtype)[6:]}"
        if match not in name:
            continue
        if time.monotonic() > end:
            skipped.append(name)
            continue
        try:
            outcomes.append(run(model, SECONDS[device][size], ("eager",) if size == "smoke" else None))
        except Exception as error:  # whatever the check, a missing package, a compiler or a launch raises
            failed.append(f"{name}: {error}")
    print_table(outcomes, console)
    return [row for outcome in outcomes for row in as_rows(outcome)], failed, skipped


def print_table(outcomes: list[Outcome], console: Console) -> None:
    """Milliseconds of each peer, and the ratio to ours: the peer's time over ours in the same rounds."""
    for device, dtype in dict.fromkeys((outcome.model.device, outcome.model.dtype) for outcome in outcomes):
        shown = [outcome for outcome in outcomes if (outcome.model.device, outcome.model.dtype) == (device, dtype)]
        timed = [(outcome.model.label, outcome.compared.timings) for outcome in shown]
        names = [name for name in peers.of_models(device, dtype) if any(name in timings for _, timings in timed)]
        if not names:
            continue
        where = "on the GPU" if device == "cuda" else f"{torch.get_num_threads()} threads"
        table = Table(title=f"Whole models in {str(dtype)[6:]}, {where}; (peer's time / ours)")
        for column in ("model", "ours", *names):
            table.add_column(column, justify="left" if column == "model" else "right")
        for label, timings in timed:
            middle = sorted(timing.ours.median for timing in timings.values())
            cells = [
                f"{report.seconds_text(timings[name].peer.median)} ({timings[name].ratio.median:.2f}x)"
                if name in timings
                else ""
                for name in names
            ]
            table.add_row(label, report.seconds_text(middle[len(middle) // 2]) if middle else "", *cells)
        console.print(table)
    left_out = [item for outcome in outcomes for item in outcome.compared.left_out.items()]
    for name, why in dict.fromkeys(left_out):
        console.print(f"left out: {name}: {why}", style="yellow", markup=False)
