"""Generation against the model's own `generate` and full forward passes."""

import pytest
import torch

from helpers import EOS, VOCABULARY, chi_square_limit, tiny_model
from stable_opd import Finish, Sampler, Temperature, TopP, TransformersEngine
from stable_opd.engines import Request
from stable_opd.randomness import key

PROMPTS = [[12, 3, 13, 5, 10, 2], [12, 1], [12, 7, 10, 2, 11, 9, 13, 1, 8], [12]]
BUDGET = 24


@pytest.fixture(scope="module")
def model():
    return tiny_model(1)


def request(prompt=(0, 1, 2, 3), budget=BUDGET, stop=(EOS,), keys=None, prompts=PROMPTS):
    keys = [key("test", row) for row in range(len(prompt))] if keys is None else keys
    return Request(prompts, list(prompt), keys, budget, list(stop))


ENGINE = TransformersEngine


def generate(model, sampler, **options):
    return ENGINE().generate(model, request(**options), sampler)


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


# Token 7 or 11 end some of the greedy rows early and leave others going on, whatever the random models like to say.
@pytest.mark.parametrize("stop", [(EOS,), (7, 11), tuple(range(0, VOCABULARY, 3))], ids=str)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_greedy_equals_the_models_own_generate_with_ragged_prompts(seed, stop):
    model = tiny_model(seed)
    assert rows(generate(model, Temperature(0.0), stop=stop)) == [own_generate(model, p, stop) for p in PROMPTS]


def test_greedy_rows_differ_from_each_other(model):
    """Otherwise the test above would not notice exchanged rows."""
    found = rows(generate(model, Temperature(0.0), stop=()))
    assert len({tuple(row) for row in found}) == len(PROMPTS)


@pytest.mark.parametrize("sampler", [Temperature(1.0), Temperature(0.6), TopP(0.8, 1.2)], ids=["t1", "t0.6", "top-p"])
def test_captured_log_probs_equal_a_full_forward(sampler, model):
    prompt = [2, 0, 1, 0, 3]
    completions = generate(model, sampler, prompt=prompt)
    start = 0
    for number, row in zip(prompt, rows(completions), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([PROMPTS[number] + row])).logits[0, len(PROMPTS[number]) - 1 : -1]
        expected = sampler(logits, torch.zeros(len(row), 0)).log_softmax(-1)[torch.arange(len(row)), row]
        found = completions.logprobs[start : start + len(row)]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        start += len(row)
    assert start == len(completions.tokens) == len(completions.logprobs)


@pytest.mark.parametrize("row", range(5))
def test_row_does_not_depend_on_what_else_is_in_the_batch(row, model):
    prompt = [2, 0, 1, 0, 3]
    together = generate(model, Temperature(1.0), prompt=prompt)
    alone = generate(model, Temperature(1.0), prompt=prompt[row : row + 1], keys=[key("test", row)])
    assert rows(alone)[0] == rows(together)[row]
    start = int(together.lengths[:row].sum())
    torch.testing.assert_close(
        alone.logprobs, together.logprobs[start : start + len(alone.logprobs)], rtol=0, atol=1e-5
    )
    assert alone.finish[0] == together.finish[row]


def test_rows_of_one_prompt_differ_by_their_keys_and_equal_keys_give_equal_rows(model):
    found = rows(generate(model, Temperature(1.0), prompt=[1, 1, 1, 1], keys=[5, 6, 5, 7], stop=()))
    assert found[0] == found[2]
    assert len({tuple(row) for row in found}) == 3


def test_rows_answer_the_prompt_that_they_name_in_any_order(model):
    found = rows(generate(model, Temperature(0.0), prompt=[3, 1, 3, 0], stop=()))
    expected = rows(generate(model, Temperature(0.0), prompt=[0, 1, 2, 3], stop=()))
    assert found == [expected[3], expected[1], expected[3], expected[0]]


@pytest.mark.parametrize("stop", [(7, 11), (EOS,)], ids=str)
def test_rows_end_with_their_first_stop_token_or_at_the_budget(stop, model):
    completions = generate(model, Temperature(1.0), prompt=[0, 1, 2, 3] * 8, stop=stop)
    for row, length, finish in zip(rows(completions), completions.lengths, completions.finish, strict=True):
        assert len(row) == length
        if finish == Finish.STOP:
            assert row[-1] in stop
            assert not set(row[:-1]) & set(stop)
        else:
            assert finish == Finish.LENGTH
            assert len(row) == BUDGET
            assert not set(row) & set(stop)
    assert set(completions.finish.tolist()) == {Finish.STOP, Finish.LENGTH}  # both cases have been seen


@pytest.mark.parametrize("budget", [1, 2])
def test_smallest_budgets(budget, model):
    completions = generate(model, Temperature(0.0), budget=budget, stop=())
    assert completions.lengths.tolist() == [budget] * 4
    assert rows(completions) == [own_generate(model, prompt, (), budget) for prompt in PROMPTS]


def test_stop_token_as_the_last_one_of_the_budget_is_a_stop(model):
    (first, second) = rows(generate(model, Temperature(0.0), prompt=[0], budget=2, stop=()))[0]
    assert first != second
    completions = generate(model, Temperature(0.0), prompt=[0], budget=2, stop=(second,))
    assert completions.finish.tolist() == [Finish.STOP]
    assert completions.lengths.tolist() == [2]


def test_first_tokens_follow_the_models_distribution(model):
    count = 4000
    keys = [key("chi", number) for number in range(count)]
    tokens = generate(model, Temperature(1.0), prompt=[0] * count, budget=1, keys=keys).tokens
    with torch.no_grad():
        expected = model(torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1) * count
    observed = tokens.bincount(minlength=VOCABULARY)
    assert expected.min() > 1
    assert ((observed - expected) ** 2 / expected).sum() < chi_square_limit(VOCABULARY - 1)


def test_sampler_sees_the_completion_of_each_row_so_far(model):
    class NoRepeats(Sampler):
        """Rules out what has been written before."""

        def forward(self, logits, prefix):
            return logits.scatter(-1, prefix, -float("inf"))

    completions = generate(model, NoRepeats(), prompt=[0, 1, 2, 3] * 3, budget=VOCABULARY - 1, stop=(EOS,))
    for row in rows(completions):
        assert len(set(row)) == len(row)
    assert completions.lengths.min() < completions.lengths.max()  # some left the batch before others


def test_model_is_left_as_it_was(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    completions = generate(model, Temperature(1.0))
    assert torch.rand(1) == expected  # nor is the global generator moved
    assert not completions.logprobs.requires_grad
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_bfloat16_model_writes_and_captures_float32_log_probs():
    completions = generate(tiny_model(1).bfloat16(), Temperature(1.0))
    assert completions.logprobs.dtype == torch.float32
    assert completions.logprobs.isfinite().all()
