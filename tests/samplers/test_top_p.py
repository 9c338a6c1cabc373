import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stable_opd import TopP
from stable_opd.samplers import draw, nucleus

PREFIX = torch.zeros(1, 0, dtype=torch.long)


def naive_nucleus(probabilities: list[float], p: float) -> set[int]:
    """Take tokens from the likeliest on until their probabilities reach p."""
    kept, reached = set(), 0.0
    for token in sorted(range(len(probabilities)), key=lambda token: -probabilities[token]):
        kept.add(token)
        reached += probabilities[token]
        if reached >= p:
            break
    return kept


@settings(deadline=None, max_examples=100)
@given(seed=st.integers(0, 2**31), vocabulary=st.integers(1, 30), p=st.floats(0.01, 0.99))
def test_keeps_what_a_naive_implementation_keeps(seed, vocabulary, p):
    logits = 2 * torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for row, kept in zip(logits, nucleus(logits, p), strict=True):
        expected = naive_nucleus(row.softmax(-1).tolist(), p)
        assert {token for token in range(vocabulary) if kept[token] > -float("inf")} == expected


def test_reaching_p_exactly_is_enough():
    """Four equal logits have probabilities of a quarter without any rounding."""
    assert nucleus(torch.zeros(1, 4), 0.5).isfinite().sum().item() == 2


def test_kept_logits_are_unchanged():
    logits = torch.tensor([[3.0, 1.0, 2.0, -4.0]])
    assert nucleus(logits, 0.9).tolist() == [[3.0, -float("inf"), 2.0, -float("inf")]]


@pytest.mark.parametrize("p", [1e-6, 0.3])
def test_likeliest_token_always_stays(p):
    logits = torch.zeros(1, 5)
    logits[0, 3] = 0.1
    assert nucleus(logits, p).isfinite().sum(-1).tolist() == [2 if p > 0.21 else 1]
    assert nucleus(logits, p)[0, 3] == logits[0, 3]


def test_p_of_one_rules_nothing_out():
    """Rounding of the cumulative sum must not cut the tail off."""
    logits = 4 * torch.randn(20, 5000, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(TopP(1.0)(logits, PREFIX), logits, rtol=0, atol=0)


def test_temperature_comes_before_the_nucleus():
    logits = torch.tensor([[0.6, 0.3, 0.1]]).log()
    flat = TopP(0.65, temperature=10.0)(logits, PREFIX)  # nearly a third each, so two reach 0.65
    sharp = TopP(0.65, temperature=0.5)(logits, PREFIX)  # 36 : 9 : 1, so one does
    assert flat.isfinite().sum().item() == 2
    assert sharp.isfinite().sum().item() == 1
    torch.testing.assert_close(flat[0, :2], logits[0, :2] / 10)


def test_temperature_zero_is_greedy():
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    tokens, _ = draw(TopP(0.9, temperature=0.0)(logits, PREFIX), torch.full((6,), 0.99))
    assert tokens.tolist() == logits.argmax(-1).tolist()


def test_tokens_outside_the_nucleus_are_never_drawn():
    logits = torch.randn(400, 30, generator=torch.Generator().manual_seed(0))
    tokens, _ = draw(TopP(0.5)(logits, PREFIX), torch.linspace(0, 1 - 2**-24, 400))
    for token, row in zip(tokens.tolist(), logits, strict=True):
        assert token in naive_nucleus(row.double().softmax(-1).tolist(), 0.5)


@pytest.mark.parametrize("p", [0.0, -0.1, 1.1])
def test_p_outside_its_range_is_refused(p):
    with pytest.raises(ValueError, match=f"above 0 and at most 1, but got {p}"):
        TopP(p)


def test_negative_temperature_is_refused():
    with pytest.raises(ValueError, match="temperature of at least 0"):
        TopP(0.9, temperature=-1.0)


def test_request_tells_a_server_the_same_rule():
    assert TopP(0.8, temperature=0.6).request() == {"top_p": 0.8, "temperature": 0.6}
