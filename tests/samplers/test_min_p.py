import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper

from helpers import chi_square_limit
from stable_opd import build
from stable_opd.samplers import MinP, draw, near_likeliest

PREFIX = torch.zeros(1, 0, dtype=torch.long)


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 2**31), vocabulary=st.integers(1, 30), min_p=st.floats(0.001, 1.0))
def test_keeps_what_the_definition_keeps(seed, vocabulary, min_p):
    logits = 2 * torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for row, kept in zip(logits, near_likeliest(logits, min_p), strict=True):
        probabilities = row.softmax(-1).tolist()
        least = min_p * max(probabilities)
        for token, probability in enumerate(probabilities):
            if abs(probability - least) > 1e-12 or probability == max(probabilities):  # rounding decides the rest
                assert (kept[token] > -float("inf")) == (probability >= least)


@pytest.mark.parametrize("min_p", [0.0, 0.02, 0.1, 0.7, 1.0])
def test_equals_that_of_transformers(min_p):
    logits = 3 * torch.randn(50, 40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(near_likeliest(logits, min_p), MinPLogitsWarper(min_p)(None, logits), rtol=0, atol=0)


def test_reaching_the_share_exactly_is_enough():
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    assert near_likeliest(logits, 0.5).isfinite().tolist() == [[True, True, False, False]]


def test_few_tokens_stay_where_the_student_is_sure_and_many_where_it_is_not():
    logits = torch.tensor([[8.0, 1.0, 0.5, 0.0], [0.3, 0.2, 0.1, 0.0]])
    assert MinP(0.1)(logits, PREFIX).isfinite().sum(-1).tolist() == [1, 4]


def test_temperature_comes_first():
    logits = torch.tensor([[0.6, 0.3, 0.1]]).log()
    flat = MinP(0.4, temperature=10.0)(logits, PREFIX)
    sharp = MinP(0.4, temperature=0.5)(logits, PREFIX)  # 36 : 9 : 1
    assert flat.isfinite().sum().item() == 3
    assert sharp.isfinite().sum().item() == 1
    torch.testing.assert_close(flat, logits / 10)


def test_draws_follow_the_kept_tokens():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -0.5, 1.5, -2.0])
    count = 20_000
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0))
    tokens, _ = draw(MinP(0.2)(logits.expand(count, 8), PREFIX), uniform)
    kept = torch.tensor([1, 3, 4, 6])  # within log 5 = 1.61 of the largest
    expected = logits[kept].softmax(-1) * count
    found = tokens.bincount(minlength=8)
    assert found.sum() == found[kept].sum()
    assert ((found[kept] - expected) ** 2 / expected).sum() < chi_square_limit(3)


@pytest.mark.parametrize("min_p", [0.0, 0.05, 1.0])
def test_temperature_zero_is_greedy(min_p):
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = draw(MinP(min_p, temperature=0.0)(logits, PREFIX), torch.full((6,), 0.99))
    assert tokens.tolist() == logits.argmax(-1).tolist()
    assert logprobs.tolist() == [0.0] * 6


def test_zero_rules_nothing_out():
    logits = 40 * torch.randn(5, 50)
    torch.testing.assert_close(MinP(0.0)(logits, PREFIX), logits, rtol=0, atol=0)


def test_inputs_are_left_alone():
    logits = torch.randn(2, 9)
    before = logits.clone()
    MinP(0.5)(logits, PREFIX)
    torch.testing.assert_close(logits, before, rtol=0, atol=0)


@pytest.mark.parametrize("min_p", [-0.1, 1.1])
def test_min_p_outside_its_range_is_refused(min_p):
    with pytest.raises(ValueError, match=f"min_p of at least 0 .* at most 1, but got {min_p}"):
        MinP(min_p)


def test_negative_temperature_is_refused():
    with pytest.raises(ValueError, match="temperature of at least 0"):
        MinP(temperature=-1.0)


def test_request_tells_a_server_the_same_rule():
    assert MinP(0.1, temperature=1.5).request() == {"min_p": 0.1, "temperature": 1.5}


def test_is_known_by_its_name():
    assert build("sampler", "MinP").min_p == 0.05
