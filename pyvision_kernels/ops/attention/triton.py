"""Long attention without a bias by Triton, in float16 and bfloat16.

Both directions are operators of `torch.library.triton_op`, so that torch.compile sees the kernels. `supports` says which
calls are worth it; all others are for the CUDA kernels in C++.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import wrap_triton

from pyvision_kernels._norm import HALF, one_by_one
from pyvision_kernels._op import Op, declare
from pyvision_kernels._packed import PLAIN
from pyvision_kernels.ops.attention import operator
from pyvision_kernels.ops.conv2d import triton_run
from pyvision_kernels.ops.conv2d.triton_launch import Launch, Machine

try:
    import triton

    from pyvision_kernels.ops.attention import triton_kernels

    MISSING = ""
except (ImportError, AttributeError) as error:  # none is installed, or one without what the kernels use
    MISSING = f"{type(error).__name__}: {error}"

_OP = "_attention_triton"
_LEAST_KEYS = 512  # below, the kernels in C++ hold all scores of a tile
_LEAST_FEATURES = 16


class Config(NamedTuple):
    """Queries and keys of a tile, warps, stages of the pipeline."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def available() -> bool:
    """Whether Triton is installed, and has what the kernels use."""
    return not MISSING


def supports(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, dropout_p: float) -> bool:
    """Whether Triton is to run a call: a long one by tensor cores on CUDA, without a bias or dropout."""
    features = query.size(3), value.size(3)
    return (
        bias is None
        and dropout_p == 0
        and query.is_cuda
        and query.dtype in HALF
        and min(features) >= _LEAST_FEATURES
        and _LEAST_KEYS <= key.size(2)
        and query.size(2) + key.size(2) < 2**30
        and query.size(0) * query.size(1) * query.size(2) < 2**31
        and available()
    )


# By the sum of the parts of the wider features: up to 64, 128, 256. None spills on its architecture.
_FORWARD = {
    80: (Config(128, 64, 8, 2), Config(64, 32, 8, 2), Config(64, 32, 8, 2)),
    90: (Config(128, 128, 8, 3), Config(128, 64, 8, 3), Config(64, 64, 8, 2)),
    100: (Config(128, 128, 8, 3), Config(128, 128, 8, 2), Config(64, 64, 8, 2)),
}
_BACKWARD = {
    80: (Config(64, 64, 8, 2), Config(32, 64, 8, 2), Config(32, 64, 8, 1)),
    90: (Config(128, 64, 8, 2), Config(64, 64, 8, 1), Config(32, 64, 8, 1)),
    100: (Config(64, 64, 8, 2), Config(64, 64, 4, 1), Config(32, 64, 8, 1)),
}


def parts_of(features: int, split: bool) -> tuple[int, int]:
    """Powers of two, of 16 at least, that cover the first and the rest of the features; 0: there is no rest."""
    whole = max(16, 1 << (features - 1).bit_length())
    if not split:
        return whole, 0
    first = whole // 2
    rest = max(16, 1 << (features - first - 1).bit_length()) if features > first else 0
    return (first, rest) if first >= 16 and first + rest < whole else (whole, 0)


def config_of(machine: Machine, width: int, backward: bool) -> Config:
    """Tiles of the nearest architecture whose shared memory and tensor cores are no larger."""
    place = 0 if width <= 64 else 1 if width <= 128 else 2
    table = _BACKWARD if backward else _FORWARD
    known = [arch for arch in table if arch <= machine.arch and not (machine.arch >= 120 and arch > 80)]
    return table[max(known, default=80)][place]


def _machine_of(tensor: Tensor) -> Machine:
    if MISSING:
        raise NotImplementedError(f"{_OP}: expected triton to be installed, 3.6 or newer, but got {MISSING}")
    if tensor.is_cuda:
        return triton_run._machine(tensor.get_device())
    if triton_kernels.INTERPRETED:
        return Machine(90, 2)
    raise NotImplementedError(f"{_OP}: expected tensors on a CUDA device, but got some on {tensor.device}")


def _is_described(tensor: Tensor) -> bool:
    """Whether a tensor descriptor can be made of it: rows and heads are multiples of 16 bytes apart."""
    size = tensor.element_size()
    steps = [by for by, length in zip(tensor.stride()[:3], tensor.shape[:3], strict=True) if length > 1]
    if type(tensor) in PLAIN and tensor.device.type != "meta":
        aligned = tensor.data_ptr() % 16 == 0
    else:
        aligned = bool(tensor.storage_offset() * size % 16 == 0)
    return aligned and all(by > 0 and by * size % 16 == 0 for by in steps)


def _strides(**tensors: Tensor) -> dict[str, int]:
    """Of batches, heads and rows; a dimension of size 1 has any that suits a descriptor."""
    return {
        f"{name}_{axis}": tensor.stride(place) if tensor.size(place) > 1 else 16
        for name, tensor in tensors.items()
        for place, axis in enumerate("bhl")
    }


def _shared(
    machine: Machine, query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None, left: int, right: int
) -> dict[str, Any]:
    """What all kernels but the sums take."""
    (B, H, L, D), (G, S), E = query.shape, key.shape[1:3], value.size(3)
    split = machine.arch >= 90  # elsewhere registers do not suffice for two parts
    (d_first, d_rest), (e_first, e_rest) = parts_of(D, split), parts_of(E, split)
    return {
        "query_ptr": query,
        "key_ptr": key,
        "value_ptr": value,
        "lengths_ptr": lengths,
        **{"B": B, "H": H, "G": G, "L": L, "S": S},
        "LEFT": L + S if left < 0 else min(left, L + S),
        "RIGHT": L + S if right < 0 else min(right, L + S),
        **_strides(query=query, key=key, value=value),
        **{"D": D, "E": E, "D_FIRST": d_first, "D_REST": d_rest, "E_FIRST": e_first, "E_REST": e_rest},
        "LENGTHS": lengths is not None,
    }


def plan_forward(
    machine: Machine,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None,
    output: Tensor,
    lse: Tensor,
    scale: float,
    left: int,
    right: int,
    config: Config | None = None,
) -> Launch:
    shared = _shared(machine, query, key, value, lengths, left, right)
    width = max(shared["D_FIRST"] + shared["D_REST"], shared["E_FIRST"] + shared["E_REST"])
    config = config or config_of(machine, width, backward=False)
    tiles = -(-shared["L"] // config.block_m) * shared["B"] * shared["H"]
    described = machine.arch >= 90 and all(_is_described(tensor) for tensor in (query, key, value))
    arguments = {
        **shared,
        "output_ptr": output,
        "lse_ptr": lse,
        "scale": scale * triton_kernels.LOG2_E.value,
        **_strides(output=output),
        **{"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "DESCRIPTORS": described},
    }
    grid = (min(tiles, machine.multiprocessors * (2 if width <= 64 else 1)),)
    return Launch("attention_forward_kernel", grid, arguments, config.warps, config.stages)


def plan_backward(
    machine: Machine,
    grad: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None,
    output: Tensor,
    lse: Tensor,
    delta: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    scale: float,
    left: int,
    right: int,
    config: Config | None = None,
) -> list[Launch]:
    """The sums, the gradients of keys and values, the gradient of queries."""
    shared = _shared(machine, query, key, value, lengths, left, right)
    B, H, G, L, S = (shared[name] for name in "BHGLS")
    width = max(shared["D_FIRST"] + shared["D_REST"], shared["E_FIRST"] + shared["E_REST"])
    config = config or config_of(machine, width, backward=True)
    by_query, by_key, by_value = grads
    rows = 32
    sums = {
        **{"grad_ptr": grad, "output_ptr": output, "grad_lse_ptr": grad_lse, "delta_ptr": delta, "H": H, "L": L},
        **_strides(grad=grad, output=output),
        **{"E": value.size(3), "WIDTH": 1 << (value.size(3) - 1).bit_length(), "BLOCK_M": rows},
    }
    common = {
        **shared,
        **{"grad_ptr": grad, "lse_ptr": lse, "delta_ptr": delta},
        **{"scale": scale * triton_kernels.LOG2_E.value, "factor": scale},
        **_strides(grad=grad),
        **{"BLOCK_M": config.block_m, "BLOCK_N": config.block_n},
    }
    of_keys = {"grad_key_ptr": by_key, "grad_value_ptr": by_value, **_strides(grad_key=by_key, grad_value=by_value)}
    of_queries = {"grad_query_ptr": by_query, **_strides(grad_query=by_query)}
    options = config.warps, config.stages
    return [
        Launch("attention_delta_kernel", (-(-L // rows) * B * H,), sums, 8, 1),
        Launch("attention_backward_keys_kernel", (-(-S // config.block_n) * B * G,), {**common, **of_keys}, *options),
        Launch(
            "attention_backward_queries_kernel", (-(-L // config.block_m) * B * H,), {**common, **of_queries}, *options
        ),
    ]


def _run(launches: list[Launch], tensor: Tensor) -> None:
    for launch in launches:
        kernel = getattr(triton_kernels, launch.kernel)
        options = {"num_warps": launch.warps, "num_stages": launch.stages}
        if type(tensor) not in PLAIN:  # it is traced
            wrap_triton(kernel)[launch.grid](**launch.arguments, **options)
            continue
        with triton_run._on(tensor, bool(launch.arguments.get("DESCRIPTORS"))):
            kernel[launch.grid](**launch.arguments, **options)


# ---- operators ----


def _fake(query, key, value, key_lengths, scale, left, right):
    return operator.fake(query, key, value, None, key_lengths, None, scale, left, right, 0.0)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    scale: float,
    left: int,
    right: int,
) -> tuple[Tensor, Tensor]:
    output, lse = _fake(query, key, value, key_lengths, scale, left, right)
    if output.numel() == 0:
        return output, lse
    if key.size(2) == 0:
        return output.zero_(), lse.fill_(float("-inf"))
    options = scale, left, right
    launch = plan_forward(_machine_of(query), query, key, value, key_lengths, output, lse, *options)
    _run([launch], query)
    return output, lse


def _fake_backward(grad_output, grad_lse, query, key, value, key_lengths, output, lse, scale, left, right):
    features = query.size(3), value.size(3)
    return (
        operator.rows_like(query, features[0]),
        operator.rows_like(key, features[0]),
        operator.rows_like(value, features[1]),
    )


def _gradients(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    output: Tensor,
    lse: Tensor,
    scale: float,
    left: int,
    right: int,
) -> tuple[Tensor, Tensor, Tensor]:
    given = (grad_output, grad_lse, query, key, value, key_lengths, output, lse)
    grads = _fake_backward(*given, scale, left, right)
    if query.numel() == 0 or key.numel() == 0:
        return grads[0].zero_(), grads[1].zero_(), grads[2].zero_()
    delta = torch.empty_like(lse)
    launches = plan_backward(_machine_of(query), *given, delta, grads, scale, left, right)
    _run(launches, query)
    return grads


def _setup(ctx, inputs, output):
    query, key, value, lengths, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, lengths, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, grad_lse):
    query, key, value, lengths, output, lse = ctx.saved_tensors
    nothing = (None,) * 4
    if grad is None and grad_lse is None:
        return (None,) * 3 + nothing
    grad = torch.zeros_like(output) if grad is None else operator.by_rows(grad)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    if torch.is_grad_enabled():
        scale, left, right = ctx.options
        rest = (None, lengths, None, output, lse, scale, left, right, 0.0, False)
        grads = operator.composed(grad, grad_lse, query, key, value, *rest)[:3]
    else:
        grads = attention_backward_triton_op(grad, grad_lse, query, key, value, lengths, output, lse, *ctx.options)
    needed = zip(grads, ctx.needs_input_grad, strict=False)
    return (*(found if needs else None for found, needs in needed), *nothing)


def _cast(query, key, value, *rest):
    query, key, value, *_ = operator.cast(query, key, value, None)
    return query, key, value, *rest


def _vmap(info, in_dims, query, key, value, key_lengths, *options):
    dims = (*in_dims[:3], None, in_dims[3])
    given = operator.folded(info.batch_size, dims, query, key, value, key_lengths)
    results = attention_triton_op(*given, *options)
    return tuple(result.unflatten(0, (info.batch_size, -1)) for result in results), (0, 0)


def _vmap_backward(info: Any, in_dims: Any, *args: Any) -> Any:
    return one_by_one(attention_backward_triton_op)(info, in_dims, *args)


attention_triton_op: Op = declare(
    f"{_OP}(Tensor query, Tensor key, Tensor value, Tensor? key_lengths, float scale, SymInt left, SymInt right) "
    "-> (Tensor, Tensor)",
    fake=_fake,
    implementation=_forward,
    setup_context=_setup,
    backward=_backward,
    autocast=_cast,
    vmap=_vmap,
)

attention_backward_triton_op: Op = declare(
    f"{_OP}_backward(Tensor grad_output, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
    "Tensor? key_lengths, Tensor output, Tensor lse, float scale, SymInt left, SymInt right) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    implementation=_gradients,
    vmap=_vmap_backward,
)
