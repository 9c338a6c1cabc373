"""How far the log-probs of an engine are from those of the model that it runs."""

from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stable_opd.engines.base import Completions, Request
from stable_opd.models import output_head
from stable_opd.samplers.base import Sampler
from stable_opd.scoring import body
from stable_opd.types import Rollout

#: Rows that are looked at, and tokens of each, both evenly spread.
ROWS, TOKENS = 8, 64

#: Log-probs below count as this one, and so does a token that the sampler ruled out: at its border, rounding decides.
RULED_OUT = -10.0


class Gap(NamedTuple):
    """Distance between two log-probs of a written token, in nats.

    Attributes:
        mean: Over the tokens that were looked at.
        largest: The largest of them.
    """

    mean: float
    largest: float


@torch.no_grad()
def gap(model: PreTrainedModel, request: Request, sampler: Sampler, written: Completions) -> Gap:
    """Measure how far the log-probs of completions are from those of the model's own forward pass.

    Args:
        model: Who is said to have written them.
        request: What was asked for.
        sampler: How the tokens were drawn.
        written: What was generated.
    """
    ends = written.lengths.cumsum(0)
    found = []
    rows = written.lengths.nonzero().squeeze(1)
    for row in _spread(rows, ROWS).tolist():
        start, end = int(ends[row] - written.lengths[row]), int(ends[row])
        places = _spread(torch.arange(end - start), TOKENS)
        own = _own(model, request, sampler, row, written.tokens[start:end], places)
        theirs = written.logprobs[start:end][places.to(own.device)]
        found.append((own.clamp(min=RULED_OUT) - theirs.clamp(min=RULED_OUT)).abs())
    if not found:
        return Gap(0.0, 0.0)
    distances = torch.cat(found)
    return Gap(distances.mean().item(), distances.max().item())


def _spread(values: Tensor, most: int) -> Tensor:
    """Return at most so many of some values, evenly spread."""
    return values[torch.linspace(0, len(values) - 1, min(most, len(values)), device=values.device).round().long()]


def _own(
    model: PreTrainedModel, request: Request, sampler: Sampler, row: int, tokens: Tensor, places: Tensor
) -> Tensor:
    """Return the log-probs of some tokens of a row under the sampler's distribution, (places,)."""
    prompt = torch.tensor(list(request.prompts[request.prompt[row]]), device=tokens.device)
    one, none = torch.ones(1, dtype=torch.long, device=tokens.device), torch.zeros(0, device=tokens.device)
    read = Rollout(
        tokens=torch.cat([prompt, tokens]),
        prompt_lengths=one * len(prompt),
        lengths=one * len(tokens),
        prompt=one,
        author=one,
        finish=one,
        behaviour_logprobs=none,
        token_author=none,
        texts=[""],
        fields=[{}],
    )
    states = body(model, read)[places.to(tokens.device)]
    with torch.autocast(states.device.type, enabled=False):  # as in the loss
        logits = output_head(model, request.vocabulary).logits(states)
    event = request.event
    if event is not None and not event.adds:
        logits = event.merged(logits)
    own = []
    for place, each in zip(places.tolist(), logits, strict=True):
        logprobs = sampler(each[None], tokens[None, :place]).log_softmax(-1)[0]
        if event is not None and event.adds and tokens[place] == event.token:
            own.append(logprobs[[event.token, *event.others]].logsumexp(-1))
        else:
            own.append(logprobs[tokens[place]])
    return torch.stack(own)
