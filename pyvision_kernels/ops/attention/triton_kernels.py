"""The Triton kernels of attention without a bias: forward, the gradients of keys and values, the gradient of queries.

Matrices are read as [B, H, L, D] through 4-D tensor descriptors, or by pointers and masks. Features are cut in two, of
FIRST and REST, each a power of two: 72 is 64 and 16, not 128. Scores are in units of log2. What lies beyond `keys`, the
keys that some query of the head looks at, is read as zeros.
"""

import triton
import triton.language as tl

# The interpreter has no bfloat16: it would multiply the bits.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _dot(a, b):
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _described(ptr, B, H, rows, features, sb, sh, sl, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """A descriptor of boxes of ROWS rows and WIDTH features of a head."""
    return tl.make_tensor_descriptor(ptr, [B, H, rows, features], [sb, sh, sl, 1], [1, 1, ROWS, WIDTH])


@triton.jit
def _read(
    described,
    ptr,
    b,
    h,
    first,
    rows,
    features,
    sb,
    sh,
    sl,
    ROWS: tl.constexpr,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """[ROWS, WIDTH] from row `first` and feature START of a head; zeros beyond `rows` and `features`."""
    i, d = first + tl.arange(0, ROWS), START + tl.arange(0, WIDTH)
    if DESCRIPTORS:
        tile = described.load([b, h, first, START]).reshape(ROWS, WIDTH)
        return tl.where((i < rows)[:, None], tile, 0.0).to(tile.dtype)
    place = ptr + b.to(tl.int64) * sb + h.to(tl.int64) * sh + i.to(tl.int64)[:, None] * sl + d[None, :]
    return tl.load(place, mask=(i < rows)[:, None] & (d < features)[None, :], other=0.0)


@triton.jit
def _write(
    ptr, tile, b, h, first, rows, features, sb, sh, sl, ROWS: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr
):
    i, d = first + tl.arange(0, ROWS), START + tl.arange(0, WIDTH)
    place = ptr + b.to(tl.int64) * sb + h.to(tl.int64) * sh + i.to(tl.int64)[:, None] * sl + d[None, :]
    tl.store(place, tile.to(ptr.dtype.element_ty), mask=(i < rows)[:, None] & (d < features)[None, :])


@triton.jit
def _keys_of(lengths_ptr, b, S, LEFT, RIGHT, L, LENGTHS: tl.constexpr):
    """How many keys, from the first on, some query of the batch looks at."""
    keys = tl.minimum(S, L + RIGHT)
    if LENGTHS:
        keys = tl.maximum(tl.minimum(keys, tl.load(lengths_ptr + b)), 0).to(tl.int32)
    return keys


@triton.jit
def _seen(i, j, keys, LEFT, RIGHT):
    """Which keys j queries i look at, [i, j]."""
    i, j = i[:, None], j[None, :]
    return (j < keys) & (j >= i - LEFT) & (j <= i + RIGHT)


@triton.jit
def attention_forward_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    lengths_ptr,
    output_ptr,
    lse_ptr,
    scale,
    B,
    H,
    G,
    L,
    S,
    LEFT,
    RIGHT,
    query_b,
    query_h,
    query_l,
    key_b,
    key_h,
    key_l,
    value_b,
    value_h,
    value_l,
    output_b,
    output_h,
    output_l,
    D: tl.constexpr,
    E: tl.constexpr,
    D_FIRST: tl.constexpr,
    D_REST: tl.constexpr,
    E_FIRST: tl.constexpr,
    E_REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LENGTHS: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """A program takes tiles of BLOCK_M queries of a head, the last of each head first: those see most keys."""
    of_head = tl.cdiv(L, BLOCK_M)
    queries, keys_first, values_first = 0, 0, 0
    queries_rest, keys_rest, values_rest = 0, 0, 0
    if DESCRIPTORS:
        queries = _described(query_ptr, B, H, L, D, query_b, query_h, query_l, BLOCK_M, D_FIRST)
        keys_first = _described(key_ptr, B, G, S, D, key_b, key_h, key_l, BLOCK_N, D_FIRST)
        values_first = _described(value_ptr, B, G, S, E, value_b, value_h, value_l, BLOCK_N, E_FIRST)
        if D_REST > 0:
            queries_rest = _described(query_ptr, B, H, L, D, query_b, query_h, query_l, BLOCK_M, D_REST)
            keys_rest = _described(key_ptr, B, G, S, D, key_b, key_h, key_l, BLOCK_N, D_REST)
        if E_REST > 0:
            values_rest = _described(value_ptr, B, G, S, E, value_b, value_h, value_l, BLOCK_N, E_REST)
    for tile in tl.range(tl.program_id(0), of_head * B * H, tl.num_programs(0)):
        first = (of_head - 1 - tile % of_head) * BLOCK_M
        b, h = tile // of_head // H, tile // of_head % H
        g = h // (H // G)
        keys = _keys_of(lengths_ptr, b, S, LEFT, RIGHT, L, LENGTHS)
        i = first + tl.arange(0, BLOCK_M)
        q = _read(queries, query_ptr, b, h, first, L, D, query_b, query_h, query_l, BLOCK_M, 0, D_FIRST, DESCRIPTORS)
        if D_REST > 0:
            q_rest = _read(
                queries_rest, query_ptr, b, h, first, L, D, query_b, query_h, query_l, BLOCK_M, D_FIRST, D_REST,
                DESCRIPTORS,
            )  # fmt: skip
        highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        out = tl.zeros([BLOCK_M, E_FIRST], tl.float32)
        if E_REST > 0:
            out_rest = tl.zeros([BLOCK_M, E_REST], tl.float32)
        start = tl.maximum(first - LEFT, 0) // BLOCK_N * BLOCK_N
        end = tl.minimum(keys, first + BLOCK_M + RIGHT)
        for n in tl.range(start, end, BLOCK_N):
            k = _read(keys_first, key_ptr, b, g, n, keys, D, key_b, key_h, key_l, BLOCK_N, 0, D_FIRST, DESCRIPTORS)
            scores = _dot(q, k.T)
            if D_REST > 0:
                k_rest = _read(
                    keys_rest, key_ptr, b, g, n, keys, D, key_b, key_h, key_l, BLOCK_N, D_FIRST, D_REST, DESCRIPTORS
                )
                scores += _dot(q_rest, k_rest.T)
            seen = _seen(i, n + tl.arange(0, BLOCK_N), keys, LEFT, RIGHT)
            scores = tl.where(seen, scores * scale, float("-inf"))
            higher = tl.maximum(highest, tl.max(scores, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp2(scores - base[:, None])
            shrink = tl.exp2(highest - base)
            total = total * shrink + tl.sum(weights, 1)
            highest = higher
            weights = weights.to(value_ptr.dtype.element_ty)
            v = _read(
                values_first, value_ptr, b, g, n, keys, E, value_b, value_h, value_l, BLOCK_N, 0, E_FIRST, DESCRIPTORS
            )
            out = out * shrink[:, None] + _dot(weights, v)
            if E_REST > 0:
                v_rest = _read(
                    values_rest, value_ptr, b, g, n, keys, E, value_b, value_h, value_l, BLOCK_N, E_FIRST, E_REST,
                    DESCRIPTORS,
                )  # fmt: skip
                out_rest = out_rest * shrink[:, None] + _dot(weights, v_rest)
        nothing = total == 0
        share = 1 / tl.where(nothing, 1.0, total)
        _write(output_ptr, out * share[:, None], b, h, first, L, E, output_b, output_h, output_l, BLOCK_M, 0, E_FIRST)
        if E_REST > 0:
            out_rest = out_rest * share[:, None]
            _write(output_ptr, out_rest, b, h, first, L, E, output_b, output_h, output_l, BLOCK_M, E_FIRST, E_REST)
        sums = tl.where(nothing, float("-inf"), (highest - tl.log2(share)) * LN_2)
        tl.store(lse_ptr + (b.to(tl.int64) * H + h) * L + i, sums, mask=i < L)


@triton.jit
def attention_delta_kernel(
    grad_ptr,
    output_ptr,
    grad_lse_ptr,
    delta_ptr,
    H,
    L,
    grad_b,
    grad_h,
    grad_l,
    output_b,
    output_h,
    output_l,
    E: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """A program takes BLOCK_M rows of a head: the sums of output * gradient, less the gradient of the sum."""
    of_head = tl.cdiv(L, BLOCK_M)
    first = tl.program_id(0) % of_head * BLOCK_M
    head = tl.program_id(0) // of_head
    b, h = head // H, head % H
    i = first + tl.arange(0, BLOCK_M)
    grad = _read(0, grad_ptr, b, h, first, L, E, grad_b, grad_h, grad_l, BLOCK_M, 0, WIDTH, False).to(tl.float32)
    out = _read(0, output_ptr, b, h, first, L, E, output_b, output_h, output_l, BLOCK_M, 0, WIDTH, False)
    delta = tl.sum(grad * out.to(tl.float32), 1)
    place = head.to(tl.int64) * L + i
    if grad_lse_ptr is not None:
        delta -= tl.load(grad_lse_ptr + place, mask=i < L, other=0.0)
    tl.store(delta_ptr + place, delta, mask=i < L)


@triton.jit
def _weights(q, q_rest, k, k_rest, sums, seen, scale, D_REST: tl.constexpr):
    """Weights [queries, keys] from the sums of the forward, in units of log2; 0 where a key is masked."""
    scores = _dot(q, k.T)
    if D_REST > 0:
        scores += _dot(q_rest, k_rest.T)
    base = tl.where(sums == float("-inf"), 0.0, sums)
    return tl.exp2(tl.where(seen, scores * scale - base[:, None], float("-inf")))


@triton.jit
def attention_backward_keys_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    lengths_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    grad_key_ptr,
    grad_value_ptr,
    scale,
    factor,
    B,
    H,
    G,
    L,
    S,
    LEFT,
    RIGHT,
    query_b,
    query_h,
    query_l,
    key_b,
    key_h,
    key_l,
    value_b,
    value_h,
    value_l,
    grad_b,
    grad_h,
    grad_l,
    grad_key_b,
    grad_key_h,
    grad_key_l,
    grad_value_b,
    grad_value_h,
    grad_value_l,
    D: tl.constexpr,
    E: tl.constexpr,
    D_FIRST: tl.constexpr,
    D_REST: tl.constexpr,
    E_FIRST: tl.constexpr,
    E_REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LENGTHS: tl.constexpr,
):
    """A program owns BLOCK_N keys of a head, and goes through the queries that look at them, head by head."""
    of_head = tl.cdiv(S, BLOCK_N)
    first = tl.program_id(0) % of_head * BLOCK_N
    b, g = tl.program_id(0) // of_head // G, tl.program_id(0) // of_head % G
    keys = _keys_of(lengths_ptr, b, S, LEFT, RIGHT, L, LENGTHS)
    j = first + tl.arange(0, BLOCK_N)
    k = _read(0, key_ptr, b, g, first, keys, D, key_b, key_h, key_l, BLOCK_N, 0, D_FIRST, False)
    v = _read(0, value_ptr, b, g, first, keys, E, value_b, value_h, value_l, BLOCK_N, 0, E_FIRST, False)
    by_key = tl.zeros([BLOCK_N, D_FIRST], tl.float32)
    by_value = tl.zeros([BLOCK_N, E_FIRST], tl.float32)
    if D_REST > 0:
        k_rest = _read(0, key_ptr, b, g, first, keys, D, key_b, key_h, key_l, BLOCK_N, D_FIRST, D_REST, False)
        by_key_rest = tl.zeros([BLOCK_N, D_REST], tl.float32)
    else:
        k_rest = k
    if E_REST > 0:
        v_rest = _read(0, value_ptr, b, g, first, keys, E, value_b, value_h, value_l, BLOCK_N, E_FIRST, E_REST, False)
        by_value_rest = tl.zeros([BLOCK_N, E_REST], tl.float32)
    start = tl.maximum(first - RIGHT, 0) // BLOCK_M * BLOCK_M
    end = tl.minimum(L, first + BLOCK_N + LEFT)
    end = tl.where(first < keys, end, start)
    for member in tl.range(0, H // G):
        h = g * (H // G) + member
        for m in tl.range(start, end, BLOCK_M):
            i = m + tl.arange(0, BLOCK_M)
            q = _read(0, query_ptr, b, h, m, L, D, query_b, query_h, query_l, BLOCK_M, 0, D_FIRST, False)
            if D_REST > 0:
                q_rest = _read(0, query_ptr, b, h, m, L, D, query_b, query_h, query_l, BLOCK_M, D_FIRST, D_REST, False)
            else:
                q_rest = q
            place = (b.to(tl.int64) * H + h) * L + i
            sums = tl.load(lse_ptr + place, mask=i < L, other=float("-inf")) * LOG2_E
            delta = tl.load(delta_ptr + place, mask=i < L, other=0.0)
            seen = _seen(i, j, keys, LEFT, RIGHT) & (i < L)[:, None]
            weights = _weights(q, q_rest, k, k_rest, sums, seen, scale, D_REST)
            narrow = weights.to(grad_ptr.dtype.element_ty)
            grad = _read(0, grad_ptr, b, h, m, L, E, grad_b, grad_h, grad_l, BLOCK_M, 0, E_FIRST, False)
            by_value += _dot(narrow.T, grad)
            by_weight = _dot(grad, v.T)
            if E_REST > 0:
                grad = _read(0, grad_ptr, b, h, m, L, E, grad_b, grad_h, grad_l, BLOCK_M, E_FIRST, E_REST, False)
                by_value_rest += _dot(narrow.T, grad)
                by_weight += _dot(grad, v_rest.T)
            by_score = tl.where(seen, weights * (by_weight - delta[:, None]), 0.0).to(q.dtype)
            by_key += _dot(by_score.T, q)
            if D_REST > 0:
                by_key_rest += _dot(by_score.T, q_rest)
    _write(grad_key_ptr, by_key * factor, b, g, first, S, D, grad_key_b, grad_key_h, grad_key_l, BLOCK_N, 0, D_FIRST)
    _write(grad_value_ptr, by_value, b, g, first, S, E, grad_value_b, grad_value_h, grad_value_l, BLOCK_N, 0, E_FIRST)
    if D_REST > 0:
        by_key_rest *= factor
        _write(
            grad_key_ptr, by_key_rest, b, g, first, S, D, grad_key_b, grad_key_h, grad_key_l, BLOCK_N, D_FIRST, D_REST
        )
    if E_REST > 0:
        _write(
            grad_value_ptr, by_value_rest, b, g, first, S, E, grad_value_b, grad_value_h, grad_value_l, BLOCK_N,
            E_FIRST, E_REST,
        )  # fmt: skip


@triton.jit
def attention_backward_queries_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    lengths_ptr,
    grad_ptr,
    lse_ptr,
    delta_ptr,
    grad_query_ptr,
    scale,
    factor,
    B,
    H,
    G,
    L,
    S,
    LEFT,
    RIGHT,
    query_b,
    query_h,
    query_l,
    key_b,
    key_h,
    key_l,
    value_b,
    value_h,
    value_l,
    grad_b,
    grad_h,
    grad_l,
    grad_query_b,
    grad_query_h,
    grad_query_l,
    D: tl.constexpr,
    E: tl.constexpr,
    D_FIRST: tl.constexpr,
    D_REST: tl.constexpr,
    E_FIRST: tl.constexpr,
    E_REST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LENGTHS: tl.constexpr,
):
    """A program owns BLOCK_M queries of a head, and goes through the keys that they look at."""
    of_head = tl.cdiv(L, BLOCK_M)
    first = (of_head - 1 - tl.program_id(0) % of_head) * BLOCK_M
    b, h = tl.program_id(0) // of_head // H, tl.program_id(0) // of_head % H
    g = h // (H // G)
    keys = _keys_of(lengths_ptr, b, S, LEFT, RIGHT, L, LENGTHS)
    i = first + tl.arange(0, BLOCK_M)
    q = _read(0, query_ptr, b, h, first, L, D, query_b, query_h, query_l, BLOCK_M, 0, D_FIRST, False)
    grad = _read(0, grad_ptr, b, h, first, L, E, grad_b, grad_h, grad_l, BLOCK_M, 0, E_FIRST, False)
    by_query = tl.zeros([BLOCK_M, D_FIRST], tl.float32)
    if D_REST > 0:
        q_rest = _read(0, query_ptr, b, h, first, L, D, query_b, query_h, query_l, BLOCK_M, D_FIRST, D_REST, False)
        by_query_rest = tl.zeros([BLOCK_M, D_REST], tl.float32)
    else:
        q_rest = q
    if E_REST > 0:
        grad_rest = _read(0, grad_ptr, b, h, first, L, E, grad_b, grad_h, grad_l, BLOCK_M, E_FIRST, E_REST, False)
    place = (b.to(tl.int64) * H + h) * L + i
    sums = tl.load(lse_ptr + place, mask=i < L, other=float("-inf")) * LOG2_E
    delta = tl.load(delta_ptr + place, mask=i < L, other=0.0)
    start = tl.maximum(first - LEFT, 0) // BLOCK_N * BLOCK_N
    for n in tl.range(start, tl.minimum(keys, first + BLOCK_M + RIGHT), BLOCK_N):
        k = _read(0, key_ptr, b, g, n, keys, D, key_b, key_h, key_l, BLOCK_N, 0, D_FIRST, False)
        v = _read(0, value_ptr, b, g, n, keys, E, value_b, value_h, value_l, BLOCK_N, 0, E_FIRST, False)
        if D_REST > 0:
            k_rest = _read(0, key_ptr, b, g, n, keys, D, key_b, key_h, key_l, BLOCK_N, D_FIRST, D_REST, False)
        else:
            k_rest = k
        seen = _seen(i, n + tl.arange(0, BLOCK_N), keys, LEFT, RIGHT) & (i < L)[:, None]
        weights = _weights(q, q_rest, k, k_rest, sums, seen, scale, D_REST)
        by_weight = _dot(grad, v.T)
        if E_REST > 0:
            v = _read(0, value_ptr, b, g, n, keys, E, value_b, value_h, value_l, BLOCK_N, E_FIRST, E_REST, False)
            by_weight += _dot(grad_rest, v.T)
        by_score = tl.where(seen, weights * (by_weight - delta[:, None]), 0.0).to(k.dtype)
        by_query += _dot(by_score, k)
        if D_REST > 0:
            by_query_rest += _dot(by_score, k_rest)
    _write(
        grad_query_ptr, by_query * factor, b, h, first, L, D, grad_query_b, grad_query_h, grad_query_l, BLOCK_M, 0,
        D_FIRST,
    )  # fmt: skip
    if D_REST > 0:
        _write(
            grad_query_ptr, by_query_rest * factor, b, h, first, L, D, grad_query_b, grad_query_h, grad_query_l,
            BLOCK_M, D_FIRST, D_REST,
        )  # fmt: skip
