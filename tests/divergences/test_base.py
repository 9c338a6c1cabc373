import pytest
import torch

from helpers import make_evidence
from stable_opd import AdvantageDivergence, Author
from stable_opd.divergences import clipped_surrogate

# log ratio, advantage, clip, loss, gradient with respect to the log ratio: worked out by hand from PPO's definition.
BY_HAND = [
    (1.0, 2.0, 0.2, -2.0, -2.0),  # on policy: minus the advantage, and its policy gradient
    (1.0, -2.0, 0.2, 2.0, 2.0),
    (1.1, 2.0, 0.2, -2.2, -2.2),  # inside the interval
    (1.5, 2.0, 0.2, -2.4, 0.0),  # good token, already likelier than 1 + clip: no more push
    (0.5, 2.0, 0.2, -1.0, -1.0),  # good token that became unlikely: still pulled back
    (0.5, -2.0, 0.2, 1.6, 0.0),  # bad token, already below 1 - clip: no more push
    (1.5, -2.0, 0.2, 3.0, 3.0),  # bad token that became likelier: pushed with its full ratio
    (1.5, 2.0, 1.0, -3.0, -3.0),  # a wider interval
    (3.0, 0.0, 0.2, 0.0, 0.0),
]


@pytest.mark.parametrize(("ratio", "advantage", "clip", "loss", "gradient"), BY_HAND)
def test_clipped_surrogate_by_hand(ratio, advantage, clip, loss, gradient):
    log_ratio = torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()
    result = clipped_surrogate(log_ratio, torch.tensor([advantage], dtype=torch.float64), clip)
    result.sum().backward()
    assert result.item() == pytest.approx(loss)
    assert log_ratio.grad.item() == pytest.approx(gradient)


def test_clipped_surrogate_against_finite_differences():
    torch.manual_seed(0)
    log_ratio = torch.randn(64, dtype=torch.float64) / 2
    log_ratio = log_ratio[((log_ratio.exp() - 1).abs() - 0.2).abs() > 1e-3].requires_grad_()  # away from the kinks
    advantage = torch.randn(len(log_ratio), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: clipped_surrogate(x, advantage, 0.2), log_ratio)


@pytest.mark.parametrize("log_ratio", [-1e4, -200.0, 80.0])
@pytest.mark.parametrize("advantage", [-30.0, 30.0])
def test_clipped_surrogate_of_extreme_ratios_has_no_nan(log_ratio, advantage):
    leaf = torch.tensor([log_ratio], requires_grad=True)
    loss = clipped_surrogate(leaf, torch.tensor([advantage]), 0.2)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert leaf.grad.isfinite().all()


def advantage_of_one(**options):
    class One(AdvantageDivergence):
        """Every token is worth as much as its student's log-prob, which carries a gradient that must not be used."""

        def advantage(self, evidence):
            return evidence.student.sampled

    return One(**options)


def test_gradient_of_the_advantage_is_not_used():
    logprobs = torch.randn(4, 5, dtype=torch.float64).log_softmax(-1).requires_grad_()
    tokens = torch.tensor([0, 1, 2, 3])
    sampled = logprobs.detach().gather(1, tokens[:, None]).squeeze(1)
    advantage_of_one()(make_evidence(tokens, logprobs, behaviour=sampled)).loss.sum().backward()
    expected = torch.zeros(4, 5, dtype=torch.float64).scatter(1, tokens[:, None], -sampled[:, None])
    torch.testing.assert_close(logprobs.grad, expected)


def test_clip_of_the_constructor_is_used():
    """Ratio e = 2.7 on a good token is cut at 1 + clip."""
    logprobs = torch.full((1, 2), 0.5).log()
    evidence = make_evidence(torch.tensor([0]), logprobs, behaviour=logprobs[:, 0] - 1)
    good = -logprobs[0, 0].item()
    loss = advantage_of_one(clip=0.5)(evidence).loss.item()
    assert loss == pytest.approx(2.7182818 * good)  # the advantage is negative here, so nothing is cut
    flipped = make_evidence(torch.tensor([0]), -logprobs, behaviour=-logprobs[:, 0] - 1)
    assert advantage_of_one(clip=0.5)(flipped).loss.item() == pytest.approx(-1.5 * good)


def test_reports_minus_the_advantage_and_speaks_about_the_students_tokens_only():
    logprobs = torch.randn(3, 4).log_softmax(-1)
    evidence = make_evidence(torch.tensor([0, 1, 2]), logprobs, author=torch.tensor([0, 1, 0]))
    term = advantage_of_one()(evidence)
    torch.testing.assert_close(term.value, -evidence.student.sampled)
    assert not term.value.requires_grad
    assert term.where.tolist() == [True, False, True]
    assert evidence.written_by(Author.GOLDEN).tolist() == [False, True, False]
