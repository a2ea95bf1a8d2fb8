"""The tuner with a timer of its own: what is measured, kept, and then chosen; and PyTorch's flags for float32."""

from __future__ import annotations

import json
import types
import warnings

import pytest
import torch
from torch.nn import functional as F

import pyvision_kernels as pvk
from pyvision_kernels import _tuner
from pyvision_kernels._backend import CHOICE
from pyvision_kernels._tuner import TUNER, Table, Tuner, fastest
from pyvision_kernels.explain import _Recorder
from pyvision_kernels.ops.conv2d import algorithm, choice, variants
from pyvision_kernels.ops.conv2d import run as run_conv2d
from pyvision_kernels.ops.conv2d.algorithm import DIRECT, TF32, TORCH, Problem
from pyvision_kernels.ops.conv2d.geometry import Geometry

GPU = "Test GPU 9000"
IDENTITY = {"gpu": GPU, "triton": "3.8.0", "torch": "2.14.1", "pyvision_kernels": "0.1.0"}


class FakeTimer:
    """Seconds by the name that a call returns; every call is counted."""

    def __init__(self, **seconds):
        self.seconds, self.calls = seconds, []

    def __call__(self, call):
        name = call()
        self.calls.append(name)
        values = self.seconds[name]
        return values.pop(0) if isinstance(values, list) else values


def _tuner_in(folder, timer):
    return Tuner(timer, lambda: folder, lambda gpu: {**IDENTITY, "gpu": gpu})


def _problem(**changes):
    given = {"N": 8, "C": 64, "H": 56, "W": 56, "K": 64, "R": 3, "S": 3, "OH": 56, "OW": 56, "stride": (1, 1)}
    given |= {"dilation": (1, 1), "groups": 1, "dtype": torch.bfloat16, "device": "cuda", "channels_last": True}
    return Problem(**{**given, "alone": True, **changes})


@pytest.fixture(autouse=True)
def auto():
    with pvk.backend("auto"):
        yield


@pytest.fixture
def tuner(tmp_path, monkeypatch):
    """The library's own, with a folder and a timer of the test's, and nothing on record."""
    monkeypatch.setattr(TUNER, "folder", lambda: tmp_path)
    monkeypatch.setattr(TUNER, "identity", lambda gpu: {**IDENTITY, "gpu": gpu})
    monkeypatch.setattr(TUNER, "_tables", {})
    monkeypatch.setattr(choice, "arch_of", {GPU: 90}.__getitem__)
    yield TUNER
    CHOICE.renew()


def test_the_median_of_rounds_decides_and_is_kept_on_disk(tmp_path):
    rounds = _tuner.ROUNDS
    outlier = [1.0] * (rounds // 2) + [2e-6] * (rounds - rounds // 2 + 1)  # the first is a warm-up
    timer = FakeTimer(cuda=3e-6, torch=outlier)
    tuner = _tuner_in(tmp_path, timer)
    times = tuner.measure(GPU, "key", {"cuda": lambda: "cuda", "torch": lambda: "torch"})
    assert times == {"cuda": 3.0, "torch": 2.0}
    assert fastest(times) == "torch"
    assert fastest(times, but="torch") == "cuda"
    assert fastest({"torch": 1.0}, but="torch") is None
    assert timer.calls.count("cuda") == timer.calls.count("torch") == rounds + 1
    assert timer.calls[2:6] == ["cuda", "torch"] * 2, "interleaved"
    (path,) = tmp_path.iterdir()
    assert path.name == "test-gpu-9000-3.8.0-2.14.1-0.1.0.json"
    content = json.loads(path.read_text())
    assert content["records"] == {"key": times}
    assert {name: content[name] for name in IDENTITY} == IDENTITY
    again = _tuner_in(tmp_path, FakeTimer())
    assert again.times(GPU, "key") == times
    assert again.measure(GPU, "key", {"cuda": lambda: "cuda"}) == times, "what is on record is not measured"
    assert again.times("another GPU", "key") is None


def test_a_candidate_that_raises_is_left_out(tmp_path):
    tuner = _tuner_in(tmp_path, FakeTimer(torch=5e-6))
    calls = {"cuda": lambda: 1 / 0, "torch": lambda: "torch"}
    assert tuner.measure(GPU, "key", calls) == {"torch": 5.0}
    with pytest.raises(RuntimeError, match=r"expected a kernel to run for other, but got cuda: .*division"):
        tuner.measure(GPU, "other", {"cuda": calls["cuda"]})
    assert tuner.times(GPU, "other") is None


def test_processes_add_to_one_file(tmp_path):
    one, other = (Table(tmp_path, IDENTITY) for _ in range(2))
    one.add("a", {"cuda": 1.0})
    other.add("b", {"cuda": 2.0})
    one.add("c", {"cuda": 3.0})
    assert Table(tmp_path, IDENTITY).records == {"a": {"cuda": 1.0}, "b": {"cuda": 2.0}, "c": {"cuda": 3.0}}
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"], "no half-written file is left"


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"format": 0, "records": {}}',
        json.dumps({"format": 1, **IDENTITY, "torch": "1.0", "records": {}}),
        json.dumps({"format": 1, **IDENTITY, "records": {"key": {"cuda": "fast"}}}),
        json.dumps({"format": 1, **IDENTITY, "records": {"key": {}}}),
        b"\xff\xfe\x00",
    ],
)
def test_a_file_that_is_not_ours_is_ignored_with_one_warning(tmp_path, content):
    path = Table(tmp_path, IDENTITY).path
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.warns(RuntimeWarning, match="is ignored"):
        table = Table(tmp_path, IDENTITY)
    assert table.records == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table.add("key", {"cuda": 1.0})
    assert Table(tmp_path, IDENTITY).records == {"key": {"cuda": 1.0}}


def test_a_folder_that_cannot_be_written_is_one_warning(tmp_path):
    table = Table(tmp_path / "folder", IDENTITY)
    (tmp_path / "folder").write_text("in the way")
    with pytest.warns(RuntimeWarning, match="cannot be written|cannot be read"):
        table.add("a", {"cuda": 1.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table.add("b", {"cuda": 2.0})
    assert table.records == {"a": {"cuda": 1.0}, "b": {"cuda": 2.0}}


def test_the_folder_is_named_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("PVK_TUNING_CACHE", str(tmp_path))
    assert _tuner.cache_folder() == tmp_path
    monkeypatch.delenv("PVK_TUNING_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert _tuner.cache_folder() == tmp_path / "xdg" / "pyvision_kernels" / "tuning"


def test_tuning_is_a_block_and_renews_plans():
    before = CHOICE.key
    with pvk.tuning():
        assert TUNER.active
        assert CHOICE.key != before
        with pvk.tuning(False):
            assert not TUNER.active
        assert TUNER.active
        assert not TUNER.wants(torch.ones(2)), "nothing is measured on the CPU"
    assert not TUNER.active


def test_an_unmeasured_dense_convolution_is_pytorchs_and_a_depthwise_one_ours():
    assert choice.choose(_problem(), packed=True) == TORCH
    assert choice.choose(_problem(groups=4), packed=True) == TORCH
    assert choice.choose(_problem(groups=64), packed=True) == DIRECT
    with pvk.backend("torch"):
        assert choice.choose(_problem(groups=64), packed=True) == TORCH
    with pvk.backend("pvk"):
        assert choice.choose(_problem(), packed=True) in (DIRECT, algorithm.TRITON)
        assert choice.choose(_problem(dtype=torch.float32), packed=True, tf32=True) in (TF32, algorithm.TRITON_TF32)


@pytest.mark.parametrize(
    ("changes", "large"),
    [
        ({}, True),
        ({"N": 1}, False),  # 25 tiles
        ({"N": 1, "H": 224, "W": 224, "OH": 224, "OW": 224}, True),
        ({"C": 3}, False),
        ({"groups": 2}, False),
        ({"dtype": torch.float64}, False),
    ],
)
def test_the_rule_takes_triton_for_what_is_large_and_dense(changes, large):
    assert algorithm.is_for_triton(_problem(**changes)) is large


class FakeTriton:
    """As the module of the Triton kernels, for choices."""

    @staticmethod
    def supports(problem, pool):
        return problem.dtype != torch.float64

    @staticmethod
    def configs(arch, problem, direction, precision):
        return ["128x64", "64x64"]


@pytest.fixture
def triton(monkeypatch):
    monkeypatch.setattr(choice, "_triton", FakeTriton)
    monkeypatch.setattr(choice, "_configs", [])


@pytest.mark.usefixtures("triton")
def test_what_was_measured_goes_before_the_rule(tuner):
    problem = _problem()
    key = choice.key_of(problem, choice.FORWARD, "bias+relu", tf32=False)
    options = {"packed": True, "fusion": "bias+relu", "gpu": GPU}
    assert choice.choose(problem, **options) == TORCH
    tuner.table(GPU).add(key, {"torch": 20.0, "cuda": 30.0, "triton 64x64": 10.0, "triton 128x64": 15.0})
    assert choice.choose(problem, **options) == algorithm.TRITON + 8 * 2
    assert algorithm.name_of(algorithm.TRITON + 8 * 2) == "triton #1"
    assert choice.choose(problem, **{**options, "fusion": "relu"}) == TORCH, "another record"
    tuner.table(GPU).add(key, {"torch": 9.0, "cuda": 30.0, "triton gone": 10.0})
    assert choice.choose(problem, **options) == TORCH
    with pvk.backend("pvk"):
        assert choice.choose(problem, **options) == algorithm.TRITON, "a configuration that is gone: the rule"
    choice.REASONS.append([])
    try:
        choice.choose(problem, **options)
        choice.choose(problem, packed=True)
        assert choice.REASONS[-1] == ["tuned: torch 9.0 us", "by the rule"]
    finally:
        choice.REASONS.pop()


@pytest.mark.usefixtures("triton")
def test_every_kernel_is_measured_under_its_name(tuner, monkeypatch):
    problem, seen = _problem(dtype=torch.float32), []

    def by_kernel(kernel):
        assert not torch.is_grad_enabled()
        seen.append((kernel, torch.backends.cudnn.benchmark))
        return {TORCH: "torch", TF32: "cuda"}.get(kernel, f"triton{kernel // 8}")

    monkeypatch.setattr(tuner, "timer", FakeTimer(torch=4e-6, cuda=2e-6, triton1=1e-6, triton2=3e-6))
    choice.measure(problem, choice.FORWARD, "", True, GPU, by_kernel)
    assert choice.choose(problem, packed=True, tf32=True, gpu=GPU) == algorithm.TRITON_TF32 + 8
    assert set(seen) == {(TORCH, True), (TF32, False), (7 + 8, False), (7 + 16, False)}
    count = len(seen)
    choice.measure(problem, choice.FORWARD, "", True, GPU, by_kernel)
    assert len(seen) == count, "once"
    assert not torch.backends.cudnn.benchmark


def test_a_call_is_measured_once_by_every_kernel_and_plans_follow(tuner, monkeypatch):
    """The whole way of `run`, with tensors on the CPU that are taken for a GPU's."""
    x, w = torch.randn(1, 8, 6, 6), torch.randn(4, 8, 3, 3)
    geometry = Geometry.of(1, 1, 1, 1, "zeros", (3, 3))
    timed = []

    def timer(call):
        timed.append(call())
        return 1e-6

    monkeypatch.setattr(tuner, "timer", timer)
    monkeypatch.setattr(tuner, "wants", lambda tensor: tuner.active)
    monkeypatch.setattr(choice, "gpu_of", lambda tensor: GPU)
    expected = F.conv2d(x, w, padding=1)
    with pvk.tuning():
        for _ in range(3):
            torch.testing.assert_close(run_conv2d(x, w, None, geometry), expected, rtol=1e-4, atol=1e-4)
    assert len(timed) == 2 * (_tuner.ROUNDS + 1), "PyTorch's and ours, once"
    for result in timed:
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
    (record,) = tuner.table(GPU).records.values()
    assert set(record) == {"torch", "cuda"}


@pytest.mark.usefixtures("triton")
def test_under_autocast_the_choice_is_for_the_dtype_that_is_computed_in(monkeypatch):
    seen = []
    choose = choice.choose
    monkeypatch.setattr(choice, "choose", lambda problem, *args, **kwargs: (seen.append(problem.dtype), TORCH)[1])
    input, weight, bias = torch.randn(2, 8, 9, 9), torch.randn(8, 8, 3, 3), torch.randn(8)
    with torch.autocast("cpu", torch.bfloat16):
        ours = pvk.ops.conv2d(input, weight, bias, activation="relu")
        theirs = F.conv2d(input, weight, bias).relu()
    assert seen == [torch.bfloat16]
    assert torch.equal(ours, theirs)
    monkeypatch.setattr(choice, "choose", choose)
    rows = torch.randn(4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert pvk.ops.linear(rows, weight[:, :, 0, 0], bias).dtype == torch.bfloat16


def test_gradients_are_chosen_one_by_one(tuner, monkeypatch):
    grad = types.SimpleNamespace(
        shape=torch.Size((8, 64, 56, 56)), dtype=torch.bfloat16, device=torch.device("cuda", 0), is_cuda=True
    )
    monkeypatch.setattr(choice, "gpu_of", lambda tensor: GPU)
    monkeypatch.setattr(tuner, "wants", lambda tensor: False)
    numbers = [1, 1, 1, 1, 1, 1, 1, 1, 1, 0]

    def chosen(direction, backend):
        sizes = torch.Size((8, 64, 56, 56)), torch.Size((64, 64, 3, 3))
        return choice.choose_gradient(direction, *sizes, grad, numbers, True, False, backend, lambda kernel: None)

    assert [chosen(direction, "auto") for direction in (choice.INPUT, choice.WEIGHT)] == [TORCH, TORCH]
    key = choice.key_of(_problem(), choice.WEIGHT, "", tf32=False)
    tuner.table(GPU).add(key, {"torch": 3.0, "cuda": 2.0})
    CHOICE.renew()
    assert [chosen(direction, "auto") for direction in (choice.INPUT, choice.WEIGHT)] == [TORCH, DIRECT]
    assert chosen(choice.WEIGHT, "torch") == TORCH
    assert chosen(choice.INPUT, "pvk") in (DIRECT, algorithm.TRITON)


def test_a_transposed_convolution_takes_the_kernel_that_is_chosen(monkeypatch):
    calls = []
    monkeypatch.setattr(choice, "choose_gradient", lambda *args: algorithm.TRITON_TF32)
    monkeypatch.setattr(choice, "_triton", types.SimpleNamespace(backward_input=lambda *args: calls.append(args)))
    monkeypatch.setattr(variants, "runs_cuda_kernels", lambda tensor: True)
    x, w = torch.ones(1, 4, 5, 5), torch.ones(4, 2, 3, 3)
    pvk.ops.conv_transpose2d(x, w, stride=2)
    ((input, weight, *_, kernel, config),) = calls
    assert input is x
    assert weight is w
    assert (kernel, config) == (TF32, None)


def test_explain_gives_each_call_the_reason_of_its_own_choice():
    recorder = _Recorder()
    x, w = torch.randn(1, 3, 4, 4), torch.randn(2, 3, 3, 3)
    with torch.no_grad(), recorder, pvk.backend("pvk"):
        recorder.reasons += ["of a choice that was made again", "tuned"]
        pvk.ops.conv2d(x, w)
        pvk.ops.conv2d(x, w)  # chosen before
    assert [line.endswith(" (tuned)") for line in recorder.lines] == [True, False]


# ---- PyTorch's flags ----


@pytest.fixture
def flags():
    """The default flags, and these again afterwards."""
    # PyTorch's own test code, which other tests import, forbids to set them but in a block of its own.
    with torch.backends.__allow_nonbracketed_mutation():
        yield
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        torch.backends.cudnn.rnn.fp32_precision = "tf32"
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        torch.set_float32_matmul_precision("highest")


def _allowed():
    return choice.precision_of(torch.float32, "cuda"), choice.precision_of(torch.float32, "cuda", matmul=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("flags")
def test_float32_follows_pytorchs_flags_by_either_way_of_setting_them():
    assert _allowed() == (True, False)
    torch.backends.cudnn.allow_tf32 = False
    assert _allowed() == (False, False)
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_tf32 = True
    assert _allowed() == (True, True)
    torch.set_float32_matmul_precision("highest")
    assert _allowed() == (True, False)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # beside the flags of the other kind: some getters raise now
    with pytest.raises(RuntimeError, match="mix of the legacy and new APIs"):
        print(torch.backends.cudnn.allow_tf32)
    assert _allowed() == (False, True)
    with pvk.strict_numerics():
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        assert _allowed() == (False, False)
    assert _allowed() == (True, True)
    assert not choice.precision_of(torch.bfloat16, "cuda")
    assert not choice.precision_of(torch.float32, "cpu")
