import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import VOCABULARY, make_rollout, tiny_model
from stable_opd.models import output_head
from stable_opd.scoring import HiddenStates, body, micro_batches


@settings(deadline=None, max_examples=100)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 30)), min_size=1, max_size=12),
    max_tokens=st.integers(1, 120),
    data=st.data(),
)
def test_micro_batches_hold_every_row_once_within_the_budget(lengths, max_tokens, data):
    rollout = make_rollout([[0] * completion for _, completion in lengths], [[1] * prompt for prompt, _ in lengths])
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), unique=True))
    batches = [batch.tolist() for batch in micro_batches(rollout, torch.tensor(rows, dtype=torch.long), max_tokens)]
    assert sorted(row for batch in batches for row in batch) == sorted(rows)
    for batch in batches:
        longest = max(sum(lengths[row]) for row in batch)
        assert len(batch) == 1 or longest * len(batch) <= max_tokens


def test_rows_of_similar_length_come_together():
    """Two long and two short rows under a budget that takes the two short ones together, or two of any kind."""
    rollout = make_rollout([[0] * 19, [0], [0] * 18, [0, 0]])
    batches = [sorted(batch.tolist()) for batch in micro_batches(rollout, torch.arange(4), 40)]
    assert batches == [[0, 2], [1, 3]]


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
        logprobs = HiddenStates(body(model, rollout), output_head(model)).logprobs(slice(None))
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
    body(model, make_rollout(ROWS, PROMPTS)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.base_model.parameters())


def test_logprobs_of_a_tile_are_normalised_float32():
    model = tiny_model(4).bfloat16()
    with torch.no_grad():
        states = HiddenStates(body(model, make_rollout(ROWS, PROMPTS)), output_head(model))
        logprobs = states.logprobs(slice(2, 5))
    assert logprobs.shape == (3, VOCABULARY)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.exp().sum(-1), torch.ones(3))
