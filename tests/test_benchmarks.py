"""The benchmarks measure what they say, refuse what is wrong, and know what a GPU has verified."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("torchvision")
pytest.importorskip("pytest_benchmark")

import pyvision_kernels as pvk
from benchmarks import ceilings, convolutions, end_to_end, gpu, gpu_status, layers, models, pair, peers, report, sources
from benchmarks.gpu_state import State, standing
from pyvision_kernels._case import all_cases

ROOT = Path(__file__).resolve().parent.parent


class FakeClock:
    """Seconds that pass only when a call says so; what happened is kept in `events`."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events: list[str] = []

    def clock(self) -> pair.Clock:
        return pair.Clock(lambda: self.now, lambda: self.events.append("prepare"))

    def call(self, name: str, seconds: list[float]) -> pair.Call:
        """Takes the given seconds in turn, the last for ever."""
        left = list(seconds)

        def run() -> None:
            self.events.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


@dataclass
class FakeBenchmark:
    """As much of pytest-benchmark's fixture as a measurement uses."""

    fake: FakeClock
    extra_info: dict[str, Any] = field(default_factory=dict)
    stats: Any = None

    def pedantic(self, target: pair.Call, setup: pair.Call, rounds: int, iterations: int) -> None:
        self.fake.events.clear()
        data = []
        for _ in range(rounds):
            setup()
            start = self.fake.now
            target()
            data.append(self.fake.now - start)
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=data))


def test_each_round_times_the_peer_then_ours(monkeypatch):
    monkeypatch.setattr(pair, "rounds_within", lambda seconds, one_round: 3)
    monkeypatch.setattr(pair, "warm_up", lambda ours, peer, clock: 1.0)
    fake = FakeClock()
    benchmark = FakeBenchmark(fake)
    # A machine that slows down by ten in the second round: the ratios of the rounds do not see it.
    ours, peer = fake.call("ours", [1, 10, 2]), fake.call("peer", [4, 40, 10])
    timing = pair.measure(benchmark, ours, peer, fake.clock(), seconds=1)
    assert fake.events == ["prepare", "peer", "prepare", "ours"] * 3
    assert timing.ratio == pair.Spread(4.0, 4.0, 4.5)
    assert timing.ours == pair.Spread(2.0, 1.5, 6.0)
    assert benchmark.extra_info["ratio"] == {"median": 4.0, "q1": 4.0, "q3": 4.5}
    assert benchmark.extra_info["rounds"] == 3


def test_seconds_are_of_one_call():
    fake = FakeClock()
    timing = pair.measure(
        FakeBenchmark(fake), fake.call("ours", [1]), fake.call("peer", [3]), fake.clock(), 0.0, calls=5
    )
    assert (timing.ours.median, timing.peer.median, timing.ratio.median) == (1.0, 3.0, 3.0)
    assert fake.events.count("ours") == 5 * timing.rounds


def test_rounds_fill_the_time_box_within_limits():
    assert pair.rounds_within(2.0, 0.25) == 8
    assert pair.rounds_within(2.0, 100.0) == pair.MIN_ROUNDS
    assert pair.rounds_within(2.0, 1e-6) == pair.MAX_ROUNDS


def test_interleave_gives_the_same_arithmetic(monkeypatch):
    monkeypatch.setattr(pair, "warm_up", lambda ours, peer, clock: 1.0)
    fake = FakeClock()
    timing = pair.interleave(fake.call("ours", [2]), fake.call("peer", [3]), fake.clock(), seconds=4.0)
    assert fake.events == ["prepare", "peer", "prepare", "ours"] * 4
    assert timing == pair.Timing(*(pair.Spread(value, value, value) for value in (2.0, 3.0, 1.5)), rounds=4)


@pytest.mark.parametrize(("error", "allowed"), [(2e-6, 1e-6), (float("nan"), 1e-6), (0.0, float("nan"))])
def test_report_refuses_a_wrong_case(error, allowed):
    info = {"op": "nms", "error": error, "allowed": allowed, "ratio": {"median": 9.0}}
    with pytest.raises(report.WrongCaseError, match="case_x: expected an error of at most"):
        report.rows_of({"benchmarks": [{"name": "case_x", "extra_info": info}]})


def test_report_refuses_a_row_that_was_not_checked():
    with pytest.raises(report.WrongCaseError):
        report.rows_of({"benchmarks": [{"name": "case_x", "extra_info": {"op": "nms"}}]})


def _run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    # One thread: on a busy machine, threads that wait for each other make seconds of milliseconds.
    # Without what pytest tells its workers by: within one, pytest-benchmark would time nothing.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    variables |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)


def test_smoke_of_the_main_job(tmp_path):
    done = _run(["-m", "benchmarks", "--smoke", "--device", "cpu", "--out", str(tmp_path)])
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "bench.json").read_text())
    assert record["schema_version"] == report.SCHEMA_VERSION
    assert record["verified"] is True
    assert record["threads"] == 1
    families = {spec.name: spec.family for spec in all_cases()}
    assert {row["op"] for row in record["rows"]} == {*families, "end_to_end", "models"}
    for row in record["rows"]:
        assert row["ratio"]["median"] > 0
        assert row["rounds"] >= pair.MIN_ROUNDS
        if row["op"] not in ("end_to_end", "models"):
            assert row["source_hash"] == sources.kernel_hash(families[row["op"]], "cpu")
    detectors = [row for row in record["rows"] if row["op"] == "end_to_end"]
    assert [row["case"] for row in detectors] == list(end_to_end.DETECTORS)
    for row in detectors:
        assert row["detections"] >= 20
        assert row["worst_iou"] > 0.99
        assert (tmp_path / f"detections-{row['case']}.png").stat().st_size > 10_000
    (model,) = [row for row in record["rows"] if row["op"] == "models"]
    assert (model["case"], model["provider"]) == ("CNN, 1 x 3 x 24 x 24", "eager")
    assert model["error"] <= model["allowed"]
    rates = record["ceilings"]
    judged = [row for row in record["rows"] if "work" in row]
    assert {row["op"] for row in judged} >= {"conv2d", "nms", "models"}
    for row in judged:
        work = row["work"]
        moving, computing = (
            work["bytes"] / rates["bytes_per_second"],
            work["flops"] / rates["flops_per_second"][work["precision"]],
        )
        assert row["floor"] == max(moving, computing)
        assert row["share"] == row["floor"] / row["ours"]["median"]
    assert record["skipped"] == []
    assert (tmp_path / "bench.png").stat().st_size > 10_000
    assert "median of the op" in done.stdout


SMALL = models.Model("small", pvk.models.CNN, (1, 3, 24, 24))


def test_a_model_is_compared_with_every_peer_and_reported_against_the_fastest():
    outcome = models.run(SMALL, 0.02)
    makers = peers.PEERS[torch.float32]
    timings, left_out = outcome.compared.timings, outcome.compared.left_out
    assert {*timings, *left_out} == set(makers)
    for reason in left_out.values():
        assert "is not installed" in reason or "torch.compile" in reason
    (row,) = models.as_rows(outcome)
    assert row["provider"] == min(timings, key=lambda name: timings[name].ratio.median)
    assert set(row["peers"]) == set(timings)
    assert row["work"]["flops"] == 2 * (32 * 27 * 576 + 64 * 288 * 144 + 128 * 2304 + 10 * 128)
    console = report.Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    models.print_table([outcome], console)
    assert "small, 1 x 3 x 24 x 24" in console.export_text()


def test_a_peer_that_is_not_installed_is_named_and_left_out(monkeypatch):
    for name in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, name, None)
    outcome = models.run(SMALL, 0.02, ("eager", "ONNX Runtime", "OpenVINO"))
    assert set(outcome.compared.timings) == {"eager"}
    assert outcome.compared.left_out["OpenVINO"] == "openvino is not installed"
    assert outcome.compared.left_out["ONNX Runtime"] == "onnxruntime is not installed"


def test_a_model_with_a_wrong_output_gets_no_speed_up(monkeypatch):
    right = models.converted
    monkeypatch.setattr(models, "converted", lambda *arguments: lambda: right(*arguments)() + 0.01)
    with pytest.raises(AssertionError, match="expected an error of at most"):
        models.run(SMALL, 0.02)
    monkeypatch.setattr(models, "MODELS", (SMALL,))
    rows, failed, _ = models.run_all("smoke", report.Console(quiet=True))
    assert rows == []
    assert failed[0].startswith("models small, 1 x 3 x 24 x 24 float32: expected an error")


def test_a_peer_with_a_wrong_output_is_left_out(monkeypatch):
    wrong = {"eager": peers.eager, "wrong": lambda model, input: lambda: model(input) + 1}
    monkeypatch.setitem(peers.PEERS, torch.float32, wrong)
    outcome = models.run(SMALL, 0.02)
    assert set(outcome.compared.timings) == {"eager"}
    assert outcome.compared.left_out["wrong"].startswith("its error is ")


@pytest.mark.parametrize("model", models.MODELS, ids=lambda model: f"{model.name}-{model.size[0]}-{model.dtype}")
def test_models_can_be_made(model):
    with torch.device("meta"):
        made = model.make().eval()
        assert made(torch.empty(model.size)).shape[0] == model.size[0]


def test_the_floor_is_of_whatever_takes_longer():
    limits = ceilings.Ceilings(bytes_per_second=100.0, flops_per_second={"bfloat16": 1000.0}, launch=None)
    assert limits.floor(bytes=200.0, flops=500.0, precision="bfloat16") == 2.0
    assert limits.floor(bytes=20.0, flops=500.0, precision="bfloat16") == 0.5
    row = {"work": ceilings.work_of(200.0, 500.0, "bfloat16"), "ours": {"median": 4.0}}
    limits.judge(row)
    assert (row["floor"], row["share"]) == (2.0, 0.5)
    assert (row["gb_per_s"], row["gflop_per_s"]) == (50e-9, 125e-9)
    assert str(limits) == "a copy 1e-07 GB/s, bfloat16 1e-06 GFLOP/s"


def test_ceilings_are_measured_on_the_cpu():
    measured = ceilings.measure("cpu", smoke=True)
    assert measured.bytes_per_second > 0
    assert measured.flops_per_second.keys() == {"float32", "bfloat16"}
    assert measured.flops_per_second["bfloat16"] >= measured.flops_per_second["float32"] > 0
    assert measured.launch is None


def test_layers_are_those_of_the_models():
    vgg, resnet = layers.found_in("VGG-16"), layers.found_in("ResNet-50")
    assert [(layer.C, layer.K, layer.H) for layer in vgg] == [
        (3, 64, 224),
        (64, 64, 224),
        (64, 128, 112),
        (128, 128, 112),
        (128, 256, 56),
        (256, 256, 56),
        (256, 512, 28),
        (512, 512, 28),
        (512, 512, 14),
    ]
    names = [layer.name for layer in resnet]
    assert names[0] == "ResNet-50, 7x7/2 3-64 at 224x224 bn relu"
    assert {
        "ResNet-50, 1x1 64-256 at 56x56 bn add relu",
        "ResNet-50, 1x1/2 256-512 at 56x56 bn",
        "ResNet-50, 3x3/2 128-128 at 56x56 bn relu",
        "ResNet-50, 1x1 2048-512 at 7x7 bn relu",
    } <= set(names)
    assert len(set(resnet)) == len(resnet) == 24
    assert {layer.taps for layer in layers.first()} == {(3, 3), (4, 4), (16, 16)}
    assert {(layer.taps, layer.stride) for layer in layers.depthwise()} >= {
        ((3, 3), (2, 2)),
        ((5, 5), (1, 1)),
        ((7, 7), (1, 1)),
    }


@pytest.mark.parametrize("size", ["quick", "full"])
def test_the_matrix_names_each_row_once(size):
    names = [job.name for job in convolutions.jobs(size)]
    assert len(set(names)) == len(names)
    assert len(names) == 12 or size == "full"


@pytest.mark.parametrize("job", convolutions.jobs("smoke"), ids=lambda job: job.name)
def test_layers_count_their_work(job):
    (bytes_, flops), module, inputs = job.layer.work(job.batch, 2), job.layer.module(), job.layer.inputs(job.batch)
    with FlopCounterMode(display=False) as counter:
        output = module(*inputs)
    assert output.shape == (job.batch, job.layer.K, *job.layer.output)
    assert counter.get_total_flops() == flops
    weight = module.get_parameter(
        "weight" if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d) else "conv.weight"
    )
    assert bytes_ == 2 * sum(tensor.numel() for tensor in (*inputs, output, weight))


def test_smoke_of_the_matrix():
    rows, failed, skipped = convolutions.run_all("smoke", report.Console(quiet=True), "cpu")
    assert (failed, skipped) == ([], [])
    jobs = convolutions.jobs("smoke")
    assert [(row["case"], row["direction"]) for row in rows[2:]] == [(job.case, job.direction) for job in jobs]
    assert [set(row["peers"]) for row in rows[:2]] == [{"F.conv2d", "nn.Conv2d"}, {"F.linear", "nn.Linear"}]
    for row in rows:
        assert row["error"] <= row["allowed"]
        assert row["provider"] in row["peers"]
    for row in rows[2:]:
        assert set(row["peers"]) == {"eager", "eager, channels_last"}
        assert row["work"]["flops"] > 0
    assert "pvk" in rows[2]["kernels"][0]
    assert "relu" in rows[2]["kernels"][0]


def test_short_calls_on_a_gpu_are_replayed_too(monkeypatch):
    """What a GPU would run, with the CPU in its place; a peer that cannot be captured is named."""
    made, captured = convolutions._made, []

    def graphed(call: pair.Call) -> pair.Call:
        captured.append(call)
        if len(captured) == 4:  # ours, eager, ours, eager in channels_last
            raise RuntimeError("cannot be captured")
        return call

    monkeypatch.setattr(convolutions, "_made", lambda job, device: made(job, "cpu"))
    monkeypatch.setattr(convolutions, "LAUNCH_BOUND", 60.0)
    monkeypatch.setattr(pair, "clock_of", lambda device: pair.host_clock("cpu"))
    monkeypatch.setattr(pair, "graphed", graphed)
    forward, _, _, _, backward = convolutions.jobs("smoke")
    (eager, graph), left_out = convolutions.run(forward, "cuda", 0.0, convolutions.EAGER, tune=True)
    assert (eager["mode"], graph["mode"]) == ("eager", "graph")
    assert (set(eager["peers"]), set(graph["peers"])) == (set(convolutions.EAGER), {"eager"})
    assert left_out == graph["left_out"] == {"eager, channels_last, graph": "cannot be captured"}
    assert eager["auto"]["ratio"]["median"] > 0
    (row,), left_out = convolutions.run(backward, "cuda", 0.0, convolutions.EAGER)
    assert (row["mode"], left_out) == ("eager", {})


def test_a_wrong_layer_gets_no_speed_up(monkeypatch):
    right = convolutions.ours_of
    monkeypatch.setattr(convolutions, "ours_of", lambda *arguments: lambda: right(*arguments)() + 1)
    rows, failed, _ = convolutions.run_all("smoke", report.Console(quiet=True), "cpu")
    assert len(rows) == 2  # the overheads, which are of other layers
    assert [line.partition(": ")[0] for line in failed] == [job.name for job in convolutions.jobs("smoke")]


def test_what_is_out_of_time_is_named():
    jobs = [job.name for job in convolutions.jobs("smoke")]
    rows, failed, skipped = convolutions.run_all("smoke", report.Console(quiet=True), "cpu", budget=-1.0)
    assert (rows, failed) == ([], [])
    assert skipped == ["convolutions overhead of conv2d", "convolutions overhead of linear", *jobs]
    rows, _, skipped = convolutions.run_all("smoke", report.Console(quiet=True), "cpu", match="transposed")
    assert ([row["case"] for row in rows], skipped) == ([convolutions.jobs("smoke")[1].case], [])
    assert models.run_all("smoke", report.Console(quiet=True), budget=-1.0) == (
        [],
        [],
        ["models CNN, 1 x 3 x 24 x 24 float32"],
    )


def test_models_on_a_gpu_come_in_three_sizes_and_types():
    labels = [(model.name, model.size[0], model.dtype) for model in models.CUDA_MODELS]
    assert len(set(labels)) == len(labels) == 6 * 3 * 3
    assert sum(model.quick for model in models.CUDA_MODELS) == 4


WRONG_NMS = """
import dataclasses, sys
from pyvision_kernels.ops.nms import cases
right = cases.NMS.op
cases.CASES = (dataclasses.replace(cases.NMS, op=lambda **inputs: right(**inputs).flip(0)),)
from benchmarks.__main__ import main
sys.exit(main(["--smoke", "--no-verify", "--only", "nms", "--device", "cpu", "--out", sys.argv[1]]))
"""


def test_a_wrong_kernel_gets_no_speed_up(tmp_path):
    done = _run(["-c", WRONG_NMS, str(tmp_path)])
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED, not timed: nms-small-float32" in done.stdout
    record = json.loads((tmp_path / "bench-nms.json").read_text())
    assert record["rows"] == []
    assert record["failed"]


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """A repository with three ops, where a GPU has verified two, and one of these has changed since."""
    for op in ("attention", "conv", "pool"):
        (tmp_path / "csrc" / "ops" / op).mkdir(parents=True)
        (tmp_path / "csrc" / "ops" / op / "cuda.cu").write_text(f"// {op}\n")
    (tmp_path / "csrc" / "core").mkdir()
    (tmp_path / "csrc" / "core" / "math.h").write_text("// shared\n")
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    monkeypatch.setattr(sources, "RESULTS", tmp_path / "benchmarks" / "results")
    state = State(sources.RESULTS / "nvidia-h200", "NVIDIA H200")
    where = {"date": "2026-01-02", "git_sha": "abc"}
    for op in ("conv", "pool"):
        state.note_check(op, "suite", "passed", sources.kernel_hash(op, "cuda"), where)
    state.save()
    (tmp_path / "csrc" / "ops" / "pool" / "cuda.cu").write_text("// faster pool\n")
    return tmp_path


def test_gpu_status_tells_never_changed_and_verified(made_up, capsys):
    assert gpu_status.main() == 0
    lines = {line.split("│")[1].strip(): line for line in capsys.readouterr().out.splitlines() if line.startswith("│")}
    assert "never" in lines["attention"]
    assert "sources changed since 2026-01-02, NVIDIA H200" in lines["pool"]
    assert "verified" in lines["conv"]
    assert "suite on 2026-01-02, NVIDIA H200" in lines["conv"]


def test_gpu_status_without_results(made_up, monkeypatch):
    monkeypatch.setattr(sources, "RESULTS", made_up / "nothing")
    assert {standing(op, [])[0] for op in sources.op_names()} == {"never"}
    assert gpu_status.main() == 0


def test_a_header_of_the_core_changes_every_op(made_up):
    (made_up / "csrc" / "core" / "math.h").write_text("// other\n")
    states = [State.load(sources.RESULTS / "nvidia-h200")]
    assert standing("conv", states)[0] == "changed"


def test_a_failed_check_is_not_hidden_by_the_suite(made_up):
    state = State.load(sources.RESULTS / "nvidia-h200")
    present = sources.kernel_hash("conv", "cuda")
    state.note_check("conv", "racecheck", "failed", present, {"date": "2026-01-03", "git_sha": "abc"})
    assert standing("conv", [state]) == ("failed", "racecheck on 2026-01-03, NVIDIA H200")


def test_gpu_stages_are_resumed_and_time_boxed(made_up):
    console = report.Console(quiet=True)
    state = State(made_up / "out", "a GPU")
    state.save()

    def stage(name: str, code: str, limit: float = 60, **options: Any) -> gpu.Stage:
        return gpu.Stage(name, [sys.executable, "-c", code], "hash", limit, **options)

    fine, slow = stage("fine", "print('done')"), stage("slow", "import time; time.sleep(60)", limit=0.5)
    absent = stage("absent", "", op="conv", check="memcheck", missing="no such tool")
    wrong = stage("wrong", "raise SystemExit(3)", op="conv", check="suite")
    assert not gpu.run_all([fine, slow, absent, wrong], state, console)
    again = State.load(state.folder)
    statuses = {name: entry["status"] for name, entry in again.stages.items()}
    assert statuses == {"fine": "passed", "slow": "timed out", "absent": "not run", "wrong": "failed"}
    assert (state.folder / "fine.log").read_text() == "done\n"
    assert again.ops["conv"]["failed"] == ["suite"]
    (state.folder / "fine.log").unlink()
    assert gpu.run_all([fine], again, console)  # skipped: its log is not written again
    assert not (state.folder / "fine.log").exists()


def test_gpu_runs_the_emulators_kernels_unless_one_op_is_asked_for():
    everything, one = (gpu.stages(["nms"], only) for only in ("", "nms"))
    (stage,) = [stage for stage in everything if "tests/simt" in stage.command]
    assert (stage.name, stage.op, stage.check) == ("suite-core", sources.CORE, "suite")
    assert [stage.name for stage in everything[-3:]] == ["benchmarks", "convolutions", "models"]
    assert [stage.name for stage in one] == ["build", "suite-nms", "memcheck-nms", "racecheck-nms", "benchmarks-nms"]


def test_gpu_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main() == 1
    assert "sees no GPU here" in capsys.readouterr().out
