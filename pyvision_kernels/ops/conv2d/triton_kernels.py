"""The Triton kernels of conv2d: a convolution or its transpose, the gradient of the weight, and the sum of its parts.

All are matrix products with float32 sums. Reductions run over (r, s, c), with c innermost, in one loop, so that the
pipeline never drains between taps. Maps are read through 4-D tensor descriptors over [N, H, W, C], one box of pixels a
tap, where reading out of bounds gives the zeros of the padding; or by pointers and masks, with any strides.
"""

import triton
import triton.language as tl

# The interpreter has no bfloat16: it would multiply the bits.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """Numbers are those of _activation.py; comparisons are such that NaN stays NaN."""
    if ACTIVATION == 1:
        x = tl.where(x < 0, 0.0, x)
    elif ACTIVATION == 2:
        x = tl.where(x < 0, 0.0, tl.where(x > 6, 6.0, x))
    elif ACTIVATION == 3:
        x = x * tl.where(x < -3, 0.0, tl.where(x > 3, 6.0, x + 3)) / 6
    elif ACTIVATION == 4:
        x = x / (1 + tl.exp(-x))
    elif ACTIVATION == 5:
        x = 0.5 * x * (1 + tl.erf(x * 0.70710678118654752440))
    elif ACTIVATION == 6:
        x = 1 / (1 + tl.exp(-x))
    return x


@triton.jit
def _origin(tile, PH, PW, BOX_N: tl.constexpr, BOX_H: tl.constexpr, BOX_W: tl.constexpr):
    """The first image, row and column of a box of pixels."""
    across, down = (PW + BOX_W - 1) // BOX_W, (PH + BOX_H - 1) // BOX_H
    return tile // across // down * BOX_N, tile // across % down * BOX_H, tile % across * BOX_W


@triton.jit
def _pixels(
    tile,
    PH,
    PW,
    DESCRIPTORS: tl.constexpr,
    BLOCK: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    POOL: tl.constexpr,
):
    """Image, row and column of each pixel of a tile, of maps of PH x PW: a box, or consecutive ones.

    POOL: consecutive are the windows of 2 x 2; the four pixels of each follow each other.
    """
    i = tl.arange(0, BLOCK)
    if DESCRIPTORS:
        n, p, q = _origin(tile, PH, PW, BOX_N, BOX_H, BOX_W)
        n, p, q = n + i // (BOX_H * BOX_W), p + i // BOX_W % BOX_H, q + i % BOX_W
    else:
        i += tile * BLOCK
        if POOL:
            window = i // 4
            q = window % (PW // 2) * 2 + i % 2
            p = window // (PW // 2) % (PH // 2) * 2 + i // 2 % 2
            n = window // (PW // 2) // (PH // 2)
        else:
            n, p, q = i // PW // PH, i // PW % PH, i % PW
    return n, p, q


@triton.jit
def _taps(phase, BEFORE: tl.constexpr, TAPS: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr):
    """The first tap that reaches the rows `phase` of a transposed convolution, and the row of the map that it reads."""
    first = phase * 0 + TAPS
    source = phase * 0
    for back in tl.static_range(TAPS):
        distance = phase + BEFORE - (TAPS - 1 - back) * DILATION
        first = tl.where(distance % STRIDE == 0, TAPS - 1 - back, first)
        source = tl.where(distance % STRIDE == 0, distance // STRIDE, source)
    return first, source


@triton.jit
def _largest_of_four(
    x,
    DESCRIPTORS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
):
    """[BLOCK_N, BLOCK_M] -> [BLOCK_N, BLOCK_M / 4]: over windows of pixels in the order of _pixels; NaN wins."""
    if DESCRIPTORS:
        x = x.reshape(BLOCK_N, BOX_N, BOX_H // 2, 2, BOX_W // 2, 2).permute(0, 1, 2, 4, 3, 5)
    left, right = tl.split(x.reshape(BLOCK_N, BLOCK_M // 4, 2, 2))
    top, bottom = tl.split(tl.maximum(left, right, propagate_nan=tl.PropagateNan.ALL))
    return tl.maximum(top, bottom, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _described(
    ptr,
    N,
    C,
    H,
    W,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    BY_PIXELS: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_C: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
):
    """The descriptor of a map: of [N, H, W, C], or of [N, H, C, W] where pixels follow each other in memory."""
    if BY_PIXELS:
        return tl.make_tensor_descriptor(ptr, [N, H, C, W], [stride_n, stride_h, stride_c, 1], [1, 1, BOX_C, BOX_W])
    else:
        return tl.make_tensor_descriptor(
            ptr, [N, H, W, C], [stride_n, stride_h, stride_w, 1], [BOX_N, BOX_H, BOX_W, BOX_C]
        )


@triton.jit
def _box(descriptor, n, c, h, w, BY_PIXELS: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr):
    """[CHANNELS, PIXELS] of a map; zeros outside."""
    if BY_PIXELS:
        return descriptor.load([n, h, c, w]).reshape(CHANNELS, PIXELS)
    else:
        return descriptor.load([n, h, w, c]).reshape(PIXELS, CHANNELS).T


@triton.jit
def _gathered(row_ptrs, offsets, rows, columns):
    """[rows, columns] by pointers; zeros where a mask says so. Triton finds along which of the two memory runs."""
    return tl.load(row_ptrs[:, None] + offsets[None, :], mask=rows[:, None] & columns[None, :], other=0.0)


@triton.jit
def _offsets(n, p, q, stride_n, stride_h, stride_w, WIDE: tl.constexpr):
    if WIDE:
        n, p, q = n.to(tl.int64), p.to(tl.int64), q.to(tl.int64)
    return n * stride_n + p * stride_h + q * stride_w


@triton.jit
def conv2d_kernel(
    input_ptr,
    weight_ptr,
    bias_ptr,
    scale_ptr,
    shift_ptr,
    residual_ptr,
    output_ptr,
    N,
    H,
    W,
    OH,
    OW,
    channels,
    outputs,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_wo,
    stride_wc,
    stride_wr,
    stride_ws,
    stride_rn,
    stride_rk,
    stride_rh,
    stride_rw,
    stride_on,
    stride_ok,
    stride_oh,
    stride_ow,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    PERIOD_H: tl.constexpr,
    PERIOD_W: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    POOL: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    INPUT_BY_PIXELS: tl.constexpr,
    WEIGHT_BY_OUTPUTS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # A program owns tiles of BLOCK_N output channels of group program_id(1) x BLOCK_M pixels, one after another.
    # Any layout; INPUT_BY_PIXELS, WEIGHT_BY_OUTPUTS: along what memory runs, of what a descriptor is made.
    # Float32 sums and epilogue, one rounding. Pixels are the second factor: wgmma has it in shared memory.
    # TRANSPOSED: pixels that the stride leaves the same rest form a phase, a convolution of stride 1 with each
    # PERIOD-th tap: no zeros are inserted. The tap t of it reads row p + source - t * STEP of the map.
    group = tl.program_id(1)
    STEP_H: tl.constexpr = -(DILATION_H * PERIOD_H // STRIDE_H) if TRANSPOSED else DILATION_H
    STEP_W: tl.constexpr = -(DILATION_W * PERIOD_W // STRIDE_W) if TRANSPOSED else DILATION_W
    PHASES: tl.constexpr = STRIDE_H * STRIDE_W if TRANSPOSED else 1
    if TRANSPOSED:
        PH, PW = (OH + STRIDE_H - 1) // STRIDE_H, (OW + STRIDE_W - 1) // STRIDE_W
    elif POOL:
        PH, PW = OH // 2 * 2, OW // 2 * 2
    else:
        PH, PW = OH, OW
    if DESCRIPTORS:
        m_tiles = ((N + BOX_N - 1) // BOX_N) * ((PH + BOX_H - 1) // BOX_H) * ((PW + BOX_W - 1) // BOX_W)
        x_desc = _described(
            input_ptr,
            *(N, channels, H, W, stride_xn, stride_xc, stride_xh, stride_xw),
            *(INPUT_BY_PIXELS, BOX_N, BLOCK_K, BOX_H, BOX_W),
        )
        if WEIGHT_BY_OUTPUTS:
            w_desc = tl.make_tensor_descriptor(
                weight_ptr, [R * S, channels, outputs], [stride_ws, stride_wc, 1], [1, BLOCK_K, BLOCK_N]
            )
        else:
            w_desc = tl.make_tensor_descriptor(
                weight_ptr, [R * S, outputs, channels], [stride_ws, stride_wo, 1], [1, BLOCK_N, BLOCK_K]
            )
    else:
        m_tiles = (N * PH * PW + BLOCK_M - 1) // BLOCK_M
    n_tiles = (outputs + BLOCK_N - 1) // BLOCK_N
    c_blocks = (channels + BLOCK_K - 1) // BLOCK_K
    first_channel, first_output = group * channels, group * outputs
    if WIDE:
        first_channel, first_output = first_channel.to(tl.int64), first_output.to(tl.int64)

    for work in tl.range(tl.program_id(0), PHASES * m_tiles * n_tiles, tl.num_programs(0)):
        # Programs that run together take GROUP_M rows of tiles, which share weights and pixels in L2.
        phase = work // (m_tiles * n_tiles)
        place = work % (m_tiles * n_tiles)
        band = place // (GROUP_M * n_tiles) * GROUP_M
        rows_of_band = tl.minimum(m_tiles - band, GROUP_M)
        m_tile = band + place % (GROUP_M * n_tiles) % rows_of_band
        k0 = place % (GROUP_M * n_tiles) // rows_of_band * BLOCK_N

        if TRANSPOSED:
            i_phase, j_phase = phase // STRIDE_W, phase % STRIDE_W
            r0, h0 = _taps(i_phase, TOP, R, STRIDE_H, DILATION_H)
            s0, w0 = _taps(j_phase, LEFT, S, STRIDE_W, DILATION_W)
            taps_r, taps_s = (R - r0 + PERIOD_H - 1) // PERIOD_H, (S - s0 + PERIOD_W - 1) // PERIOD_W
            steps = taps_r * taps_s * c_blocks
        else:
            r0, s0, h0, w0 = 0, 0, -TOP, -LEFT
            taps_s = S
            steps = R * S * c_blocks
        n, p, q = _pixels(m_tile, PH, PW, DESCRIPTORS, BLOCK_M, BOX_N, BOX_H, BOX_W, POOL)
        if DESCRIPTORS:
            box_n, box_p, box_q = _origin(m_tile, PH, PW, BOX_N, BOX_H, BOX_W)
            h0 += box_p
            w0 += box_q
        elif TRANSPOSED:
            h, w = p + h0, q + w0
        else:
            h, w = p * STRIDE_H + h0, q * STRIDE_W + w0
        k = k0 + tl.arange(0, BLOCK_N)
        cs = tl.arange(0, BLOCK_K)
        if not DESCRIPTORS:
            pixels = _offsets(n, h, w, stride_xn, stride_xh, stride_xw, WIDE)
            kw = k.to(tl.int64) if WIDE else k
            if TRANSPOSED:  # a group of the weight is a part of what is summed over
                filter_ptrs = weight_ptr + first_channel * stride_wc + kw * stride_wo
            else:
                filter_ptrs = weight_ptr + (first_output + kw) * stride_wo

        acc = tl.full([BLOCK_N, BLOCK_M], 0.0, tl.float32)
        r, s, c = r0 * 0, r0 * 0, r0 * 0
        for _ in tl.range(0, steps):
            if DESCRIPTORS:
                tap = (r0 + r * PERIOD_H) * S + s0 + s * PERIOD_W
                if WEIGHT_BY_OUTPUTS:
                    a = w_desc.load([tap, c, k0]).reshape(BLOCK_K, BLOCK_N).T
                else:
                    a = w_desc.load([tap, k0, c]).reshape(BLOCK_N, BLOCK_K)
                b = _box(x_desc, box_n, c, h0 + r * STEP_H, w0 + s * STEP_W, INPUT_BY_PIXELS, BLOCK_K, BLOCK_M)
            else:
                i, j = h + r * STEP_H, w + s * STEP_W
                inside = (n < N) & (i >= 0) & (i < H) & (j >= 0) & (j < W)
                channel = c + cs
                there = channel < channels
                if WIDE:
                    channel = channel.to(tl.int64)
                ptrs = filter_ptrs + ((r0 + r * PERIOD_H) * stride_wr + (s0 + s * PERIOD_W) * stride_ws)
                a = _gathered(ptrs, channel * stride_wc, k < outputs, there)
                ptrs = input_ptr + (first_channel + channel) * stride_xc
                b = _gathered(ptrs, pixels + (r * STEP_H * stride_xh + s * STEP_W * stride_xw), there, inside)
            acc = _dot(a, b, acc, PRECISION)
            c += BLOCK_K
            if R * S > 1:
                s = tl.where(c >= channels, s + 1, s)
                c = tl.where(c >= channels, 0, c)
                r = tl.where(s >= taps_s, r + 1, r)
                s = tl.where(s >= taps_s, 0, s)

        known = k < outputs
        kw = first_output + k
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + kw, mask=known, other=0.0).to(tl.float32)[:, None]
        if scale_ptr is not None:
            acc *= tl.load(scale_ptr + kw, mask=known, other=0.0).to(tl.float32)[:, None]
        if shift_ptr is not None:
            acc += tl.load(shift_ptr + kw, mask=known, other=0.0).to(tl.float32)[:, None]
        if residual_ptr is not None:
            inside = (n < N) & (p < PH) & (q < PW)
            offsets = _offsets(n, p, q, stride_rn, stride_rh, stride_rw, WIDE)
            acc += _gathered(residual_ptr + kw * stride_rk, offsets, known, inside).to(tl.float32)
        acc = _activate(acc, ACTIVATION)

        if POOL:
            acc = _largest_of_four(acc, DESCRIPTORS, BLOCK_N, BLOCK_M, BOX_N, BOX_H, BOX_W)
            n, p, q = _pixels(m_tile, PH // 2, PW // 2, DESCRIPTORS, BLOCK_M // 4, BOX_N, BOX_H // 2, BOX_W // 2, False)
            inside = (n < N) & (p < PH // 2) & (q < PW // 2)
        elif TRANSPOSED:
            p, q = p * STRIDE_H + i_phase, q * STRIDE_W + j_phase
            inside = (n < N) & (p < OH) & (q < OW)
        else:
            inside = (n < N) & (p < PH) & (q < PW)
        ptrs = (output_ptr + kw * stride_ok)[:, None] + _offsets(n, p, q, stride_on, stride_oh, stride_ow, WIDE)[
            None, :
        ]
        tl.store(ptrs, acc.to(output_ptr.dtype.element_ty), mask=known[:, None] & inside[None, :])


@triton.jit
def conv2d_weight_kernel(
    grad_ptr,
    input_ptr,
    output_ptr,
    N,
    H,
    W,
    OH,
    OW,
    channels,
    outputs,
    steps,
    stride_gn,
    stride_gk,
    stride_gh,
    stride_gw,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_part,
    stride_ok,
    stride_oc,
    stride_or,
    stride_os,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    GRAD_BY_PIXELS: tl.constexpr,
    INPUT_BY_PIXELS: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # A program owns BLOCK_M output channels x BLOCK_N input channels of one tap, and sums over part program_id(1) of
    # the pixels: `steps` tiles of BLOCK_K. program_id(2) is the group.
    # Any layout; output is [parts, K, C, R, S] by its strides: float32 parts, or the gradient where there is one part.
    # The descriptor of the input ends where the tap's pixels do: a box over the edge of the map is zeros in both.
    k_tiles = (outputs + BLOCK_M - 1) // BLOCK_M
    c_tiles = (channels + BLOCK_N - 1) // BLOCK_N
    k0 = tl.program_id(0) % k_tiles * BLOCK_M
    c0 = tl.program_id(0) // k_tiles % c_tiles * BLOCK_N
    tap = tl.program_id(0) // k_tiles // c_tiles
    r, s = tap // S, tap % S
    part, group = tl.program_id(1), tl.program_id(2)
    first_channel, first_output = group * channels, group * outputs
    if WIDE:
        first_channel, first_output = first_channel.to(tl.int64), first_output.to(tl.int64)
    k = k0 + tl.arange(0, BLOCK_M)
    c = c0 + tl.arange(0, BLOCK_N)
    h0, w0 = r * DILATION_H - TOP, s * DILATION_W - LEFT
    if DESCRIPTORS:
        tiles = ((N + BOX_N - 1) // BOX_N) * ((OH + BOX_H - 1) // BOX_H) * ((OW + BOX_W - 1) // BOX_W)
        g_desc = _described(
            grad_ptr,
            *(N, outputs, OH, OW, stride_gn, stride_gk, stride_gh, stride_gw),
            *(GRAD_BY_PIXELS, BOX_N, BLOCK_M, BOX_H, BOX_W),
        )
        x_desc = _described(
            input_ptr,
            *(N, channels, tl.minimum(H, OH + h0), tl.minimum(W, OW + w0)),
            *(stride_xn, stride_xc, stride_xh, stride_xw),
            *(INPUT_BY_PIXELS, BOX_N, BLOCK_N, BOX_H, BOX_W),
        )
    else:
        tiles = (N * OH * OW + BLOCK_K - 1) // BLOCK_K
        grad_ptrs = grad_ptr + (first_output + k) * stride_gk
        channel_ptrs = input_ptr + (first_channel + c) * stride_xc

    acc = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
    for tile in tl.range(part * steps, tl.minimum(part * steps + steps, tiles)):
        if DESCRIPTORS:
            n, p, q = _origin(tile, OH, OW, BOX_N, BOX_H, BOX_W)
            a = _box(g_desc, n, k0, p, q, GRAD_BY_PIXELS, BLOCK_M, BLOCK_K)
            b = _box(x_desc, n, c0, p + h0, q + w0, INPUT_BY_PIXELS, BLOCK_N, BLOCK_K).T
        else:
            n, p, q = _pixels(tile, OH, OW, False, BLOCK_K, 1, 1, 1, False)
            h, w = p * STRIDE_H + h0, q * STRIDE_W + w0
            there = n < N
            inside = there & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            offsets = _offsets(n, p, q, stride_gn, stride_gh, stride_gw, WIDE)
            a = _gathered(grad_ptrs, offsets, k < outputs, there)
            offsets = _offsets(n, h, w, stride_xn, stride_xh, stride_xw, WIDE)
            b = _gathered(channel_ptrs, offsets, c < channels, inside).T
        acc = _dot(a, b, acc, PRECISION)

    ptrs = output_ptr + part.to(tl.int64) * stride_part + (r * stride_or + s * stride_os)
    ptrs = ptrs + ((first_output + k) * stride_ok)[:, None] + (c * stride_oc)[None, :]
    tl.store(ptrs, acc.to(output_ptr.dtype.element_ty), mask=(k < outputs)[:, None] & (c < channels)[None, :])


@triton.jit
def conv2d_weight_sum_kernel(
    partial_ptr,
    output_ptr,
    parts,
    size,
    channels,
    taps,
    stride_k,
    stride_c,
    stride_t,
    BLOCK: tl.constexpr,
):
    # A program owns BLOCK elements of a weight's gradient [K, R * S, C], and adds their parts in order.
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.full([BLOCK], 0.0, tl.float32)
    for part in tl.range(0, parts):
        total += tl.load(partial_ptr + tl.cast(part, tl.int64) * size + i, mask=i < size, other=0.0)
    offsets = i // channels // taps * stride_k + i // channels % taps * stride_t + i % channels * stride_c
    tl.store(output_ptr + offsets, total.to(output_ptr.dtype.element_ty), mask=i < size)
