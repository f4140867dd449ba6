"""One step of a beam search in Triton; contract in `prunelm/ops/beam_step.py`.

Two kernels. `_row`, a program a hypothesis, reads its logits and the rows of its terms and keeps
its best W candidates, by repeated selection out of registers, a stretch of the vocabulary at a
time. `_merge`, a program an utterance, picks the best W of what its hypotheses kept and writes the
results.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

Term = tuple[Tensor, Tensor, Tensor]
MAX_BEAM = 64  # [64 * 64] candidates are merged at a time, in registers
MAX_COLS = 8192


@triton.jit
def _scaled(
    p_logits,  # [B, W, V]
    o_row,  # where the row begins
    o_v,
    mask,
    BLANK: tl.constexpr,
    PENALTY: tl.constexpr,
    TEMPERATURE: tl.constexpr,
):
    """Logits with penalty and temperature; -inf outside the mask."""
    b_x = tl.load(p_logits + o_row + o_v, mask=mask, other=-float("inf"))
    return tl.where(o_v == BLANK, b_x - PENALTY, b_x) / TEMPERATURE


@triton.jit
def _inside(o_v, V, ALIGNED: tl.constexpr):
    """o_v < V, seen to be the same for neighbours, so that loads are wide."""
    return o_v // ALIGNED < V // ALIGNED


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
    o_b,
    o_h,
    o_v,
    m_used,  # where the hypothesis expands
    b_lp,  # log_prob of o_v
    b_blank,  # log_prob of the blank
    SILENT: tl.constexpr,
    WEIGH_BLANK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """What one term adds to token o_v of hypothesis o_h; NaN where row is out of range."""
    b_weight = tl.load(p_weight + o_b)  # [1]
    m_used = m_used & (b_weight != 0)
    b_row = tl.load(p_row + o_h, mask=m_used, other=0)  # [1]
    m_row = (b_row >= 0) & (b_row < L)
    o_row = tl.multiple_of(b_row * V, [ALIGNED])
    m_silent = _is_silent(o_v, SILENT)
    m_read = m_used & m_row & _inside(o_v, V, ALIGNED)
    b_value = tl.load(p_rows + o_row + o_v, mask=m_read, other=0.0)
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
    o_b,
    o_h,
    o_v,
    m_used,
    b_lp,
    b_blank,
    TERMS: tl.constexpr,
    SILENT: tl.constexpr,
    WEIGH_BLANK: tl.constexpr,
    HAS_REWARD: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    rows, row, weight, L = terms
    for i in tl.static_range(TERMS):
        b_total += _part(
            rows[i], row[i], weight[i], L[i], V, o_b, o_h, o_v, m_used, b_lp, b_blank,
            SILENT, WEIGH_BLANK, ALIGNED,
        )  # fmt: skip
    if HAS_REWARD:
        b_total += tl.where(_is_silent(o_v, SILENT), 0.0, tl.load(p_reward + o_b))
    return b_total


@triton.jit
def _statistics(
    p_logits, o_row, m_scored, V, BLANK: tl.constexpr, PENALTY: tl.constexpr,
    TEMPERATURE: tl.constexpr, ALIGNED: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """(high, log_sum, spoiled), each [1]: log_softmax(x) = (x - high) - log_sum."""
    b_high = tl.full([1], -float("inf"), dtype=p_logits.dtype.element_ty)
    b_sum = tl.zeros([1], dtype=b_high.dtype)
    for i_v in range(0, V, COLS):
        o_v = i_v + tl.arange(0, COLS)  # [COLS]
        m_v = m_scored & _inside(o_v, V, ALIGNED)
        b_x = _scaled(p_logits, o_row, o_v, m_v, BLANK, PENALTY, TEMPERATURE)
        b_top = tl.max(tl.where(b_x != b_x, -float("inf"), b_x), 0, keep_dims=True)
        b_top = tl.maximum(b_high, b_top)
        b_base = tl.where(b_top == -float("inf"), 0.0, b_top)
        # NaN and +inf make the sum NaN.
        b_sum = b_sum * tl.exp(b_high - b_base) + tl.sum(tl.exp(b_x - b_base), 0, keep_dims=True)
        b_high = b_top
    m_spoiled = m_scored & (b_sum != b_sum)
    m_usable = m_scored & ~m_spoiled & (b_high != -float("inf"))
    return b_high, tl.log(tl.where(m_usable, b_sum, 1.0)), m_spoiled


@triton.jit
def _keep_best(
    b_top,  # [BEAM], the best values so far, sorted
    b_token,  # [BEAM]
    b_value,  # [COLS], of the tokens from i_v, which come after all of b_token
    i_v,
    own,
    BEAM: tl.constexpr,
    COLS: tl.constexpr,
):
    """The best `own` of both, sorted, the lower token first where values are equal."""
    none = -float("inf")
    o_j = tl.arange(0, BEAM)
    o_c = tl.arange(0, COLS)
    b_next = tl.full([BEAM], none, dtype=b_top.dtype)
    b_next_token = tl.zeros([BEAM], dtype=tl.int32)
    b_taken = tl.zeros([1], dtype=tl.int32)  # of b_top
    for j in range(own):
        top, at = tl.max(b_value, 0, return_indices=True, keep_dims=True)
        head = tl.max(tl.where(o_j == b_taken, b_top, none), 0, keep_dims=True)
        token = tl.max(tl.where(o_j == b_taken, b_token, 0), 0, keep_dims=True)
        m_old = head >= top
        b_next = tl.where(o_j == j, tl.where(m_old, head, top), b_next)
        b_next_token = tl.where(o_j == j, tl.where(m_old, token, i_v + at), b_next_token)
        b_value = tl.where((o_c == at) & ~m_old, none, b_value)
        b_taken += m_old.to(tl.int32)
    return b_next, b_next_token


@triton.jit(do_not_specialize=["W", "V", "own"])
def _row(
    p_score,  # [B, W]
    p_logits,  # [B, W, V]
    p_slot,  # [B, W]
    p_reward,  # [B]
    terms,
    p_total,  # [B, W, own], out, as are all below; -inf: none
    p_token,  # [B, W, own]
    p_parts,  # [B, W, own, 1 + TERMS]
    p_spoiled,  # [B, W]
    W,
    V,
    own,  # how many candidates a hypothesis keeps
    TEMPERATURE: tl.constexpr,
    PENALTY: tl.constexpr,
    TERMS: tl.constexpr,
    SILENT: tl.constexpr,
    PRUNE: tl.constexpr,
    WEIGH_BLANK: tl.constexpr,
    HAS_SLOT: tl.constexpr,
    HAS_REWARD: tl.constexpr,
    ALIGNED: tl.constexpr,  # what V is a multiple of
    BEAM: tl.constexpr,  # own rounded up
    COLS: tl.constexpr,
):
    kind = p_score.dtype.element_ty
    none = -float("inf")
    blank: tl.constexpr = SILENT[0]
    # Blocks of one: the interpreter stumbles over scalars.
    o_h = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    o_b = o_h // W
    o_row = tl.multiple_of(o_h * V, [ALIGNED])
    b_score = tl.load(p_score + o_h)
    b_slot = tl.zeros([1], dtype=tl.int64)
    if HAS_SLOT:
        b_slot = tl.load(p_slot + o_h)
    m_live = (b_slot != 3) & (b_score != none)
    m_amiss = (b_score != b_score) | (b_score == float("inf")) | (b_slot < 0) | (b_slot > 3)
    m_spoiled = m_live & m_amiss
    m_live = m_live & ~m_amiss
    m_keep = m_live & (b_slot == 2)
    m_scored = m_live & (b_slot < 2)
    b_high, b_log_sum, m_bad = _statistics(
        p_logits, o_row, m_scored, V, blank, PENALTY, TEMPERATURE, ALIGNED, COLS
    )
    m_spoiled = m_spoiled | m_bad
    m_scored = m_scored & ~m_bad & (b_high != none)
    b_high = tl.where(m_scored, b_high, 0.0)
    m_expand = m_scored & (b_slot == 0)
    b_x = _scaled(p_logits, o_row, blank, m_scored, blank, PENALTY, TEMPERATURE)
    b_blank = (b_x - b_high) - b_log_sum  # [1]

    b_top = tl.full([BEAM], none, dtype=b_x.dtype if PRUNE == "early" else kind)
    b_token = tl.zeros([BEAM], dtype=tl.int32)
    for i_v in range(0, V, COLS):
        o_v = i_v + tl.arange(0, COLS)  # [COLS]
        m_v = m_scored & _inside(o_v, V, ALIGNED)
        b_lp = _scaled(p_logits, o_row, o_v, m_v, blank, PENALTY, TEMPERATURE)
        b_lp = (b_lp - b_high) - b_log_sum
        m_v = (m_expand | (m_scored & (o_v == blank))) & (b_lp != none)
        b_value = b_lp
        if PRUNE != "early":
            b_value = b_score + b_lp.to(kind)
            if PRUNE == "late":
                b_value = _with_terms(
                    b_value, terms, p_reward, V, o_b, o_h, o_v, m_expand, b_lp, b_blank,
                    TERMS, SILENT, WEIGH_BLANK, HAS_REWARD, ALIGNED,
                )  # fmt: skip
            m_wrong = m_v & ((b_value != b_value) | (b_value == float("inf")))
            m_spoiled = m_spoiled | (tl.max(m_wrong.to(tl.int32), 0, keep_dims=True) != 0)
            m_v = m_v & ~m_wrong
        b_value = tl.where(m_v, b_value, none)
        least = tl.min(tl.where(tl.arange(0, BEAM) < own, b_top, float("inf")), 0)
        if tl.max(b_value, 0) > least:
            b_top, b_token = _keep_best(b_top, b_token, b_value, i_v, own, BEAM, COLS)

    # What the kept ones are made of, [BEAM] each.
    o_j = tl.arange(0, BEAM)
    m_j = o_j < own
    b_token = b_token.to(tl.int64)
    m_kept = m_j & (b_top != none)
    b_lp = _scaled(p_logits, o_row, b_token, m_kept, blank, PENALTY, TEMPERATURE)
    b_lp = tl.where(m_kept, (b_lp - b_high) - b_log_sum, 0.0)
    if PRUNE == "early":
        b_top = _with_terms(
            b_score + b_lp.to(kind), terms, p_reward, V, o_b, o_h, b_token, m_expand & m_kept,
            b_lp, b_blank, TERMS, SILENT, WEIGH_BLANK, HAS_REWARD, ALIGNED,
        )  # fmt: skip
        m_wrong = m_kept & ((b_top != b_top) | (b_top == float("inf")))
        m_spoiled = m_spoiled | (tl.max(m_wrong.to(tl.int32), 0, keep_dims=True) != 0)
        b_top = tl.where(m_kept & ~m_wrong, b_top, none)
    b_top = tl.where(m_keep & (o_j == 0), b_score, b_top)
    b_token = tl.where(m_keep, blank, b_token)
    o_out = o_h * own + o_j
    tl.store(p_total + o_out, b_top, mask=m_j)
    tl.store(p_token + o_out, b_token, mask=m_j)
    p_out = p_parts + o_out * (1 + TERMS)
    tl.store(p_out, b_lp.to(kind), mask=m_j)
    rows, row, weight, L = terms
    for i in tl.static_range(TERMS):
        b_part = _part(
            rows[i], row[i], weight[i], L[i], V, o_b, o_h, b_token, m_expand & m_kept,
            b_lp, b_blank, SILENT, WEIGH_BLANK, ALIGNED,
        )  # fmt: skip
        tl.store(p_out + 1 + i, tl.where(m_kept, b_part, 0.0), mask=m_j)
    tl.store(p_spoiled + o_h, m_spoiled.to(tl.int32))


@triton.jit(do_not_specialize=["W", "V", "own"])
def _merge(
    p_reward,  # [B]
    p_total,  # [B, W, own]
    p_token,  # [B, W, own]
    p_parts,  # [B, W, own, 1 + TERMS]
    p_spoiled,  # [B, W]
    p_new_score,  # [B, W], out, as are all below
    p_parent,  # [B, W]
    p_new_token,  # [B, W]
    p_new_parts,  # [B, W, 1 + TERMS]
    p_bad,  # [B]
    W,
    V,
    own,
    TERMS: tl.constexpr,
    SILENT: tl.constexpr,
    PRUNE: tl.constexpr,
    HAS_REWARD: tl.constexpr,
    BEAM: tl.constexpr,  # W rounded up
    COUNT: tl.constexpr,  # W * own rounded up
):
    i_b = tl.program_id(0).to(tl.int64)
    none = -float("inf")
    o_c = tl.arange(0, COUNT)  # [COUNT]
    m_c = o_c < W * own
    b_total = tl.load(p_total + i_b * W * own + o_c, mask=m_c, other=none)
    b_token = tl.load(p_token + i_b * W * own + o_c, mask=m_c, other=0)
    b_key = (o_c // own).to(tl.int64) * V + b_token  # lower: a lower parent, then a lower token

    o_j = tl.arange(0, BEAM)  # [BEAM], the winners, best first
    m_j = o_j < W
    b_best = tl.full([BEAM], none, dtype=b_total.dtype)
    b_at = tl.zeros([BEAM], dtype=tl.int32)
    for j in range(W):
        top = tl.max(b_total, 0)
        first = tl.min(tl.where(b_total == top, b_key, 1 << 62), 0)
        at = tl.max(tl.where((b_total == top) & (b_key == first), o_c, 0), 0)
        b_best = tl.where(o_j == j, top, b_best)
        b_at = tl.where(o_j == j, at, b_at)
        b_total = tl.where(o_c == at, none, b_total)

    m_live = m_j & (b_best != none)
    o_at = i_b * W * own + b_at
    b_token = tl.load(p_token + o_at, mask=m_live, other=SILENT[0])
    p_from = p_parts + o_at * (1 + TERMS)
    b_spoiled = tl.load(p_spoiled + i_b * W + o_j, mask=m_j, other=0)
    if PRUNE == "after":
        # The order stays; what is no longer finite leaves.
        for i in tl.static_range(TERMS):
            b_best += tl.load(p_from + 1 + i, mask=m_live, other=0.0)
        if HAS_REWARD:
            b_reward = tl.load(p_reward + i_b + 0 * o_j)
            b_best += tl.where(_is_silent(b_token, SILENT), 0.0, b_reward)
        m_wrong = m_live & ((b_best != b_best) | (b_best == float("inf")))
        b_spoiled = tl.maximum(b_spoiled, m_wrong.to(tl.int32))
        m_live = m_live & ~m_wrong & (b_best != none)

    # Live ones first, the others behind them, each kind in order.
    b_live = m_live.to(tl.int64)
    o_to = tl.where(m_live, tl.cumsum(b_live, 0), tl.sum(b_live) + tl.cumsum(1 - b_live, 0)) - 1
    tl.store(p_new_score + i_b * W + o_to, tl.where(m_live, b_best, none), mask=m_j)
    tl.store(p_parent + i_b * W + o_to, tl.where(m_live, b_at // own, o_to), mask=m_j)
    tl.store(p_new_token + i_b * W + o_to, tl.where(m_live, b_token, SILENT[0]), mask=m_j)
    p_out = p_new_parts + (i_b * W + o_to) * (1 + TERMS)
    for i in tl.static_range(1 + TERMS):
        tl.store(p_out + i, tl.load(p_from + i, mask=m_live, other=0.0), mask=m_j)
    tl.store(p_bad + i_b, tl.max(b_spoiled, 0) != 0)


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
    width, own = 1 + len(terms), min(W, V)
    parent = torch.empty_like(score, dtype=torch.int64)
    bad = torch.empty(B, dtype=torch.bool, device=score.device)
    out = (
        torch.empty_like(score), parent, torch.empty_like(parent), score.new_empty(B, W, width), bad
    )  # fmt: skip
    if B == 0:
        return out
    each = [(*term, len(term[0])) for term in terms]
    packed = tuple(tuple(column) for column in zip(*each, strict=True)) or ((),) * 4
    reward = score if token_reward is None else token_reward
    kept = (
        score.new_empty(B, W, own),
        torch.empty(B, W, own, dtype=torch.int64, device=score.device),
        score.new_empty(B, W, own, width),
        torch.empty(B, W, dtype=torch.int32, device=score.device),
    )
    options = {
        "TERMS": len(terms),
        "SILENT": tuple(silent),
        "PRUNE": prune,
        "HAS_REWARD": token_reward is not None,
    }
    columns = min(max(triton.next_power_of_2(V), 32), MAX_COLS)
    _row[(B * W,)](
        score, am_logits, score if slot is None else slot, reward, packed, *kept, W, V, own,
        TEMPERATURE=float(temperature),
        PENALTY=float(blank_penalty),
        WEIGH_BLANK=weigh_blank,
        HAS_SLOT=slot is not None,
        ALIGNED=min(V & -V, 16),
        BEAM=triton.next_power_of_2(own),
        COLS=columns,
        num_warps=min(max(columns // 512, 1), 16),
        **options,
    )  # fmt: skip
    count = triton.next_power_of_2(W * own)
    _merge[(B,)](
        reward, *kept, *out, W, V, own,
        BEAM=triton.next_power_of_2(W),
        COUNT=count,
        num_warps=min(max(count // 256, 1), 8),
        **options,
    )  # fmt: skip
    return out
