"""`pvk.nn.MultiheadAttention` and `TransformerEncoderLayer`: torch.nn's layers in all but speed."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import pyvision_kernels as pvk
from tests.errors import assert_as_good, in_double

with warnings.catch_warnings():  # of packages that it would like to have
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_modules import module_db

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
N, L, S, E, H = 2, 5, 6, 12, 3
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


def _operators(call) -> set[str]:
    with torch.profiler.profile(acc_events=True) as profile:
        call()
    return {event.key for event in profile.key_averages()}


def _close(ours, stock):
    torch.testing.assert_close(ours, stock, rtol=1e-10, atol=1e-12)


def _layer(cls=nn.MultiheadAttention, *args, dtype=torch.float64, **options):
    """A stock layer with biases that are not 0, and the same converted."""
    stock = cls(*args or (E, H), **options, dtype=dtype)
    for name, parameter in stock.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return stock, pvk.convert(copy.deepcopy(stock))


# Constructor's options: each once, and what concerns the same code together.
MADE = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no_bias": {"bias": False, "batch_first": True},
    "more_keys": {"add_bias_kv": True, "add_zero_attn": True},
    "learned_key": {"add_bias_kv": True, "batch_first": True},
    "zero_key": {"add_zero_attn": True, "bias": False},
    "other_sizes": {"kdim": 5, "vdim": 7, "batch_first": True},
    "other_sizes_more_keys": {"kdim": 5, "add_bias_kv": True, "add_zero_attn": True},
}
MASKS = ("none", "bool", "float", "bool_of_heads", "float_of_heads")
PADDING = ("none", "bool", "float")


def _masks(attn: str, padding: str, dtype, queries=L, keys=S):
    size = (N * H, queries, keys) if attn.endswith("heads") else (queries, keys)
    mask = None if attn == "none" else torch.randn(size, dtype=dtype)
    pad = None if padding == "none" else torch.randn(N, keys, dtype=dtype)
    if attn.startswith("bool"):
        mask = mask > 0.5
        mask[..., 0] = False  # torch gives NaN for a query that looks at no key
    if padding == "bool":
        pad = pad > 0.5
        pad[:, 0] = False
    return {"attn_mask": mask, "key_padding_mask": pad}


def _rows(layer, dtype=torch.float64, same=False):
    """Query, key and value of a layer; one tensor where `same`."""
    sizes = ((L, E), (S, layer.kdim), (S, layer.vdim))
    rows = [torch.randn(N, *size, dtype=dtype) for size in sizes]
    rows = [tensor if layer.batch_first else tensor.transpose(0, 1).contiguous() for tensor in rows]
    return [rows[0]] * 3 if same else rows


def _outputs_and_gradients(layer, rows, options):
    leaves = [row.clone().requires_grad_() for row in dict.fromkeys(rows)]
    given = leaves * 3 if len(leaves) == 1 else leaves
    masks = {key: value for key, value in options.items() if isinstance(value, torch.Tensor)}
    floating = {key: mask.clone().requires_grad_() for key, mask in masks.items() if mask.is_floating_point()}
    outputs = [output for output in layer(*given, **{**options, **floating}) if output is not None]
    wanted = [*leaves, *floating.values(), *layer.parameters()]
    weighted = sum((output * torch.linspace(-1, 1, output.size(-1))).sum() for output in outputs)
    return outputs, torch.autograd.grad(weighted, wanted)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize(
    ("made", "same"),
    [
        pytest.param(made, same, id=f"{made}-{'self' if same else 'cross'}")
        for made, options in MADE.items()
        for same in (True, False)
        if not (same and "kdim" in options)  # one tensor has one size
    ],
)
@pytest.mark.parametrize("weights", ["no_weights", "average", "of_heads"])
def test_multihead_attention_is_torchs(made, same, weights):
    stock, ours = _layer(**MADE[made])
    assert type(ours) is pvk.nn.MultiheadAttention
    options = {"need_weights": weights != "no_weights", "average_attn_weights": weights != "of_heads"}
    rows = _rows(stock, same=same)
    for attn, padding in itertools.product(MASKS, PADDING):
        given = {**options, **_masks(attn, padding, torch.float64, keys=L if same else S)}
        expected, got = (_outputs_and_gradients(layer.train(), rows, given) for layer in (stock, ours))
        _close(got, expected)
        with torch.no_grad():
            for _ in range(2):  # the second with what the first has packed
                _close(ours.eval()(*rows, **given), stock.eval()(*rows, **given))


@by_dtype
@pytest.mark.parametrize("made", ["batch_first", "more_keys", "other_sizes"])
@pytest.mark.parametrize("weights", [True, False], ids=["weights", "no_weights"])
def test_multihead_attention_is_as_exact_as_torchs(made, weights, dtype):
    stock, ours = _layer(dtype=dtype, **MADE[made])
    exact = copy.deepcopy(stock).double()
    rows = _rows(stock, dtype)
    for attn, padding in (("none", "none"), ("float", "none"), ("bool_of_heads", "bool")):
        given = {"need_weights": weights, **_masks(attn, padding, dtype)}
        results = [
            layer(*map(change, rows), **{key: change(value) for key, value in given.items()})
            for layer, change in ((ours, lambda value: value), (stock, lambda value: value), (exact, in_double))
        ]
        assert_as_good(*(tuple(filter(lambda part: part is not None, result)) for result in results), (attn, padding))


@pytest.mark.parametrize("weights", [True, False], ids=["weights", "no_weights"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_inputs_without_a_batch(weights, batch_first):
    stock, ours = _layer(batch_first=batch_first, add_zero_attn=True)
    query, key = torch.randn(L, E, dtype=torch.float64), torch.randn(S, E, dtype=torch.float64)
    masks = {"key_padding_mask": torch.arange(S) > 3, "attn_mask": torch.randn(H, L, S) > 2}
    for rows, given in (((query,) * 3, {}), ((query, key, key), {}), ((query, key, key), masks)):
        for average in (True, False):
            options = {"need_weights": weights, "average_attn_weights": average, **given}
            _close(ours(*rows, **options), stock(*rows, **options))


@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_a_causal_hint_takes_the_place_of_the_mask():
    stock, ours = _layer()
    rows = _rows(stock, same=True)
    causal = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    padding = torch.arange(L) > torch.tensor([[3], [4]])
    for options in ({}, {"need_weights": False}, {"need_weights": False, "key_padding_mask": padding}):
        options |= {"attn_mask": causal, "is_causal": True}
        _close(ours(*rows, **options), stock(*rows, **options))
    # It is a hint: without weights and padding the mask is not read.
    other = {"attn_mask": torch.zeros_like(causal), "is_causal": True, "need_weights": False}
    _close(ours(*rows, **other)[0], stock(*rows, **other)[0])


@pytest.mark.parametrize("weights", [True, False], ids=["weights", "no_weights"])
def test_a_query_that_looks_at_no_key_gets_zeros(weights):
    _, ours = _layer(batch_first=True)
    rows = [row.requires_grad_() for row in _rows(ours)]
    mask = torch.zeros(L, S, dtype=torch.bool)
    mask[2] = True
    output, given = ours(*rows, attn_mask=mask, need_weights=weights)
    _close(output[:, 2], ours.out_proj.bias.expand(N, -1))
    assert given is None or (given[:, 2] == 0).all()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(output.sum(), rows))


@pytest.mark.parametrize("weights", [True, False], ids=["weights", "no_weights"])
def test_dropout_zeroes_some_weights_and_scales_the_others(weights):
    _, ours = _layer(dropout=0.5, batch_first=True)
    with torch.no_grad():  # every value and product is one: the output is the sum of the kept weights
        ours.in_proj_weight[2 * E :].zero_()
        ours.in_proj_bias[2 * E :] = 1
        ours.out_proj.weight.copy_(torch.eye(E))
        ours.out_proj.bias.zero_()
    rows = torch.randn(64, 32, E, dtype=torch.float64)
    output, given = ours.train()(rows, rows, rows, need_weights=weights, average_attn_weights=False)
    assert abs(output.mean().item() - 1) < 0.02
    assert output.std() > 0.05
    if weights:
        assert 0.45 < (given == 0).double().mean() < 0.55
        _close(given.sum(-1).transpose(1, 2), output.unflatten(-1, (H, -1))[..., 0])
    output, _ = ours.eval()(rows, rows, rows, need_weights=weights)
    _close(output, torch.ones_like(output))
    everything = pvk.nn.MultiheadAttention(E, H, dropout=1.0)
    assert (everything(*_rows(everything, torch.float32), need_weights=False)[0] == 0).all()


def _wrong() -> dict[str, tuple[list[Any], dict[str, Any]]]:
    x = torch.randn(N, L, E)
    masks: dict[str, Any] = {
        "one_row": torch.zeros(1, L),
        "one_column": torch.zeros(L, 1, dtype=torch.bool),
        "other_heads": torch.zeros(N, L, L),
        "four_dimensions": torch.zeros(N, H, L, L),
        "integers": torch.zeros(L, L).int(),
        "another_dtype": torch.zeros(L, L).double(),
    }
    padding = {
        "one_batch": torch.zeros(1, L, dtype=torch.bool),
        "one_key": torch.zeros(N, 1, dtype=torch.bool),
        "integers": torch.zeros(N, L).int(),
        "another_dtype": torch.zeros(N, L).double(),
    }
    rows = {
        "features": [x[..., :8]] * 3,
        "key_features": [x, x[..., :8], x[..., :8]],
        "lengths": [x, x, x[:, :3]],
        "batches": [x, x[:1], x[:1]],
        "dimensions": [x[0], x, x],
        "four_dimensions": [x[None]] * 3,
        "dtype": [x.double()] * 3,
        "dtype_of_keys": [x, x.double(), x.double()],
        "integers": [x.long()] * 3,
    }
    return {
        "hint_without_mask": ([x] * 3, {"is_causal": True}),
        **{f"mask_{name}": ([x] * 3, {"attn_mask": mask}) for name, mask in masks.items()},
        **{f"padding_{name}": ([x] * 3, {"key_padding_mask": mask}) for name, mask in padding.items()},
        **{f"rows_{name}": (given, {}) for name, given in rows.items()},
    }


@pytest.mark.parametrize("name", _wrong())
@pytest.mark.parametrize("weights", [True, False], ids=["weights", "no_weights"])
def test_bad_input_is_refused_in_the_words_of_torch(name, weights):
    rows, options = _wrong()[name]
    stock, ours = _layer(batch_first=True, dtype=torch.float32)
    messages = []
    for layer in (stock, ours):
        with pytest.raises((RuntimeError, AssertionError)) as caught:
            layer(*rows, **options, need_weights=weights)
        messages.append((type(caught.value), str(caught.value)))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("empty", [(0, L, S), (N, 0, S), (N, L, 0)], ids=["batches", "queries", "keys"])
def test_empty_inputs(empty):
    stock, ours = _layer(batch_first=True)
    batches, queries, keys = empty
    query, key = (torch.randn(batches, length, E, dtype=torch.float64) for length in (queries, keys))
    results = [layer(query, key, key, need_weights=False)[0] for layer in (stock, ours)]
    _close(results[1], results[0])


def test_heads_of_more_than_256_features_are_torchs():
    stock, ours = _layer(nn.MultiheadAttention, 600, 2)
    rows = torch.randn(3, 1, 600, dtype=torch.float64)
    _close(ours(rows, rows, rows), stock(rows, rows, rows))


def test_our_operators_run_in_train_and_eval_mode():
    _, ours = _layer(dtype=torch.float32, batch_first=True)
    row = torch.randn(N, L, E)

    def step():
        ours.train()(row, row, row, need_weights=False)[0].sum().backward()

    def infer():
        with torch.no_grad():
            ours.eval()(row, row, row)

    assert {"pvk::linear", "pvk::attention", "pvk::_attention_backward"} <= _operators(step)
    seen = _operators(infer)
    assert {"pvk::linear", "pvk::attention"} <= seen
    assert "aten::_native_multi_head_attention" not in seen


def test_no_write_to_a_packed_projection_is_missed():
    stock, ours = _layer(batch_first=True, dtype=torch.float32)
    rows = [torch.randn(N, 30, E)] * 3
    with torch.no_grad():
        for write in (
            lambda layer: layer.in_proj_weight.mul_(1.5),
            lambda layer: layer.out_proj.weight.mul_(1.5),
            lambda layer: setattr(layer, "in_proj_weight", nn.Parameter(layer.in_proj_weight * 2)),
            lambda layer: layer.load_state_dict({key: value / 2 for key, value in layer.state_dict().items()}),
        ):
            ours.eval()(*rows)
            write(stock), write(ours)
            torch.testing.assert_close(ours(*rows), stock.eval()(*rows))
    twin = copy.deepcopy(ours)
    assert list(twin.state_dict()) == list(stock.state_dict())
    torch.testing.assert_close(twin(*rows), stock(*rows))


def test_under_compile_and_func_and_autocast():
    stock, ours = _layer(batch_first=True)
    rows = _rows(stock)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for options in ({}, {"need_weights": False, "attn_mask": torch.rand(L, S) > 2}):
        _close(compiled(*rows, **options), ours(*rows, **options))
    torch._dynamo.reset()
    many = [torch.stack([row, row + 1]) for row in rows]
    _close(*(torch.vmap(lambda *given, layer=layer: layer(*given)[0])(*many) for layer in (ours, stock)))
    stock, ours = stock.float(), ours.float()
    rows = [row.float() for row in rows]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(ours(*rows)[0], stock(*rows)[0])


def test_a_model_of_attention_is_traced_with_its_layers_as_leaves():
    model = nn.Sequential(nn.LayerNorm(E), nn.TransformerEncoderLayer(E, H, 16, batch_first=True)).eval()
    converted = pvk.convert(copy.deepcopy(model))
    traced = torch.fx.symbolic_trace(converted)
    assert "1.self_attn" in [node.target for node in traced.graph.nodes if node.op == "call_module"]
    rows = torch.randn(N, L, E)
    torch.testing.assert_close(traced(rows), model(rows))


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("cls", [nn.MultiheadAttention, nn.TransformerEncoderLayer], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@by_dtype
def test_samples_of_module_db(cls, training, dtype):
    entry = next(entry for entry in module_db if entry.module_cls is cls)
    count = 0
    for sample in entry.module_inputs_func(entry, "cpu", dtype, requires_grad=False, training=training):
        made, given = sample.constructor_input, sample.forward_input
        stock = cls(*made.args, **made.kwargs, dtype=dtype).train(training)
        ours = getattr(pvk.nn, cls.__name__)(*made.args, **made.kwargs, dtype=dtype).train(training)
        ours.load_state_dict(stock.state_dict())
        exact = copy.deepcopy(stock).double()
        with torch.no_grad():
            results = [
                layer(*map(change, given.args), **{key: change(value) for key, value in given.kwargs.items()})
                for layer, change in ((ours, lambda value: value), (stock, lambda value: value), (exact, in_double))
            ]
        if cls is not nn.MultiheadAttention:
            results = [(result,) for result in results]
        assert results[2][0].isfinite().all()
        largest = 1.0 if cls is nn.MultiheadAttention else 9.0  # what weights sum to; inputs, which cancel in norms
        assert_as_good(*results, sample, largest=largest)
        count += 1
    assert count >= 32


@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"activation": "gelu", "bias": False}, {"dropout": 0.0}])
@pytest.mark.parametrize("batch_first", [True, False])
def test_encoder_layers_are_torchs(options, batch_first):
    options = {"dropout": 0.0, **options, "batch_first": batch_first}
    stock, ours = _layer(nn.TransformerEncoderLayer, E, H, 16, **options)
    rows = torch.randn(N, L, E, dtype=torch.float64)
    rows = rows if batch_first else rows.transpose(0, 1)
    padding = torch.arange(L) > torch.tensor([[2], [4]])
    causal = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    for masks in ({}, {"src_key_padding_mask": padding}, {"src_mask": causal, "is_causal": True}):
        results = []
        for layer in (stock, ours):
            leaf = rows.clone().requires_grad_()
            output = layer.train()(leaf, **masks)
            grads = torch.autograd.grad(output.square().sum(), [leaf, *layer.parameters()])
            with torch.no_grad():
                results.append((output, *grads, layer.eval()(rows, **masks)))
        _close(results[1], results[0])


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoders_run_our_layers_and_nested_tensors_go_to_torch():
    stock = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    ours = pvk.convert(copy.deepcopy(stock))
    rows = torch.randn(N, L, 16)
    padding = torch.arange(L) > torch.tensor([[2], [4]])
    fused = "aten::_transformer_encoder_layer_fwd"
    with torch.no_grad():
        torch.testing.assert_close(ours(rows), stock(rows))
        seen = _operators(lambda: ours(rows))
        assert "pvk::attention" in seen
        assert fused not in seen
        padded = {"src_key_padding_mask": padding}
        torch.testing.assert_close(ours(rows, **padded), stock(rows, **padded))
        assert fused in _operators(lambda: ours(rows, **padded))
        nested = torch.nested.nested_tensor([torch.randn(3, 16), torch.randn(5, 16)])
        one, other = (model.layers[0].self_attn(*[nested] * 3, need_weights=False)[0] for model in (ours, stock))
        for mine, theirs in zip(one.unbind(), other.unbind(), strict=True):
            assert torch.equal(mine, theirs)


def test_hooks_within_an_encoder_layer_are_called():
    _, ours = _layer(nn.TransformerEncoderLayer, E, H, 16)
    calls = []
    for name in ("self_attn", "linear1", "linear2", "norm1", "norm2"):
        getattr(ours, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    ours(torch.randn(L, N, E, dtype=torch.float64))
    assert calls == ["self_attn", "norm1", "linear1", "linear2", "norm2"]


def test_decoders_run_our_attention():
    stock = nn.TransformerDecoderLayer(E, H, 16, dropout=0.0, batch_first=True).eval()
    ours = pvk.convert(copy.deepcopy(stock))
    rows, memory = torch.randn(N, L, E), torch.randn(N, S, E)
    with torch.no_grad():
        torch.testing.assert_close(ours(rows, memory), stock(rows, memory))
        assert "pvk::attention" in _operators(lambda: ours(rows, memory))


def test_conversion_says_which_attention_was_replaced(capsys):
    class Own(nn.MultiheadAttention):
        pass

    stock = nn.ModuleList([nn.TransformerEncoderLayer(E, H, 16), Own(E, H)])
    classes = [type(module) for module in stock.modules()]
    model = pvk.convert(stock)
    entries = {entry.name: entry for entry in pvk.conversion_report(model)}
    assert all(entries[name].replaced for name in ("0", "0.self_attn", "0.self_attn.out_proj", "0.linear1", "0.norm2"))
    assert "subclass of MultiheadAttention" in entries["1"].reason
    assert [type(module) for module in pvk.revert(model).modules()] == classes
    assert "subclass of MultiheadAttention" in " ".join(capsys.readouterr().out.split())
