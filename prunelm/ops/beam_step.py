"""One step of a transducer beam search with language-model fusion, for all utterances at once."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

import prunelm._C
from prunelm.ops import _library  # noqa: F401  (loads the extension)
from prunelm.ops.backend import WITH_CUDA, WITH_TRITON, triton_is_interpreted
from prunelm.ops.tensors import can_look_at, check_one_device, check_tensors

Term = tuple[Tensor, Tensor, Tensor]
Prune = Literal["late", "early", "after"]
Backend = Literal["reference", "cpu", "cuda", "triton"]

EXPAND, BLANK_ONLY, KEEP, DEAD = range(4)
_LEAST_NOT_BLANK = 0.01  # NeMo's clamp of 1 - P(blank)

_direct = prunelm._C.beam_step


class BeamStep(NamedTuple):
    """What `beam_step` chose; see there."""

    score: Tensor
    parent: Tensor
    token: Tensor
    parts: Tensor
    bad: Tensor


def beam_step(
    score: Tensor,
    am_logits: Tensor,
    terms: Sequence[Term] = (),
    *,
    slot: Tensor | None = None,
    silent: Sequence[int] = (0,),
    token_reward: Tensor | float | None = None,
    temperature: float = 1.0,
    blank_penalty: float = 0.0,
    prune: Prune = "late",
    weigh_blank: bool = False,
    normalise: bool = False,
    backend: Backend | None = None,
) -> BeamStep:
    """The best W extensions of W hypotheses of each utterance.

    With y = (am_logits - blank_penalty [v is blank]) / temperature and lp = log_softmax(y),
    hypothesis w extended by token v scores

        score[b, w] + lp[b, w, v] + sum_i weight_i[b] * rows_i[row_i[b, w], v] + token_reward[b]

    where silent tokens get no terms and no reward. `prune` says when the terms count:

    * "late": for all of V, before the best W are chosen (NeMo's "late").
    * "early": each hypothesis keeps its best W tokens by lp, these get their terms, and the best
      W of all are chosen (NeMo's "early").
    * "after": the best W of all by score + lp are chosen, then get their terms, and stay in the
      order in which they were chosen (icefall's modified_beam_search).

    `normalise`: rows hold logits, and it is their log_softmax that counts. Rows that are read in
    many steps are better normalised once.

    `weigh_blank` is NeMo's "lm_weighted_full": with a = sum_i weight_i, blank gets (1 + a) lp
    instead of lp, and a token that is not silent gets a * log(max(1 - P(blank), 0.01)) more.

    Ties go to the lowest parent, then the lowest token. A candidate whose lp or total is -inf is
    dead. A live hypothesis that holds NaN or +inf, or leads to one in what is looked at, sets
    `bad` and loses those candidates. A term of weight 0 is not read. An utterance's result depends
    on that utterance alone.

    Gradients of `score` and `parts` reach score, am_logits, rows, weight and token_reward, for the
    extensions that were chosen; the choice itself has none. Arithmetic is in am_logits' dtype,
    scores are summed in score's.

    Args:
        score: [B, W] float32 or float64, log-scores; -inf: a dead slot.
        am_logits: [B, W, V] float32 or float64 (float16 and bfloat16 are converted), W, V >= 1.
        terms: (rows [L, V] of any floating dtype, row [B, W] int64, weight [B]) each; row is read
            for live hypotheses in slots that expand only.
        slot: [B, W] int64: 0 expand, 1 extend by blank only, 2 keep as it is (finished), 3 dead.
            None: all expand.
        silent: tokens that extend nothing; the first is blank.
        token_reward: [B] or a number.
        temperature: above 0.
        blank_penalty: subtracted from blank's logit.
        backend: None (chosen from the device), "cpu", "cuda", "triton" or "reference".

    Returns:
        score [B, W]; parent [B, W] int64, the hypothesis extended; token [B, W] int64;
        parts [B, W, 1 + len(terms)], score's dtype: lp, then what each term added, weight
        included, so that score = score[parent] + parts.sum(-1) + reward; bad [B] bool.
        Slots are filled from the first; empty ones hold -inf, their own index, blank and zeros.
        Their memory need not be torch's own: it can be written to, but not resized in place.

    Raises:
        ValueError: the backend or `prune` is unknown, or the backend cannot run this.
        RuntimeError: a shape, dtype or index is not as above.
    """
    if backend is None and not is_compiling():
        chosen = _direct(
            score, am_logits, tuple(terms), slot, tuple(silent), token_reward,
            temperature, blank_penalty, prune, weigh_blank, normalise,
        )  # fmt: skip
        if chosen is not None:
            return BeamStep._make(chosen)
    if prune not in ("late", "early", "after"):
        raise ValueError(f"prune: expected late, early or after, got {prune!r}")
    _check_all(score, am_logits, terms, slot, token_reward)
    run = _runner(am_logits.device, backend)
    if am_logits.dtype in (torch.float16, torch.bfloat16):
        am_logits = am_logits.float()
    if normalise:
        dtype = am_logits.dtype
        terms = [(rows.to(dtype).log_softmax(-1), row, weight) for rows, row, weight in terms]
    if isinstance(token_reward, (int, float)):
        token_reward = score.new_full(score.shape[:1], token_reward) if token_reward else None
    out = run(
        score.contiguous(),
        am_logits.contiguous(),
        [rows.contiguous() for rows, _, _ in terms],
        [row.contiguous() for _, row, _ in terms],
        [weight.to(score.dtype).contiguous() for _, _, weight in terms],
        None if slot is None else slot.contiguous(),
        list(silent),
        None if token_reward is None else token_reward.to(score.dtype).contiguous(),
        temperature,
        blank_penalty,
        prune,
        weigh_blank,
    )
    return BeamStep(*out)


def _check_all(
    score: Tensor,
    am_logits: Tensor,
    terms: Sequence[Term],
    slot: Tensor | None,
    token_reward: Tensor | float | None,
) -> None:
    """Refuses what cannot be read."""
    named: dict[str, Tensor | None] = {"score": score, "am_logits": am_logits, "slot": slot}
    for i, (rows, row, weight) in enumerate(terms):
        named |= {f"rows of term {i}": rows, f"row of term {i}": row, f"weight of term {i}": weight}
    if not isinstance(token_reward, (int, float)):
        named["token_reward"] = token_reward
    check_tensors(**named)


def _runner(device: torch.device, backend: Backend | None) -> Callable[..., tuple[Tensor, ...]]:
    """What runs on a device; a backend asked for by name runs or is refused with its reason."""
    native: Callable[..., tuple[Tensor, ...]] = torch.ops.prunelm.beam_step
    if backend is None:
        return (
            native if device.type == "cpu" or (device.type == "cuda" and WITH_CUDA) else _reference
        )
    if backend == "reference":
        return _reference
    if backend not in ("cpu", "cuda", "triton"):
        raise ValueError(
            f"backend: expected None, 'cpu', 'cuda', 'triton' or 'reference', got {backend!r}"
        )
    needed = "cpu" if backend == "cpu" else "cuda"
    if backend == "triton" and triton_is_interpreted():
        needed = device.type
    if device.type != needed:
        raise ValueError(f"backend: {backend!r} expected {needed} tensors, got {device}")
    if backend == "cuda" and not WITH_CUDA:
        raise ValueError("backend: 'cuda' expected an extension built with CUDA, got one without")
    if backend == "triton" and not WITH_TRITON:
        raise ValueError("backend: 'triton' expected triton, which is not installed")
    return torch.ops.prunelm.beam_step_triton if backend == "triton" else native


def beam_step_reference(
    score: Tensor,
    am_logits: Tensor,
    terms: Sequence[Term] = (),
    *,
    slot: Tensor | None = None,
    silent: Sequence[int] = (0,),
    token_reward: Tensor | float | None = None,
    temperature: float = 1.0,
    blank_penalty: float = 0.0,
    prune: Prune = "late",
    weigh_blank: bool = False,
    normalise: bool = False,
) -> BeamStep:
    """beam_step in plain torch, on any device; differentiable by autograd."""
    return beam_step(
        score,
        am_logits,
        terms,
        slot=slot,
        silent=silent,
        token_reward=token_reward,
        temperature=temperature,
        blank_penalty=blank_penalty,
        prune=prune,
        weigh_blank=weigh_blank,
        normalise=normalise,
        backend="reference",
    )


def _reference(
    score: Tensor,
    am_logits: Tensor,
    rows: list[Tensor],
    row: list[Tensor],
    weight: list[Tensor],
    slot: Tensor | None,
    silent: list[int],
    token_reward: Tensor | None,
    temperature: float,
    blank_penalty: float,
    prune: str,
    weigh_blank: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    W, V = am_logits.shape[1:]
    _check_numbers(score, rows, row, slot, silent, temperature, W, V)
    slot = torch.zeros_like(score, dtype=torch.int64) if slot is None else slot
    live = (slot != DEAD) & (score != -torch.inf)
    expands = live & (slot == EXPAND)
    lp, am_bad = _log_probs(am_logits, silent[0], temperature, blank_penalty)
    is_silent = _mask(silent, lp)
    is_blank = _mask(silent[:1], lp)

    # What each term adds to every extension, [B, W, V], and whether it was looked at.
    added = []
    for values, index, factor in zip(rows, row, weight, strict=True):
        used = expands & (factor != 0)[:, None]
        value = values[index.where(used, 0)].to(lp.dtype) if len(values) else torch.zeros_like(lp)
        value = value * factor.to(lp.dtype)[:, None, None]
        if weigh_blank:
            value = value + factor.to(lp.dtype)[:, None, None] * _log_not_blank(lp, silent[0])
        value = value.where(used[..., None] & ~is_silent, 0)
        if weigh_blank:
            value = value + (factor.to(lp.dtype)[:, None, None] * lp).where(is_blank, 0)
        added.append(value)
    reward = torch.zeros_like(lp)
    if token_reward is not None:
        reward = token_reward.to(lp.dtype)[:, None, None].where(~is_silent, reward)

    # A kept hypothesis has one candidate, blank, which costs nothing.
    kept = (slot == KEEP)[..., None]
    lp = lp.where(~kept, torch.zeros_like(lp).where(is_blank, -torch.inf))
    added = [value.where(~kept, 0) for value in added]
    allowed = live[..., None] & (expands[..., None] | is_blank) & (lp != -torch.inf)
    by_am = score[..., None] + lp.to(score.dtype)
    total = by_am + sum(added, reward).to(score.dtype)
    if prune == "early":
        best = _best(lp.masked_fill(~allowed, -torch.inf), min(W, V))[1]
        allowed = allowed & torch.zeros_like(allowed).scatter(2, best, True)
    chosen_by = (by_am if prune == "after" else total).flatten(1)
    allowed = allowed.flatten(1)
    # Where a candidate was looked at and is no number, the utterance is bad.
    bad = (live & ~kept[..., 0] & am_bad).any(1) | (
        live & (score.isnan() | (score == torch.inf))
    ).any(1)
    spoiled = allowed & (chosen_by.isnan() | (chosen_by == torch.inf))
    order, index = _best(chosen_by.masked_fill(~allowed | spoiled, -torch.inf), W)

    out = total.flatten(1).gather(1, index).where(order != -torch.inf, -torch.inf)
    late_spoiled = out.isnan() | (out == torch.inf)
    bad = bad | spoiled.any(1) | late_spoiled.any(1)
    out = out.where(~late_spoiled, -torch.inf)
    # Filled slots first, in the order of choice.
    front = (out == -torch.inf).to(torch.int8).argsort(dim=1, stable=True)
    index, out = index.gather(1, front), out.gather(1, front)
    filled = out != -torch.inf
    parent = (index // V).where(filled, torch.arange(W, device=index.device))
    token = (index % V).where(filled, silent[0])
    parts = torch.stack([part.flatten(1).gather(1, index) for part in (lp, *added)], -1)
    parts = parts.where(filled[..., None], 0).to(score.dtype)
    return out, parent, token, parts, bad


def _check_numbers(
    score: Tensor,
    rows: list[Tensor],
    row: list[Tensor],
    slot: Tensor | None,
    silent: list[int],
    temperature: float,
    W: int,
    V: int,
) -> None:
    """As the compiled op does, where looking costs no wait for a device and nothing is traced."""
    if W < 1 or V < 1:
        raise RuntimeError(f"am_logits: expected W and V of at least 1, got {[len(score), W, V]}")
    if not silent:
        raise RuntimeError("silent: expected at least the blank token, got none")
    for token in silent:
        if not 0 <= token < V:
            raise RuntimeError(f"silent: expected tokens from 0 to {V - 1}, got {token}")
    if not temperature > 0:
        raise RuntimeError(f"temperature: expected a number above 0, got {temperature}")
    given = () if slot is None else (slot,)
    if not can_look_at(score, *row, *given):
        return
    expands = score != -torch.inf
    if slot is not None:
        wrong = slot[(slot < EXPAND) | (slot > DEAD)]
        if len(wrong):
            raise RuntimeError(f"slot: expected 0 to 3, got {int(wrong[0])}")
        expands = expands & (slot == EXPAND)
    for values, index in zip(rows, row, strict=True):
        wrong = index[expands & ((index < 0) | (index >= len(values)))]
        if len(wrong):
            raise RuntimeError(f"row: expected 0 to {len(values) - 1}, got {int(wrong[0])}")


def _log_probs(
    am_logits: Tensor, blank: int, temperature: float, blank_penalty: float
) -> tuple[Tensor, Tensor]:
    """log_softmax [B, W, V], and where it cannot be taken [B, W]; all -inf stays all -inf."""
    x = am_logits - blank_penalty * _mask([blank], am_logits).to(am_logits.dtype)
    x = x / temperature
    bad = x.isnan().any(-1) | (x == torch.inf).any(-1)
    empty = (x == -torch.inf).all(-1)
    x = x.where(~(bad | empty)[..., None], 0)
    return x.log_softmax(-1).masked_fill((bad | empty)[..., None], -torch.inf), bad


def _log_not_blank(lp: Tensor, blank: int) -> Tensor:
    return (1 - lp[..., blank, None].exp()).clamp_min(_LEAST_NOT_BLANK).log()


def _mask(tokens: Sequence[int], like: Tensor) -> Tensor:
    """[V] bool, True at the tokens."""
    vocabulary = torch.arange(like.shape[-1], device=like.device)
    return torch.isin(vocabulary, torch.tensor(list(tokens), device=like.device))


def _best(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Values and indices of the largest `count` along the last axis, ties to the lowest index."""
    values, index = x.sort(dim=-1, descending=True, stable=True)
    return values[..., :count], index[..., :count]


@torch.library.custom_op("prunelm::beam_step_triton", mutates_args=())
def _triton(
    score: Tensor,
    am_logits: Tensor,
    rows: Sequence[Tensor],
    row: Sequence[Tensor],
    weight: Sequence[Tensor],
    slot: Tensor | None,
    silent: Sequence[int],
    token_reward: Tensor | None,
    temperature: float,
    blank_penalty: float,
    prune: str,
    weigh_blank: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from prunelm.triton_kernels.beam_step import beam_step as launch

    out: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = launch(
        score,
        am_logits,
        list(zip(rows, row, weight, strict=True)),
        slot=slot,
        silent=silent,
        token_reward=token_reward,
        temperature=temperature,
        blank_penalty=blank_penalty,
        prune=prune,
        weigh_blank=weigh_blank,
    )
    return out


@_triton.register_fake
@torch.library.register_fake("prunelm::beam_step")
def _fake(
    score: Tensor,
    am_logits: Tensor,
    rows: list[Tensor],
    row: list[Tensor],
    weight: list[Tensor],
    slot: Tensor | None,
    silent: list[int],
    token_reward: Tensor | None,
    temperature: float,
    blank_penalty: float,
    prune: str,
    weigh_blank: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    named = {"score": score, "am_logits": am_logits, "slot": slot, "token_reward": token_reward}
    for name, tensors in (("rows", rows), ("row", row), ("weight", weight)):
        named |= {f"{name} {i}": tensor for i, tensor in enumerate(tensors)}
    check_one_device(named)
    index = torch.empty_like(score, dtype=torch.int64)
    parts = score.new_empty(*score.shape, 1 + len(rows))
    bad = score.new_empty(score.shape[:1], dtype=torch.bool)
    return torch.empty_like(score), index, torch.empty_like(index), parts, bad


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, am_logits, rows, row, weight, slot, silent, reward, temperature, penalty, _, weigh = inputs
    out, parent, token, parts, bad = output
    ctx.mark_non_differentiable(parent, token, bad)
    tensors = [am_logits, out, parent, token, parts, *rows, *row, *weight]
    ctx.slot_given = slot is not None
    ctx.save_for_backward(*tensors, *([slot] if ctx.slot_given else []))
    ctx.terms, ctx.rewarded, ctx.silent = len(rows), reward is not None, list(silent)
    ctx.temperature, ctx.blank_penalty, ctx.weigh_blank = temperature, penalty, weigh


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """Scatters the gradients of the chosen extensions to what they were made of."""
    grad_score, _, _, grad_parts, _ = grads
    am_logits, out, parent, token, parts, *saved = ctx.saved_tensors
    check_tensors(
        grad_score=grad_score,
        grad_parts=grad_parts,
        am_logits=am_logits,
        score=out,
        parent=parent,
        token=token,
        parts=parts,
        **{f"saved {i}": tensor for i, tensor in enumerate(saved)},
    )
    n = ctx.terms
    rows, row, weight = saved[:n], saved[n : 2 * n], saved[2 * n : 3 * n]
    utterance = torch.arange(len(out), device=out.device)[:, None].expand_as(parent)
    filled = (out != -torch.inf).to(out.dtype)
    grad = torch.zeros_like(out) if grad_score is None else grad_score * filled
    each = torch.zeros_like(parts) if grad_parts is None else grad_parts * filled[..., None]
    each = each + grad[..., None]
    moved = torch.ones_like(parent, dtype=torch.bool)
    if ctx.slot_given:
        moved = saved[-1].gather(1, parent) != KEEP
    emits = moved & ~_mask(ctx.silent, am_logits)[token]
    is_blank = moved & (token == ctx.silent[0])

    lp = _log_probs(am_logits, ctx.silent[0], ctx.temperature, ctx.blank_penalty)[0]
    not_blank = lp[utterance, parent, ctx.silent[0]].exp().neg() + 1
    log_not_blank = not_blank.clamp_min(_LEAST_NOT_BLANK).log().to(out.dtype)
    grad_lp = torch.zeros_like(am_logits)
    to_blank = torch.zeros_like(out)  # gradient of the parent's lp[blank]
    grad_rows, grad_weight = [], []
    for i in range(n):
        factor = weight[i][:, None]
        here = each[..., i + 1] * emits
        values = torch.zeros_like(out)
        if len(rows[i]):
            index = row[i].gather(1, parent).where(emits & (factor != 0), 0)
            at = (index, token)
            empty = torch.zeros_like(rows[i])
            scattered = (here * factor).to(empty.dtype)
            grad_rows.append(empty.index_put(at, scattered, accumulate=True))
            values = rows[i][at].to(out.dtype)
        else:
            grad_rows.append(torch.zeros_like(rows[i]))
        per_weight = values.where(emits & (factor != 0), 0)
        if ctx.weigh_blank:
            chosen_lp = lp[utterance, parent, token].to(out.dtype)
            per_weight = per_weight + log_not_blank.where(emits, 0) + chosen_lp.where(is_blank, 0)
            slope = (1 - 1 / not_blank).where(not_blank > _LEAST_NOT_BLANK, 0).to(out.dtype)
            to_blank = to_blank + here * factor * slope
            to_blank = to_blank + each[..., i + 1] * factor * is_blank
        grad_weight.append((each[..., i + 1] * per_weight).sum(1))
    at_chosen = (utterance, parent, token)
    at_blank = (utterance, parent, torch.full_like(token, ctx.silent[0]))
    grad_lp = grad_lp.index_put(at_chosen, (each[..., 0] * moved).to(lp.dtype), accumulate=True)
    grad_lp = grad_lp.index_put(at_blank, to_blank.to(lp.dtype), accumulate=True)
    grad_logits = (grad_lp - lp.exp() * grad_lp.sum(-1, keepdim=True)) / ctx.temperature
    grad_old = torch.zeros_like(out).scatter_add(1, parent, grad)
    grad_reward = (grad * emits).sum(1) if ctx.rewarded else None
    rest = (None, None, grad_reward, None, None, None, None)
    return grad_old, grad_logits, grad_rows, [None] * n, grad_weight, *rest


for _op in ("prunelm::beam_step", "prunelm::beam_step_triton"):
    torch.library.register_autograd(_op, _backward, setup_context=_save)
