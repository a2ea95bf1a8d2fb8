"""Cases of attention."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyvision_kernels._case import DTYPES, Case, Inputs, OpCases, error_case
from pyvision_kernels.ops.attention import attention, luong, reference

_HALF = (torch.bfloat16, torch.float16)
_NARROW = (torch.float32, *_HALF)
Change = Callable[[Inputs], None]


def _case(
    name: str,
    query: tuple[int, int, int, int],  # B, H, L, D
    keys: int | None = None,
    *,
    heads: int | None = None,  # of the keys
    features: int | None = None,  # of the values
    bias: tuple[int, ...] | None = None,
    change: Change | None = None,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    single: tuple[str, ...] = (),
    bench: str = "",
    **options: Any,
) -> Case:

    def make(generator: torch.Generator) -> Inputs:
        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, dtype=torch.float64)

        B, H, L, D = query
        S, G, E = keys or L, heads or H, features or D
        inputs: Inputs = {"query": normal(B, H, L, D), "key": normal(B, G, S, D), "value": normal(B, G, S, E)}
        inputs.update(options, bias=None if bias is None else normal(*bias))
        if change is not None:
            change(inputs)
        return inputs

    return Case(name, make, dtypes=dtypes, single=single, bench=bench)


def _masks(inputs: Inputs) -> None:
    """Bits for the bias, with a row that looks at nothing."""
    inputs["bias"] = inputs["bias"] > -0.5
    inputs["bias"][..., 1, :] = False


def _lengths(*lengths: int) -> Change:
    """Padding that is not finite."""

    def change(inputs: Inputs) -> None:
        inputs["key_lengths"] = torch.tensor(lengths)
        for batch, length in enumerate(lengths):
            inputs["key"][batch, :, max(length, 0) :] = math.nan
            inputs["value"][batch, :, max(length, 0) :] = math.inf

    return change


def _set(name: str, place: Any, value: float) -> Change:
    def change(inputs: Inputs) -> None:
        inputs[name][place] = value

    return change


def _absent_key(inputs: Inputs) -> None:
    """The key 2 masked for every query, and not finite."""
    inputs["bias"][..., 2] = -math.inf
    inputs["key"][:, :, 2] = math.nan
    inputs["value"][:, :, 2] = math.inf


def _scaled(factor: float) -> Change:
    def change(inputs: Inputs) -> None:
        inputs["query"] *= factor

    return change


def _flops(inputs: Inputs, output: Any) -> float:
    query, value = inputs["query"], inputs["value"]
    pairs = query.size(0) * query.size(1) * query.size(2) * value.size(2)
    return 2.0 * pairs * (query.size(3) + value.size(3)) / (2 if inputs.get("is_causal") else 1)


def _bytes(inputs: Inputs, output: Any) -> float:
    tensors = [inputs["query"], inputs["key"], inputs["value"], output]
    if inputs.get("bias") is not None:
        tensors.append(inputs["bias"])
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))


_GOOD: Inputs = {
    "query": torch.ones(2, 4, 5, 8),
    "key": torch.ones(2, 4, 3, 8),
    "value": torch.ones(2, 4, 3, 8),
}


_BROADCAST = "key and value to broadcast to query's first sizes [2, 4]"


def _error(name: str, error: type[Exception], message: str, **change: Any) -> Any:
    return error_case("attention", name, error, message, {**_GOOD, **change})


_PLAIN = (
    _case("odd", (2, 3, 37, 24), 19),
    _case("one", (1, 1, 1, 1)),
    _case("no_power_of_two", (1, 2, 50, 72)),
    _case("odd_features", (1, 2, 9, 13), 11, features=21),
    _case("most_features", (1, 1, 18, 256), 35),
    _case("one_query", (3, 2, 1, 40), 70),
    _case("two_keys", (1, 2, 33, 8), 2),
    _case("many_small", (17, 2, 7, 8)),
    _case("several_tiles", (1, 1, 150, 32), 210, dtypes=_NARROW),  # in float64 the reference errs more than the kernels
    _case("shared_keys", (2, 6, 17, 16), 23, heads=2, enable_gqa=True),
    _case("scale", (1, 2, 9, 8), scale=-0.7),
)
_MASKED = (
    _case("causal", (1, 2, 70, 16), is_causal=True),
    _case("causal_longer_keys", (1, 2, 9, 16), 30, is_causal=True),
    _case("causal_shorter_keys", (1, 2, 30, 16), 9, is_causal=True, bias=(1, 2, 30, 9)),
    _case("window", (1, 2, 140, 8), 150, window=(5, 20)),
    _case("window_before", (1, 2, 40, 8), window=(3, None)),
    _case("window_past_the_keys", (1, 2, 40, 8), 10, window=(4, 2)),  # rows without a key
    _case("mask", (2, 3, 30, 16), 40, bias=(2, 1, 30, 40), change=_masks),
    _case("lengths", (3, 2, 20, 16), 33, change=_lengths(33, 5, 0)),
    _case(
        "lengths_beyond", (2, 2, 20, 16), 33, change=lambda inputs: inputs.update(key_lengths=torch.tensor([40, -3]))
    ),
)
_BIASED = (
    _case("bias", (2, 3, 31, 16), 45, bias=(2, 3, 31, 45)),
    _case("bias_of_heads", (3, 2, 49, 16), bias=(1, 2, 49, 49)),
    _case("bias_of_keys", (2, 3, 31, 16), 45, bias=(2, 1, 1, 45)),
    _case("bias_of_two_dimensions", (2, 3, 11, 16), 15, bias=(11, 15)),
    _case("bias_shared_keys", (2, 4, 17, 16), 23, heads=2, enable_gqa=True, bias=(1, 4, 17, 23)),
    _case("bias_single", (2, 2, 20, 16), bias=(1, 2, 20, 20), dtypes=_HALF, single=("bias",)),
)
_HOSTILE = (
    _case("no_batches", (0, 2, 3, 8), bias=(1, 2, 3, 3)),
    _case("no_queries", (2, 2, 0, 8), 5),
    _case("absent_key", (2, 2, 19, 8), bias=(2, 2, 19, 19), change=_absent_key),
    _case("nan_query", (1, 2, 6, 8), change=_set("query", (0, 0, 2, 1), math.nan)),
    _case("nan_value", (1, 2, 6, 8), change=_set("value", (0, 0, 2, 1), math.nan)),
    _case("infinite_value", (1, 2, 6, 8), change=_set("value", (0, 0, 2, 1), math.inf)),
    _case("masked_row", (1, 2, 6, 8), bias=(1, 2, 6, 6), change=_set("bias", (0, 0, 3), -math.inf)),
    # Weights of 0 and 1: whatever exp loses is lost in the sum.
    _case("sharp", (1, 2, 20, 16), change=_scaled(40.0), dtypes=_NARROW),
    _case("tiny_scores", (1, 2, 20, 16), change=_scaled(1e-6)),
)
_BENCHMARKS = (
    _case("vit_b_b8", (8, 12, 197, 64), bench="quick"),
    _case("vit_b_384", (1, 16, 577, 64), bench="full"),
    _case("so400m_b4", (4, 16, 256, 72), bench="quick"),
    _case("features_32", (4, 8, 196, 32), bench="full"),
    _case("features_40", (4, 8, 196, 40), bench="full"),
    _case("features_80", (4, 8, 257, 80), bench="full"),
    _case("features_96", (4, 8, 196, 96), bench="full"),
    _case("windows_of_49", (256, 4, 49, 32), bench="quick"),
    _case("windows_with_bias", (256, 4, 49, 32), bias=(1, 4, 49, 49), bench="quick"),
    _case("bias_of_heads_197", (8, 12, 197, 64), bias=(1, 12, 197, 197), bench="full"),
    _case("long", (1, 12, 4096, 64), bench="full"),
)

ATTENTION = OpCases(
    name="attention",
    op=attention,
    reference=reference.attention,
    peer=reference.by_torch,
    peer_package="torch",
    peer_is_native=True,
    operators=("attention", "_attention_backward"),
    differentiable=("query", "key", "value", "bias"),
    layouts=("contiguous", "strided", "transposed"),
    cases=(*_PLAIN, *_MASKED, *_BIASED, *_HOSTILE, *_BENCHMARKS),
    errors=(
        _error("query_sizes", RuntimeError, "expected query to have at least 2 dimensions", query=torch.ones(8)),
        _error("key_batches", RuntimeError, f"expected {_BROADCAST}", key=torch.ones(3, 4, 3, 8)),
        _error(
            "key_features", RuntimeError, "expected key to have 2 batches and 8 features", key=torch.ones(2, 4, 3, 7)
        ),
        _error("heads", RuntimeError, f"expected {_BROADCAST}", key=torch.ones(2, 2, 3, 8)),
        _error(
            "shared_heads",
            RuntimeError,
            "expected query to have a multiple of key's 3 heads",
            key=torch.ones(2, 3, 3, 8),
            value=torch.ones(2, 3, 3, 8),
            enable_gqa=True,
        ),
        _error("value_keys", RuntimeError, "expected value to have size [2, 4, 3, E]", value=torch.ones(2, 4, 5, 8)),
        _error("dtype", RuntimeError, "expected value to be torch.float32", value=torch.ones(2, 4, 3, 8).half()),
        _error(
            "features",
            RuntimeError,
            "expected query to have 1 to 256 features",
            query=torch.ones(2, 4, 5, 257),
            key=torch.ones(2, 4, 3, 257),
        ),
        _error("bias_size", RuntimeError, "expected bias to broadcast to [2, 4, 5, 3]", bias=torch.ones(5, 5)),
        _error("bias_dtype", RuntimeError, "expected bias to be bool or torch.float32", bias=torch.ones(5, 3).double()),
        _error("lengths", RuntimeError, "expected key_lengths to have size [2]", key_lengths=torch.tensor([1, 2, 3])),
        _error("length_dtype", RuntimeError, "expected key_lengths to be integers", key_lengths=torch.ones(2)),
        _error("window", ValueError, "expected window to be (left, right)", window=(-1, 2)),
        _error("dropout", ValueError, "expected dropout_p to be in [0, 1)", dropout_p=1.0),
        _error("type", TypeError, "expected bias to be a Tensor", bias=1.0),
        _error(
            "integers",
            NotImplementedError,
            "expected query to be float16, bfloat16, float32 or float64",
            query=torch.ones(2, 4, 5, 8).int(),
        ),
    ),
    tiny=_case("per_call_overhead", (1, 1, 1, 8)),
    flops=_flops,
    bytes=_bytes,
)


def _states(
    name: str,
    decoder: tuple[int, int, int],
    encoder: tuple[int, int],
    *,
    weight: bool = False,
    lengths: tuple[int, ...] | None = None,
    bench: str = "",
    dtypes: tuple[torch.dtype, ...] = DTYPES,
) -> Case:
    """Decoder states [B, L, D], encoder states [B, S, E], and of general scores the weight [D, E]."""

    def make(generator: torch.Generator) -> Inputs:
        def normal(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, dtype=torch.float64)

        inputs: Inputs = {"decoder": normal(*decoder), "encoder": normal(decoder[0], *encoder) / encoder[1] ** 0.5}
        if weight:
            inputs["weight"] = normal(decoder[2], encoder[1]) / decoder[2] ** 0.5
        if lengths is not None:
            inputs["key_lengths"] = torch.tensor(lengths)
        return inputs

    return Case(name, make, bench=bench, dtypes=dtypes)


def _state_flops(inputs: Inputs, output: Any) -> float:
    (B, L, D), (_, S, E) = inputs["decoder"].shape, inputs["encoder"].shape
    return 4.0 * B * L * S * E + (2.0 * B * min(L, S) * D * E if "weight" in inputs else 0)


def _state_bytes(inputs: Inputs, output: Any) -> float:
    tensors = [inputs["decoder"], inputs["encoder"], *([inputs["weight"]] if "weight" in inputs else []), output]
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))


_STATES: Inputs = {"decoder": torch.ones(2, 3, 8), "encoder": torch.ones(2, 5, 8)}


def _state_error(op: str, name: str, error: type[Exception], message: str, **change: Any) -> Any:
    weight = {"weight": torch.ones(8, 8)} if op == "general_attention" else {}
    return error_case(op, name, error, message, {**_STATES, **weight, **change})


def _state_errors(op: str) -> tuple[Any, ...]:
    return (
        _state_error(op, "dimensions", RuntimeError, "expected decoder to have 3 dimensions", decoder=torch.ones(3, 8)),
        _state_error(op, "encoder", RuntimeError, "expected encoder to have 3 dimensions", encoder=torch.ones(5, 8)),
        _state_error(op, "batches", RuntimeError, "expected encoder to have 2 batches", encoder=torch.ones(3, 5, 8)),
        _state_error(op, "dtype", RuntimeError, "expected encoder to be", encoder=torch.ones(2, 5, 8).double()),
        _state_error(op, "lengths", RuntimeError, "expected key_lengths", key_lengths=torch.tensor([1, 2, 3])),
        _state_error(
            op, "length_dtype", RuntimeError, "expected key_lengths to be integers", key_lengths=torch.ones(2)
        ),
        _state_error(
            op, "integers", NotImplementedError, "expected decoder to be float", decoder=torch.ones(2, 3, 8).int()
        ),
        _state_error(op, "type", TypeError, "expected encoder to be a Tensor", encoder=1.0),
    )


def _dot_by_torch(decoder: Tensor, encoder: Tensor, key_lengths: Tensor | None = None) -> Tensor:
    query, key = decoder.unsqueeze(1), encoder.unsqueeze(1)
    return reference.by_torch(query, key, key, scale=1.0, key_lengths=key_lengths).squeeze(1)


def _luong(name: str, function: Any, exact: Any, peer: Any, weight: bool, errors: tuple[Any, ...]) -> OpCases:
    make = functools.partial(_states, weight=weight)
    return OpCases(
        name=name,
        op=function,
        reference=exact,
        peer=peer,
        peer_package="torch",
        peer_is_native=True,
        operators=("attention",) if weight else ("attention", "_attention_backward"),
        differentiable=("decoder", "encoder", *(("weight",) if weight else ())),
        layouts=("contiguous", "strided"),
        cases=(
            make("odd", (3, 7, 24), (11, 24)),
            make("more_decoder_states", (2, 30, 16), (9, 16)),
            make("lengths", (3, 4, 16), (9, 16), lengths=(9, 1, 4)),
            make("one", (1, 1, 8), (1, 8)),
            make("no_decoder_states", (2, 0, 8), (5, 8)),
            make("many_features", (2, 3, 264), (5, 264)),  # more than the kernel takes
            make("sequence", (32, 20, 256), (50, 256), bench="quick"),
        ),
        errors=errors,
        tiny=make("per_call_overhead", (1, 1, 8), (1, 8)),
        flops=_state_flops,
        bytes=_state_bytes,
    )


DOT_ATTENTION = _luong(
    "dot_attention",
    luong.dot_attention,
    reference.dot_attention,
    _dot_by_torch,
    False,
    (
        *_state_errors("dot_attention"),
        _state_error(
            "dot_attention",
            "features",
            RuntimeError,
            "expected encoder to have 8 features",
            encoder=torch.ones(2, 5, 7),
        ),
    ),
)

GENERAL_ATTENTION = _luong(
    "general_attention",
    luong.general_attention,
    reference.general_attention,
    lambda decoder, encoder, weight, **options: _dot_by_torch(decoder @ weight, encoder, **options),
    True,
    (
        *_state_errors("general_attention"),
        _state_error(
            "general_attention", "weight", RuntimeError, "expected weight to have size [8, 8]", weight=torch.ones(8, 7)
        ),
    ),
)

CASES = (ATTENTION, DOT_ATTENTION, GENERAL_ATTENTION)
