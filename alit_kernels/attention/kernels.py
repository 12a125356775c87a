"""Triton kernels of attention: one family for dense batches and packed sequences, forward and backward.

Grid: axis 0 goes over tiles of sequences, axis 1 over heads, so neighboring programs share the keys of one head of one
sequence while they are in the cache. Packed sequences need no prefix sum of tile counts and no maximum length: with
tiles of M rows, sequence b owns the slots from ``offsets[b] // M + b`` on, which leaves room for each sequence's last,
partial tile; the rows beyond the last sequence are one more "sequence", of which the programs write zeros. That is
T / M + B programs, whatever the lengths. A dense batch is the same with offsets computed from the length.

Softmax: running maximum m of the raw scores and sum l of exp2(c s - c m), c = scale log2(e). The backward recomputes
P = exp(scale s - lse). A query without any key has log-sum-exp -inf; the backward takes that as +inf, which makes its P
zero. Queries beyond the end of a sequence are taken so too, so that no score needs a mask for them.

Rows are tuples of chunks of BLOCK_D channels: one, but for wide heads of split float32 (``CHUNK``). A score is the sum
over chunks; an accumulator has as many. Registers are short then: what a step loads is split where it is multiplied,
and addresses in shared memory are computed in each step (``disable_licm``), and not kept for all of them.

With stops, query i sees the keys before ``stop[i]``. A tile of queries goes as far as its largest stop, without masks
as far as its smallest; a tile of keys leaves out the queries that stop before it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .split import added, factor, factors, operands, scores

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
#: Offsets that one step of the search for a tile's sequence compares.
SEARCH = tl.constexpr(256)


@triton.jit
def _locate(p_offsets, sequences, length, TILE: tl.constexpr):
    """Sequence of this program, its first row in the packed rows (0 if dense), its length, and the tile within it.

    ``length`` is that of every dense sequence, or the number of packed rows, which no sequence exceeds. Sequence number
    ``sequences`` stands for the rows beyond the last one.
    """
    slot = tl.program_id(0)
    start = slot * 0
    if p_offsets is None:
        tiles = tl.cdiv(length, TILE)
        sequence = slot // tiles
        tile = slot % tiles
    else:
        below = slot * 0
        for first in range(0, sequences + 1, SEARCH):
            o_b = first + tl.arange(0, SEARCH)
            b_offset = tl.load(p_offsets + o_b, mask=o_b <= sequences, other=0)
            below += tl.sum(((o_b <= sequences) & (b_offset // TILE + o_b <= slot)).to(tl.int32), 0)
        # Offsets that do not begin with 0 are wrong; they read nothing outside all the same.
        sequence = tl.maximum(below - 1, 0)
        start = tl.load(p_offsets + sequence)
        stop = tl.load(p_offsets + sequence + 1, mask=sequence < sequences, other=length)
        length = tl.minimum(stop, length) - start
        tile = slot - start // TILE - sequence
    return sequence, start, length, tile


@triton.jit
def _other_length(p_offsets, sequence, length):
    """First row and length of a sequence on the other side (keys of queries, queries of keys)."""
    start = sequence * 0
    if p_offsets is not None:
        start = tl.load(p_offsets + sequence)
        length = tl.minimum(tl.load(p_offsets + sequence + 1), length) - start
    return start, length


@triton.jit
def _base(pointer, sequence, start, head, stride_b, stride_r, stride_h):
    """Pointer to row 0 of one head of one sequence; 64-bit arithmetic."""
    rows = sequence.to(tl.int64) * stride_b + start.to(tl.int64) * stride_r
    return pointer + rows + tl.cast(head, tl.int64) * stride_h


@triton.jit
def _pointers(rows, first, SIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers (SIZE, BLOCK_D) from row ``first`` on; 32 bits within the tile save registers: row pitch below 2^24."""
    base, pitch = rows
    o_r = tl.arange(0, SIZE)
    o_d = tl.arange(0, BLOCK_D)
    return (base + tl.cast(first, tl.int64) * pitch) + (o_r[:, None] * pitch + o_d[None, :])


@triton.jit
def _load(
    rows, first, m_r, SIZE: tl.constexpr, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Chunks (SIZE, BLOCK_D) from row ``first`` on; where MASKED, rows outside ``m_r`` are not read and are zero."""
    pointers = _pointers(rows, first, SIZE, BLOCK_D)
    chunks = ()
    for i in tl.static_range(0, HEAD_DIM, BLOCK_D):
        m_d = i + tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM
        if MASKED and i + BLOCK_D > HEAD_DIM:
            b_x = tl.load(pointers, mask=m_r[:, None] & m_d, other=0.0)
        elif MASKED:
            b_x = tl.load(pointers, mask=m_r[:, None], other=0.0)
        elif i + BLOCK_D > HEAD_DIM:
            b_x = tl.load(pointers, mask=m_d, other=0.0)
        else:
            b_x = tl.load(pointers)
        chunks += (b_x,)  # type: ignore[assignment]
        pointers += BLOCK_D
    return chunks


@triton.jit
def _store(
    rows, first, stop, chunks, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    pointers = _pointers(rows, first, SIZE, BLOCK_D)
    m_r = first + tl.arange(0, SIZE) < stop
    for i in tl.static_range(len(chunks)):
        m_d = i * BLOCK_D + tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM
        tl.store(pointers, chunks[i].to(rows[0].dtype.element_ty), mask=m_r[:, None] & m_d)
        pointers += BLOCK_D


@triton.jit
def _zeros(SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    chunks = ()
    for _ in tl.static_range(0, HEAD_DIM, BLOCK_D):
        chunks += (tl.zeros((SIZE, BLOCK_D), tl.float32),)  # type: ignore[assignment]
    return chunks


@triton.jit
def _taken(p_mask, first, stop, SIZE: tl.constexpr):
    """Mask (SIZE,) of the keys from ``first`` on that take part."""
    o_n = first + tl.arange(0, SIZE)
    taken = o_n < stop
    if p_mask is not None:
        taken = taken & (tl.load(p_mask + o_n, mask=taken, other=0) != 0)
    return taken


@triton.jit
def _stops(p_stop, o_m, m_m, stop):
    """Stops of a tile of queries within 0..stop, the smallest and the largest; ``stop`` three times without stops."""
    b_stop, least, last = stop, stop, stop
    if p_stop is not None:
        b_stop = tl.minimum(tl.maximum(tl.load(p_stop + o_m, mask=m_m, other=0), 0), stop)
        least, last = tl.min(tl.where(m_m, b_stop, stop), 0), tl.max(b_stop, 0)
    return b_stop, least, last


@triton.jit
def _seen(m_n, b_stop, first, p_stop, SIZE: tl.constexpr):
    """Mask of the SIZE keys from ``first`` on that each query sees, of those in ``m_n``; one row without stops."""
    m_s = m_n[None, :]
    if p_stop is not None:
        m_s = m_s & ((first + tl.arange(0, SIZE))[None, :] < b_stop[:, None])
    return m_s


@triton.jit
def _attend(state, q, k, v, m_s, scale, MASKED: tl.constexpr, PRECISE: tl.constexpr):
    """State (accumulator, maximum, sum) after one step of the online softmax."""
    acc, b_m, b_l = state
    b_s = scores(q, k)
    if MASKED:
        b_s = tl.where(m_s, b_s, float("-inf"))
    b_largest = tl.maximum(b_m, tl.max(b_s, 1))
    # A row without any key so far: any finite number will do as its maximum.
    b_finite = tl.where(b_largest == float("-inf"), 0.0, b_largest)
    if PRECISE:
        b_p = tl.exp2((b_s - b_finite[:, None]) * scale)
        b_decay = tl.exp2((b_m - b_finite) * scale)
    else:  # One multiply-add per score. The rounding of c m is the same in all of a row, so it cancels.
        b_p = tl.exp2(b_s * scale - (b_finite * scale)[:, None])
        b_decay = tl.exp2(b_m * scale - b_finite * scale)
    p = factor(b_p, q[0], True)
    acc = added([b_x * b_decay[:, None] for b_x in acc], p, v)
    return acc, b_largest, b_l * b_decay + tl.sum(b_p, 1)


@triton.jit
def _forward_step(
    state, q, keys, values, p_mask, p_stop, b_stop, first, stop, scale_log2,
    MASKED: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """State of the online softmax after the SIZE keys from ``first`` on."""
    TAKEN: tl.constexpr = MASKED or p_mask is not None
    m_n = _taken(p_mask, first, stop, SIZE)
    k = factors(_load(keys, first, m_n, SIZE, TAKEN, HEAD_DIM, BLOCK_D), len(q[0]) == 3)
    v = factors(_load(values, first, m_n, SIZE, TAKEN, HEAD_DIM, BLOCK_D), len(q[0]) == 3)
    m_s = _seen(m_n, b_stop, first, p_stop, SIZE) if MASKED else m_n[None, :]
    return _attend(state, q, k, v, m_s, scale_log2, TAKEN, keys[0].dtype.element_ty == tl.float32)


UNSPECIALIZED = ("sequences", "length", "key_length", "lse_b", "lse_h", "mask_b", "stop_b")


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward_kernel(
    p_q, p_k, p_v, p_mask, p_stop, p_out, p_lse, p_offsets, p_key_offsets,
    q_b, q_r, q_h, k_b, k_r, k_h, v_b, v_r, v_h, out_b, out_r, out_h, lse_b, lse_h, mask_b, stop_b,
    sequences, length, key_length, scale, scale_log2,
    TILE: tl.constexpr, STEP: tl.constexpr, MASK_ALL: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Write output and log-sum-exp of one tile of queries of one head."""
    sequence, start, stop, tile = _locate(p_offsets, sequences, length, TILE)
    first = tile * TILE
    if first >= stop:
        return
    head = tl.program_id(1)
    out = _base(p_out, sequence, start, head, out_b, out_r, out_h), out_r
    p_lse = _base(p_lse, sequence, start, head, lse_b, 1, lse_h)
    o_m = first + tl.arange(0, TILE)
    m_m = o_m < stop
    if sequence == sequences:
        zeros = _zeros(TILE, HEAD_DIM, BLOCK_D)
        _store(out, first, stop, zeros, TILE, HEAD_DIM, BLOCK_D)
        tl.store(p_lse + o_m, tl.zeros((TILE,), tl.float32), mask=m_m)
        return
    key_start, key_stop = _other_length(p_key_offsets, sequence, key_length)
    query = _base(p_q, sequence, start, head, q_b, q_r, q_h), q_r
    keys = _base(p_k, sequence, key_start, head, k_b, k_r, k_h), k_r
    values = _base(p_v, sequence, key_start, head, v_b, v_r, v_h), v_r
    if p_mask is not None:
        p_mask = _base(p_mask, sequence, key_start, head, mask_b, 1, 0)
    if p_stop is not None:
        p_stop = _base(p_stop, sequence, start, head, stop_b, 1, 0)

    q = operands(_load(query, first, m_m, TILE, True, HEAD_DIM, BLOCK_D), SPLIT)
    b_m = tl.full((TILE,), float("-inf"), tl.float32)
    state = _zeros(TILE, HEAD_DIM, BLOCK_D), b_m, tl.zeros((TILE,), tl.float32)
    b_stop, least, last = _stops(p_stop, o_m, m_m, key_stop)
    whole = 0 if MASK_ALL else least // STEP * STEP
    for o_n in tl.range(0, whole, STEP, disable_licm=HEAD_DIM > BLOCK_D):
        state = _forward_step(
            state, q, keys, values, p_mask, p_stop, b_stop, o_n, key_stop, scale_log2,
            False, STEP, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
    if MASK_ALL or p_stop is not None:
        for o_n in tl.range(whole, last, STEP, disable_licm=HEAD_DIM > BLOCK_D):
            state = _forward_step(
                state, q, keys, values, p_mask, p_stop, b_stop, o_n, key_stop, scale_log2,
                True, STEP, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
    elif whole < last:
        state = _forward_step(
            state, q, keys, values, p_mask, p_stop, b_stop, whole, key_stop, scale_log2,
            True, STEP, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
    acc, b_m, b_l = state
    b_none = b_l == 0.0
    b_l = tl.where(b_none, 1.0, b_l)
    scaled = [b_x / b_l[:, None] for b_x in acc]
    b_lse = tl.where(b_none, float("-inf"), b_m * scale + tl.log2(b_l) * LN2)
    _store(out, first, stop, scaled, TILE, HEAD_DIM, BLOCK_D)
    tl.store(p_lse + o_m, b_lse, mask=m_m)


@triton.jit
def _normalizer(b_lse, PRECISE: tl.constexpr):
    """Log-sum-exp as ``_recomputed`` subtracts it: +inf for a query without any key, whose P is then 0; for powers of
    two unless PRECISE.
    """
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)
    return b_lse if PRECISE else b_lse * LOG2E


@triton.jit
def _recomputed(b_s, b_normalizer, scale, scale_log2, PRECISE: tl.constexpr):
    """P = exp(scale s - lse). PRECISE subtracts in the units of the log-sum-exp, which then costs no accuracy where it
    is large; otherwise it is one multiply-add.
    """
    b_scaled = b_s * (scale if PRECISE else scale_log2)
    return tl.exp2((b_scaled - b_normalizer) * LOG2E if PRECISE else b_scaled - b_normalizer)


@triton.jit
def _query_gradient_step(
    state, q, do, b_normalizer, b_delta, keys, values, p_mask, p_stop, b_stop, first, stop, scale, scale_log2,
    MASKED: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """State (dQ, sum of P) with dS K added for SIZE keys from ``first`` on; the sum only where factors are split."""
    dq, b_total = state
    PRECISE: tl.constexpr = keys[0].dtype.element_ty == tl.float32
    TAKEN: tl.constexpr = MASKED or p_mask is not None
    m_n = _taken(p_mask, first, stop, SIZE)
    k = factors(_load(keys, first, m_n, SIZE, TAKEN, HEAD_DIM, BLOCK_D), len(q[0]) == 3)
    v = factors(_load(values, first, m_n, SIZE, TAKEN, HEAD_DIM, BLOCK_D), len(q[0]) == 3)
    b_s = scores(q, k)
    b_p = _recomputed(b_s, b_normalizer[:, None], scale, scale_log2, PRECISE)
    if TAKEN:
        m_s = _seen(m_n, b_stop, first, p_stop, SIZE) if MASKED else m_n[None, :]
        b_p = tl.where(m_s, b_p, 0.0)
    b_dp = scores(do, v)
    b_ds = b_p * (b_dp - b_delta[:, None])
    if len(q[0]) == 3:
        b_total += tl.sum(b_p, 1)
    return added(dq, factor(b_ds, q[0]), k), b_total


@triton.jit(do_not_specialize=UNSPECIALIZED)
def backward_queries_kernel(
    p_q, p_k, p_v, p_mask, p_stop, p_out, p_do, p_dlse, p_lse, p_delta, p_normalizer, p_share, p_dq,
    p_offsets, p_key_offsets,
    q_b, q_r, q_h, k_b, k_r, k_h, v_b, v_r, v_h, out_b, out_r, out_h, do_b, do_r, do_h,
    dq_b, dq_r, dq_h, lse_b, lse_h, mask_b, stop_b,
    sequences, length, key_length, scale, scale_log2,
    TILE: tl.constexpr, STEP: tl.constexpr, MASK_ALL: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Write dQ of one tile of queries of one head, and for the dK/dV kernel each query's delta = rowsum(dO O) - dlse,
    and its log-sum-exp as ``_recomputed`` takes it. Where SPLIT, probabilities are made to sum to 1:
    dK/dV multiplies dO by ``p_share``, and delta is multiplied already.
    """
    sequence, start, stop, tile = _locate(p_offsets, sequences, length, TILE)
    first = tile * TILE
    if first >= stop:
        return
    head = tl.program_id(1)
    query_gradient = _base(p_dq, sequence, start, head, dq_b, dq_r, dq_h), dq_r
    dq = _zeros(TILE, HEAD_DIM, BLOCK_D)
    if sequence == sequences:
        _store(query_gradient, first, stop, dq, TILE, HEAD_DIM, BLOCK_D)
        return
    key_start, key_stop = _other_length(p_key_offsets, sequence, key_length)
    query = _base(p_q, sequence, start, head, q_b, q_r, q_h), q_r
    keys = _base(p_k, sequence, key_start, head, k_b, k_r, k_h), k_r
    values = _base(p_v, sequence, key_start, head, v_b, v_r, v_h), v_r
    out = _base(p_out, sequence, start, head, out_b, out_r, out_h), out_r
    gradient = _base(p_do, sequence, start, head, do_b, do_r, do_h), do_r
    if p_mask is not None:
        p_mask = _base(p_mask, sequence, key_start, head, mask_b, 1, 0)
    if p_stop is not None:
        p_stop = _base(p_stop, sequence, start, head, stop_b, 1, 0)

    o_m = first + tl.arange(0, TILE)
    m_m = o_m < stop
    o_lse = sequence.to(tl.int64) * lse_b + tl.cast(head, tl.int64) * lse_h + start + o_m
    do = _load(gradient, first, m_m, TILE, True, HEAD_DIM, BLOCK_D)
    outs = _load(out, first, m_m, TILE, True, HEAD_DIM, BLOCK_D)
    b_lse = tl.load(p_lse + o_lse, mask=m_m, other=float("-inf"))
    PRECISE: tl.constexpr = p_q.dtype.element_ty == tl.float32
    b_delta = tl.sum(do[0].to(tl.float32) * outs[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(do)):
        b_delta += tl.sum(do[i].to(tl.float32) * outs[i].to(tl.float32), 1)
    if p_dlse is not None:  # no key, no gradient, whatever comes in
        b_dlse = tl.load(p_dlse + o_lse, mask=m_m, other=0.0)
        b_delta -= tl.where(b_lse == float("-inf"), 0.0, b_dlse)
    if not SPLIT:
        tl.store(p_delta + o_lse, b_delta, mask=m_m)
    q = operands(_load(query, first, m_m, TILE, True, HEAD_DIM, BLOCK_D), SPLIT)
    do = operands(do, SPLIT)
    b_normalizer = _normalizer(b_lse, PRECISE)
    tl.store(p_normalizer + o_lse, b_normalizer, mask=m_m)

    b_stop, least, last = _stops(p_stop, o_m, m_m, key_stop)
    state = dq, tl.zeros((TILE,), tl.float32) if SPLIT else 0.0
    whole = 0 if MASK_ALL else least // STEP * STEP
    for o_n in tl.range(0, whole, STEP, disable_licm=HEAD_DIM > BLOCK_D):
        state = _query_gradient_step(
            state, q, do, b_normalizer, b_delta, keys, values, p_mask, p_stop, b_stop, o_n, key_stop,
            scale, scale_log2, False, STEP, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
    if MASK_ALL or p_stop is not None:
        for o_n in tl.range(whole, last, STEP, disable_licm=HEAD_DIM > BLOCK_D):
            state = _query_gradient_step(
                state, q, do, b_normalizer, b_delta, keys, values, p_mask, p_stop, b_stop, o_n, key_stop,
                scale, scale_log2, True, STEP, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
    elif whole < last:
        state = _query_gradient_step(
            state, q, do, b_normalizer, b_delta, keys, values, p_mask, p_stop, b_stop, whole, key_stop,
            scale, scale_log2, True, STEP, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
    dq, b_total = state
    dq = [b_x * scale for b_x in dq]
    if SPLIT:
        # P sums to 1 but for what the log-sum-exp lost in float32: 6e-5 where it is 1000.
        b_share = 1.0 / tl.where(b_total == 0.0, 1.0, b_total)
        dq = [b_x * b_share[:, None] for b_x in dq]
        tl.store(p_share + o_lse, b_share, mask=m_m)
        tl.store(p_delta + o_lse, b_delta * b_share, mask=m_m)
    _store(query_gradient, first, stop, dq, TILE, HEAD_DIM, BLOCK_D)


@triton.jit
def _load_sums(pointers, m_r, other, MASKED: tl.constexpr):
    return tl.load(pointers, mask=m_r, other=other) if MASKED else tl.load(pointers)


@triton.jit
def _key_gradient_step(
    dk, dv, k, v, query, gradient, p_normalizer, p_delta, p_share, p_stop, o_n, first, stop, scale, scale_log2,
    MASKED: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dK and dV with dS^T Q and P^T dO added for SIZE queries from ``first`` on; rows of scores are keys ``o_n``."""
    o_m = first + tl.arange(0, SIZE)
    m_m = o_m < stop
    q = factors(_load(query, first, m_m, SIZE, MASKED, HEAD_DIM, BLOCK_D), len(k[0]) == 3)
    do = _load(gradient, first, m_m, SIZE, MASKED, HEAD_DIM, BLOCK_D)
    PRECISE: tl.constexpr = query[0].dtype.element_ty == tl.float32
    if len(k[0]) == 3:
        b_share = _load_sums(p_share + o_m, m_m, 0.0, MASKED)
        do = [b_x * b_share[:, None] for b_x in do]
    do = factors(do, len(k[0]) == 3)
    b_normalizer = _load_sums(p_normalizer + o_m, m_m, float("inf"), MASKED)
    b_s = scores(k, q, True)
    b_p = _recomputed(b_s, b_normalizer[None, :], scale, scale_log2, PRECISE)
    if p_stop is not None:
        b_stop = _load_sums(p_stop + o_m, m_m, 0, MASKED)
        b_p = tl.where(o_n[:, None] < b_stop[None, :], b_p, 0.0)
    if len(do) == 1:
        dv = added(dv, factor(b_p, k[0], True), do)
    b_dp = scores(v, do)
    # Loaded here, where it is needed: registers are short.
    b_delta = _load_sums(p_delta + o_m, m_m, 0.0, MASKED)
    b_ds = b_p * (b_dp - b_delta[None, :])
    dk = added(dk, factor(b_ds, k[0]), q)
    if len(do) > 1:  # noqa: SIM102
        # Always true, which the compiler does not know: so it makes the sums of dK before these products, and not when
        # all products are there, for which there are no registers.
        if scale >= 0.0:
            dv = added(dv, factor(b_p, k[0], True), do)
    return dk, dv


@triton.jit
def _reach(p_stop, first, stop, SIZE: tl.constexpr):
    """Largest stop of SIZE queries from ``first`` on."""
    o_m = first + tl.arange(0, SIZE)
    return tl.max(tl.load(p_stop + o_m, mask=o_m < stop, other=0), 0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def backward_keys_kernel(
    p_q, p_k, p_v, p_mask, p_stop, p_do, p_delta, p_normalizer, p_share, p_dk, p_dv, p_offsets, p_key_offsets,
    q_b, q_r, q_h, k_b, k_r, k_h, v_b, v_r, v_h, do_b, do_r, do_h, dk_b, dk_r, dk_h,
    lse_b, lse_h, mask_b, stop_b,
    sequences, length, key_length, scale, scale_log2,
    TILE: tl.constexpr, STEP: tl.constexpr, MASK_ALL: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Write dK and dV of one tile of keys of one head."""
    sequence, key_start, key_stop, tile = _locate(p_key_offsets, sequences, key_length, TILE)
    first = tile * TILE
    if first >= key_stop:
        return
    head = tl.program_id(1)
    key_gradient = _base(p_dk, sequence, key_start, head, dk_b, dk_r, dk_h), dk_r
    value_gradient = _base(p_dv, sequence, key_start, head, dk_b, dk_r, dk_h), dk_r
    dk = _zeros(TILE, HEAD_DIM, BLOCK_D)
    dv = _zeros(TILE, HEAD_DIM, BLOCK_D)
    if sequence == sequences:
        _store(key_gradient, first, key_stop, dk, TILE, HEAD_DIM, BLOCK_D)
        _store(value_gradient, first, key_stop, dv, TILE, HEAD_DIM, BLOCK_D)
        return
    start, stop = _other_length(p_offsets, sequence, length)
    query = _base(p_q, sequence, start, head, q_b, q_r, q_h), q_r
    gradient = _base(p_do, sequence, start, head, do_b, do_r, do_h), do_r
    keys = _base(p_k, sequence, key_start, head, k_b, k_r, k_h), k_r
    values = _base(p_v, sequence, key_start, head, v_b, v_r, v_h), v_r
    p_normalizer = _base(p_normalizer, sequence, start, head, lse_b, 1, lse_h)
    p_delta = _base(p_delta, sequence, start, head, lse_b, 1, lse_h)
    if SPLIT:
        p_share = _base(p_share, sequence, start, head, lse_b, 1, lse_h)
    if p_mask is not None:
        p_mask = _base(p_mask, sequence, key_start, head, mask_b, 1, 0)
    if p_stop is not None:
        p_stop = _base(p_stop, sequence, start, head, stop_b, 1, 0)
    m_n = _taken(p_mask, first, key_stop, TILE)
    k = operands(_load(keys, first, m_n, TILE, True, HEAD_DIM, BLOCK_D), SPLIT)
    v = operands(_load(values, first, m_n, TILE, True, HEAD_DIM, BLOCK_D), SPLIT)

    o_n = first + tl.arange(0, TILE)
    whole = stop if MASK_ALL else stop // STEP * STEP
    for o_m in tl.range(0, whole, STEP, disable_licm=HEAD_DIM > BLOCK_D):
        if p_stop is None or _reach(p_stop, o_m, stop, STEP) > first:
            dk, dv = _key_gradient_step(
                dk, dv, k, v, query, gradient, p_normalizer, p_delta, p_share, p_stop, o_n, o_m, stop,
                scale, scale_log2, MASK_ALL, STEP, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
    if not MASK_ALL and whole < stop:
        dk, dv = _key_gradient_step(
            dk, dv, k, v, query, gradient, p_normalizer, p_delta, p_share, p_stop, o_n, whole, stop,
            scale, scale_log2, True, STEP, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
    # Rows are independent: a masked key's own row is all that has to be cleared.
    dk = [tl.where(m_n[:, None], b_x * scale, 0.0) for b_x in dk]
    dv = [tl.where(m_n[:, None], b_x, 0.0) for b_x in dv]
    _store(key_gradient, first, key_stop, dk, TILE, HEAD_DIM, BLOCK_D)
    _store(value_gradient, first, key_stop, dv, TILE, HEAD_DIM, BLOCK_D)


@triton.jit(
    do_not_specialize=("length", "query_start", "query_stop", "key_start", "key_stop", "lse_h")
)
def map_kernel(
    p_q, p_k, p_lse, p_map, p_offsets, q_r, q_h, k_r, k_h, lse_h,
    length, query_start, query_stop, key_start, key_stop, heads, scale, scale_log2,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write one tile of one sequence's attention map, the mean over heads, which are summed in turn."""
    sequence = tl.program_id(0)
    start, stop = _other_length(p_offsets, sequence, length)
    first_query = query_start + tl.program_id(1) * ROWS
    first_key = key_start + tl.program_id(2) * COLUMNS
    o_m = first_query + tl.arange(0, ROWS)
    o_n = first_key + tl.arange(0, COLUMNS)
    m_m = o_m < tl.minimum(stop, query_stop)
    m_n = o_n < tl.minimum(stop, key_stop)
    b_map = tl.zeros((ROWS, COLUMNS), tl.float32)
    for head in range(0, heads):
        query = _base(p_q, sequence, start, head, 0, q_r, q_h), q_r
        keys = _base(p_k, sequence, start, head, 0, k_r, k_h), k_r
        (b_q,) = _load(query, first_query, m_m, ROWS, True, HEAD_DIM, BLOCK_D)
        (b_k,) = _load(keys, first_key, m_n, COLUMNS, True, HEAD_DIM, BLOCK_D)
        o_lse = tl.cast(head, tl.int64) * lse_h + start + o_m
        b_lse = tl.load(p_lse + o_lse, mask=m_m, other=float("-inf"))
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        b_normalizer = _normalizer(b_lse, b_q.dtype == tl.float32)
        b_map += _recomputed(b_s, b_normalizer[:, None], scale, scale_log2, b_q.dtype == tl.float32)
    b_map = tl.where(m_m[:, None] & m_n[None, :], b_map / heads, 0.0)
    width = key_stop - key_start
    o_r = sequence.to(tl.int64) * (query_stop - query_start) + (o_m - query_start)
    pointers = p_map + o_r[:, None] * width + (o_n - key_start)[None, :]
    tl.store(pointers, b_map, mask=(o_m < query_stop)[:, None] & (o_n < key_stop)[None, :])
