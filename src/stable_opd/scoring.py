"""From rollouts to hidden states: micro-batches of rows, and one forward of a model's body over them."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stable_opd.models import Head
from stable_opd.types import Rollout


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """What a model thinks before its head: the states from which each completion token was predicted.

    Attributes:
        states: (N, H).
        head: Turns them into logits.
    """

    states: Tensor
    head: Head

    def logprobs(self, tile: slice) -> Tensor:
        """Return the log-probs of a tile of positions, (n, V) float32."""
        return torch.log_softmax(self.head.logits(self.states[tile]), -1)


def micro_batches(rollout: Rollout, rows: Tensor, max_tokens: int) -> list[Tensor]:
    """Cut rows into micro-batches of at most ``max_tokens`` tokens each, padding included.

    Rows of similar length come together, so that little is padded. A row that is longer than the budget is alone.

    Args:
        rollout: The rollout that the rows are of.
        rows: Numbers of the rows to spread, (r,).
        max_tokens: Budget of rows times longest row.

    Returns:
        Row numbers of each micro-batch.
    """
    lengths = (rollout.prompt_lengths + rollout.lengths)[rows]
    ordered = lengths.argsort(descending=True, stable=True).tolist()
    batches: list[list[int]] = []
    for index in ordered:
        longest = int(lengths[batches[-1][0]]) if batches else 0
        if not batches or longest * (len(batches[-1]) + 1) > max_tokens:
            batches.append([])
        batches[-1].append(index)
    return [rows[torch.tensor(batch, device=rows.device)] for batch in batches]


def body(model: PreTrainedModel, rollout: Rollout) -> Tensor:
    """Run the body of a model over prompt and completion of each row; the head is left to the caller.

    Rows are padded on the right, where a causal model cannot see, so no attention mask is needed.

    Args:
        model: A causal language model.
        rollout: B rows with N completion tokens.

    Returns:
        Hidden states that predict the completion tokens, in the order of `Rollout.completion`, (N, H).
    """
    totals = rollout.prompt_lengths + rollout.lengths
    width = int(totals.max()) - 1  # the last token of a row predicts nothing
    column = torch.arange(width, device=totals.device)
    source = (rollout.starts[:, None] + column).clamp(max=len(rollout.tokens) - 1)
    ids = rollout.tokens[source].where(column < totals[:, None], 0)
    hidden: Tensor = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    predicting = rollout.prompt_lengths[rollout.row] - 1 + rollout.position
    return hidden[rollout.row, predicting]
