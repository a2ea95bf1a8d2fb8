"""`pvk.nn.Conv2d`, `Conv1d` and `Linear`: torch.nn's layers in all but speed; packed weights are never stale."""

from __future__ import annotations

import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import pyvision_kernels as pvk
from pyvision_kernels._packed import Packs

# Stock constructor, arguments, and an input of that layer.
LAYERS = {
    "conv2d": (nn.Conv2d, (4, 6, 3), {"padding": 1}, (2, 4, 9, 8)),
    "conv2d_1x1": (nn.Conv2d, (4, 6, 1), {"bias": False}, (2, 4, 5, 5)),
    "conv2d_winograd": (nn.Conv2d, (16, 16, 3), {"padding": 1}, (1, 16, 18, 17)),
    "conv2d_same_reflect": (
        nn.Conv2d,
        (4, 4, (2, 3)),
        {"padding": "same", "padding_mode": "reflect", "groups": 2},
        (2, 4, 7, 6),
    ),
    "conv2d_circular": (
        nn.Conv2d,
        (3, 5, 3),
        {"padding": (1, 2), "padding_mode": "circular", "stride": 2},
        (1, 3, 8, 9),
    ),
    "conv2d_depthwise": (nn.Conv2d, (8, 8, 3), {"padding": 2, "dilation": 2, "groups": 8}, (2, 8, 9, 9)),
    "conv2d_unbatched": (nn.Conv2d, (4, 6, 3), {}, (4, 9, 8)),
    "conv1d": (nn.Conv1d, (4, 6, 3), {"padding": 1, "stride": 2}, (2, 4, 11)),
    "conv1d_unbatched": (nn.Conv1d, (4, 6, 3), {"padding": "same", "padding_mode": "replicate"}, (4, 11)),
    "linear": (nn.Linear, (7, 5), {}, (3, 7)),
    "linear_of_maps": (nn.Linear, (7, 5), {"bias": False}, (2, 3, 4, 7)),
    "linear_of_a_vector": (nn.Linear, (7, 5), {}, (7,)),
}
LAYERS_WITHOUT_ACTIVATION = {
    "group_norm": (nn.GroupNorm, (2, 4), {"eps": 1e-3}, (3, 4, 5, 6)),
    "group_norm_without_affine": (nn.GroupNorm, (2, 4), {"affine": False}, (3, 4)),
    "instance_norm": (nn.InstanceNorm2d, (4,), {"affine": True}, (2, 4, 5, 6)),
    "instance_norm_unbatched": (nn.InstanceNorm2d, (4,), {"affine": True}, (4, 5, 6)),
    "layer_norm": (nn.LayerNorm, (7,), {}, (3, 7)),
    "layer_norm_of_maps": (nn.LayerNorm, ((3, 4),), {"bias": False, "eps": 1e-3}, (2, 5, 3, 4)),
    "layer_norm_without_affine": (nn.LayerNorm, (7,), {"elementwise_affine": False}, (7,)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
every_layer_and_norm = pytest.mark.parametrize("name", [*LAYERS, *LAYERS_WITHOUT_ACTIVATION])


def _pair(name, dtype=torch.float64, **more):
    stock_class, args, kwargs, size = {**LAYERS, **LAYERS_WITHOUT_ACTIVATION}[name]
    stock = stock_class(*args, **kwargs, dtype=dtype)
    ours = getattr(pvk.nn, stock_class.__name__)(*args, **kwargs, **more, dtype=dtype)
    ours.load_state_dict(stock.state_dict())
    return stock.eval(), ours.eval(), torch.randn(size, dtype=dtype)


def _assert_close(ours, stock):
    torch.testing.assert_close(ours, stock, rtol=1e-12, atol=1e-12)


@every_layer_and_norm
def test_layers_compute_what_torch_does(name):
    stock, ours, input = _pair(name)
    for call in range(2):  # the second with what the first has packed
        with torch.no_grad():
            _assert_close(ours(input), stock(input)), call
    with torch.inference_mode():
        _assert_close(ours(input), stock(input))
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert isinstance(ours, type(stock))


@every_layer_and_norm
@pytest.mark.parametrize("train", [True, False])
def test_layers_have_the_gradients_of_torch(name, train):
    stock, ours, input = _pair(name)
    results = []
    for layer in (stock.train(train), ours.train(train)):
        leaf = input.clone().requires_grad_()
        output = layer(leaf)
        results.append((output, *torch.autograd.grad(output.square().sum(), [leaf, *layer.parameters()])))
    for expected, got in zip(*results, strict=True):
        _assert_close(got, expected)


@every_layer
def test_an_activation_is_applied(name):
    stock, ours, input = _pair(name, activation="hardswish")
    with torch.no_grad():
        _assert_close(ours(input), nn.functional.hardswish(stock(input)))
    assert "activation='hardswish'" in repr(ours)


@every_layer_and_norm
def test_an_instance_of_torch_becomes_ours_by_its_class(name):
    stock, _, input = _pair(name)
    with torch.no_grad():
        expected = stock(input)
        pvk.convert(stock)
        assert type(stock).__module__.startswith("pyvision_kernels.")
        _assert_close(stock(input), expected)
    attributes = set(pvk.revert(stock).__dict__)
    assert attributes == set(_pair(name)[0].__dict__)


def _writes():
    def in_place(layer):
        layer.weight.mul_(1.5)

    def optimizer_step(layer):
        layer.weight.grad = torch.ones_like(layer.weight)
        torch.optim.SGD([layer.weight], lr=0.1).step()

    def load(layer):
        layer.load_state_dict({key: value * 2 for key, value in layer.state_dict().items()})

    def another_parameter(layer):
        layer.weight = nn.Parameter(torch.randn_like(layer.weight))

    def other_memory(layer):
        layer.weight.data = torch.randn_like(layer.weight)

    def other_strides(layer):
        layer.weight.data = layer.weight.flip(0).mT.contiguous().mT

    def repacked(layer):
        layer.weight.data.mul_(3)
        layer.repack()

    def uncounted_before_eval(layer):
        layer.weight.data.mul_(3)
        layer.eval()

    def uncounted_before_load(layer):
        layer.weight.data.mul_(3)
        layer.load_state_dict({}, strict=False)

    def under_inference_mode(layer):
        with torch.inference_mode():
            layer.weight.mul_(1.5)

    return [value for value in locals().values() if callable(value)]


@pytest.mark.parametrize("name", ["conv2d_winograd", "conv2d", "conv1d", "linear"])
@pytest.mark.parametrize("write", _writes(), ids=lambda write: write.__name__)
def test_no_write_to_a_weight_is_missed(name, write):
    stock, ours, input = _pair(name)
    with torch.no_grad():
        ours(input)
        write(ours)
        stock.load_state_dict(ours.state_dict())
        for _ in range(2):
            _assert_close(ours(input), stock(input))


def test_a_cast_layer_is_packed_anew():
    stock, ours, input = _pair("conv2d_winograd")
    with torch.no_grad():
        ours(input)
        ours.float(), stock.float()
        torch.testing.assert_close(ours(input.float()), stock(input.float()), rtol=1e-4, atol=1e-4)
        ours.double(), stock.double()
        _assert_close(ours(input), stock(input))


def _packed_of(layer):
    kept = layer._packs._kept
    return [] if kept is None else list(kept.results.values())


def test_weights_are_packed_once_and_in_eval_mode_only():
    _, ours, input = _pair("conv2d_winograd", torch.float32)
    with torch.no_grad():
        ours.train()(input)
        assert not _packed_of(ours)
        ours.eval()(input)
        (first,) = _packed_of(ours)
        ours(input)
        assert _packed_of(ours)[0] is first
        for forget in (ours.train, ours.eval, ours.float, ours.repack, lambda: ours.load_state_dict(ours.state_dict())):
            ours.eval()(input)
            assert _packed_of(ours)
            forget()
            assert not _packed_of(ours)


def test_packs_keep_no_weight_alive_and_know_it_by_identity():
    packs, calls = Packs(), []

    def get(tensor):
        return packs.get(tensor, "key", lambda: calls.append(1) or tensor.detach().clone())

    weight = torch.ones(4)
    assert get(weight) is get(weight)
    assert len(calls) == 1
    seen = weakref.ref(weight)
    twin = weight.detach()  # of the same memory and version
    get(twin)
    assert len(calls) == 2
    del weight
    gc.collect()
    assert seen() is None


def test_inference_tensors_are_kept_only_after_repack():
    stock, ours, input = _pair("conv2d_winograd")
    with torch.inference_mode():
        stock.weight = nn.Parameter(stock.weight.detach() * 2, requires_grad=False)
        ours.weight = nn.Parameter(stock.weight.detach() + 0, requires_grad=False)
        assert ours.weight.is_inference()
        _assert_close(ours(input), stock(input))
        assert not _packed_of(ours)
        ours.weight.mul_(2), stock.weight.mul_(2)
        _assert_close(ours(input), stock(input))
        ours.repack()
        _assert_close(ours(input), stock(input))
        assert _packed_of(ours)
        ours.weight.mul_(2), stock.weight.mul_(2)
        ours.repack()
        _assert_close(ours(input), stock(input))


def test_what_is_packed_under_inference_mode_serves_autograd():
    stock, ours, input = _pair("conv2d_winograd")
    with torch.inference_mode():
        ours(input)
    leaf = input.requires_grad_()
    expected = torch.autograd.grad(stock(leaf).sum(), leaf)
    _assert_close(torch.autograd.grad(ours(leaf).sum(), leaf), expected)


@every_layer_and_norm
def test_copies_and_pickles_carry_no_packed_weight(name):
    _, ours, input = _pair(name)
    expected = ours(input)
    keys = list(ours.state_dict())
    size = len(_saved(copy.deepcopy(ours).train()))
    assert len(_saved(ours)) == size
    buffer = io.BytesIO(_saved(ours))
    for twin in (copy.deepcopy(ours), torch.load(buffer, weights_only=False)):
        assert type(twin) is type(ours)
        assert twin.__dict__.get("_packs") is None or twin._packs._kept is None
        assert list(twin.state_dict()) == keys
        _assert_close(twin(input), expected)


def _saved(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    return buffer.getvalue()


@every_layer_and_norm
def test_meta_tensors_give_meta_tensors(name):
    _, ours, input = _pair(name)
    expected, found = ours(input), ours.to("meta")(input.to("meta"))
    assert found.is_meta
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)


def test_changed_arguments_of_a_convolution_count():
    stock, ours, input = _pair("conv2d")
    ours(input)
    for layer in (stock, ours):
        layer.stride, layer.padding = (2, 1), (0, 2)
    _assert_close(ours(input), stock(input))


def test_pruned_and_parametrized_weights_are_seen():
    for wrap in (
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: nn.utils.parametrizations.weight_norm(layer),
    ):
        stock, ours, input = _pair("conv2d_winograd")
        wrap(stock), wrap(ours)
        for _ in range(2):
            _assert_close(ours(input), stock(input))
            with torch.no_grad():
                for layer in (stock, ours):
                    next(layer.parameters()).mul_(2)


@pytest.mark.parametrize("name", ["conv2d_winograd", "conv2d_same_reflect", "conv1d", "linear"])
def test_compiled_layers_compute_the_same(name):
    stock, ours, input = _pair(name, activation="relu")
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = stock(input).relu()
        _assert_close(compiled(input), expected)
        ours(input)
        _assert_close(compiled(input), expected)


@pytest.mark.parametrize("name", ["conv2d", "conv1d", "linear"])
def test_torch_func_and_autocast(name):
    stock, ours, input = _pair(name, torch.float32)
    many = torch.stack([input, input + 1])
    state = {key: torch.stack([value, value * 2]) for key, value in stock.state_dict().items()}

    def call(layer):
        return torch.vmap(lambda state, input: torch.func.functional_call(layer, state, (input,)))(state, many)

    torch.testing.assert_close(call(ours), call(stock), rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(ours(input), stock(input))


@every_layer_and_norm
def test_bad_input_is_refused_in_the_words_of_torch(name):
    stock, ours, input = _pair(name)
    for bad in (input[..., :0], input.sum(), input.transpose(0, -1), input.float(), input.long()):
        try:
            expected = stock(bad)
        except (RuntimeError, ValueError) as error:
            with pytest.raises(type(error)) as caught:
                ours(bad)
            assert str(caught.value) == str(error)  # noqa: PT017
        else:
            close = 1e-12 if expected.dtype == torch.float64 else 1e-6
            torch.testing.assert_close(ours(bad), expected, rtol=close, atol=close)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="Conv2d: expected activation to be None or one of 'relu'"):
        pvk.nn.Conv2d(3, 4, 3, activation="tanh")


def test_layers_are_leaves_of_a_traced_model():
    for name in LAYERS:
        _, ours, input = _pair(name, activation="silu")
        traced = torch.fx.symbolic_trace(ours)
        assert [node.name for node in traced.graph.nodes if node.op == "call_function"] in (
            ["conv2d"],
            ["conv1d"],
            ["linear"],
        )
        _assert_close(traced(input), ours(input))


def test_explain_names_the_kernels_that_a_call_takes():
    _, ours, input = _pair("conv2d_winograd", activation="relu")
    assert pvk.explain(ours, input) == ["conv2d [1, 16, 18, 17] * [16, 16, 3, 3]: pvk winograd4 + relu"]
    with pvk.strict_numerics():
        assert pvk.explain(ours, input) == ["conv2d [1, 16, 18, 17] * [16, 16, 3, 3]: pvk winograd2 + relu"]
    with pvk.backend("torch"):
        assert pvk.explain(ours, input) == ["conv2d [1, 16, 18, 17] * [16, 16, 3, 3]: torch aten::convolution"]
    rows, weight = torch.randn(2, 7), torch.randn(5, 7)
    line = "linear [2, 7] * [5, 7]: pvk + residual + silu"
    assert pvk.explain(pvk.ops.linear, rows, weight, residual=torch.ones(2, 5), activation="silu") == [line]
    assert pvk.explain(nn.Linear(7, 5), rows) == ["linear [2, 7] * [7, 5]: torch aten::addmm"]
