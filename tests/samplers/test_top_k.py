import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TopKLogitsWarper

from helpers import chi_square_limit
from stable_opd import build
from stable_opd.samplers import Temperature, TopK, draw, likeliest

PREFIX = torch.zeros(1, 0, dtype=torch.long)


def naive_top_k(values: list[float], k: int) -> set[int]:
    """The tokens that fewer than k others are likelier than."""
    return {token for token, value in enumerate(values) if sum(other > value for other in values) < k}


@settings(deadline=None, max_examples=100)
@given(rows=st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=1, max_size=4), k=st.integers(1, 9))
def test_keeps_what_a_naive_implementation_keeps(rows, k):
    """With many ties, which are kept."""
    logits = torch.tensor(rows, dtype=torch.float32)
    for row, kept in zip(logits, likeliest(logits, k), strict=True):
        expected = naive_top_k(row.tolist(), k)
        assert kept.tolist() == [value if token in expected else -float("inf") for token, value in enumerate(row)]


@pytest.mark.parametrize("k", [1, 3, 29, 30, 50])
def test_equals_that_of_transformers(k):
    logits = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # some are equal
    torch.testing.assert_close(likeliest(logits, k), TopKLogitsWarper(k)(None, logits), rtol=0, atol=0)


def test_default_is_that_of_transformers():
    from transformers import GenerationConfig

    assert TopK().k == GenerationConfig._get_default_generation_params()["top_k"] == 50


def test_draws_follow_the_kept_tokens():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -0.5, 1.5, -2.0])
    count = 20_000
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0))
    tokens, _ = draw(TopK(4)(logits.expand(count, 8), PREFIX), uniform)
    kept = torch.tensor([1, 3, 4, 6])
    expected = logits[kept].softmax(-1) * count
    found = tokens.bincount(minlength=8)
    assert found.sum() == found[kept].sum()
    assert ((found[kept] - expected) ** 2 / expected).sum() < chi_square_limit(3)


def test_temperature_divides_the_logits_and_does_not_change_the_choice():
    logits = torch.tensor([[3.0, 1.0, 2.0, -4.0]])
    assert TopK(2, temperature=0.5)(logits, PREFIX).tolist() == [[6.0, -float("inf"), 4.0, -float("inf")]]


def test_temperature_zero_is_greedy():
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = draw(TopK(5, temperature=0.0)(logits, PREFIX), torch.full((6,), 0.99))
    assert tokens.tolist() == logits.argmax(-1).tolist()
    assert logprobs.tolist() == [0.0] * 6


def test_more_tokens_than_there_are_rule_nothing_out():
    logits = torch.randn(2, 9)
    torch.testing.assert_close(TopK(9)(logits, PREFIX), logits, rtol=0, atol=0)
    torch.testing.assert_close(TopK(100)(logits, PREFIX), logits, rtol=0, atol=0)


def test_inputs_are_left_alone():
    logits = torch.randn(2, 9)
    before = logits.clone()
    TopK(2)(logits, PREFIX)
    torch.testing.assert_close(logits, before, rtol=0, atol=0)


def test_never_claims_to_follow_the_student():
    assert not TopK(10**9).follows_student


def test_k_below_one_is_refused_with_what_to_use():
    with pytest.raises(ValueError, match=r"at least 1 token, but got 0\..*Temperature\(0\.7\)"):
        TopK(0, temperature=0.7)
    assert Temperature(0.7).temperature == 0.7


def test_negative_temperature_is_refused():
    with pytest.raises(ValueError, match="temperature of at least 0"):
        TopK(3, temperature=-1.0)


def test_request_tells_a_server_the_same_rule():
    assert TopK(20, temperature=0.6).request() == {"top_k": 20, "temperature": 0.6}


def test_is_known_by_its_name():
    assert build("sampler", "TopK", k=3).k == 3
