"""Attention in layers, models and `convert`, against torch.nn, torchvision and timm; more of torch.nn's layers is in
test_multihead_attention.py."""

from __future__ import annotations

import copy
import importlib
import types
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import pyvision_kernels as pvk
from pyvision_kernels.recipes.digits import kernels_of
from tests.errors import assert_as_good

BY_ATTENTION = {"pvk::attention", "pvk::linear"}


def _masks(name, L, S, N, H):
    """attn_mask, key_padding_mask; every query looks at the first key."""
    masks = {
        "none": (None, None),
        "bool": (torch.rand(L, S) > 0.6, None),
        "added of heads": (torch.randn(N * H, L, S), None),
        "padding": (None, torch.rand(N, S) > 0.6),
        "bool and padding": (torch.rand(N * H, L, S) > 0.6, torch.rand(N, S) > 0.6),
        "added and padding": (torch.randn(L, S), torch.rand(N, S) > 0.6),
    }[name]
    for mask in masks:
        if mask is not None and mask.dtype == torch.bool:
            mask[..., 0] = False
    return masks


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize(
    "masks", ["none", "bool", "added of heads", "padding", "bool and padding", "added and padding"]
)
@pytest.mark.parametrize(
    "options",
    [
        {"batch_first": True},
        {"bias": False},
        {"kdim": 5, "vdim": 7, "batch_first": True},
        {"add_bias_kv": True, "add_zero_attn": True},
    ],
    ids=lambda options: ", ".join(options),
)
def test_multihead_attention_is_torchs(options, masks, device):
    stock = nn.MultiheadAttention(12, 3, **options)
    ours = pvk.nn.MultiheadAttention(12, 3, **options)
    ours.load_state_dict(stock.state_dict())
    L, S, N = 5, 6, 2
    sizes = ((L, 12), (S, options.get("kdim", 12)), (S, options.get("vdim", 12)))
    rows = [torch.randn(N, *size) if options.get("batch_first") else torch.randn(size[0], N, size[1]) for size in sizes]
    mask, padding = _masks(masks, L, S, N, 3)
    for needs, average in ((False, True), (True, True), (True, False)):
        given = {"key_padding_mask": padding, "attn_mask": mask, "need_weights": needs, "average_attn_weights": average}
        results = []
        for layer in (ours, stock):
            leaves = [one.clone().requires_grad_() for one in rows]
            output, weights = layer(*leaves, **given)
            loss = output.square().sum() + (0 if weights is None else weights.square().sum())
            results.append((output, weights, *torch.autograd.grad(loss, [*leaves, *layer.parameters()])))
        torch.testing.assert_close(*results, rtol=2e-4, atol=2e-5)


def test_half_precision_is_as_exact_as_torchs(device):
    stock = nn.MultiheadAttention(64, 4, batch_first=True).bfloat16()
    ours = pvk.convert(copy.deepcopy(stock))
    x = torch.randn(2, 30, 64).bfloat16()
    double = x.double()
    exact, _ = copy.deepcopy(stock).double()(double, double, double, need_weights=False)
    with torch.no_grad():
        found, theirs = (layer(x, x, x, need_weights=False)[0] for layer in (ours, stock))
    assert_as_good(found, theirs, exact.detach())


def test_heads_are_not_copied_and_our_kernels_run():
    layer = pvk.nn.MultiheadAttention(64, 4, batch_first=True).eval()
    x = torch.randn(2, 30, 64)
    with torch.profiler.profile(acc_events=True) as profile:
        layer(x, x, x, need_weights=False)[0].sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert names >= BY_ATTENTION | {"pvk::_attention_backward"}
    with torch.no_grad(), torch.profiler.profile(acc_events=True) as profile:
        layer(x, x, x, need_weights=False)
    assert not [event.key for event in profile.key_averages() if event.key in ("aten::copy_", "aten::contiguous")]


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_transformer_encoder_is_torchs(norm_first, activation):
    layer = nn.TransformerEncoderLayer(
        16, 2, 32, dropout=0.0, activation=activation, batch_first=True, norm_first=norm_first
    )
    stock = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    ours = pvk.convert(copy.deepcopy(stock))
    x, mask = torch.randn(2, 7, 16), nn.Transformer.generate_square_subsequent_mask(7)
    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[1, 4:] = True
    with torch.no_grad():
        torch.testing.assert_close(ours(x), stock(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours(x, mask), stock(x, mask), rtol=1e-4, atol=1e-5)
        both = [model(x, src_key_padding_mask=padding)[~padding] for model in (ours, stock)]
        torch.testing.assert_close(*both, rtol=1e-4, atol=1e-5)
        names = kernels_of(lambda: ours(x))
    assert set(names) >= BY_ATTENTION | {"pvk::layer_norm"}
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert type(pvk.revert(ours).layers[0]) is nn.TransformerEncoderLayer


def test_vit_has_torchvisions_keys_and_results():
    torchvision = pytest.importorskip("torchvision")
    stock = torchvision.models.VisionTransformer(32, 16, 2, 4, 64, 128).eval()
    nn.init.normal_(stock.heads.head.weight)
    ours = pvk.models.VisionTransformer(32, 16, 2, 4, 64, 128).eval()
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = stock(x)
        torch.testing.assert_close(ours(x), expected, rtol=1e-4, atol=1e-4)
        for model in (
            pvk.convert(copy.deepcopy(stock)),
            pvk.convert(ours),
            pvk.convert(copy.deepcopy(stock), fuse=True),
        ):
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
            assert set(kernels_of(lambda model=model: model(x))) >= BY_ATTENTION
    with torch.device("meta"):
        mine, theirs = pvk.models.vit_b_16(), torchvision.models.vit_b_16()
    assert {key: value.shape for key, value in mine.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }


@pytest.mark.parametrize("options", [{}, {"qk_norm": True}])
def test_vit_of_timm(options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of timm about itself
        timm = pytest.importorskip("timm")
        stock = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5, **options).eval()
    ours = pvk.convert(copy.deepcopy(stock))
    x = torch.randn(2, 3, 32, 32)
    results = []
    for model in (ours, stock):
        model.train(False)
        loss = model(x).square().sum()
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)
    assert set(kernels_of(lambda: ours(x))) >= BY_ATTENTION
    assert type(pvk.revert(ours).blocks[0].attn) is type(stock.blocks[0].attn)


def test_another_version_of_timm_is_left_alone(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of timm about itself
        timm = pytest.importorskip("timm")
        ours = importlib.import_module("pyvision_kernels.convert.timm")
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=5).eval()
    assert not ours.REFUSED
    monkeypatch.setattr(ours, "REFUSED", "of a version of timm with other arguments of forward")
    stock = type(model.blocks[0].attn)
    entries = {entry.name: entry for entry in pvk.conversion_report(pvk.convert(model))}
    assert type(model.blocks[0].attn) is stock
    assert (entries["blocks.0.attn"].replaced, entries["blocks.0.attn"].reason) == (False, ours.REFUSED)
    assert entries["blocks.0.attn.qkv"].replaced


@pytest.mark.parametrize("kind", ["dot", "general", "qkv"])
def test_attention_layer(kind, device):
    layer = pvk.nn.Attention(16, kind, **({"num_heads": 2} if kind == "qkv" else {}))
    decoder, encoder = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    lengths = torch.tensor([7, 3]) if kind != "qkv" else torch.tensor([5, 3])
    if kind == "qkv":
        found = layer(decoder, key_lengths=lengths)
        query, key, value = layer.qkv(decoder).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        mask = torch.arange(5) < lengths[:, None, None, None]
        expected = F.scaled_dot_product_attention(query, key, value, mask)
        expected = layer.proj(expected.transpose(1, 2).flatten(2))
    else:
        found = layer(decoder, encoder, key_lengths=lengths)
        query = decoder if kind == "dot" else decoder @ layer.weight
        mask = torch.arange(7) < lengths[:, None, None]
        expected = F.scaled_dot_product_attention(query, encoder, encoder, mask, scale=1.0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_attention_layer_refuses_what_it_cannot_use():
    with pytest.raises(ValueError, match="expected attn_type to be 'dot', 'general' or 'qkv', but got 'sum'"):
        pvk.nn.Attention(16, "sum")
    with pytest.raises(ValueError, match="expected dim to be a multiple of num_heads, but got 10 and 4"):
        pvk.nn.Attention(10, num_heads=4)
    with pytest.raises(TypeError, match="expected encoder to be a Tensor for 'dot', but got NoneType"):
        pvk.nn.Attention(16, "dot")(torch.ones(1, 2, 16))
    with pytest.raises(TypeError, match="expected encoder to be None for 'qkv', but got Tensor"):
        pvk.nn.Attention(16)(torch.ones(1, 2, 16), torch.ones(1, 2, 16))


def test_weights_of_luongs_attention(device):
    decoder, encoder, weight = torch.randn(2, 3, 8), torch.randn(2, 5, 6), torch.randn(8, 6)
    lengths = torch.tensor([5, 2])
    context, weights = pvk.ops.general_attention(decoder, encoder, weight, key_lengths=lengths, return_weights=True)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3))
    assert (weights[1, :, 2:] == 0).all()
    torch.testing.assert_close(weights @ encoder, context, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("features", [16, 300])  # more than the kernels take
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contexts_and_weights_of_luongs_attention_are_as_exact_as_torchs(features, dtype):
    decoder, encoder = torch.randn(2, 3, features, dtype=dtype), torch.randn(2, 5, features, dtype=dtype)
    lengths = torch.tensor([5, 2])

    def composed(decoder, encoder):
        scores = (decoder @ encoder.mT).masked_fill(torch.arange(5) >= lengths[:, None, None], -torch.inf)
        weights = scores.softmax(-1)
        return weights @ encoder, weights

    found = pvk.ops.dot_attention(decoder, encoder, key_lengths=lengths, return_weights=True)
    assert_as_good(found, composed(decoder, encoder), composed(decoder.double(), encoder.double()))


def test_gradients_of_luongs_weights_and_of_padding():
    given = [torch.randn(*size, dtype=torch.float64) for size in ((3, 3, 8), (3, 5, 6), (8, 6))]
    lengths = torch.tensor([5, 0, 2])
    padded = given[1].masked_fill((torch.arange(5) >= lengths[:, None])[..., None], torch.nan)

    def grads(function, encoder, **options):
        leaves = [one.clone().requires_grad_() for one in (given[0], encoder, given[2])]
        context, weights = function(*leaves, return_weights=True, **options)
        return context, weights, *torch.autograd.grad(context.sum() + weights.square().sum(), leaves)

    found = grads(pvk.ops.general_attention, padded, key_lengths=lengths)
    assert all(one.isfinite().all() for one in found)
    assert (found[0][1] == 0).all()
    torch.testing.assert_close(*(grads(function, given[1]) for function in (pvk.ops.general_attention, _general)))


def _general(decoder, encoder, weight, return_weights):
    weights = (decoder @ weight @ encoder.mT).softmax(-1)
    return weights @ encoder, weights


def test_attention_layers_are_traced():
    decoder, encoder = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    for kind in ("dot", "general", "qkv"):
        layer = pvk.nn.Attention(16, kind, num_heads=2)
        given = (decoder,) if kind == "qkv" else (decoder, encoder)
        absent = {"encoder": None} if kind == "qkv" else {}
        traced = torch.fx.symbolic_trace(layer, {"bias": None, "key_lengths": None, **absent})
        torch.testing.assert_close(traced(*given), layer(*given))


def _dims(dec, enc):
    return types.SimpleNamespace(dec_embed_dim=dec, enc_embed_dim=enc)


def test_reference_attention_on_single_states_is_the_references_arithmetic():
    dec, enc = torch.randn(3, 6), torch.randn(3, 6)
    dot = pvk.models.Attention(_dims(6, 4))
    expected = torch.softmax(dot.attn(enc), dim=1)[:, :, None] @ dec[:, None, :]
    assert expected.shape == (3, 4, 6)
    general = pvk.models.Attention(_dims(6, 4), "general")
    also = torch.softmax(general.attn(dec), dim=1)[:, :, None] @ enc[:, None, :]
    assert also.shape == (3, 1, 6)
    for model, right in ((dot, expected), (general, also)):
        torch.testing.assert_close(model(dec, enc), right)
        torch.testing.assert_close(pvk.convert(copy.deepcopy(model))(dec, enc), right)


def test_reference_attention_on_sequences():
    dec, enc = torch.randn(2, 5, 6), torch.randn(2, 5, 4)
    dot = pvk.models.Attention(_dims(6, 4))
    scores = dot.attn(dec) @ enc.mT
    general = pvk.models.Attention(_dims(6, 4), "general")
    weights = torch.softmax(general.attn(dec), dim=1)  # [B, S, 1]
    for model, right in ((dot, scores.softmax(-1) @ enc), (general, (weights * enc).sum(1, keepdim=True))):
        torch.testing.assert_close(model(dec, enc), right)
        ours = pvk.convert(copy.deepcopy(model))
        torch.testing.assert_close(ours(dec, enc), right, rtol=1e-4, atol=1e-5)
        assert list(ours.state_dict()) == ["attn.weight", "attn.bias"]
    assert set(kernels_of(lambda: pvk.convert(dot)(dec, enc))) >= BY_ATTENTION
    with pytest.raises(ValueError, match="expected enc to have 5 states as dec has, but got 4"):
        general(dec, enc[:, :4])
    with pytest.raises(ValueError, match="expected dec and enc to have 2 dimensions, or 3"):
        dot(dec, enc[0])
    with pytest.raises(ValueError, match="expected attn_type to be 'dot' or 'general', but got 'qkv'"):
        pvk.models.Attention(_dims(6, 4), "qkv")
