import pytest
import torch

from helpers import total_of_one_process
from stable_opd.reduce import numerators

LENGTHS = torch.tensor([3, 0, 1, 4])
LOSSES = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0])


def shares(aggregation, total=total_of_one_process, weights=None, lengths=LENGTHS):
    rows = torch.arange(len(lengths)).repeat_interleave(lengths)
    weights = torch.ones(len(rows), dtype=torch.float64) if weights is None else torch.tensor(weights)
    found, count = numerators(rows, len(lengths), weights, aggregation)
    return found / total(count).clamp(min=1)


def mean(aggregation, total=total_of_one_process, weights=None):
    return (shares(aggregation, total, weights) * LOSSES).sum().item()


def test_token_mean_is_the_mean_over_all_tokens():
    assert mean("token_mean") == pytest.approx(255 / 8)


def test_sequence_mean_is_the_mean_over_rows_with_tokens_of_the_mean_over_each():
    assert mean("sequence_mean") == pytest.approx((7 / 3 + 8 / 1 + 240 / 4) / 3)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_denominators_are_those_of_all_processes(aggregation):
    """Two processes with the same rows: each of them contributes half of the mean."""
    assert mean(aggregation, lambda count: 2 * count) == pytest.approx(mean(aggregation) / 2)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]], ids=str)
def test_shares_of_a_batch_without_tokens_are_finite(aggregation, lengths):
    found = shares(aggregation, lengths=torch.tensor(lengths, dtype=torch.long))
    assert found.shape == (0,)
    assert found.isfinite().all()


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_shares_are_float32_whatever_the_weights_are(aggregation):
    assert shares(aggregation).dtype == torch.float32


MASK = [1.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0]  # the row of one token is masked as a whole


def test_masked_tokens_are_as_if_they_were_not_there():
    assert mean("token_mean", weights=MASK) == pytest.approx((1 + 4 + 16 + 32 + 128) / 5)
    assert mean("sequence_mean", weights=MASK) == pytest.approx(((1 + 4) / 2 + (16 + 32 + 128) / 3) / 2)


def test_down_weighted_tokens_add_less_and_no_other_adds_more():
    weights = [1.0, 1.0, 1.0, 0.25, 1.0, 1.0, 0.5, 1.0]
    assert mean("token_mean", weights=weights) == pytest.approx((255 - 6 - 32) / 8)
    assert mean("sequence_mean", weights=weights) == pytest.approx((7 / 3 + 2 + (240 - 32) / 4) / 3)


@pytest.mark.parametrize("aggregation", ["token_mean", "sequence_mean"])
def test_nothing_is_left_of_a_batch_that_is_masked_as_a_whole(aggregation):
    assert mean(aggregation, weights=[0.0] * 8) == 0
