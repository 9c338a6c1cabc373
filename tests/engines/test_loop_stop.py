"""Rows that repeat themselves are stopped early, against the definition of a loop word for word."""

import math
from dataclasses import replace

import pytest
import torch

from helpers import EOS, VOCABULARY, make_rollout, naive_repeated, tiny_model
from stable_opd import Finish, InProcessEngine, LoopStop, Temperature
from writing import make_request, rows

SHORT = LoopStop(max_period=5, min_copies=3, min_tokens=8, every=4)


def chain_model(following):
    """A model that always says the same after the same token."""
    model = tiny_model(1, hidden_size=32, head_dim=16, tie_word_embeddings=False)
    assert VOCABULARY <= 32
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(VOCABULARY, 32))
        model.lm_head.weight.zero_()
        for token in range(VOCABULARY):
            model.lm_head.weight[following(token), token] = 20.0
    return model


def write(model, loops, budget=40, sampler=None, **options):
    prompts = options.pop("prompts", [[12, 3, 13, 5], [4], [7, 10, 2], [2, 9]])
    request = make_request(budget=budget, prompts=prompts, **options)
    return InProcessEngine(loops).generate(model, request, sampler or Temperature(0.0))


def expected_end(row, finish, loops):
    """Where a row ends that would have been written like this to its end."""
    for length in range(loops.every, len(row) + (finish != Finish.STOP), loops.every):
        if naive_repeated(row[:length], loops.max_period, loops.min_copies, loops.min_tokens):
            return row[:length], Finish.LOOP
    return row, finish


CASES = {
    "short": SHORT,
    "late": replace(SHORT, every=16),
    "single tokens": replace(SHORT, max_period=1),
    "many copies": replace(SHORT, min_copies=6),
    "as long as the budget": replace(SHORT, every=40),
}


@pytest.mark.parametrize("loops", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("sampler", [Temperature(0.0), Temperature(0.25)], ids=["greedy", "cold"])
def test_rows_end_where_the_definition_says(loops, sampler):
    ends, prompt = [], [0, 1, 2, 3] * 4
    for seed in (1, 2, 3):
        model = tiny_model(seed)
        free = write(model, None, sampler=sampler, prompt=prompt)
        stopped = write(model, loops, sampler=sampler, prompt=prompt)
        for row, finish, short, reason in zip(
            rows(free), free.finish.tolist(), rows(stopped), stopped.finish.tolist(), strict=True
        ):
            assert (short, reason) == expected_end(row, finish, loops)
            ends.append(reason)
        assert_captured_as_free(free, stopped)
    assert Finish.LOOP in ends
    assert set(ends) != {Finish.LOOP}


def assert_captured_as_free(free, stopped):
    captured = zip(*(each.logprobs.split(each.lengths.tolist()) for each in (free, stopped)), strict=True)
    for whole, part in captured:
        torch.testing.assert_close(part, whole[: len(part)], rtol=0, atol=1e-4)


def test_a_loop_for_sure_is_stopped_and_a_sure_way_to_the_end_is_not():
    """2 -> 3 -> 2 for ever, and 4 -> 5 -> ... -> the stop token."""
    assert EOS > 12  # the way is longer than what is needed to see a loop
    model = chain_model(lambda token: {2: 3, 3: 2}.get(token, (token + 1) % VOCABULARY))
    completions = write(model, SHORT, prompts=[[2], [4], [5, 3]], prompt=[0, 1, 2])
    assert rows(completions)[0] == [3, 2] * 4
    assert rows(completions)[1] == list(range(5, EOS + 1))
    assert rows(completions)[2] == [2, 3] * 4
    assert completions.finish.tolist() == [Finish.LOOP, Finish.STOP, Finish.LOOP]
    assert write(model, None, prompts=[[2]], prompt=[0]).lengths.tolist() == [40]


def test_row_that_has_ended_is_not_stopped_for_what_would_come_after():
    """One row in twenty does not pay for moving the others, so it stays in the batch; and then it would loop."""
    model = chain_model(lambda token: {2: 3, 3: 2, EOS: 2}.get(token, (token + 1) % VOCABULARY))
    completions = write(model, SHORT, prompts=[[4], [EOS - 1]], prompt=[1] + [0] * 19)
    assert completions.finish.tolist() == [Finish.STOP] * 20
    assert completions.lengths.tolist() == [1] + [EOS - 4] * 19


@pytest.mark.parametrize("every", [4, 6, 8])
def test_rows_are_stopped_at_a_multiple_of_the_interval(every):
    model = chain_model(lambda token: token)
    completions = write(model, LoopStop(4, 3, 8, every), prompts=[[5]], prompt=[0])
    assert completions.finish.tolist() == [Finish.LOOP]
    assert completions.lengths.tolist() == [every * math.ceil(8 / every)]


def test_stopping_does_not_depend_on_what_else_is_in_the_batch():
    model, prompt = tiny_model(2), [0, 1, 2, 3] * 3
    together = write(model, SHORT, sampler=Temperature(0.25), prompt=prompt)
    keys = make_request(prompt).keys
    for row, (text, finish) in enumerate(zip(rows(together), together.finish.tolist(), strict=True)):
        alone = write(model, SHORT, sampler=Temperature(0.25), prompt=[prompt[row]], keys=[keys[row]])
        assert rows(alone) == [text]
        assert alone.finish.tolist() == [finish]
    assert {Finish.LOOP} < set(together.finish.tolist())


def test_by_default_loops_run_to_the_budget():
    model = chain_model(lambda token: token)
    completions = InProcessEngine().generate(model, make_request(budget=100, prompt=[0]), Temperature(0.0))
    assert completions.finish.tolist() == [Finish.LENGTH]
    assert completions.lengths.tolist() == [100]


def test_a_stopped_row_counts_as_truncated():
    rollout = make_rollout([[1], [1], [1]], finish=[Finish.STOP, Finish.LENGTH, Finish.LOOP])
    assert rollout.truncated.tolist() == [False, True, True]
