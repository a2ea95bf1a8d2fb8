"""Ours and the peer, timed alternately in one process.

A round times the peer and then ours, so that whatever the machine does meanwhile, it does to both. The ratio (peer's
seconds / ours; above 1 ours is faster) is taken in each round, and medians and quartiles are reported.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

Call = Callable[[], Any]
MIN_ROUNDS, MAX_ROUNDS = 3, 101
GRAIN_SIZE = 32768  # Elements that torch gives to a thread at least.
SLEEP_CYCLES = 2_000_000  # About 1 ms: longer than it takes to launch what is timed.


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of the rounds."""

    median: float
    q1: float
    q3: float

    @staticmethod
    def of(values: list[float]) -> Spread:
        if len(values) == 1:
            return Spread(values[0], values[0], values[0])
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, q1, q3)


@dataclass(frozen=True)
class Timing:
    """Seconds of one call of ours and of the peer's, and the ratios of the rounds."""

    ours: Spread
    peer: Spread
    ratio: Spread
    rounds: int

    @staticmethod
    def of(ours: list[float], peer: list[float]) -> Timing:
        ratios = [theirs / mine for mine, theirs in zip(ours, peer, strict=True)]
        return Timing(Spread.of(ours), Spread.of(peer), Spread.of(ratios), len(ratios))


@dataclass(frozen=True)
class Clock:
    """How a call is timed: two values of `timer` subtract to seconds; `prepare` runs before each timed call."""

    timer: Callable[[], Any]
    prepare: Callable[[], Any]


class CudaMark:
    """A point in the current stream; the difference of two is in seconds, by CUDA events."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, start: CudaMark) -> float:
        self.event.synchronize()
        return start.event.elapsed_time(self.event) / 1000


def host_clock(device: str) -> Clock:
    """Wall time: all that the caller waits for. On a GPU, the time to launch.

    On the CPU a trivial parallel operation goes first, so that torch's threads are awake for both, as they are after
    any other layer: to wake them costs what a small call takes, and only a peer with one thread would be spared it.
    """
    if device == "cuda":
        return Clock(time.perf_counter, torch.cuda.synchronize)
    small = torch.zeros(GRAIN_SIZE * torch.get_num_threads(), dtype=torch.uint8)
    return Clock(time.perf_counter, lambda: small.add_(1))


@functools.lru_cache(maxsize=1)
def cuda_clock() -> Clock:
    """The GPU's time: L2 is flushed, and a sleep before the first mark lets the launches queue up behind it."""
    bytes_of_l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    buffer = torch.empty(2 * bytes_of_l2, dtype=torch.uint8, device="cuda")

    def prepare() -> None:
        buffer.zero_()
        torch.cuda._sleep(SLEEP_CYCLES)

    return Clock(CudaMark, prepare)


def clock_of(device: str) -> Clock:
    return cuda_clock() if device == "cuda" else host_clock(device)


def timed(call: Call, clock: Clock) -> float:
    """Seconds of one call. Its result is freed after the end, as pytest-benchmark does."""
    clock.prepare()
    start = clock.timer()
    result = call()
    end = clock.timer()
    del result
    return end - start


def rounds_within(seconds: float, one_round: float) -> int:
    """As many rounds as fit the time box, within the limits."""
    return max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / one_round)))


def warm_up(ours: Call, peer: Call, clock: Clock) -> float:
    """Runs both until caches and clocks are warm; returns the wall seconds of a round."""
    for _ in range(3):
        start = time.perf_counter()
        timed(peer, clock)
        timed(ours, clock)
        one_round = time.perf_counter() - start
        if one_round > 0.2:
            break
    return one_round


def repeated(call: Call, count: int) -> Call:
    """The call, made `count` times; the last result."""
    if count == 1:
        return call

    def repeat() -> Any:
        for _ in range(count - 1):
            call()
        return call()

    return repeat


def measure(benchmark: Any, ours: Call, peer: Call, clock: Clock, seconds: float, calls: int = 1) -> Timing | None:
    """Times ours by pytest-benchmark and the peer in the set-up of each of its rounds; fills `extra_info`.

    Args:
        benchmark: The fixture, with `clock.timer` as its timer.
        ours, peer: Take nothing; warm from the check that went before.
        seconds: Time box of all rounds together.
        calls: How often each is called in a round; the seconds recorded are of one call.

    Returns:
        None where pytest-benchmark is disabled and timed nothing.
    """
    ours, peer = repeated(ours, calls), repeated(peer, calls)
    rounds = rounds_within(seconds, warm_up(ours, peer, clock))
    peer_seconds: list[float] = []

    def time_peer() -> None:
        peer_seconds.append(timed(peer, clock))
        clock.prepare()

    benchmark.pedantic(ours, setup=time_peer, rounds=rounds, iterations=1)
    if benchmark.stats is None:
        return None
    our_seconds = benchmark.stats.stats.data
    timing = Timing.of([value / calls for value in our_seconds], [value / calls for value in peer_seconds])
    benchmark.extra_info.update(asdict(timing))
    return timing


def interleave(ours: Call, peer: Call, clock: Clock, seconds: float, calls: int = 1) -> Timing:
    """The same rounds without pytest-benchmark, within a time box."""
    ours, peer = repeated(ours, calls), repeated(peer, calls)
    rounds = rounds_within(seconds, warm_up(ours, peer, clock))
    pairs = [(timed(peer, clock), timed(ours, clock)) for _ in range(rounds)]
    return Timing.of([mine / calls for _, mine in pairs], [theirs / calls for theirs, _ in pairs])


def graphed(call: Call) -> Call:
    """Replays of the call from a CUDA graph; the call may not synchronise."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = call()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay
