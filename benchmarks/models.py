"""Whole models, converted with `fuse=True`, against other ways to run them on this CPU.

Weights are random and seeded; the statistics of the batch norms are those of the input, so that no map vanishes. Every
output is compared with the model's in float64 first. Then each peer is timed against ours, in pairs of one process,
with the same number of threads.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import pyvision_kernels as pvk
from benchmarks import pair, peers, report

PAUSE = 0.06  # Seconds, in which the threads of who ran before go to sleep: ONNX Runtime's spin for 0.05.
LEAST = 0.005  # Seconds of a timed stretch; shorter calls are repeated.
# Relative l2 error of an output, beside twice that of eager PyTorch: Winograd F(4x4) has 2e-6 in each layer.
BESIDE = {torch.float32: 2e-5, torch.bfloat16: 2.0**-8}
FAR_OFF = 10  # Times as far off as ours may be: such a peer is left out.


@dataclass(frozen=True)
class Model:
    """A row of the table.

    Attributes:
        name: As the table has it.
        make: Makes it.
        size: Of the input [N, 3, H, W].
        dtype: In which ours computes, and the peers.
        against: Peers that each get a row; none: the fastest of all.
        quick: Whether `make bench` shows it.
    """

    name: str
    make: Callable[[], nn.Module]
    size: tuple[int, ...] = (1, 3, 224, 224)
    dtype: torch.dtype = torch.float32
    against: tuple[str, ...] = ()
    quick: bool = False


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torchvision

        return getattr(torchvision.models, name)()

    return make


_CNN_PEERS = ("eager", "ONNX Runtime")
MODELS = (
    Model("CNN", pvk.models.CNN, (1, 3, 24, 24), against=_CNN_PEERS, quick=True),
    Model("CNN", pvk.models.CNN, (64, 3, 24, 24), against=_CNN_PEERS),
    Model("VGG-16", pvk.models.vgg16, quick=True),
    Model("ResNet-50", _torchvision("resnet50"), quick=True),
    Model("U-Net", pvk.models.UNet, (1, 3, 256, 256)),
    Model("MobileNetV3-Large", _torchvision("mobilenet_v3_large"), quick=True),
    Model("ResNet-18", _torchvision("resnet18")),
    Model("DenseNet-121", _torchvision("densenet121")),
    Model("EfficientNet-B0", _torchvision("efficientnet_b0")),
    Model("VGG-16", pvk.models.vgg16, dtype=torch.bfloat16),
    Model("ResNet-50", _torchvision("resnet50"), dtype=torch.bfloat16, quick=True),
)


@dataclass(frozen=True)
class Outcome:
    """Ours against each peer; errors are relative, l2, against float64."""

    model: Model
    timings: dict[str, pair.Timing]
    errors: dict[str, float]
    error: float
    allowed: float
    left_out: dict[str, str]


def calibrated(model: Model) -> tuple[nn.Module, Tensor]:
    """The model in eval mode and an input; batch norms have the statistics of two such inputs."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = model.make().eval()
        input = torch.randn(model.size)
        more = torch.randn(2, *model.size[1:])
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
    """Ours; its input is converted once, as the peers' is."""
    ours = pvk.convert(copy.deepcopy(model).to(dtype), fuse=True)
    input = input.to(dtype)
    return lambda: ours(input)


def timed_against(ours: pair.Call, peer: pair.Call, seconds: float) -> pair.Timing:
    """Seconds of a call of each, in stretches by turns.

    Before a stretch the other's threads go to sleep, which else take the CPUs, and an untimed call wakes those of who
    is next.
    """
    start = time.perf_counter()
    ours()
    count = max(1, math.ceil(LEAST / (time.perf_counter() - start)))

    def stretch(call: pair.Call) -> float:
        time.sleep(PAUSE)
        call()
        start = time.perf_counter()
        pair.repeated(call, count)()
        return (time.perf_counter() - start) / count

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
    eager = copy.deepcopy(made).to(model.dtype)(input.to(model.dtype))
    ours = converted(made, input, model.dtype)
    error = _error(ours(), exact)
    allowed = 2 * _error(eager, exact) + BESIDE[model.dtype]
    assert error <= allowed, f"expected an error of at most {allowed:.1e}, but got {error:.1e}"
    timings: dict[str, pair.Timing] = {}
    errors: dict[str, float] = {}
    left_out: dict[str, str] = {}
    with peers.nothing_kept():
        for name, make in peers.PEERS[model.dtype].items():
            if only is not None and name not in only:
                continue
            try:
                call = make(made, input)
                errors[name] = _error(call(), exact)
            except peers.Absent as reason:
                left_out[name] = str(reason)
                continue
            if not errors[name] <= FAR_OFF * allowed:
                left_out[name] = f"its error is {errors[name]:.1e}"
                continue
            timings[name] = timed_against(ours, call, seconds)
    return Outcome(model, timings, errors, error, allowed, left_out)


def as_rows(outcome: Outcome) -> list[report.Row]:
    """A row against the fastest peer, or one against each that the model names; all peers are in each."""
    model, timings = outcome.model, outcome.timings
    fastest = min(timings, key=lambda name: timings[name].ratio.median, default=None)
    names = [name for name in model.against if name in timings] or ([fastest] if fastest else [])
    return [
        {
            "op": "models",
            "case": f"{model.name}, {' x '.join(map(str, model.size))}",
            "dtype": str(model.dtype)[6:],
            "layout": "contiguous",
            "direction": "forward",
            "mode": "eager",
            "provider": name,
            **asdict(timings[name]),
            "error": outcome.error,
            "peer_error": outcome.errors[name],
            "allowed": outcome.allowed,
            "peers": {peer: asdict(timing) for peer, timing in timings.items()},
        }
        for name in names
    ]


def run_all(size: str, console: Console) -> tuple[list[report.Row], list[str]]:
    """All models of a size ("smoke", "quick", "full"); prints a table; returns the rows, and what was wrong."""
    seconds = {"smoke": 0.02, "quick": 1.0, "full": 8.0}[size]
    chosen = MODELS[:1] if size == "smoke" else [model for model in MODELS if model.quick or size == "full"]
    outcomes, failed = [], []
    for model in chosen:
        try:
            outcomes.append(run(model, seconds, ("eager",) if size == "smoke" else None))
        except (AssertionError, ImportError) as error:
            failed.append(f"models {model.name} {str(model.dtype)[6:]}: {error}")
    print_table(outcomes, console)
    return [row for outcome in outcomes for row in as_rows(outcome)], failed


def print_table(outcomes: list[Outcome], console: Console) -> None:
    """Milliseconds of each peer, and the ratio to ours: the peer's time over ours in the same rounds."""
    for dtype, makers in peers.PEERS.items():
        shown = [outcome for outcome in outcomes if outcome.model.dtype == dtype]
        names = [name for name in makers if any(name in outcome.timings for outcome in shown)]
        if not names:
            continue
        title = f"Whole models in {str(dtype)[6:]}, {torch.get_num_threads()} threads; (peer's time / ours)"
        table = Table(title=title)
        for column in ("model", "ours", *names):
            table.add_column(column, justify="left" if column == "model" else "right")
        for outcome in shown:
            timings = outcome.timings
            middle = sorted(timing.ours.median for timing in timings.values())
            cells = [
                f"{report.seconds_text(timings[name].peer.median)} ({timings[name].ratio.median:.2f}x)"
                if name in timings
                else ""
                for name in names
            ]
            label = f"{outcome.model.name}, {' x '.join(map(str, outcome.model.size))}"
            table.add_row(label, report.seconds_text(middle[len(middle) // 2]), *cells)
        console.print(table)
    for line in dict.fromkeys(f"{name}: {why}" for outcome in outcomes for name, why in outcome.left_out.items()):
        console.print(f"left out: {line}", style="yellow", markup=False)
