"""The convolutions of well-known models, one by one on CUDA, against PyTorch's: chains with batch norm, addition and
relu, convolutions with a bias alone, first, depthwise and transposed ones, and gradients; and what a call costs.

Ours is the layer of `pvk.nn`, converted with `fuse=True`, in channels_last and by our own kernels. Its result is judged
against float64 first, by the rule of docs/design.md. A row is against the fastest peer, and holds them all.
"""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.nn import functional as F

import pyvision_kernels as pvk
from benchmarks import ceilings, layers, pair, peers, report, sources

BATCHES = (1, 8, 32)
SECONDS = {"smoke": 0.0, "quick": 0.1, "full": 0.3}  # time box of a peer
LAUNCH_BOUND = 100e-6  # Seconds; a shorter call is timed by graph replay too.
EAGER = ("eager", "eager, channels_last")
CALLS_FOR_OVERHEAD = 200


@dataclass(frozen=True)
class Job:
    """What a row times. direction: forward, grad_input or grad_weight."""

    layer: layers.Layer
    batch: int
    dtype: torch.dtype = torch.bfloat16
    direction: str = "forward"

    @property
    def case(self) -> str:
        return f"{self.layer.name}, batch {self.batch}"

    @property
    def name(self) -> str:
        return f"convolutions {self.case} {str(self.dtype)[6:]} {self.direction}"


_QUICK = (
    ("VGG-16, 3x3 256-256 at 56x56 bias bn relu", 1, "forward"),
    ("VGG-16, 3x3 256-256 at 56x56 bias bn relu", 32, "forward"),
    ("VGG-16, 3x3 512-512 at 14x14 bias bn relu", 1, "forward"),
    ("ResNet-50, 7x7/2 3-64 at 224x224 bn relu", 32, "forward"),
    ("ResNet-50, 1x1 64-256 at 56x56 bn add relu", 32, "forward"),
    ("ResNet-50, 3x3 256-256 at 14x14 bn relu", 1, "forward"),
    ("ResNet-50, 1x1 1024-256 at 14x14 bn relu", 8, "forward"),
    ("ResNet-50, 3x3/2 128-128 at 56x56 bn relu", 8, "forward"),
    ("MobileNetV3, depthwise 5x5 120-120 at 28x28 bias", 8, "forward"),
    ("U-Net, transposed 2x2/2 256-128 at 64x64 bias", 8, "forward"),
    ("ResNet-50, 3x3 128-128 at 28x28 bias", 32, "grad_input"),
    ("ResNet-50, 3x3 128-128 at 28x28 bias", 32, "grad_weight"),
)


def jobs(size: str) -> list[Job]:
    """All rows of a size ("smoke", "quick", "full"), the most telling first."""
    if size == "smoke":
        return _smoke()
    chains, alone = layers.chains(), layers.alone()
    if size == "quick":
        named = {layer.name: layer for layer in (*chains, *alone)}
        return [Job(named[name], batch, direction=direction) for name, batch, direction in _QUICK]
    some = [layer for layer in alone if not layer.transposed][::6]
    result = []
    for dtype in (torch.bfloat16, torch.float16):
        result += [Job(layer, batch, dtype) for batch in BATCHES for layer in chains]
        for direction in ("grad_input", "grad_weight"):
            result += [Job(layer, batch, dtype, direction) for batch in BATCHES[1:] for layer in some]
        result += [Job(layer, batch, dtype) for batch in BATCHES for layer in alone]
    return result


def _smoke() -> list[Job]:
    one, two = (1, 1), (2, 2)
    chain = layers.Layer("tiny", 8, 9, 7, 16, (3, 3), one, one, 1, False, norm=True, residual=True, relu=True)
    transposed = layers.Layer("tiny", 8, 5, 4, 6, two, two, (0, 0), 1, True, transposed=True)
    directions = ("forward", "grad_input", "grad_weight")
    return [Job(chain, 2), Job(transposed, 1), *(Job(chain.alone, 2, direction=way) for way in directions)]


def _made(job: Job, device: str) -> tuple[nn.Module, list[Tensor]]:
    """The layer by PyTorch and its inputs, contiguous; the same at every call."""
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        module = job.layer.module().to(job.dtype)
        return module, [input.to(job.dtype) for input in job.layer.inputs(job.batch)]


def ours_of(job: Job, module: nn.Module, inputs: list[Tensor]) -> pair.Call:
    module, *inputs = peers.in_channels_last(module, *inputs)
    if isinstance(module, nn.ConvTranspose2d):  # a function of ours, no layer
        options: dict[str, Any] = {"stride": module.stride, "padding": module.padding, "groups": module.groups}
        return functools.partial(pvk.ops.conv_transpose2d, inputs[0], module.weight, module.bias, **options)
    if job.direction != "forward":
        return _gradient(pvk.convert(module.train()), inputs[0], job.direction)
    pvk.convert(module, fuse=True)
    return lambda: module(*inputs)


def _gradient(module: Any, input: Tensor, direction: str) -> pair.Call:
    """The gradient of a convolution alone, of a graph that is kept."""
    module.requires_grad_(False)
    leaf = input.detach() if direction == "grad_input" else module.weight
    leaf.requires_grad_()
    with torch.enable_grad():
        output = module(leaf if direction == "grad_input" else input)
    generator = torch.Generator(output.device).manual_seed(1)
    # Quarters between -2 and 2 are exact in every dtype.
    quarters = torch.randint(-8, 9, output.shape, generator=generator, device=output.device) / 4
    grad = torch.empty_like(output).copy_(quarters)
    return lambda: torch.autograd.grad(output, leaf, grad, retain_graph=True)[0]


def _makers(job: Job, only: tuple[str, ...] | None) -> dict[str, peers.Maker]:
    makers = peers.LAYER_PEERS
    if job.direction != "forward":
        gradient = functools.partial(_gradient, direction=job.direction)
        makers = {
            "eager": lambda module, input: gradient(copy.deepcopy(module), input),
            "eager, channels_last": lambda module, input: gradient(*peers.in_channels_last(module, input)),
        }
    return {name: make for name, make in makers.items() if only is None or name in only}


def _error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).abs().max() / exact.abs().max()).item()


def _judged(ours: Tensor, peer: Tensor, exact: Tensor) -> dict[str, float]:
    """The errors that a row carries.

    Raises:
        AssertionError: that of ours is over twice the peer's and a unit of rounding.
    """
    error, peer_error = _error(ours, exact), _error(peer, exact)
    allowed = torch.finfo(ours.dtype).eps + 2 * peer_error
    assert error <= allowed, f"expected an error of at most {allowed:.1e}, but got {error:.1e}"
    return {"error": error, "peer_error": peer_error, "allowed": allowed}


def _row(labels: dict[str, str], timings: dict[str, pair.Timing], errors: dict[str, float]) -> report.Row:
    """Against the fastest peer; `peers` holds all."""
    fastest = peers.Compared(timings).fastest
    assert fastest is not None, "expected a peer that is right"
    return {
        "op": "convolutions",
        **labels,
        "provider": fastest,
        **asdict(timings[fastest]),
        **errors,
        "peers": {peer: asdict(timing) for peer, timing in timings.items()},
    }


@torch.no_grad()
def run(
    job: Job, device: str, seconds: float, only: tuple[str, ...] | None = None, tune: bool = False
) -> tuple[list[report.Row], dict[str, str]]:
    """Compares results, then times.

    Args:
        seconds: Time box of each peer; at least 3 rounds are run.
        only: These peers alone.
        tune: Then tune, and time what `pvk.backend("auto")` takes against eager in channels_last.

    Returns:
        A row, and one of graph replays where the call is short; and which peers were left out, and why.

    Raises:
        AssertionError: our result is wrong.
    """
    module, inputs = _made(job, device)
    precise = copy.deepcopy(module).double(), *(input.double() for input in inputs)
    exact = _makers(job, ("eager",))["eager"](*precise)()
    makers, clock = _makers(job, only), pair.clock_of(device)
    replays: dict[str, pair.Timing] = {}
    unable: dict[str, str] = {}

    with pvk.backend("pvk"), peers.searching():
        ours = ours_of(job, module, inputs)
        errors = _judged(ours(), makers["eager"](module, *inputs)(), exact)
        replayed = device == "cuda" and job.direction == "forward" and pair.timed(ours, clock) < LAUNCH_BOUND

        def timed(name: str, peer: pair.Call) -> pair.Timing:
            timing = pair.interleave(ours, peer, clock, seconds)
            if replayed:
                try:
                    replays[name] = pair.interleave(pair.graphed(ours), pair.graphed(peer), clock, seconds)
                except RuntimeError as error:
                    unable[f"{name}, graph"] = str(error)
            return timing

        allowed = errors["allowed"]
        compared = peers.compare(makers, (module, *inputs), lambda found: _error(found, exact), allowed, timed)
        labels = {"case": job.case, "dtype": str(job.dtype)[6:], "layout": "channels_last", "direction": job.direction}
        moved, flops = job.layer.work(job.batch, job.dtype.itemsize)
        more: dict[str, Any] = {
            "work": ceilings.work_of(moved, flops, str(job.dtype)[6:]),
            "source_hash": sources.kernel_hash("conv2d", device),
        }
        if job.direction == "forward":
            more["kernels"] = pvk.explain(ours)
    if tune:
        with pvk.backend("auto"), peers.searching():
            more["auto"] = _tuned(ours_of(job, module, inputs), makers[EAGER[1]](module, *inputs), clock, seconds)
    left_out = more["left_out"] = {**compared.left_out, **unable}
    rows = [{**_row({**labels, "mode": "eager"}, compared.timings, errors), **more}]
    if replays:
        rows.append({**_row({**labels, "mode": "graph"}, replays, errors), **more})
    return rows, left_out


def _tuned(ours: pair.Call, peer: pair.Call, clock: pair.Clock, seconds: float) -> dict[str, Any]:
    """The time against a peer, with what the tuner chooses among PyTorch's kernels and ours."""
    with pvk.tuning():
        ours()
    return {**asdict(pair.interleave(ours, peer, clock, seconds)), "kernels": pvk.explain(ours)}


@torch.no_grad()
def _overhead(op: str, device: str, seconds: float, calls: int) -> tuple[list[report.Row], dict[str, str]]:
    """What a call costs the host: our layer in eval mode against PyTorch's function and layer, in float32."""
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        layer: Any = nn.Conv2d(3, 4, 3, padding=1) if op == "conv2d" else nn.Linear(8, 8)
        input = torch.randn(1, 3, 4, 4) if op == "conv2d" else torch.randn(4, 8)
    stock = layer.eval()
    ours = pvk.convert(copy.deepcopy(stock))
    function: Callable[..., Any] = functools.partial(F.conv2d, padding=1) if op == "conv2d" else F.linear
    others: dict[str, pair.Call] = {
        f"F.{op}": lambda: function(input, stock.weight, stock.bias),
        f"nn.{type(stock).__name__}": lambda: stock(input),
    }
    exact = copy.deepcopy(stock).double()(input.double())
    with pvk.backend("pvk"), ceilings.tf32(False):
        errors = _judged(ours(input), stock(input), exact)
        clock = pair.host_clock(device)
        timings = {
            name: pair.interleave(lambda: ours(input), call, clock, seconds, calls) for name, call in others.items()
        }
    labels = {"case": f"overhead of a layer, {op}", "dtype": "float32", "layout": "contiguous"}
    row = _row({**labels, "direction": "forward", "mode": "eager"}, timings, errors)
    return [{**row, "source_hash": sources.kernel_hash(op, device)}], {}


def run_all(
    size: str,
    console: Console,
    device: str = "cuda",
    budget: float = math.inf,
    match: str = "",
    tune: bool = False,
) -> tuple[list[report.Row], list[str], list[str]]:
    """All rows of a size.

    Args:
        budget: Seconds after which no row is begun.
        match: A part of the names of the rows that are wanted.
        tune: As of `run`.

    Returns:
        The rows, what was wrong, and what the budget did not reach.
    """
    rows: list[report.Row] = []
    failed: list[str] = []
    skipped: list[str] = []
    left_out: dict[str, str] = {}
    only = EAGER if size == "smoke" else None
    end = time.monotonic() + budget
    calls = 5 if size == "smoke" else CALLS_FOR_OVERHEAD
    tasks: list[tuple[str, Callable[[], Any]]] = [
        (f"convolutions overhead of {op}", functools.partial(_overhead, op, device, SECONDS[size], calls))
        for op in ("conv2d", "linear")
    ]
    tasks += [(job.name, functools.partial(run, job, device, SECONDS[size], only, tune)) for job in jobs(size)]
    tasks = [(name, task) for name, task in tasks if match in name]
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as progress:
        bar = progress.add_task("", total=len(tasks))
        for name, task in tasks:
            progress.update(bar, description=name)
            progress.refresh()
            if time.monotonic() > end:
                skipped.append(name)
            else:
                try:
                    found, missing = task()
                except Exception as error:  # whatever the check, a compiler or a launch raises
                    failed.append(f"{name}: {error}")
                else:
                    rows += found
                    left_out |= {f"{peer}: {reason}": name for peer, reason in missing.items()}
            progress.advance(bar)
    for reason, name in left_out.items():
        console.print(f"left out: {reason} (last: {name})", style="yellow", markup=False)
    return rows, failed, skipped
