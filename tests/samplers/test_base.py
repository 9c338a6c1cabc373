import pytest
import torch

from helpers import chi_square_limit
from stable_opd import Sampler
from stable_opd.samplers import draw

ALMOST_ONE = 1 - 2**-24  # the largest float32 below 1


def test_marginals_pass_a_chi_square_test():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, -0.5, 1.5, -2.0])
    count = 20_000
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0))
    tokens, _ = draw(logits.expand(count, 8), uniform)
    expected = logits.softmax(-1) * count
    assert ((tokens.bincount(minlength=8) - expected) ** 2 / expected).sum() < chi_square_limit(7)


def test_logprobs_are_those_of_the_drawn_tokens():
    logits = torch.randn(50, 11, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = draw(logits, torch.rand(50, generator=torch.Generator().manual_seed(1)))
    expected = torch.distributions.Categorical(logits=logits).log_prob(tokens)
    torch.testing.assert_close(logprobs, expected)


@pytest.mark.parametrize("logit", [-10.0, -40.0, -80.0])
def test_logprob_of_a_very_unlikely_and_of_a_certain_token(logit):
    """A probability of 1e-35 is a float32 like any other, and its logarithm is as exact."""
    logits = torch.tensor([[logit, 0.0, -float("inf"), logit]]).expand(2, 4)
    tokens, logprobs = draw(logits, torch.tensor([0.0, 0.5]))
    assert tokens.tolist() == [0, 1]
    expected = torch.distributions.Categorical(logits=logits.double()).log_prob(tokens)
    torch.testing.assert_close(logprobs, expected.float(), rtol=1e-6, atol=1e-7)


def test_each_token_gets_its_share_of_the_numbers():
    """Numbers that are evenly spaced fall on each token as often as it is likely, but for the two at its borders."""
    logits = 3 * torch.randn(40, generator=torch.Generator().manual_seed(0))
    logits[[0, 7, 39]] = -float("inf")
    count = 2**14
    tokens, _ = draw(logits.expand(count, 40), (torch.arange(count) + 0.5) / count)
    expected = logits.double().softmax(-1) * count
    assert (tokens.bincount(minlength=40) - expected).abs().max() <= 1.01


@pytest.mark.parametrize("uniform", [0.0, 0.5, ALMOST_ONE])
@pytest.mark.parametrize("nothing", [-float("inf"), float("nan")])
def test_where_nothing_can_be_drawn_the_logprob_tells(uniform, nothing):
    """The other rows are drawn as ever."""
    logits = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    expected, expected_logprobs = draw(logits, torch.full((3,), uniform))
    logits[1] = nothing
    tokens, logprobs = draw(logits, torch.full((3,), uniform))
    assert logprobs.isfinite().tolist() == [True, False, True]
    assert tokens[[0, 2]].tolist() == expected[[0, 2]].tolist()
    assert logprobs[[0, 2]].tolist() == expected_logprobs[[0, 2]].tolist()
    assert 0 <= tokens[1] < 7


def test_inverts_the_cumulative_distribution():
    logits = torch.tensor([[0.125, 0.5, 0.25, 0.125]]).log()
    uniform = [0.0, 0.12, 0.13, 0.6, 0.63, 0.87, 0.88, ALMOST_ONE]
    tokens, _ = draw(logits.expand(8, 4), torch.tensor(uniform))
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


# 1.0 is what a number close to 1 becomes where somebody rounds it.
@pytest.mark.parametrize("uniform", [0.0, 0.5, ALMOST_ONE, 1.0])
@pytest.mark.parametrize("never", [-float("inf"), -1e4])
@pytest.mark.parametrize("vocabulary", [5, 1000, 50_000])
def test_tokens_of_probability_zero_are_never_drawn(uniform, never, vocabulary):
    """Rounding of a long cumulative sum must not let a number close to 1 fall behind the last possible token."""
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn(8, vocabulary, generator=generator)
    ruled_out = torch.rand(8, vocabulary, generator=generator) < 0.5
    ruled_out[:, -2:] = True
    ruled_out[:, :2] = True
    ruled_out[:, 2] = False
    tokens, logprobs = draw(logits.masked_fill(ruled_out, never), torch.full((8,), uniform))
    assert not ruled_out.gather(1, tokens[:, None]).any()
    assert logprobs.isfinite().all()


def test_a_single_possible_token_is_drawn_whatever_the_number():
    logits = torch.full((3, 6), -float("inf"))
    logits[:, 4] = 7.0
    tokens, logprobs = draw(logits, torch.tensor([0.0, 0.3, ALMOST_ONE]))
    assert tokens.tolist() == [4, 4, 4]
    assert logprobs.tolist() == [0.0, 0.0, 0.0]


def test_a_row_does_not_depend_on_the_other_rows():
    logits = torch.randn(20, 9, generator=torch.Generator().manual_seed(0))
    uniform = torch.rand(20, generator=torch.Generator().manual_seed(1))
    together, _ = draw(logits, uniform)
    alone = torch.cat([draw(logits[row : row + 1], uniform[row : row + 1])[0] for row in range(20)])
    assert together.tolist() == alone.tolist()


def test_bfloat16_logits_are_drawn_from_in_float32():
    logits = torch.randn(4, 9).bfloat16()
    _, logprobs = draw(logits, torch.full((4,), 0.5))
    assert logprobs.dtype == torch.float32


def test_sampler_without_a_request_says_what_to_do():
    class Local(Sampler):
        """Leaves the logits alone."""

        def forward(self, logits, prefix):
            return logits

    with pytest.raises(ValueError, match=r"Local cannot be put into a request.*overrides `request`"):
        Local().request()
