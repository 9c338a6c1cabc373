import pytest
import torch

from helpers import total_of_one_process
from stable_opd.reduce import token_shares

LENGTHS = torch.tensor([3, 0, 1, 4])
LOSSES = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0])


def mean(aggregation, total=total_of_one_process):
    return (token_shares(LENGTHS, aggregation, total).repeat_interleave(LENGTHS) * LOSSES).sum().item()


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
    shares = token_shares(torch.tensor(lengths, dtype=torch.long), aggregation, total_of_one_process)
    assert shares.shape == (len(lengths),)
    assert shares.isfinite().all()


def test_shares_are_float32_whatever_the_lengths_are():
    assert token_shares(LENGTHS, "token_mean", total_of_one_process).dtype == torch.float32
    assert token_shares(LENGTHS, "sequence_mean", total_of_one_process).dtype == torch.float32
