"""What the tests of engines and samplers let models write, and what transformers itself would have written."""

import torch

from helpers import EOS
from stable_opd.engines import Request
from stable_opd.randomness import key

PROMPTS = [[12, 3, 13, 5, 10, 2], [12, 1], [12, 7, 10, 2, 11, 9, 13, 1, 8], [12]]
BUDGET = 24


def make_request(prompt=(0, 1, 2, 3), budget=BUDGET, stop=(EOS,), keys=None, prompts=PROMPTS, vocabulary=None):
    keys = [key("test", row) for row in range(len(prompt))] if keys is None else keys
    return Request(prompts, list(prompt), keys, budget, list(stop), vocabulary)


def rows(completions):
    return [part.tolist() for part in completions.tokens.split(completions.lengths.tolist())]


def own_generate(model, prompt, stop, budget=BUDGET):
    """Greedy decoding by transformers, for one prompt without any padding."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=budget,
        eos_token_id=list(stop) or None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def full_forward(model, sampler, prompt, row, vocabulary=None):
    """Log-probs of a row's tokens under the sampler, from one forward over the whole text."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + row])).logits[0, len(prompt) - 1 : -1, :vocabulary].float()
    prefixes = torch.zeros(len(row), 0, dtype=torch.long)
    return sampler(logits, prefixes).log_softmax(-1)[torch.arange(len(row)), row]


def assert_captured(completions, model, sampler, prompt, vocabulary=None, atol=1e-4):
    """Hold the log-probs that were captured while writing against full forwards."""
    captured = completions.logprobs.split(completions.lengths.tolist())
    assert len(completions.lengths) == len(prompt)
    for number, row, found in zip(prompt, rows(completions), captured, strict=True):
        expected = full_forward(model, sampler, PROMPTS[number], row, vocabulary)
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def assert_equal_completions(found, expected, atol=1e-4):
    """Token for token; the log-probs as far as two orders of summation agree."""
    assert rows(found) == rows(expected)
    assert found.finish.tolist() == expected.finish.tolist()
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=0, atol=atol)
