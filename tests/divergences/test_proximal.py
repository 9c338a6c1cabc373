import math

import pytest
import torch

from stable_opd.divergences.proximal import ProximalTeacher, log_mixture


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.99])
def test_mixture_equals_its_definition(share):
    log_u = torch.linspace(-30, 30, 121, dtype=torch.float64)
    torch.testing.assert_close(log_mixture(log_u, share), (share * log_u.exp() + 1 - share).log())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_mixture_of_equals_is_exactly_zero_and_extremes_are_finite(dtype):
    found = log_mixture(torch.tensor([0.0, -1e4, 1e4], dtype=dtype), 0.2)
    assert found[0] == 0
    assert found[1].item() == pytest.approx(math.log(0.8), rel=1e-2)
    assert found[2].item() == pytest.approx(1e4 + math.log(0.2), rel=1e-2)


def test_advantage_is_that_of_the_log_ratio_of_the_target():
    p, q = torch.tensor([0.5, 0.1, 0.3]).double(), torch.tensor([0.1, 0.6, 0.3]).double()
    found = ProximalTeacher(0.25).advantage(p.log(), q.log(), None)
    torch.testing.assert_close(found, ((0.25 * q + 0.75 * p) / p).log())


def test_no_token_is_punished_by_more_than_the_students_own_share():
    found = ProximalTeacher().advantage(torch.tensor([0.0]), torch.tensor([-1e4]), None)
    assert found.item() == pytest.approx(math.log(0.8))


@pytest.mark.parametrize("share", [0.0, 1.0, -0.2, math.nan])
def test_share_outside_of_its_interval_is_refused(share):
    with pytest.raises(ValueError, match=rf"above 0 and below 1, but got {share}\. Use SampledReverseKL for 1"):
        ProximalTeacher(share)
