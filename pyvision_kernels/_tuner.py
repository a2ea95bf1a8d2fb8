"""The on-line tuner of kernels on CUDA: which of several computes a call fastest here, measured once and kept.

`with pvk.tuning():`, or PVK_TUNE=1 in the environment, measures what has no record yet; records are used whether or not
it is on. They are kept in a file for each GPU, Triton, torch and version of this library, below PVK_TUNING_CACHE or the
user's cache directory. What calls it is ops/conv2d/choice.py.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import statistics
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from pyvision_kernels._backend import CHOICE
from pyvision_kernels._packed import is_off

Call = Callable[[], Any]
Times = dict[str, float]  # candidate -> microseconds
FORMAT = 1
ROUNDS = 7
_SLEEP_CYCLES = 500_000  # longer than it takes to launch what is timed, so that launches queue up behind it


class Table:
    """The records of one GPU, and their file.

    Args:
        folder: Of the file.
        identity: All that a measurement depends on beside the call: GPU, versions.
    """

    def __init__(self, folder: Path, identity: Mapping[str, str]):
        self.identity = dict(identity)
        slug = re.sub(r"[^a-z0-9.]+", "-", "-".join(identity.values()).lower()).strip("-")
        self.path = folder / f"{slug}.json"
        self.warned = False
        self.records: dict[str, Times] = self._read()

    def _warn(self, what: str) -> None:
        if not self.warned:
            warnings.warn(f"tuning: {self.path} {what}", RuntimeWarning, stacklevel=2)
        self.warned = True

    def _read(self) -> dict[str, Times]:
        """What the file holds; nothing where there is none, or not one of ours."""
        try:
            content = json.loads(self.path.read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            self._warn(f"is ignored: it cannot be read ({error})")
            return {}
        if not _is_ours(content, self.identity):
            self._warn("is ignored: it is not a file of records for this GPU and these versions")
            return {}
        return content["records"]

    def add(self, key: str, times: Times) -> None:
        """Notes a record, here and in the file, beside what other processes have written there meanwhile."""
        self.records = {**self._read(), **self.records, key: times}
        content = {"format": FORMAT, **self.identity, "records": self.records}
        fresh = self.path.with_name(f"{self.path.name}.{os.getpid()}.new")  # who reads meanwhile reads a whole file
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_text(json.dumps(content, indent=1) + "\n")
            fresh.replace(self.path)
        except OSError as error:
            self._warn(f"cannot be written ({error}): records last as long as this process")


def _is_ours(content: Any, identity: dict[str, str]) -> bool:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return False
    records = content.get("records")
    return (
        all(content.get(name) == value for name, value in identity.items())
        and isinstance(records, dict)
        and all(isinstance(times, dict) and times for times in records.values())
        and all(isinstance(value, int | float) for times in records.values() for value in times.values())
    )


class Tuner:
    """Measures candidates and remembers what each took.

    Args:
        timer: Seconds of one call, after whatever it takes to make calls comparable.
        folder: Where the files are.
        identity: Of a GPU by its name: all that a file is for.
    """

    def __init__(
        self,
        timer: Callable[[Call], float],
        folder: Callable[[], Path],
        identity: Callable[[str], Mapping[str, str]],
    ):
        self.timer, self.folder, self.identity = timer, folder, identity
        self.active = False
        self._tables: dict[str, Table] = {}
        self._lock = threading.RLock()

    def table(self, gpu: str) -> Table:
        table = self._tables.get(gpu)
        if table is None:
            with self._lock:
                table = self._tables.setdefault(gpu, Table(self.folder(), self.identity(gpu)))
        return table

    def times(self, gpu: str, key: str) -> Times | None:
        """What each candidate of a call took; None where it was not measured."""
        return self.table(gpu).records.get(key)

    def measure(self, gpu: str, key: str, candidates: Mapping[str, Call]) -> Times:
        """The median microseconds of each candidate, in rounds in which each runs once; noted.

        A candidate that raises has none.

        Raises:
            RuntimeError: every candidate raises.
        """
        with self._lock:
            known = self.times(gpu, key)
            if known is not None:
                return known
            seconds: dict[str, list[float]] = {}
            errors = []
            for name, call in candidates.items():
                try:
                    self.timer(call)  # compiles, allocates, loads
                except Exception as error:  # whatever a compiler or a launch raises
                    errors.append(f"{name}: {error}")
                else:
                    seconds[name] = []
            if not seconds:
                raise RuntimeError(f"tuning: expected a kernel to run for {key}, but got {'; '.join(errors)}")
            for _ in range(ROUNDS):
                for name, values in seconds.items():
                    values.append(self.timer(candidates[name]))
            times = {name: round(statistics.median(values) * 1e6, 3) for name, values in seconds.items()}
            self.table(gpu).add(key, times)
            CHOICE.renew()
            return times

    def wants(self, tensor: torch.Tensor) -> bool:
        """Whether a call with this tensor may be measured: not while compiling, tracing, or capturing a CUDA graph."""
        return self.active and tensor.is_cuda and not is_off() and not torch.cuda.is_current_stream_capturing()

    def set_active(self, active: bool) -> None:
        self.active = active
        CHOICE.renew()


def fastest(times: Times, but: str = "") -> str | None:
    """The candidate that took least, among all but one."""
    return min((name for name in times if name != but), key=times.__getitem__, default=None)


class CudaTimer:
    """Seconds that the GPU spends on a call, by events: L2 is flushed, and a sleep lets the launches queue up."""

    def __init__(self) -> None:
        self._buffers: dict[int, torch.Tensor] = {}

    def __call__(self, call: Call) -> float:
        device = torch.cuda.current_device()
        buffer = self._buffers.get(device)
        if buffer is None:
            size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
            buffer = self._buffers[device] = torch.empty(size, dtype=torch.uint8, device="cuda")
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        buffer.zero_()
        torch.cuda._sleep(_SLEEP_CYCLES)
        start.record()
        result = call()
        end.record()
        end.synchronize()
        del result
        return start.elapsed_time(end) / 1000


def cache_folder() -> Path:
    named = os.environ.get("PVK_TUNING_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyvision_kernels" / "tuning"


def _identity(gpu: str) -> dict[str, str]:
    from pyvision_kernels import __version__

    triton = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "none"
    return {"gpu": gpu, "triton": triton, "torch": torch.__version__, "pyvision_kernels": __version__}


_archs: dict[str, int] = {}  # by names of GPUs


@functools.cache
def gpu_name(index: int | None) -> str:
    name = torch.cuda.get_device_name(index)
    major, minor = torch.cuda.get_device_capability(index)
    _archs[name] = 10 * major + minor
    return name


def arch_of(gpu: str) -> int:
    """The compute capability of a GPU that gpu_name has named: 80, 90, ..."""
    return _archs[gpu]


TUNER = Tuner(CudaTimer(), cache_folder, _identity)
TUNER.active = os.environ.get("PVK_TUNE", "0") not in ("", "0")


@contextlib.contextmanager
def tuning(active: bool = True) -> Iterator[None]:
    """Measures which kernel is fastest, for every convolution and linear layer on CUDA that is called inside the block.

    ``with pvk.tuning(): model(batch)``, once, with the inputs that are to be fast. Measured are our kernels in CUDA C++
    and Triton, and PyTorch's with `cudnn.benchmark`, once for each shape, dtype, layout and what is fused; gradients
    too, where ours are called. The first call of each takes seconds, for Triton compiles its configurations. What was
    found is kept on disk and used from then on, in other processes too, with or without tuning; `pvk.explain` names it.
    PVK_TUNE=1 does the same for a whole process; PVK_TUNING_CACHE names the folder of the files. Of the whole process,
    not of a thread. Nothing is measured under `torch.compile`, `torch.func`, tracing and the capture of CUDA graphs.

    Args:
        active (bool): False: measure nothing inside the block.
    """
    previous = TUNER.active
    TUNER.set_active(active)
    try:
        yield
    finally:
        TUNER.set_active(previous)
