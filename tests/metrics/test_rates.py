import pytest
import torch

from stable_opd.metrics import RepetitionRate, TruncationRate

BATCHES = [[True, False, False], [True], [False, False, False, True]]


@pytest.mark.parametrize("metric", [TruncationRate, RepetitionRate])
def test_share_over_all_rows_and_not_the_mean_of_batches(metric):
    rate = metric()
    for batch in BATCHES:
        rate.update(torch.tensor(batch))
    assert rate.compute().item() == pytest.approx(3 / 8)


@pytest.mark.parametrize("metric", [TruncationRate, RepetitionRate])
def test_forward_gives_the_batch_and_keeps_counting(metric):
    rate = metric()
    assert [rate(torch.tensor(batch)).item() for batch in BATCHES] == pytest.approx([1 / 3, 1.0, 1 / 4])
    assert rate.compute().item() == pytest.approx(3 / 8)


@pytest.mark.parametrize("metric", [TruncationRate, RepetitionRate])
def test_reset_forgets(metric):
    rate = metric()
    rate.update(torch.tensor([True, True]))
    rate.reset()
    rate.update(torch.tensor([False]))
    assert rate.compute().item() == 0.0


@pytest.mark.parametrize("metric", [TruncationRate, RepetitionRate])
def test_rate_of_no_rows_is_nan_and_not_an_error(metric):
    rate = metric()
    rate.update(torch.zeros(0, dtype=torch.bool))
    assert rate.compute().isnan()
