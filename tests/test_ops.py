"""Every case of every op on every backend, against the float64 reference and the peer."""

from __future__ import annotations

import pytest
import torch

from pyvision_kernels import _simt
from pyvision_kernels._case import all_cases, map_tensors, tensors_of
from pyvision_kernels._op import REGISTRY, Emulation
from pyvision_kernels._verify import run_case

SPECS = list(all_cases())
CASES = [
    pytest.param(spec, case, dtype, id=f"{spec.name}-{case.name}-{str(dtype)[6:]}")
    for spec in SPECS
    for case in spec.tests()
    for dtype in case.dtypes
]
ERRORS = [pytest.param(spec, error, id=f"{spec.name}-{error.name}") for spec in SPECS for error in spec.errors]
by_op = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)


def _has_its_own_operator(spec) -> bool:
    """Else it runs another function's, which is compiled and checked for that one."""
    return spec.operators[0] == spec.name


@pytest.mark.every_schedule
@pytest.mark.parametrize(("spec", "case", "dtype"), CASES)
def test_error_is_at_most_twice_the_peers(spec, case, dtype, device):
    for layout in spec.layouts:
        for result in run_case(spec, case, dtype, device, layout):
            assert result.ok, result


@pytest.mark.parametrize(("spec", "error"), ERRORS)
def test_bad_input_raises_the_projects_words(spec, error, device):
    with pytest.raises(error.error) as caught:
        spec.op(**error.make(device))
    assert error.message in str(caught.value)


@by_op
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_opcheck(spec, device):
    for case in spec.tests()[1 : 5 if _has_its_own_operator(spec) else 2]:
        for layout in spec.layouts:
            inputs = case.inputs(torch.float32, device, layout)
            operator = spec.operators_on(device == "cuda" or Emulation.active)[0]
            with _Record(operator) as calls:
                spec.op(**spec.with_leaves(inputs)[0])
            torch.library.opcheck(REGISTRY[operator].overload, calls[0])


@by_op
def test_runs_our_operator_and_not_torchvisions(spec, device):
    inputs = spec.tests()[1].inputs(torch.float32, device)
    with torch.profiler.profile(acc_events=True) as profile:
        spec.op(**inputs)
    names = {event.key for event in profile.key_averages()}
    operator = spec.operators_on(device == "cuda" or Emulation.active)[0]
    assert REGISTRY[operator].overload.name() in names
    assert not [name for name in names if name.startswith("torchvision::")]


@by_op
def test_two_runs_are_equal_bit_for_bit(spec, device):
    # An output, or a gradient by our kernels, may not depend on the number of threads either.
    inputs = spec.tests()[0].inputs(torch.float32, device)
    threads, ours = torch.get_num_threads(), not spec.differentiable or len(spec.operators) > 1
    runs = []
    try:
        for count in (1, threads, 7):
            torch.set_num_threads(count)
            runs.append(_outputs_and_gradients(spec, inputs) if ours else tensors_of(spec.op(**inputs)))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        for one, other in zip(runs[0], run, strict=True):
            assert torch.equal(one, other)


def _outputs_and_gradients(spec, inputs, function=None):
    """Of the function (the op), with a gradient of ones."""
    inputs, leaves = spec.with_leaves(inputs)
    outputs = tensors_of((function or spec.op)(**inputs))
    floating = [output for output in outputs if output.is_floating_point()]
    ones = [torch.ones_like(output) for output in floating]
    grads = torch.autograd.grad(floating, leaves, ones, materialize_grads=True) if leaves else []
    return [*(output.detach() for output in outputs), *grads]


@by_op
@pytest.mark.simt
def test_every_schedule_gives_the_same_bits(spec, emulator):
    runs = []
    for seed in range(6):
        inputs = spec.tests()[2].inputs(torch.float32)
        with _simt.emulated(seed):
            runs.append(_outputs_and_gradients(spec, inputs))
    for run in runs[1:]:
        for one, other in zip(runs[0], run, strict=True):
            assert torch.equal(one, other)


@by_op
def test_under_compile_fullgraph(spec, device):
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(spec.op, fullgraph=True, backend="aot_eager")
        for case in spec.tests()[1:4]:
            inputs = case.inputs(torch.float32, device)
            torch.testing.assert_close(compiled(**inputs), spec.op(**inputs), rtol=0, atol=0)
    torch._dynamo.reset()


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.differentiable], ids=lambda spec: spec.name)
def test_inductor_with_gradients_and_changing_sizes(spec):
    compiled = torch.compile(spec.op, fullgraph=True, dynamic=True)
    for case in spec.tests()[: 3 if _has_its_own_operator(spec) else 1]:
        inputs = case.inputs(torch.float32)
        ours, eager = _outputs_and_gradients(spec, inputs, compiled), _outputs_and_gradients(spec, inputs)
        outputs = len(tensors_of(spec.op(**inputs)))
        assert all(map(torch.equal, ours[:outputs], eager[:outputs]))
        torch.testing.assert_close(ours, eager)
    torch._dynamo.reset()


@by_op
def test_meta_tensors_give_meta_tensors(spec):
    inputs = spec.tests()[1].inputs(torch.float32)
    meta = {name: map_tensors(lambda tensor: tensor.to("meta"), value) for name, value in inputs.items()}
    if spec.sized_by_data:
        with pytest.raises(RuntimeError, match="data-dependent"):
            spec.op(**meta)
        return
    for ours, real in zip(tensors_of(spec.op(**meta)), tensors_of(spec.op(**inputs)), strict=True):
        assert ours.device.type == "meta"
        assert (ours.shape, ours.dtype) == (real.shape, real.dtype)


@by_op
def test_autocast_gives_the_dtype_that_torchvision_gives(spec, device):
    if spec.exact:  # torchvision casts to float32; mixed dtypes are then equal
        single = spec.tests()[2].inputs(torch.float32, device)
        mixed = {**single, "scores": single["scores"].bfloat16()}
        with torch.autocast(device, torch.bfloat16):
            ours = tensors_of(spec.op(**mixed))
            assert all(map(torch.equal, ours, tensors_of(spec.op(**{**single, "scores": mixed["scores"].float()}))))
        return
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        inputs = spec.tests()[1].inputs(dtype, device)
        with torch.autocast(device, torch.bfloat16):
            ours, theirs = spec.op(**inputs), spec.peer(**inputs)
        assert ours.dtype == theirs.dtype
        if spec.peer_is_native:  # both round what they multiply
            bound = 4 * torch.finfo(ours.dtype).eps * float(theirs.abs().max())
            torch.testing.assert_close(ours, theirs, rtol=0, atol=bound)
            continue
        # In 16 bits torchvision may round on the way: its values are those of float32.
        single = {
            name: map_tensors(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor, value)
            for name, value in inputs.items()
        }
        torch.testing.assert_close(ours, spec.peer(**single).to(ours.dtype))


class _Record:
    """Arguments with which an operator is called."""

    def __init__(self, name: str):
        self.op = REGISTRY[name]
        self.calls: list[tuple] = []

    def __enter__(self) -> list[tuple]:
        self.overload = self.op.overload

        def record(*args):
            self.calls.append(args)
            return self.overload(*args)

        self.op.overload = record
        return self.calls

    def __exit__(self, *error) -> None:
        self.op.overload = self.overload
