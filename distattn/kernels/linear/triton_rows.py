"""What the Triton kernels of linear attention share: tiles of rows, gates, and products under a vector of gates.

A chunk is CHUNK rows of one piece, fewer at its end; rows past the end read as zeros, so that they change nothing. Gates are
running sums inside the chunk, G, in powers of two, and only differences that are ≤ 0 are exponentiated, except where the whole
chunk decays by so little (``is_mild``) that a factor on either side of its middle stays far from fp32's limits. Mild chunks and
the others have kernels of their own (argument ``MILD``): the latter's code would cost the former registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

CHUNK = tl.constexpr(64)
SUB = tl.constexpr(16)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Forms of the gate (argument ``GATE`` of every kernel).
GATE_NONE = tl.constexpr(0)
GATE_CONSTANT = tl.constexpr(1)
GATE_SCALAR = tl.constexpr(2)
GATE_VECTOR = tl.constexpr(3)

MILD_POWERS = tl.constexpr(80.0)
"""Powers of two: how much a chunk may decay for its scores to be one product of scaled rows, 2^±40 at most."""


@triton.jit
def chunk_rows(cu_seqlens, i_piece, i_chunk):
    """(first row of a chunk of a piece, how many rows of it there are)."""
    row0 = tl.load(cu_seqlens + i_piece) + i_chunk * CHUNK
    return row0, tl.minimum(tl.load(cu_seqlens + i_piece + 1) - row0, CHUNK)


@triton.jit
def load_tile(p, m_row, o_row, o_col, stride, COLUMNS: tl.constexpr):
    """[rows, columns] from the address of row 0; zeros where ``m_row`` is false and past COLUMNS.

    Blocks of columns begin at multiples of their width.
    """
    m_tile = m_row[:, None]
    if ((o_col.shape[0] - 1) & COLUMNS) != 0:  # a multiple of the power of two needs no mask
        m_tile = m_tile & (o_col < COLUMNS)[None, :]
    return tl.load(p + o_row[:, None] * stride + o_col[None, :], mask=m_tile, other=0.0)


@triton.jit
def store_tile(p, b_tile, m_row, o_row, o_col, stride, COLUMNS: tl.constexpr):
    m_tile = m_row[:, None]
    if ((o_col.shape[0] - 1) & COLUMNS) != 0:  # a multiple of the power of two needs no mask
        m_tile = m_tile & (o_col < COLUMNS)[None, :]
    tl.store(p + o_row[:, None] * stride + o_col[None, :], b_tile.to(p.dtype.element_ty), mask=m_tile)


@triton.jit
def load_state(p, o_k, o_v, K: tl.constexpr, V: tl.constexpr):
    """[BLOCK_K, BLOCK_V] of a K × V state."""
    return tl.load(p + o_k[:, None] * V + o_v[None, :], mask=(o_k < K)[:, None] & (o_v < V)[None, :], other=0.0)


@triton.jit
def store_state(p, b_state, o_k, o_v, keep, K: tl.constexpr, V: tl.constexpr):
    m_state = (o_k < K)[:, None] & (o_v < V)[None, :] & keep
    tl.store(p + o_k[:, None] * V + o_v[None, :], b_state.to(p.dtype.element_ty), mask=m_state)


@triton.jit
def row_gate(g, i_b, i_h, row0, num_valid, num_rows, HV: tl.constexpr, GATE: tl.constexpr):
    """(G [CHUNK], G of the chunk's last row) of a gate a head. g: rates [HV], natural logs, or running sums [B, HV, T]."""
    o_r = tl.arange(0, CHUNK)
    if GATE == GATE_CONSTANT:
        rate = tl.load(g + i_h).to(tl.float32) * LOG2E
        b_G = rate * tl.minimum(o_r + 1, num_valid).to(tl.float32)
        last = rate * num_valid.to(tl.float32)
    else:
        p_G = g + (i_b * HV + i_h) * num_rows + row0
        b_G = tl.load(p_G + o_r, mask=o_r < num_valid, other=0.0)
        last = tl.load(p_G + num_valid - 1)
    return b_G, last


@triton.jit
def decay_matrix(b_G, num_valid, STRICT: tl.constexpr):
    """2^(G_i − G_j) for rows i ≥ j (i > j if strict) of the chunk, else 0: [CHUNK, CHUNK]."""
    o_r = tl.arange(0, CHUNK)
    if STRICT:
        m_seen = o_r[:, None] > o_r[None, :]
    else:
        m_seen = o_r[:, None] >= o_r[None, :]
    m_seen = m_seen & (o_r < num_valid)[:, None]
    return tl.where(m_seen, tl.exp2(tl.where(m_seen, b_G[:, None] - b_G[None, :], 0.0)), 0.0)


@triton.jit
def is_mild(b_last):
    """Whether no key dimension of the chunk decays by more than 2^MILD_POWERS. b_last [BLOCK_K]: G of the last row."""
    return tl.min(b_last, 0) > -MILD_POWERS


@triton.jit
def vector_scores(
    b_a, b_b, b_G, b_last, p_b, p_G, o_k, num_valid, stride_b,
    K: tl.constexpr, HV: tl.constexpr, MILD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ_d a_id b_jd 2^(G_id − G_jd) for i ≥ j, undefined above: [CHUNK, CHUNK].

    b_a, b_b, b_G [CHUNK, BLOCK_K] in fp32. p_b, p_G: addresses of row 0 of b and G, of which neighbouring rows are read.
    """
    o_r = tl.arange(0, CHUNK)
    if MILD:
        b_ref = 0.5 * b_last[None, :]
        b_left = b_a * tl.exp2(b_G - b_ref)
        b_scores = tl.dot(b_left, tl.trans(b_b * tl.exp2(b_ref - b_G)), input_precision=PRECISION)
    else:
        b_scores = tl.zeros([CHUNK, CHUNK], tl.float32)
        for i_sub in range(SUB, CHUNK, SUB):
            b_ref = tl.sum(tl.where((o_r == i_sub)[:, None], b_G, 0.0), 0)[None, :]
            m_in = (o_r // SUB == i_sub // SUB)[:, None]
            b_left = tl.where(m_in, b_a * tl.exp2(tl.minimum(b_G - b_ref, 0.0)), 0.0)
            b_right = tl.where((o_r < i_sub)[:, None], b_b * tl.exp2(tl.minimum(b_ref - b_G, 0.0)), 0.0)
            b_scores += tl.dot(b_left, tl.trans(b_right), input_precision=PRECISION)
        for i_back in range(SUB):
            m_row = (o_r % SUB >= i_back) & (o_r < num_valid)
            b_near = load_tile(p_b - i_back * stride_b, m_row, o_r, o_k, stride_b, K).to(tl.float32)
            b_near *= tl.exp2(tl.minimum(b_G - load_tile(p_G - i_back * HV * K, m_row, o_r, o_k, HV * K, K), 0.0))
            b_sum = tl.sum(tl.where(m_row[:, None], b_a * b_near, 0.0), 1)
            b_scores += tl.where(o_r[None, :] == (o_r - i_back)[:, None], b_sum[:, None], 0.0)
    return b_scores


@triton.jit
def vector_to_reader(
    b_w, b_b, b_G, b_last, p_b, p_G, o_k, num_valid, stride_b,
    K: tl.constexpr, HV: tl.constexpr, MILD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ_j w_ij 2^(G_i − G_j) ⊙ b_j: [CHUNK, BLOCK_K]. b_w [CHUNK, CHUNK]: 0 above the diagonal; the rest as vector_scores."""
    o_r = tl.arange(0, CHUNK)
    if MILD:
        b_ref = 0.5 * b_last[None, :]
        b_out = tl.exp2(b_G - b_ref) * tl.dot(b_w, b_b * tl.exp2(b_ref - b_G), input_precision=PRECISION)
    else:
        b_out = tl.zeros(b_b.shape, tl.float32)
        for i_sub in range(SUB, CHUNK, SUB):
            b_ref = tl.sum(tl.where((o_r == i_sub)[:, None], b_G, 0.0), 0)[None, :]
            m_in = (o_r // SUB == i_sub // SUB)[:, None]
            b_right = tl.where((o_r < i_sub)[:, None], b_b * tl.exp2(tl.minimum(b_ref - b_G, 0.0)), 0.0)
            b_part = tl.dot(tl.where(m_in, b_w, 0.0), b_right, input_precision=PRECISION)
            b_out += tl.where(m_in, tl.exp2(tl.minimum(b_G - b_ref, 0.0)) * b_part, 0.0)
        for i_back in range(SUB):
            m_row = (o_r % SUB >= i_back) & (o_r < num_valid)
            b_near = load_tile(p_b - i_back * stride_b, m_row, o_r, o_k, stride_b, K).to(tl.float32)
            b_near *= tl.exp2(tl.minimum(b_G - load_tile(p_G - i_back * HV * K, m_row, o_r, o_k, HV * K, K), 0.0))
            b_weight = tl.sum(tl.where(o_r[None, :] == (o_r - i_back)[:, None], b_w, 0.0), 1)
            b_out += tl.where(m_row[:, None], b_weight[:, None] * b_near, 0.0)
    return b_out


@triton.jit
def vector_to_writer(
    b_w, b_a, b_G, b_last, p_a, p_G, o_k, num_valid, stride_a,
    K: tl.constexpr, HV: tl.constexpr, MILD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ_i w_ij 2^(G_i − G_j) ⊙ a_i: [CHUNK, BLOCK_K]. p_a: address of row 0 of a; the rest as vector_to_reader."""
    o_r = tl.arange(0, CHUNK)
    if MILD:
        b_ref = 0.5 * b_last[None, :]
        b_out = tl.exp2(b_ref - b_G) * tl.dot(tl.trans(b_w), b_a * tl.exp2(b_G - b_ref), input_precision=PRECISION)
    else:
        b_out = tl.zeros(b_a.shape, tl.float32)
        for i_sub in range(SUB, CHUNK, SUB):
            b_ref = tl.sum(tl.where((o_r == i_sub)[:, None], b_G, 0.0), 0)[None, :]
            m_in = (o_r // SUB == i_sub // SUB)[:, None]
            b_left = tl.where(m_in, b_a * tl.exp2(tl.minimum(b_G - b_ref, 0.0)), 0.0)
            b_part = tl.dot(tl.trans(b_w), b_left, input_precision=PRECISION)
            b_out += tl.where((o_r < i_sub)[:, None], tl.exp2(tl.minimum(b_ref - b_G, 0.0)) * b_part, 0.0)
        for i_on in range(SUB):
            m_row = (o_r % SUB + i_on < SUB) & (o_r + i_on < num_valid)
            b_near = load_tile(p_a + i_on * stride_a, m_row, o_r, o_k, stride_a, K).to(tl.float32)
            b_near *= tl.exp2(tl.minimum(load_tile(p_G + i_on * HV * K, m_row, o_r, o_k, HV * K, K) - b_G, 0.0))
            b_weight = tl.sum(tl.where(o_r[:, None] == (o_r + i_on)[None, :], b_w, 0.0), 0)
            b_out += tl.where(m_row[:, None], b_weight[:, None] * b_near, 0.0)
    return b_out
