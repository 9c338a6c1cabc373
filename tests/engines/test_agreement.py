"""How far an engine's log-probs are from the model's own: not at all if it is right, and else as far as it is off."""

from dataclasses import replace

import pytest
import torch

from helpers import EOS, tiny_model
from stable_opd import Sampler, Temperature, TopP
from stable_opd.engines import Completions, InProcessEngine
from stable_opd.engines.agreement import RULED_OUT, Gap, gap
from stable_opd.samplers import TopK
from stable_opd.terminal import StopEvent
from writing import PROMPTS, full_forward, make_request


class NotTwice(Sampler):
    """Makes the token before less likely: it looks at what was written."""

    def forward(self, logits, prefix):
        return logits if prefix.shape[1] == 0 else logits.scatter_add(-1, prefix[:, -1:], -torch.ones(len(logits), 1))


@pytest.fixture(scope="module")
def model():
    return tiny_model(1)


def written(model, sampler, request):
    return InProcessEngine().generate(model, request, sampler)


SUM, RULED = StopEvent(EOS, (3, 5)), StopEvent(EOS, (3, 5), adds=False)
#: An event that adds up stands at a temperature of 1 only, where it is one thing to draw it or its parts.
CASES = [(Temperature(1.0), SUM)] + [
    (sampler, event) for sampler in (Temperature(1.0), TopP(0.8, 1.2), NotTwice()) for event in (None, RULED)
]


@pytest.mark.parametrize(("sampler", "event"), CASES, ids=str)
def test_no_gap_where_the_engine_is_right(sampler, event, model):
    request = replace(make_request(prompt=[0, 1, 2, 3] * 4, stop=(EOS, 3, 5), vocabulary=19), event=event)
    found = gap(model, request, sampler, written(model, sampler, request))
    assert 0 < found.mean <= found.largest < 1e-4


def test_gap_is_what_was_added(model):
    request = make_request(prompt=[0, 1, 2, 3] * 3)
    completions = written(model, Temperature(1.0), request)
    off = torch.full_like(completions.logprobs, -0.1)
    off[0] = -0.7
    found = gap(model, request, Temperature(1.0), replace(completions, logprobs=completions.logprobs + off))
    assert found.largest == pytest.approx(0.7, abs=1e-4)
    assert 0.1 < found.mean < 0.2


def test_token_that_the_sampler_ruled_out_counts_as_very_unlikely(model):
    """At the border of a sampler, rounding decides: one such token must not end a run."""
    request = make_request()
    found = gap(model, request, TopK(1), written(model, Temperature(1.0), request))
    assert 1 < found.mean < found.largest <= -RULED_OUT


def test_token_that_was_very_unlikely_and_is_said_to_be_has_no_gap(model):
    request, tokens = make_request(prompt=[0]), [3, 17, 5, 0, 11, 2, 9]
    logprobs = full_forward(model, Temperature(0.1), PROMPTS[0], tokens)
    assert logprobs.min() < 2 * RULED_OUT
    one = torch.ones(1, dtype=torch.long)
    found = gap(model, request, Temperature(0.1), Completions(torch.tensor(tokens), logprobs, one * 7, one))
    assert found.largest < 1e-3


def test_rows_without_tokens_have_no_gap(model):
    none = torch.zeros(0)
    nothing = Completions(none.long(), none, torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.long))
    assert gap(model, make_request(prompt=[0, 1]), Temperature(1.0), nothing) == Gap(0.0, 0.0)
