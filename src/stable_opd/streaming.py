"""The head and the loss, in tiles of positions, so that no tensor of (N, V) ever exists.

A tile of hidden states is multiplied by the heads of the models that are needed, every component is called on the tile,
and the gradient of the weighted sum is pushed back at once into the tile's hidden states and the head's weight. That
works for any plug-in, because losses are per position and unreduced, and because the share of each position in the mean
is known before.

Gradients meet in the logits of the tile. A component that knows its gradient there in closed form gives it
(`LossTerm.closed_form`); any other is differentiated by autograd with respect to the log-probs. Either way the head is
passed once, and its backward are two matrix products that the components share.

Components that follow a row from token to token get the log-probs of the written tokens of all positions at once: a
pass over the tiles collects them, and the one that is made anyway pushes the gradient back.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stable_opd.diagnostics import Diagnostics
from stable_opd.models import Head, product
from stable_opd.scoring import HiddenStates, KnownLogprobs, Opinion
from stable_opd.terms import LossTerm
from stable_opd.types import NOT_SCORED, Evidence, Scores, TokenLoss


@dataclass(frozen=True, slots=True)
class Part:
    """Positions that are treated alike, and what is asked of them.

    Attributes:
        terms: The components to call, by name.
        evidence: The facts about the positions, without scores.
        shares: Share of each position in the mean of each term, (n,), by the names of `terms`.
        teacher: What the teacher thinks there; None if no term declares ``needs_teacher``.
        reference: What the initial student thinks there; None if no term declares ``needs_reference``.
        diagnose: Whether to compare student and teacher on the way.
    """

    terms: Mapping[str, LossTerm]
    evidence: Evidence
    shares: Mapping[str, Tensor]
    teacher: Opinion | None = None
    reference: HiddenStates | None = None
    diagnose: bool = False

    def __len__(self) -> int:
        """Number of positions."""
        return len(self.evidence.tokens)


@dataclass(frozen=True, slots=True)
class StreamedLoss:
    """What came out of one micro-batch.

    Attributes:
        loss: The sum of all terms, a scalar through which gradients flow.
        losses: Loss of each term, detached scalars.
        values: Reported value of each term, detached scalars.
        diagnostics: What was measured on the way at the parts that asked for it.
    """

    loss: Tensor
    losses: dict[str, Tensor]
    values: dict[str, Tensor]
    diagnostics: Diagnostics


def streamed_loss(student: HiddenStates, parts: Sequence[Part]) -> StreamedLoss:
    """Evaluate the terms of the objective.

    Args:
        student: Where gradients flow to: the states and, if it is trainable, the head.
        parts: What is asked of the positions; the student's states stand in the order of the parts.

    Returns:
        The loss, and what is reported.

    Raises:
        ValueError: If the parts do not cover the student's positions.
    """
    count = sum(map(len, parts))
    if count != len(student.states):
        raise ValueError(f"Expected the parts to cover {len(student.states)} positions, but they cover {count}.")
    job = _Job(parts, student)
    loss = _Streamed.apply(  # type: ignore[no-untyped-call]
        job, student.states, student.head.weight, student.head.bias
    )
    return StreamedLoss(loss, job.losses, job.values, job.diagnostics)


def tile_size(vocabulary: int, device: torch.device) -> int:
    """Return how many positions are treated at once.

    On a CPU the tile (4 MiB for each model) should stay in the cache while it is worked on, but some dozen positions
    are needed for each read of the head's weight to pay. On a GPU some hundred positions saturate the matrix units.
    """
    if device.type == "cpu":
        return max(64, 2**22 // (4 * vocabulary))
    return max(512, 2**26 // (4 * vocabulary))


class _Streamed(torch.autograd.Function):
    """Computes the gradients in the forward pass, when the tile is at hand, and scales them in the backward pass."""

    @staticmethod
    def forward(ctx: Any, job: "_Job", states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # Precision is decided here and by the dtypes that arrive, and not once more for each product.
        with torch.autocast(states.device.type, enabled=False):
            loss, ctx.gradients = job.run(states, weight, bias, train_head=ctx.needs_input_grad[2])
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        # In place, because the gradient of a head is as large as the head; so there is no second backward pass.
        if ctx.gradients is None:
            raise RuntimeError("The loss of a micro-batch goes backward once; evaluate it again for a second time.")
        gradients, ctx.gradients = ctx.gradients, None
        return None, *(None if each is None else each.mul_(upstream[0]) for each in gradients)


class _Backward:
    """The gradients of states and head, to which each tile adds."""

    def __init__(self, states: Tensor, head: Head, train_head: bool) -> None:
        self.head = head
        self.states = torch.empty_like(states)
        # In float32 over all tiles: rounding each partial sum would let the gradient drift.
        self.weight = torch.zeros_like(head.weight, dtype=torch.float32) if train_head else None
        self.bias = torch.zeros_like(head.bias, dtype=torch.float32) if train_head and head.bias is not None else None

    def add(self, place: slice, states: Tensor, in_logits: Tensor) -> None:
        """Push the gradient in the logits of some positions (n, V) back to their states (n, H) and to the head."""
        low, states = in_logits.to(self.head.weight.dtype), states.to(self.head.weight.dtype)
        self.states[place] = product(low, self.head.weight)
        if self.weight is not None and self.weight.dtype == low.dtype:
            self.weight.addmm_(low.T, states)
        elif self.weight is not None:
            self.weight += product(low.T, states)
        if self.bias is not None:
            self.bias += in_logits.sum(0)

    def results(self, dtype: torch.dtype) -> list[Tensor | None]:
        """Return the gradients of states, weight and bias, the latter two in the precision of the parameters."""
        return [self.states, *(None if each is None else each.to(dtype) for each in (self.weight, self.bias))]


#: Memory of tiles on a CPU, by what it holds. It is kept, because the page faults of fresh memory are a good part
#: of the time of a tile. The allocator of a GPU keeps it by itself, for others too.
_ROOM: dict[str, Tensor] = {}


def _room(name: str, rows: int, columns: int, device: torch.device) -> Tensor:
    """Return float32 memory of a tile, (rows, columns), which the next tile will overwrite."""
    if device.type != "cpu":
        return torch.empty(rows, columns, dtype=torch.float32, device=device)
    if name not in _ROOM or _ROOM[name].numel() < rows * columns:
        _ROOM[name] = torch.empty(rows * columns, dtype=torch.float32)  # whatever the default is
    return _ROOM[name][: rows * columns].view(rows, columns)


class _InLogits:
    """The gradient in the logits of a tile, to which its terms add."""

    def __init__(self, model: HiddenStates, student: Scores, tokens: Tensor, logits: Tensor) -> None:
        self.student, self.tokens = student, tokens
        # What is needed of the logits is kept, because their memory is that of the next model.
        self.softcap, self.event = model.head.softcap, model.event
        self.capped = logits.clone() if self.softcap else None
        self.within = None if self.event is None else self.event.within(logits)
        self.total: Tensor | None = None
        self.slope: Tensor | None = None

    def room(self) -> Tensor:
        """Return memory for the next gradient to `add`, (n, V)."""
        name = "gradient" if self.total is None else "another gradient"
        rows, columns = self.student.logprobs.shape
        return _room(name, rows, columns, self.student.logprobs.device)

    def add(self, in_logits: Tensor) -> None:
        """Add a gradient with respect to the logits, (n, V)."""
        self.total = in_logits if self.total is None else self.total.add_(in_logits)

    def add_in_logprobs(self, gradient: Tensor) -> None:
        """Add a gradient with respect to all log-probs, (n, V)."""
        if self.event is not None:
            gradient = self.event.fill_(gradient.clone(), 0)  # the log-probs of the others are constants
        expected = gradient.sum(-1, keepdim=True)
        self.add(torch.addcmul(gradient, self.student.probs, expected, value=-1, out=self.room()))

    def add_slope(self, slope: Tensor | None) -> None:
        """Add a gradient with respect to the log-probs of the written tokens, (n,)."""
        self.slope = slope if self.slope is None or slope is None else self.slope + slope

    def result(self) -> Tensor:
        """Return the sum, (n, V), as a gradient with respect to what the head's product gave before it was capped."""
        if self.slope is not None:
            slope = self.slope[:, None]
            self.add(torch.mul(self.student.probs, -slope, out=self.room()))
            self.total = self.total.scatter_add_(1, self.tokens[:, None], slope)  # type: ignore[union-attr]
        total = torch.zeros_like(self.student.logprobs) if self.total is None else self.total
        if self.event is not None and self.within is not None:
            total = self.event.spread_(total, self.within)
        if self.capped is None or self.softcap is None:
            return total
        return total.mul_(1 - (self.capped / self.softcap).square_())


class _Job:
    """One micro-batch's way through the tiles; it collects what is reported."""

    def __init__(self, parts: Sequence[Part], student: HiddenStates) -> None:
        names = [name for part in parts for name in part.terms]
        self.parts, self.softcap, self.event = parts, student.head.softcap, student.event
        device = student.states.device
        # The products are those of the mixed precision that is asked for; on a CPU float32 is as fast and more exact.
        mixed = device.type == "cuda" and torch.is_autocast_enabled("cuda")
        self.mixed = torch.get_autocast_dtype("cuda") if mixed else None
        self.losses = {name: torch.zeros((), dtype=torch.float32, device=device) for name in names}
        self.values = {name: torch.zeros((), dtype=torch.float32, device=device) for name in names}
        self.diagnostics = Diagnostics()

    def run(
        self, states: Tensor, weight: Tensor, bias: Tensor | None, train_head: bool
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return the loss, and its gradients with respect to states, head weight and head bias."""
        head = Head(weight if self.mixed is None else weight.to(self.mixed), bias, self.softcap)
        backward = _Backward(states, head, train_head)
        start = 0
        for part in self.parts:
            student = HiddenStates(states[start : start + len(part)], head, self.event)
            slope, idle = self._whole_rows(part, student), _idle(part)
            for tile in tiles(len(part), student):
                in_logits = self._tile(part, tile, student, None if slope is None else slope[tile], idle)
                backward.add(slice(start + tile.start, start + tile.stop), student.states[tile], in_logits)
            start += len(part)
        losses = [*self.losses.values(), torch.zeros((), dtype=torch.float32, device=states.device)]
        return torch.stack(losses).sum(), backward.results(weight.dtype)

    def _whole_rows(self, part: Part, student: HiddenStates) -> Tensor | None:
        """Call the terms that follow a row; return the slope of their loss in the student's log-probs, (n,)."""
        terms = {name: term for name, term in part.terms.items() if _follows_rows(term)}
        if not terms:
            return None
        leaf = _collect(part, student, student).requires_grad_()
        needs_teacher = part.teacher is not None and any(term.needs_teacher for term in terms.values())
        needs_reference = part.reference is not None and any(term.needs_reference for term in terms.values())
        evidence = part.evidence.seen(
            slice(None),
            Scores(leaf),
            Scores(_collect(part, part.teacher, student)) if part.teacher and needs_teacher else NOT_SCORED,
            Scores(_collect(part, part.reference, student)) if part.reference and needs_reference else NOT_SCORED,
        )
        return self._differentiate(terms, evidence, part.shares, slice(None), leaf)

    def _tile(
        self, part: Part, tile: slice, student: HiddenStates, slope: Tensor | None, idle: Mapping[str, Tensor]
    ) -> Tensor:
        """Call the terms that look at each position by itself; return the gradient in the logits, (n, V)."""
        terms = {name: term for name, term in part.terms.items() if not _follows_rows(term)}
        tokens, shares = part.evidence.tokens[tile], part.shares
        ours, logits = scores("student", student, tile, tokens)
        gradient = _InLogits(student, ours, tokens, logits)
        del logits  # as large as the tile
        needs_teacher = part.diagnose or any(term.needs_teacher for term in terms.values())
        needs_reference = any(term.needs_reference for term in terms.values())
        teacher = opinion("teacher", part.teacher, tile, tokens) if part.teacher and needs_teacher else NOT_SCORED
        initial = part.reference if needs_reference else None
        reference = NOT_SCORED if initial is None else opinion("reference", initial, tile, tokens)
        gradient.add_slope(slope)
        evidence = part.evidence.seen(tile, ours, teacher, reference)
        if part.diagnose:
            self.diagnostics.add(evidence, tile.start, len(part))
        rest: dict[str, LossTerm] = {}
        for name, term in terms.items():
            in_logits = gradient.room()
            loss = term.closed_form(evidence, in_logits)
            if loss is None:
                rest[name] = term
            else:
                in_logits.mul_(self._add(name, loss, shares[name][tile])[0][:, None])
                gradient.add(_stilled(in_logits, [name], idle, tile))
        sampled = {name: term for name, term in rest.items() if term.support == "sampled"}
        if sampled:
            leaf = ours.sampled.clone().requires_grad_()
            evidence = part.evidence.seen(tile, Scores(leaf), teacher, reference)
            in_sampled = self._differentiate(sampled, evidence, shares, tile, leaf)
            gradient.add_slope(_stilled(in_sampled, sampled, idle, tile))
        full = {name: term for name, term in rest.items() if term.support != "sampled"}
        if full:
            leaf = ours.logprobs.detach().requires_grad_()
            with torch.enable_grad():  # a term may look at the written tokens alone
                evidence = part.evidence.seen(tile, Scores(gather(leaf, tokens), leaf), teacher, reference)
            in_logprobs = self._differentiate(full, evidence, shares, tile, leaf)
            gradient.add_in_logprobs(_stilled(in_logprobs, full, idle, tile))
        return gradient.result()

    def _differentiate(
        self,
        terms: Mapping[str, LossTerm],
        evidence: Evidence,
        shares: Mapping[str, Tensor],
        tile: slice,
        leaf: Tensor,
    ) -> Tensor:
        """Call terms and return the gradient of their weighted sum with respect to a leaf, by autograd."""
        with torch.enable_grad():
            total = leaf.sum() * 0  # a term may speak about nothing
            for name, term in terms.items():
                total = total + self._add(name, term(evidence), shares[name][tile])[1]
        return torch.autograd.grad(total, leaf)[0]

    def _add(self, name: str, term: TokenLoss, shares: Tensor) -> tuple[Tensor, Tensor]:
        """Remember what is reported of a term; return the share of each position in it, and its weighted sum."""
        share = shares * term.where
        without = share == 0  # what is said there need not be finite
        loss = (share * term.loss.masked_fill(without, 0)).sum()
        self.losses[name] = self.losses[name] + loss.detach()
        self.values[name] = self.values[name] + (share * term.value.detach().masked_fill(without, 0)).sum()
        return share, loss


def _idle(part: Part) -> dict[str, Tensor]:
    """Return where terms have no share, (n,) each, of those of which that happens.

    They are looked for once in a part, because a GPU is waited for, and their gradients cleared in a pass of its own.
    """
    without = {name: part.shares[name] == 0 for name in part.terms}
    happens = torch.stack(list(without.values())).any(-1).tolist() if without else []
    return {name: where for (name, where), some in zip(without.items(), happens, strict=True) if some}


def _stilled(gradient: Tensor, terms: Collection[str], idle: Mapping[str, Tensor], tile: slice) -> Tensor:
    """Clear the gradient of some terms, (n,) or (n, V), where none has a share; 0 times infinity is not 0."""
    if not all(name in idle for name in terms):
        return gradient
    without = torch.stack([idle[name][tile] for name in terms]).all(0)
    return gradient.masked_fill_(without.view(-1, *[1] * (gradient.dim() - 1)), 0)


def _follows_rows(term: LossTerm) -> bool:
    return term.support == "sampled" and not term.positionwise


def tiles(count: int, model: HiddenStates) -> Iterator[slice]:
    """Return ``count`` positions, as many at a time as are treated at once."""
    size = tile_size(len(model.head.weight), model.states.device)
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _collect(part: Part, model: Opinion, student: HiddenStates) -> Tensor:
    """Return a model's log-probs of the written tokens, (n,), in tiles that suit the student."""
    tokens = part.evidence.tokens
    return torch.cat([opinion("student", model, tile, tokens[tile]).sampled for tile in tiles(len(part), student)])


def opinion(name: str, model: Opinion, tile: slice | Tensor, tokens: Tensor) -> Scores:
    """Return what a model says about a tile; each name has memory of its own."""
    return model.at(tile, tokens) if isinstance(model, KnownLogprobs) else scores(name, model, tile, tokens)[0]


@torch.no_grad()
def known_logprobs(model: HiddenStates, tokens: Tensor, k: int) -> KnownLogprobs:
    """Return the log-probs of the written tokens, (N,), and the k likeliest tokens with theirs, (N, k) each."""
    found = []
    for tile in tiles(len(tokens), model):
        tile_scores = scores("teacher", model, tile, tokens[tile])[0]
        found.append((tile_scores.sampled, *tile_scores.top(k)))
    sampled, best, logprobs = (torch.cat(each) for each in zip(*found, strict=True))
    return KnownLogprobs(tokens, sampled, best, logprobs)


def scores(name: str, model: HiddenStates, tile: slice | Tensor, tokens: Tensor) -> tuple[Scores, Tensor]:
    """Return what a model says about a tile, and the logits; each name has memory of its own, the logits share one."""
    states = model.states[tile]
    shape = len(states), len(model.head.weight), states.device
    logits = model.head.logits(states, _room("logits", *shape))
    logprobs = torch.log_softmax(logits, -1, out=_room(name, *shape))
    if model.event is not None:
        model.event.read_(logprobs)
    return Scores(gather(logprobs, tokens), logprobs, _room(f"{name}'s probabilities", *shape)), logits


def gather(logprobs: Tensor, tokens: Tensor) -> Tensor:
    """Return the entry of each row at its token, (n, V) and (n,) -> (n,)."""
    return logprobs.gather(-1, tokens[:, None]).squeeze(-1)
