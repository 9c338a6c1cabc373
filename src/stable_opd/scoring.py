"""From rollouts to hidden states: micro-batches of rows, and one forward of a model's body over them."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stable_opd.models import Head, output_head
from stable_opd.packing import packs
from stable_opd.terminal import StopEvent
from stable_opd.types import Rollout, Scores


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """What a model thinks before its head: the states from which each completion token was predicted.

    Attributes:
        states: (N, H).
        head: Turns them into logits.
        event: The terminal ids that its log-probs have as one; None for none.
    """

    states: Tensor
    head: Head
    event: StopEvent | None = None


@dataclass(frozen=True, slots=True)
class KnownLogprobs:
    """What is known of a model that is not in this process: the written tokens, and its likeliest ones.

    Attributes:
        written: The completion tokens, (N,).
        sampled: Log-prob of each, (N,) float32.
        tokens: The model's K likeliest tokens at each place, likeliest first, (N, K); K may be 0.
        logprobs: Log-prob of each of these, (N, K) float32.
        event: The terminal ids that its log-probs have as one. Those that are not among the known ones add nothing to
            it, so its log-prob is a lower bound; what is missing is less than the K-th probability for each.
    """

    written: Tensor
    sampled: Tensor
    tokens: Tensor
    logprobs: Tensor
    event: StopEvent | None = None

    def at(self, tile: slice | Tensor, tokens: Tensor) -> Scores:
        """Return what is known of some places, whose tokens, (n,), count as those given.

        Raises:
            ValueError: If the event rules tokens out instead of adding them up, which takes the whole vocabulary.
        """
        known = self.tokens[tile], self.logprobs[tile]
        if self.event is None:
            return Scores(self.sampled[tile], top=known)
        if not self.event.adds:
            raise ValueError("Expected an event that adds up its tokens, because the whole vocabulary is not known.")
        members = torch.tensor([self.event.token, *self.event.others], device=tokens.device)
        written, sampled = self.written[tile], self.sampled[tile]
        apart = torch.isin(written, members) & ~(known[0] == written[:, None]).any(-1)
        inside = torch.isin(known[0], members)
        parts = torch.cat(
            [known[1].masked_fill(~inside, -torch.inf), sampled[:, None].masked_fill(~apart[:, None], -torch.inf)], -1
        )
        total = parts.logsumexp(-1)
        renamed = torch.isin(tokens, members[1:])
        sampled = torch.where(tokens == self.event.token, total, sampled.masked_fill(renamed, self.event.rest))
        return Scores(sampled, top=self._merged(*known, inside, total, members))

    def _merged(
        self, tokens: Tensor, logprobs: Tensor, inside: Tensor, total: Tensor, members: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the likeliest tokens with the event as one of them, (n, K) each, in order."""
        assert self.event is not None
        # What the event stands for takes the names of its other tokens, which do not occur any more; if all of it is
        # known, there is a name too few, and the one that is left over goes.
        number = inside.cumsum(-1) - 1
        names = torch.cat([members[1:], members[:1]])
        rest = torch.where(number < len(members) - 1, self.event.rest, -torch.inf)
        tokens = tokens.where(~inside, names[number.clamp(min=0)])
        logprobs = logprobs.where(~inside, rest)
        ids = torch.cat([torch.full_like(total[:, None], self.event.token, dtype=torch.long), tokens], -1)
        best, order = torch.cat([total[:, None], logprobs], -1).sort(dim=-1, descending=True, stable=True)
        k = tokens.shape[-1]
        return ids.gather(-1, order)[:, :k], best[:, :k]


#: What a model thinks of some positions.
Opinion = HiddenStates | KnownLogprobs


def micro_batches(rollout: Rollout, rows: Tensor, max_tokens: int, padded: bool = False) -> list[Tensor]:
    """Cut rows into micro-batches of at most ``max_tokens`` tokens each.

    Rows of similar length come together, so that little is padded. A row that is longer than the budget is alone.

    Args:
        rollout: The rollout that the rows are of.
        rows: Numbers of the rows to spread, (r,).
        max_tokens: Tokens of a micro-batch, prompts included.
        padded: Whether the rows will be padded; then padding counts.

    Returns:
        Row numbers of each micro-batch.
    """
    lengths = (rollout.prompt_lengths + rollout.lengths)[rows]
    ordered = lengths.argsort(descending=True, stable=True)
    batches: list[list[int]] = []
    filled = longest = 0
    for index, length in zip(ordered.tolist(), lengths[ordered].tolist(), strict=True):
        filled += longest if padded else length
        if not batches or filled > max_tokens:
            batches.append([])
            filled = longest = length
        batches[-1].append(index)
    return [rows[torch.tensor(batch, device=rows.device)] for batch in batches]


def body(model: PreTrainedModel, rollout: Rollout) -> Tensor:
    """Run the body of a model over prompt and completion of each row; the head is left to the caller.

    Rows are packed where the model's attention can be told where each starts, and padded on the right otherwise, where
    a causal model cannot see.

    Args:
        model: A causal language model.
        rollout: B rows with N completion tokens.

    Returns:
        Hidden states that predict the completion tokens, in the order of `Rollout.completion`, (N, H).
    """
    predicting = rollout.prompt_lengths[rollout.row] - 1 + rollout.position
    if not packs(model):
        return _padded_body(model, rollout)[rollout.row, predicting]
    packing = rollout.packing
    read = rollout.prompt_lengths + rollout.lengths - 1  # the last token of a row predicts nothing
    row = torch.arange(len(rollout), device=packing.device).repeat_interleave(read)
    hidden: Tensor = model.base_model(
        input_ids=rollout.tokens[rollout.starts[row] + packing.positions][None],
        position_ids=packing.positions[None],
        # Transformers passes on whatever has four dimensions, instead of making a mask of all tokens by all tokens.
        attention_mask=torch.empty(1, 1, 1, 1, device=packing.device),
        packing=packing,
        use_cache=False,
    ).last_hidden_state[0]
    return hidden[packing.starts[rollout.row] + predicting]


def _padded_body(model: PreTrainedModel, rollout: Rollout) -> Tensor:
    """Return the hidden states of rows that are padded on the right, (B, width, H)."""
    totals = rollout.prompt_lengths + rollout.lengths
    column = torch.arange(int(totals.max()) - 1, device=totals.device)  # the last token of a row predicts nothing
    source = (rollout.starts[:, None] + column).clamp(max=len(rollout.tokens) - 1)
    ids = rollout.tokens[source].where(column < totals[:, None], 0)
    hidden: Tensor = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden


class LogprobError(NamedTuple):
    """How far the log-probs of one model are from those of another, in nats.

    Attributes:
        mean: Mean of the distances at the written tokens.
        largest: The largest of them.
    """

    mean: float
    largest: float


@torch.no_grad()
def logprob_error(model: PreTrainedModel, other: PreTrainedModel, rollout: Rollout) -> LogprobError:
    """Measure what the quantisation of a model costs, or any other difference between two of one vocabulary.

    Args:
        model: The one.
        other: The other.
        rollout: B rows with N completion tokens, at which both are asked.
    """
    one, two = (_written(each, rollout) for each in (model, other))
    distance = (one - two).abs()
    return LogprobError(distance.mean().item(), distance.max().item())


def _written(model: PreTrainedModel, rollout: Rollout) -> Tensor:
    """Return the log-prob of each completion token, (N,), row by row."""
    head = output_head(model)
    rows = [rollout.select(torch.tensor([row], device=rollout.lengths.device)) for row in range(len(rollout))]
    logprobs = [head.logits(body(model, row)).log_softmax(-1) for row in rows]
    tokens = rollout.completion[:, None]
    return torch.cat(logprobs).gather(-1, tokens).squeeze(-1)
