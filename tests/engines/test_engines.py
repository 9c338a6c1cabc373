"""What every engine promises, against the model's own `generate` and full forward passes."""

import pytest
import torch

from helpers import EOS, VOCABULARY, chi_square_limit, tiny_model
from stable_opd import Finish, InProcessEngine, Sampler, Temperature, TopP, TransformersEngine
from stable_opd.randomness import key
from writing import BUDGET, PROMPTS, assert_captured, make_request, own_generate, rows

ENGINES = {"in process": InProcessEngine, "transformers": TransformersEngine}


@pytest.fixture(params=ENGINES.values(), ids=ENGINES.keys())
def generate(request):
    """A function that lets one of the engines write."""
    return make_generate(request.param)


def make_generate(engine):
    return lambda model, sampler, **options: engine().generate(model, make_request(**options), sampler)


@pytest.fixture(scope="module")
def model():
    return tiny_model(1)


# Token 7 or 11 end some of the greedy rows early and leave others going on, whatever the random models like to say.
@pytest.mark.parametrize("stop", [(EOS,), (7, 11), tuple(range(0, VOCABULARY, 3))], ids=str)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_greedy_equals_the_models_own_generate_with_ragged_prompts(seed, stop, generate):
    model = tiny_model(seed)
    assert rows(generate(model, Temperature(0.0), stop=stop)) == [own_generate(model, p, stop) for p in PROMPTS]


def test_greedy_rows_differ_from_each_other(model, generate):
    """Otherwise the test above would not notice exchanged rows."""
    found = rows(generate(model, Temperature(0.0), stop=()))
    assert len({tuple(row) for row in found}) == len(PROMPTS)


@pytest.mark.parametrize("sampler", [Temperature(1.0), Temperature(0.6), TopP(0.8, 1.2)], ids=["t1", "t0.6", "top-p"])
def test_captured_log_probs_equal_a_full_forward(sampler, model, generate):
    prompt = [2, 0, 1, 0, 3]
    assert_captured(generate(model, sampler, prompt=prompt), model, sampler, prompt)


@pytest.mark.parametrize("row", range(5))
def test_row_does_not_depend_on_what_else_is_in_the_batch(row, model, generate):
    prompt = [2, 0, 1, 0, 3]
    together = generate(model, Temperature(1.0), prompt=prompt)
    alone = generate(model, Temperature(1.0), prompt=prompt[row : row + 1], keys=[key("test", row)])
    assert rows(alone)[0] == rows(together)[row]
    start = int(together.lengths[:row].sum())
    torch.testing.assert_close(
        alone.logprobs, together.logprobs[start : start + len(alone.logprobs)], rtol=0, atol=1e-5
    )
    assert alone.finish[0] == together.finish[row]


def test_rows_of_one_prompt_differ_by_their_keys_and_equal_keys_give_equal_rows(model, generate):
    found = rows(generate(model, Temperature(1.0), prompt=[1, 1, 1, 1], keys=[5, 6, 5, 7], stop=()))
    assert found[0] == found[2]
    assert len({tuple(row) for row in found}) == 3


def test_rows_answer_the_prompt_that_they_name_in_any_order(model, generate):
    found = rows(generate(model, Temperature(0.0), prompt=[3, 1, 3, 0], stop=()))
    expected = rows(generate(model, Temperature(0.0), prompt=[0, 1, 2, 3], stop=()))
    assert found == [expected[3], expected[1], expected[3], expected[0]]


@pytest.mark.parametrize("stop", [(7, 11), (EOS,)], ids=str)
def test_rows_end_with_their_first_stop_token_or_at_the_budget(stop, model, generate):
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
def test_smallest_budgets(budget, model, generate):
    completions = generate(model, Temperature(0.0), budget=budget, stop=())
    assert completions.lengths.tolist() == [budget] * 4
    assert rows(completions) == [own_generate(model, prompt, (), budget) for prompt in PROMPTS]


def test_stop_token_as_the_last_one_of_the_budget_is_a_stop(model, generate):
    (first, second) = rows(generate(model, Temperature(0.0), prompt=[0], budget=2, stop=()))[0]
    assert first != second
    completions = generate(model, Temperature(0.0), prompt=[0], budget=2, stop=(second,))
    assert completions.finish.tolist() == [Finish.STOP]
    assert completions.lengths.tolist() == [2]


def test_first_tokens_follow_the_models_distribution(model, generate):
    count = 4000
    keys = [key("chi", number) for number in range(count)]
    tokens = generate(model, Temperature(1.0), prompt=[0] * count, budget=1, keys=keys).tokens
    with torch.no_grad():
        expected = model(torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1) * count
    observed = tokens.bincount(minlength=VOCABULARY)
    assert expected.min() > 1
    assert ((observed - expected) ** 2 / expected).sum() < chi_square_limit(VOCABULARY - 1)


def test_second_tokens_follow_the_models_distribution(model, generate):
    """Their marginal is enumerated over all first tokens."""
    count, prompt = 4000, PROMPTS[0]
    keys = [key("chi", number) for number in range(count)]
    completions = generate(model, Temperature(2.0), prompt=[0] * count, budget=2, keys=keys, stop=())
    with torch.no_grad():
        first = (model(torch.tensor([prompt])).logits[0, -1] / 2).softmax(-1)
        everything = torch.tensor([[*prompt, token] for token in range(VOCABULARY)])
        second = (model(everything).logits[:, -1] / 2).softmax(-1)
    expected = first @ second * count
    observed = completions.tokens.view(count, 2)[:, 1].bincount(minlength=VOCABULARY)
    assert expected.min() > 1
    assert ((observed - expected) ** 2 / expected).sum() < chi_square_limit(VOCABULARY - 1)


def test_sampler_sees_the_completion_of_each_row_so_far(model, generate):
    class NoRepeats(Sampler):
        """Rules out what has been written before."""

        def forward(self, logits, prefix):
            return logits.scatter(-1, prefix, -float("inf"))

    completions = generate(model, NoRepeats(), prompt=[0, 1, 2, 3] * 3, budget=VOCABULARY - 1, stop=(EOS,))
    for row in rows(completions):
        assert len(set(row)) == len(row)
    assert completions.lengths.min() < completions.lengths.max()  # some left the batch before others


def test_rows_leave_the_batch_at_different_times(model, generate):
    """Whoever has ended must not move the cache, the prefix or the random numbers of those who go on."""
    prompt = [0, 1, 2, 3] * 8
    together = generate(model, Temperature(1.0), prompt=prompt, stop=(7, 11))
    assert len(set(together.lengths.tolist())) > 8
    for row, text in enumerate(rows(together)):
        alone = generate(model, Temperature(1.0), prompt=prompt[row : row + 1], stop=(7, 11), keys=[key("test", row)])
        assert rows(alone)[0] == text
    assert_captured(together, model, Temperature(1.0), prompt)


def test_sampler_need_not_know_what_comes_after_a_stop_token(model, generate):
    class Grammar(Sampler):
        """Leaves nothing to say to those who have ended."""

        def forward(self, logits, prefix):
            ended = torch.isin(prefix, torch.tensor([7, 11])).any(1)
            return logits.masked_fill(ended[:, None], -float("inf"))

    found = generate(model, Grammar(), prompt=[0, 1, 2, 3] * 4, stop=(7, 11))
    expected = generate(model, Temperature(1.0), prompt=[0, 1, 2, 3] * 4, stop=(7, 11))
    assert rows(found) == rows(expected)
    assert found.logprobs.isfinite().all()


@pytest.mark.parametrize("broken", ["sampler", "model"])
def test_token_that_was_not_drawn_from_a_distribution_is_an_error(broken, generate):
    class Silent(Sampler):
        """Leaves nothing to say after two tokens."""

        def forward(self, logits, prefix):
            return logits if prefix.shape[1] < 2 else torch.full_like(logits, -float("inf"))

    model = tiny_model(1)
    if broken == "model":
        model.model.norm.weight.data[3] = float("nan")
    with pytest.raises(ValueError, match=r"no finite log-prob.*train/grad_norm"):
        generate(model, Silent() if broken == "sampler" else Temperature(1.0), stop=())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_tokens_beyond_the_vocabulary_are_never_drawn(tied, generate):
    padded, prompt = tiny_model(1, vocab_size=VOCABULARY + 40, tie_word_embeddings=tied), [0, 1, 2, 3] * 4
    free = generate(padded, Temperature(1.0), prompt=prompt)
    assert free.tokens.max() >= VOCABULARY
    completions = generate(padded, Temperature(1.0), prompt=prompt, vocabulary=VOCABULARY)
    assert completions.tokens.max() < VOCABULARY
    assert_captured(completions, padded, Temperature(1.0), prompt, VOCABULARY)


def test_model_is_left_as_it_was(model, generate):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attention = model.config._attn_implementation
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    completions = generate(model, Temperature(1.0))
    assert torch.rand(1) == expected  # nor is the global generator moved
    assert not completions.logprobs.requires_grad
    assert not model.training
    assert model.config._attn_implementation == attention
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_completions_can_take_part_in_autograd(model, generate):
    completions = generate(model, Temperature(1.0))
    assert not any(each.is_inference() for each in (completions.tokens, completions.logprobs, completions.lengths))
    assert not completions.finish.is_inference()
    weight = torch.ones_like(completions.logprobs, requires_grad=True)
    (weight * completions.logprobs).sum().backward()
    torch.testing.assert_close(weight.grad, completions.logprobs)
    loss = model(torch.tensor([PROMPTS[1] + rows(completions)[1]])).logits.logsumexp(-1).sum()
    (gradient,) = torch.autograd.grad(loss, model.model.norm.weight)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=["bfloat16", "autocast"])
def test_low_precision_is_near_float32(weights, generate):
    """Weights in bfloat16, or float32 weights under autocast: 8 bits of mantissa in every product."""
    exact = tiny_model(1, initializer_range=0.1).bfloat16().float()
    model, prompt = tiny_model(1, initializer_range=0.1).bfloat16().to(weights), [2, 0, 1, 0, 3]
    with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32):
        completions = generate(model, Temperature(1.0), prompt=prompt)
    assert completions.logprobs.dtype == torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {weights}
    assert_captured(completions, exact, Temperature(1.0), prompt, atol=0.05)
    with pytest.raises(AssertionError):  # and rounded it was
        assert_captured(completions, exact, Temperature(1.0), prompt, atol=1e-5)
