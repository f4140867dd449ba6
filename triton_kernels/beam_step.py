"""One step of a beam search in Triton; contract in `prunelm/ops/beam_step.py`.

Two kernels, a program an utterance. `_pick` looks at [W, COLS] candidates at a time and finds the
best W by repeated selection: each round takes the best candidate that comes after the last winner,
so ties need no marks. `_write` turns winners into the outputs. Not tuned yet: every round reads all
of V again.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

Term = tuple[Tensor, Tensor, Tensor]
MAX_BEAM = 64  # [64, 64] candidates are held at a time, in registers


@triton.jit
def _scaled(
    p_logits,  # [B, W, V]
    o_h,  # utterance * W + hypothesis
    o_v,
    mask,
    V,
    BLANK: tl.constexpr,
    PENALTY: tl.constexpr,
    TEMPERATURE: tl.constexpr,
):
    """Logits with penalty and temperature; -inf outside the mask."""
    b_x = tl.load(p_logits + o_h * V + o_v, mask=mask, other=-float("inf"))
    return tl.where(o_v == BLANK, b_x - PENALTY, b_x) / TEMPERATURE


@triton.jit
def _is_silent(o_v, SILENT: tl.constexpr):
    m_silent = o_v == SILENT[0]
    for i in tl.static_range(1, len(SILENT)):
        m_silent = m_silent | (o_v == SILENT[i])
    return m_silent


@triton.jit
def _part(
    p_rows,  # [L, V]
    p_row,  # [B, W]
    p_weight,  # [B]
    L,
    V,
    i_b,
    o_h,
    o_v,
    m_used,  # where the hypothesis expands
    b_lp,  # log_prob of o_v
    b_blank,  # log_prob of the blank
    SILENT: tl.constexpr,
    WEIGH_BLANK: tl.constexpr,
):
    """What one term adds to token o_v of hypothesis o_h; NaN where row is out of range."""
    b_weight = tl.load(p_weight + i_b + 0 * o_h)  # a block: the interpreter stumbles over scalars
    m_used = m_used & (b_weight != 0) & (o_v < V)
    m_silent = _is_silent(o_v, SILENT)
    b_row = tl.load(p_row + o_h, mask=m_used, other=0)
    m_row = (b_row >= 0) & (b_row < L)
    b_value = tl.load(p_rows + b_row * V + o_v, mask=m_used & m_row & ~m_silent, other=0.0)
    b_part = b_value.to(b_weight.dtype) * b_weight
    if WEIGH_BLANK:
        # log P(not blank), from 0.01 up, shares the terms' weight among the tokens.
        b_part += b_weight * tl.log(tl.maximum(1 - tl.exp(b_blank), 0.01)).to(b_weight.dtype)
    b_part = tl.where(m_used & ~m_silent, tl.where(m_row, b_part, float("nan")), 0.0)
    if WEIGH_BLANK:
        b_own = b_weight * b_lp.to(b_weight.dtype)
        b_part = tl.where((o_v == SILENT[0]) & (b_weight != 0), b_own, b_part)
    return b_part


@triton.jit
def _with_terms(
    b_total,
    terms,  # (rows, row, weight, L), each a tuple over the terms
    p_reward,  # [B]
    V,
    i_b,
    o_h,
    o_v,
    m_used,
    b_lp,
    b_blank,
    TERMS: tl.constexpr,
    SILENT: tl.constexpr,
    WEIGH_BLANK: tl.constexpr,
    HAS_REWARD: tl.constexpr,
):
    rows, row, weight, L = terms
    for i in tl.static_range(TERMS):
        b_total += _part(
            rows[i], row[i], weight[i], L[i], V, i_b, o_h, o_v, m_used, b_lp, b_blank,
            SILENT, WEIGH_BLANK,
        )  # fmt: skip
    if HAS_REWARD:
        b_total += tl.where(_is_silent(o_v, SILENT), 0.0, tl.load(p_reward + i_b + 0 * o_h))
    return b_total


@triton.jit
def _statistics(
    p_logits, o_h, m_scored, V, BLANK: tl.constexpr, PENALTY: tl.constexpr,
    TEMPERATURE: tl.constexpr, BEAM: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """(high, log_sum, spoiled), each [BEAM, 1]: log_softmax(x) = (x - high) - log_sum."""
    b_high = tl.full([BEAM, 1], -float("inf"), dtype=p_logits.dtype.element_ty)
    b_nan = tl.zeros([BEAM, 1], dtype=tl.int32)
    for i_v in range(0, V, COLS):
        o_v = i_v + tl.arange(0, COLS)[None, :]  # [1, COLS]
        b_x = _scaled(p_logits, o_h, o_v, m_scored & (o_v < V), V, BLANK, PENALTY, TEMPERATURE)
        b_nan = tl.maximum(b_nan, tl.max((b_x != b_x).to(tl.int32), 1, keep_dims=True))
        b_x = tl.where(b_x != b_x, -float("inf"), b_x)
        b_high = tl.maximum(b_high, tl.max(b_x, 1, keep_dims=True))
    m_spoiled = m_scored & ((b_nan != 0) | (b_high == float("inf")))
    m_usable = m_scored & ~m_spoiled & (b_high != -float("inf"))
    b_base = tl.where(m_usable, b_high, 0.0)
    b_sum = tl.zeros([BEAM, 1], dtype=b_high.dtype)
    for i_v in range(0, V, COLS):
        o_v = i_v + tl.arange(0, COLS)[None, :]
        b_x = _scaled(p_logits, o_h, o_v, m_usable & (o_v < V), V, BLANK, PENALTY, TEMPERATURE)
        b_sum += tl.sum(tl.exp(b_x - b_base), 1, keep_dims=True)
    return b_high, tl.log(tl.where(m_usable, b_sum, 1.0)), m_spoiled


@triton.jit
def _shortlist(
    p_logits, o_h, m_expand, b_high, b_log_sum, own, V, BLANK: tl.constexpr,
    PENALTY: tl.constexpr, TEMPERATURE: tl.constexpr, BEAM: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The last (log_prob, token), each [BEAM, 1], of each hypothesis's best `own` tokens."""
    b_least = tl.full([BEAM, 1], float("inf"), dtype=b_high.dtype)
    b_last = tl.full([BEAM, 1], -1, dtype=tl.int64)
    for _ in range(own):
        b_next = tl.full([BEAM, 1], -float("inf"), dtype=b_high.dtype)
        b_at = tl.full([BEAM, 1], 1 << 62, dtype=tl.int64)
        for i_v in range(0, V, COLS):
            o_v = (i_v + tl.arange(0, COLS)[None, :]).to(tl.int64)
            m_v = m_expand & (o_v < V)
            b_lp = _scaled(p_logits, o_h, o_v, m_v, V, BLANK, PENALTY, TEMPERATURE)
            b_lp = (b_lp - b_high) - b_log_sum
            m_v = m_v & ((b_lp < b_least) | ((b_lp == b_least) & (o_v > b_last)))
            b_lp = tl.where(m_v, b_lp, -float("inf"))
            b_top = tl.max(b_lp, 1, keep_dims=True)
            b_first = tl.min(tl.where(m_v & (b_lp == b_top), o_v, 1 << 62), 1, keep_dims=True)
            b_at = tl.where(b_top > b_next, b_first, b_at)
            b_next = tl.maximum(b_next, b_top)
        b_least = b_next
        b_last = b_at
    return b_least, b_last


@triton.jit
def _pick(
    p_score,  # [B, W]
    p_logits,  # [B, W, V]
    p_slot,  # [B, W]
    p_reward,  # [B]
    terms,
    p_high,  # [B, W], out
    p_log_sum,  # [B, W], out
    p_total,  # [B, W], out: the winners, best first; -inf: none
    p_key,  # [B, W], out: parent * V + token
    p_spoiled,  # [B], out
    W,
    V,
    own,  # how many tokens a hypothesis keeps by itself when PRUNE is "early"
    TEMPERATURE: tl.constexpr,
    PENALTY: tl.constexpr,
    TERMS: tl.constexpr,
    SILENT: tl.constexpr,
    PRUNE: tl.constexpr,
    WEIGH_BLANK: tl.constexpr,
    HAS_SLOT: tl.constexpr,
    HAS_REWARD: tl.constexpr,
    BEAM: tl.constexpr,  # W rounded up
    COLS: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    kind = p_score.dtype.element_ty
    none = -float("inf")
    o_w = tl.arange(0, BEAM)[:, None].to(tl.int64)  # [BEAM, 1]
    o_h = i_b * W + o_w
    m_w = o_w < W
    b_score = tl.load(p_score + o_h, mask=m_w, other=none)  # [BEAM, 1]
    b_slot = tl.zeros([BEAM, 1], dtype=tl.int64)
    if HAS_SLOT:
        b_slot = tl.load(p_slot + o_h, mask=m_w, other=3)
    m_live = (b_slot != 3) & (b_score != none)
    m_spoiled = m_live & ((b_score != b_score) | (b_slot < 0) | (b_slot > 3))
    m_keep = m_live & (b_slot == 2) & ~m_spoiled
    m_scored = m_live & (b_slot < 2) & ~m_spoiled
    b_high, b_log_sum, m_bad = _statistics(
        p_logits, o_h, m_scored, V, SILENT[0], PENALTY, TEMPERATURE, BEAM, COLS
    )
    m_scored = m_scored & ~m_bad & (b_high != none)
    b_high = tl.where(m_scored, b_high, 0.0)
    m_expand = m_scored & (b_slot == 0)
    tl.store(p_high + o_h, b_high, mask=m_w)
    tl.store(p_log_sum + o_h, b_log_sum, mask=m_w)
    b_x = _scaled(p_logits, o_h, SILENT[0], m_scored, V, SILENT[0], PENALTY, TEMPERATURE)
    b_blank = (b_x - b_high) - b_log_sum
    b_spoiled = tl.max((m_spoiled | m_bad).to(tl.int32))
    if PRUNE == "early":
        b_least, b_last = _shortlist(
            p_logits, o_h, m_expand, b_high, b_log_sum, own, V,
            SILENT[0], PENALTY, TEMPERATURE, BEAM, COLS,
        )  # fmt: skip

    last_total = tl.full([], float("inf"), dtype=kind)
    last_key = tl.full([], -1, dtype=tl.int64)
    for i_round in range(W):
        next_total = tl.full([], none, dtype=kind)
        next_key = tl.full([], 1 << 62, dtype=tl.int64)
        for i_v in range(0, V, COLS):
            o_v = (i_v + tl.arange(0, COLS)[None, :]).to(tl.int64)  # [1, COLS]
            m_v = (m_expand & (o_v < V)) | (m_scored & (o_v == SILENT[0]))
            b_lp = _scaled(p_logits, o_h, o_v, m_v, V, SILENT[0], PENALTY, TEMPERATURE)
            b_lp = (b_lp - b_high) - b_log_sum  # [BEAM, COLS]
            m_v = m_v & (b_lp != none)
            if PRUNE == "early":
                m_own = (b_lp > b_least) | ((b_lp == b_least) & (o_v <= b_last))
                m_v = m_v & (m_own | ~m_expand)
            b_total = b_score + b_lp.to(kind)
            if PRUNE != "after":
                b_total = _with_terms(
                    b_total, terms, p_reward, V, i_b, o_h, o_v, m_expand, b_lp, b_blank,
                    TERMS, SILENT, WEIGH_BLANK, HAS_REWARD,
                )  # fmt: skip
            m_kept = m_keep & (o_v == SILENT[0])
            b_total = tl.where(m_kept, b_score, b_total)
            m_v = m_v | m_kept
            m_wrong = m_v & ((b_total != b_total) | (b_total == float("inf")))
            b_spoiled = tl.maximum(b_spoiled, tl.max(m_wrong.to(tl.int32)))
            b_key = o_w * V + o_v
            m_v = m_v & ~m_wrong & (b_total != none)
            m_v = m_v & ((b_total < last_total) | ((b_total == last_total) & (b_key > last_key)))
            b_total = tl.where(m_v, b_total, none)
            top = tl.max(b_total)
            first = tl.min(tl.where(m_v & (b_total == top), b_key, 1 << 62))
            m_new = (top > next_total) | ((top == next_total) & (first < next_key))
            next_key = tl.where(m_new, first, next_key)
            next_total = tl.where(m_new, top, next_total)
        last_total = next_total
        last_key = next_key
        tl.store(p_total + i_b * W + i_round, last_total)
        tl.store(p_key + i_b * W + i_round, last_key)
    tl.store(p_spoiled + i_b, b_spoiled)


@triton.jit
def _write(
    p_logits,
    p_slot,
    p_reward,
    terms,
    p_high,
    p_log_sum,
    p_total,
    p_key,
    p_spoiled,
    p_score,  # [B, W], out, as are all below
    p_parent,  # [B, W]
    p_token,  # [B, W]
    p_parts,  # [B, W, 1 + TERMS]
    p_bad,  # [B]
    W,
    V,
    TEMPERATURE: tl.constexpr,
    PENALTY: tl.constexpr,
    TERMS: tl.constexpr,
    SILENT: tl.constexpr,
    PRUNE: tl.constexpr,
    WEIGH_BLANK: tl.constexpr,
    HAS_SLOT: tl.constexpr,
    HAS_REWARD: tl.constexpr,
    BEAM: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    none = -float("inf")
    o_j = tl.arange(0, BEAM)[:, None].to(tl.int64)  # [BEAM, 1]
    m_j = o_j < W
    b_total = tl.load(p_total + i_b * W + o_j, mask=m_j, other=none)
    m_live = b_total != none
    b_key = tl.load(p_key + i_b * W + o_j, mask=m_live, other=0)
    o_h = i_b * W + b_key // V
    o_v = b_key % V
    m_scored = m_live
    m_expand = m_live
    if HAS_SLOT:
        b_slot = tl.load(p_slot + o_h, mask=m_live, other=3)
        m_scored = m_live & (b_slot != 2)
        m_expand = m_live & (b_slot == 0)
    b_high = tl.load(p_high + o_h, mask=m_scored, other=0.0)
    b_log_sum = tl.load(p_log_sum + o_h, mask=m_scored, other=0.0)
    b_x = _scaled(p_logits, o_h, o_v, m_scored, V, SILENT[0], PENALTY, TEMPERATURE)
    b_lp = (b_x - b_high) - b_log_sum
    b_x = _scaled(p_logits, o_h, SILENT[0], m_scored, V, SILENT[0], PENALTY, TEMPERATURE)
    b_blank = (b_x - b_high) - b_log_sum

    b_spoiled = tl.load(p_spoiled + i_b)
    if PRUNE == "after":
        b_sum = _with_terms(
            b_total, terms, p_reward, V, i_b, o_h, o_v, m_expand, b_lp, b_blank,
            TERMS, SILENT, WEIGH_BLANK, HAS_REWARD,
        )  # fmt: skip
        b_total = tl.where(m_scored, b_sum, b_total)
        m_wrong = (b_total != b_total) | (b_total == float("inf"))
        b_spoiled = tl.maximum(b_spoiled, tl.max(m_wrong.to(tl.int32)))
        m_live = m_live & ~m_wrong & (b_total != none)
        m_scored = m_scored & m_live

    # Live ones first, the others behind them, each kind in order.
    b_live = m_live.to(tl.int64)
    o_to = tl.where(m_live, tl.cumsum(b_live, 0), tl.sum(b_live) + tl.cumsum(1 - b_live, 0)) - 1
    tl.store(p_score + i_b * W + o_to, tl.where(m_live, b_total, none), mask=m_j)
    tl.store(p_parent + i_b * W + o_to, tl.where(m_live, b_key // V, o_to), mask=m_j)
    tl.store(p_token + i_b * W + o_to, tl.where(m_live, o_v, SILENT[0]), mask=m_j)
    p_out = p_parts + (i_b * W + o_to) * (1 + TERMS)
    tl.store(p_out, tl.where(m_scored, b_lp, 0.0).to(b_total.dtype), mask=m_j)
    rows, row, weight, L = terms
    for i in tl.static_range(TERMS):
        b_part = _part(
            rows[i], row[i], weight[i], L[i], V, i_b, o_h, o_v, m_expand, b_lp, b_blank,
            SILENT, WEIGH_BLANK,
        )  # fmt: skip
        tl.store(p_out + 1 + i, tl.where(m_scored, b_part, 0.0), mask=m_j)
    tl.store(p_bad + i_b, b_spoiled != 0)


def beam_step(
    score: Tensor,
    am_logits: Tensor,
    terms: Sequence[Term] = (),
    *,
    slot: Tensor | None = None,
    silent: Sequence[int] = (0,),
    token_reward: Tensor | None = None,
    temperature: float = 1.0,
    blank_penalty: float = 0.0,
    prune: str = "late",
    weigh_blank: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The best W extensions of W hypotheses of each utterance.

    Args:
        score: [B, W] float32 or float64; W at most 64.
        am_logits: [B, W, V] float32 or float64, contiguous like every tensor here.
        terms: (rows [L, V] floating, row [B, W] int64, weight [B] in score's dtype) each.
        slot: [B, W] int64 or None.
        silent: tokens, blank first.
        token_reward: [B] in score's dtype, or None.

    Returns:
        score, parent, token [B, W]; parts [B, W, 1 + len(terms)]; bad [B].
    """
    B, W, V = am_logits.shape
    if W > MAX_BEAM:
        raise ValueError(f"score: expected at most {MAX_BEAM} hypotheses for Triton, got {W}")
    parent = torch.empty_like(score, dtype=torch.int64)
    parts = score.new_empty(B, W, 1 + len(terms))
    bad = torch.empty(B, dtype=torch.bool, device=score.device)
    out = (torch.empty_like(score), parent, torch.empty_like(parent), parts, bad)
    if B == 0:
        return out
    each = [(*term, len(term[0])) for term in terms]
    packed = tuple(tuple(column) for column in zip(*each, strict=True)) or ((),) * 4
    slots = score if slot is None else slot
    reward = score if token_reward is None else token_reward
    high = torch.empty_like(score, dtype=am_logits.dtype)
    found = (high, torch.empty_like(high), torch.empty_like(score), torch.empty_like(parent))
    spoiled = torch.empty(B, dtype=torch.int32, device=score.device)
    options = {
        "TEMPERATURE": float(temperature),
        "PENALTY": float(blank_penalty),
        "TERMS": len(terms),
        "SILENT": tuple(silent),
        "PRUNE": prune,
        "WEIGH_BLANK": weigh_blank,
        "HAS_SLOT": slot is not None,
        "HAS_REWARD": token_reward is not None,
        "BEAM": triton.next_power_of_2(W),
    }
    inputs = (am_logits, slots, reward, packed)
    _pick[(B,)](score, *inputs, *found, spoiled, W, V, min(W, V), COLS=64, **options)
    _write[(B,)](*inputs, *found, spoiled, *out, W, V, **options)
    return out
