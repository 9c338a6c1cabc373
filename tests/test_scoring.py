import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import VOCABULARY, make_rollout, tiny_model
from stable_opd.models import output_head
from stable_opd.scoring import KnownLogprobs, body, logprob_error, micro_batches
from stable_opd.terminal import NEGLIGIBLE, NEVER, StopEvent


@settings(deadline=None, max_examples=100)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 30)), min_size=1, max_size=12),
    max_tokens=st.integers(1, 120),
    padded=st.booleans(),
    data=st.data(),
)
def test_micro_batches_hold_every_row_once_within_the_budget(lengths, max_tokens, padded, data):
    rollout = make_rollout([[0] * completion for _, completion in lengths], [[1] * prompt for prompt, _ in lengths])
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), unique=True))
    chosen = torch.tensor(rows, dtype=torch.long)
    batches = [batch.tolist() for batch in micro_batches(rollout, chosen, max_tokens, padded)]
    assert sorted(row for batch in batches for row in batch) == sorted(rows)
    counts = [[sum(lengths[row]) for row in batch] for batch in batches]
    for count in counts:
        tokens = max(count) * len(count) if padded else sum(count)
        assert len(count) == 1 or tokens <= max_tokens
    # Nor is a batch closed while the next row still fits.
    for count, following in itertools.pairwise(counts):
        more = [*count, following[0]]
        assert (max(more) * len(more) if padded else sum(more)) > max_tokens


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "packed"])
def test_rows_of_similar_length_come_together(padded):
    """Two long and two short rows under a budget that takes the two short ones together, or two of any kind."""
    rollout = make_rollout([[0] * 19, [0], [0] * 18, [0, 0]])
    batches = [sorted(batch.tolist()) for batch in micro_batches(rollout, torch.arange(4), 40, padded)]
    assert batches == [[0, 2], [1, 3]]


def test_padding_counts_only_where_rows_are_padded():
    """10 + 2 + 2 + 2 tokens: they fit into 16, but four rows of 10 do not."""
    rollout = make_rollout([[0] * 9, [0], [0], [0]])
    sizes = {padded: [len(each) for each in micro_batches(rollout, torch.arange(4), 16, padded)] for padded in (0, 1)}
    assert sizes == {0: [4], 1: [1, 3]}


def test_a_large_budget_is_one_batch():
    rollout = make_rollout([[0] * 5, [0] * 3, [0] * 4])
    (batch,) = micro_batches(rollout, torch.arange(3), 10**6)
    assert sorted(batch.tolist()) == [0, 1, 2]


PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11]]
ROWS = [[1, 2], [3, 4, 5, 6, 7, 8], [9]]


@pytest.mark.parametrize("rows", [[0, 1, 2], [2, 0], [1]], ids=str)
def test_body_and_head_predict_each_completion_token_as_the_model_does_on_the_row_alone(rows):
    """Padding and neighbours must not matter, and the state before a token must be the one that predicts it."""
    model = tiny_model(4)
    rollout = make_rollout(ROWS, PROMPTS).select(torch.tensor(rows))
    with torch.no_grad():
        logprobs = output_head(model).logits(body(model, rollout)).log_softmax(-1)
        expected = []
        for row in rows:
            ids = torch.tensor([PROMPTS[row] + ROWS[row]])
            full = model(ids).logits[0].log_softmax(-1)
            expected.append(full[len(PROMPTS[row]) - 1 : -1])
    torch.testing.assert_close(logprobs, torch.cat(expected), rtol=1e-4, atol=1e-5)


def test_rows_without_a_completion_predict_nothing():
    model = tiny_model(4)
    with torch.no_grad():
        with_empty = body(model, make_rollout([[1, 2], [], [3]], [[5, 6], [7, 8, 9], [4]]))
        without = body(model, make_rollout([[1, 2], [3]], [[5, 6], [4]]))
    torch.testing.assert_close(with_empty, without, rtol=1e-4, atol=1e-5)


def test_gradient_reaches_every_parameter_of_the_body():
    model = tiny_model(4)
    states = body(model, make_rollout(ROWS, PROMPTS))
    (states * torch.randn(states.shape)).sum().backward()  # the sum of squares is what a norm keeps constant
    assert all(parameter.grad.abs().max() > 1e-3 for parameter in model.base_model.parameters())


def test_logits_of_a_bfloat16_model_are_float32_and_carry_no_gradient():
    model = tiny_model(4).bfloat16()
    states = body(model, make_rollout(ROWS, PROMPTS))
    assert states.requires_grad
    logits = output_head(model).logits(states[2:5])
    assert logits.shape == (3, VOCABULARY)
    assert logits.dtype == torch.float32
    assert not logits.requires_grad  # the gradient is computed by hand, tile by tile


def test_error_of_log_probs_is_that_at_the_written_tokens():
    one, other = tiny_model(4), tiny_model(5)
    distances = []
    with torch.no_grad():
        for prompt, row in zip(PROMPTS, ROWS, strict=True):
            logprobs = [model(torch.tensor([prompt + row])).logits[0].log_softmax(-1) for model in (one, other)]
            for place, token in enumerate(row, len(prompt) - 1):
                distances.append(abs(logprobs[0][place, token] - logprobs[1][place, token]).item())
    error = logprob_error(one, other, make_rollout(ROWS, PROMPTS))
    assert error.mean == pytest.approx(sum(distances) / len(distances), rel=1e-4)
    assert error.largest == pytest.approx(max(distances), rel=1e-4)
    assert logprob_error(one, one, make_rollout(ROWS, PROMPTS)) == (0, 0)


EVENTS = [StopEvent(3, (17, 0)), StopEvent(17, (3,), rest=NEGLIGIBLE)]


def known(logprobs, written, k, event):
    best, tokens = logprobs.topk(k, -1)
    sampled = logprobs.gather(-1, written[:, None]).squeeze(-1)
    return KnownLogprobs(written, sampled, tokens, best, event)


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("renamed", [True, False], ids=["the student has the event too", "the student has none"])
def test_event_of_known_logprobs_is_that_of_the_whole_vocabulary(event, renamed):
    """With all tokens known, reading them as one is what the streamed path does to a dense row."""
    logprobs = torch.randn(64, VOCABULARY, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    written = torch.arange(64) % VOCABULARY
    tokens = event.renamed(written) if renamed else written
    found = known(logprobs, written, VOCABULARY, event).at(slice(None), tokens)
    dense = event.read_(logprobs.clone())
    torch.testing.assert_close(found.sampled, dense.gather(-1, tokens[:, None]).squeeze(-1))
    best, ids = dense.topk(VOCABULARY - len(event.others), -1)
    torch.testing.assert_close(found.top(best.shape[-1])[0], ids)
    torch.testing.assert_close(found.top(best.shape[-1])[1], best)


@pytest.mark.parametrize(
    ("written", "tokens", "probs", "expected"),
    [
        ((5, 0.1), [1, 2], [0.5, 0.3], (0.1, [1, 2], [0.5, 0.3])),  # nothing of the event is known
        ((4, 0.1), [1, 2], [0.5, 0.3], (0.1, [1, 2], [0.5, 0.3])),  # only what was written, and others are likelier
        ((4, 0.1), [1, 2], [0.5, 0.05], (0.1, [1, 3], [0.5, 0.1])),  # only what was written, which is the likelier
        ((5, 0.1), [3, 4], [0.5, 0.3], (0.1, [3, 4], [0.8, 0.0])),  # all of it; the other name does not occur any more
        ((4, 0.15), [1, 3], [0.5, 0.2], (0.35, [1, 3], [0.5, 0.35])),  # one is written, one is among the likeliest
        ((4, 0.2), [1, 4], [0.5, 0.2], (0.2, [1, 3], [0.5, 0.2])),  # counted once, and by its new name
    ],
)
def test_event_of_what_is_known(written, tokens, probs, expected):
    """By hand, for the tokens 3 and 4 as one: the log-prob of the written token, and the two likeliest tokens."""
    event, token = StopEvent(3, (4,)), torch.tensor([written[0]])
    known_of = torch.tensor([written[1]]).log(), torch.tensor([tokens]), torch.tensor([probs]).log()
    found = KnownLogprobs(token, *known_of, event).at(slice(None), event.renamed(token))
    best, logprobs = found.top(2)
    assert best.tolist() == [expected[1]]
    torch.testing.assert_close(found.sampled.exp(), torch.tensor([expected[0]]))
    torch.testing.assert_close(logprobs.exp(), torch.tensor([expected[2]]))


def test_tokens_of_an_event_that_do_not_occur_have_no_probability():
    event = StopEvent(3, (4,))
    opinion = KnownLogprobs(
        torch.tensor([1]), torch.tensor([0.2]).log(), torch.tensor([[3, 4]]), torch.tensor([[0.5, 0.3]]).log(), event
    )
    assert opinion.at(slice(None), torch.tensor([1])).top(2)[1][0, 1].item() == NEVER


def test_an_event_that_rules_tokens_out_takes_the_whole_vocabulary():
    event = StopEvent(3, (4,), adds=False)
    with pytest.raises(ValueError, match="whole vocabulary is not known"):
        known(torch.zeros(1, 6).log_softmax(-1), torch.tensor([1]), 2, event).at(slice(None), torch.tensor([1]))
