"""The head and the loss, in tiles of positions, so that no tensor of (N, V) ever exists.

A tile of hidden states is multiplied by the head, every component is called on it, and the gradient of the weighted sum
is pushed back at once into the tile's hidden states and the head's weight. That works for any plug-in, because losses
are per position and unreduced, and because the share of each position in the mean is known before.

Components with ``support = "sampled"`` get the log-probs of the written tokens of all positions at once: a first pass
over the tiles collects them, and the second pushes the gradient with respect to them back through the head.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stable_opd.models import Head
from stable_opd.scoring import HiddenStates
from stable_opd.terms import LossTerm
from stable_opd.types import NOT_SCORED, Evidence, Scores, TokenLoss

#: Working memory of a tile of logits, per model, in bytes.
TILE_BYTES = 2**26

#: How many of the likeliest tokens of student and teacher are compared (Li et al. 2026, arXiv 2604.13016).
OVERLAP_K = 16


@dataclass(frozen=True, slots=True)
class StreamedLoss:
    """What came out of one micro-batch.

    Attributes:
        loss: The sum of all terms, a scalar through which gradients flow.
        losses: Loss of each term, detached scalars.
        values: Reported value of each term, detached scalars.
        diagnostics: What is measured on the way, each (N,) float32: ``student`` and ``teacher`` log-probs of the
            written tokens, ``entropy_student``, ``entropy_teacher``, ``overlap``; empty without the teacher's scores.
    """

    loss: Tensor
    losses: dict[str, Tensor]
    values: dict[str, Tensor]
    diagnostics: dict[str, Tensor]


def streamed_loss(
    terms: Mapping[str, LossTerm],
    evidence: Evidence,
    shares: Tensor,
    student: HiddenStates,
    teacher: HiddenStates | None = None,
    reference: HiddenStates | None = None,
) -> StreamedLoss:
    """Evaluate the terms of the objective on N positions.

    Args:
        terms: The components to call, by name.
        evidence: The facts about the positions, without scores.
        shares: Share of each position in the mean, (N,).
        student: Where gradients flow to: the states and, if it is trainable, the head.
        teacher: Needed if a term declares ``needs_teacher``.
        reference: Needed if a term declares ``needs_reference``.

    Returns:
        The loss, and what is reported.
    """
    job = _Job(terms, evidence, shares, student.head.softcap, teacher, reference)
    loss = _Streamed.apply(  # type: ignore[no-untyped-call]
        job, student.states, student.head.weight, student.head.bias
    )
    return StreamedLoss(
        loss, job.losses, job.values, {name: torch.cat(parts) for name, parts in job.diagnostics.items()}
    )


def overlap(student: Tensor, teacher: Tensor) -> Tensor:
    """Return which share of the teacher's likeliest tokens is among the student's likeliest, (n, V) twice -> (n,)."""
    k = min(OVERLAP_K, student.shape[-1])
    ours, theirs = student.topk(k, -1).indices, teacher.topk(k, -1).indices
    return (ours[:, :, None] == theirs[:, None, :]).any(-1).float().mean(-1)


def entropy(logprobs: Tensor) -> Tensor:
    """Return the entropy of distributions in nats, (..., V) -> (...)."""
    return -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)


class _Streamed(torch.autograd.Function):
    """Computes the gradients in the forward pass, when the tile is at hand, and scales them in the backward pass."""

    @staticmethod
    def forward(ctx: Any, job: "_Job", states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        loss, *gradients = job.run(states, weight, bias, train_head=ctx.needs_input_grad[2])
        ctx.save_for_backward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        return None, *(None if each is None else each * upstream[0] for each in ctx.saved_tensors)


@dataclass
class _Job:
    """One micro-batch's way through the tiles; it collects what is reported."""

    terms: Mapping[str, LossTerm]
    evidence: Evidence
    shares: Tensor
    softcap: float | None
    teacher: HiddenStates | None
    reference: HiddenStates | None
    losses: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    diagnostics: dict[str, list[Tensor]] = field(default_factory=dict)

    def run(
        self, states: Tensor, weight: Tensor, bias: Tensor | None, train_head: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return the loss and its gradients with respect to states, head weight and head bias."""
        for name in self.terms:
            self.losses[name] = self.values[name] = torch.zeros((), dtype=torch.float32, device=states.device)
        slope = self._sampled_terms(HiddenStates(states, Head(weight, bias, self.softcap)))
        to_states = torch.zeros_like(states)
        to_weight = torch.zeros_like(weight, dtype=torch.float32) if train_head else None
        to_bias = torch.zeros_like(bias, dtype=torch.float32) if train_head and bias is not None else None
        for tile in self._tiles(weight.shape[0]):
            # Leaves of their own for every tile: their graph is freed with the tile.
            leaves = [states[tile].detach().requires_grad_()]
            leaves += [part.detach().requires_grad_() for part in (weight, bias) if part is not None and train_head]
            with torch.enable_grad():
                head = Head(leaves[1], leaves[2] if bias is not None else None, self.softcap) if train_head else None
                logprobs = HiddenStates(leaves[0], head or Head(weight, bias, self.softcap)).logprobs(slice(None))
                total = self._tile_terms(tile, logprobs, slope)
            gradients = torch.autograd.grad(total, leaves)
            to_states[tile] = gradients[0]
            if to_weight is not None:
                to_weight += gradients[1]
            if to_bias is not None:
                to_bias += gradients[2]
        loss = torch.stack(list(self.losses.values())).sum()
        cast = None if to_weight is None else to_weight.to(weight.dtype)
        return loss, to_states, cast, None if to_bias is None or bias is None else to_bias.to(bias.dtype)

    def _tiles(self, vocabulary: int) -> Iterator[slice]:
        size = max(1, TILE_BYTES // (4 * vocabulary))
        return (slice(start, start + size) for start in range(0, len(self.shares), size))

    def _sampled_terms(self, student: HiddenStates) -> Tensor:
        """Call the terms that need the written tokens only; return the slope of their loss in the log-probs, (N,)."""
        terms = {name: term for name, term in self.terms.items() if term.support == "sampled"}
        if not terms:
            return torch.zeros_like(self.shares)
        leaf = self._collect(student).requires_grad_()
        needs_teacher = any(term.needs_teacher for term in terms.values())
        needs_reference = any(term.needs_reference for term in terms.values())
        teacher = Scores(self._collect(self.teacher)) if self.teacher and needs_teacher else NOT_SCORED
        reference = Scores(self._collect(self.reference)) if self.reference and needs_reference else NOT_SCORED
        with torch.enable_grad():
            evidence = self.evidence.seen(slice(None), Scores(leaf), teacher, reference)
            total = sum((self._add(name, term(evidence), slice(None)) for name, term in terms.items()), leaf.sum() * 0)
        return torch.autograd.grad(total, leaf)[0]

    def _collect(self, model: HiddenStates) -> Tensor:
        """Return a model's log-probs of the written tokens, (N,)."""
        tiles = self._tiles(model.head.weight.shape[0])
        return torch.cat([_gather(model.logprobs(tile), self.evidence.tokens[tile]) for tile in tiles])

    def _tile_terms(self, tile: slice, logprobs: Tensor, slope: Tensor) -> Tensor:
        """Call the terms that need the whole vocabulary; return what is to be differentiated on this tile."""
        tokens = self.evidence.tokens[tile]
        student = Scores(_gather(logprobs, tokens), logprobs)
        teacher, reference = self._frozen(self.teacher, tile), self._frozen(self.reference, tile)
        total = (slope[tile] * student.sampled).sum()
        evidence = self.evidence.seen(tile, student, teacher, reference)
        for name, term in self.terms.items():
            if term.support == "full":
                total = total + self._add(name, term(evidence), tile)
        if self.teacher is not None:
            self._diagnose(logprobs.detach(), teacher, student.sampled.detach())
        return total

    def _frozen(self, model: HiddenStates | None, tile: slice) -> Scores:
        if model is None:
            return NOT_SCORED
        with torch.no_grad():
            logprobs = model.logprobs(tile)
            return Scores(_gather(logprobs, self.evidence.tokens[tile]), logprobs)

    def _add(self, name: str, term: TokenLoss, tile: slice) -> Tensor:
        """Reduce a term on a tile, remember what is reported, and return what is to be differentiated."""
        share = self.shares[tile] * term.where
        loss = (share * term.loss.masked_fill(~term.where, 0)).sum()
        self.losses[name] = self.losses[name] + loss.detach()
        self.values[name] = self.values[name] + (share * term.value.detach().masked_fill(~term.where, 0)).sum()
        return loss

    def _diagnose(self, student: Tensor, teacher: Scores, sampled: Tensor) -> None:
        with torch.no_grad():
            for name, values in (
                ("student", sampled),
                ("teacher", teacher.sampled),
                ("entropy_student", entropy(student)),
                ("entropy_teacher", entropy(teacher.logprobs)),
                ("overlap", overlap(student, teacher.logprobs)),
            ):
                self.diagnostics.setdefault(name, []).append(values)


def _gather(logprobs: Tensor, tokens: Tensor) -> Tensor:
    return logprobs.gather(-1, tokens[:, None]).squeeze(-1)
