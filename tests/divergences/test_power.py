import math

import pytest
import torch

from stable_opd.divergences.power import PowerAdvantage


def test_by_hand():
    student, teacher = torch.tensor([0.5, 0.9, 0.2, 1e-6]).log(), torch.tensor([0.25, 1.0, 0.2, 1e-7]).log()
    found = PowerAdvantage(2.0).advantage(student, teacher, None)
    torch.testing.assert_close(found, torch.tensor([-0.1875, 0.19, 0.0, 0.0]), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("power", [0.1, 5.0, 500.0])
def test_between_minus_1_and_1_with_the_sign_of_the_log_ratio(power):
    torch.manual_seed(0)
    student, teacher = -3 * torch.rand(2, 200, dtype=torch.float64) ** 4
    found = PowerAdvantage(power).advantage(student, teacher, None)
    assert (found.abs() <= 1).all()
    assert (found * (teacher - student) >= 0).all()
    assert found.abs().max() > 0.1


def test_certain_of_different_tokens():
    found = PowerAdvantage().advantage(torch.tensor([0.0, -1e4]), torch.tensor([-1e4, 0.0]), None)
    assert found.tolist() == [-1.0, 1.0]


def test_a_small_power_is_the_log_ratio_times_the_power():
    student, teacher = torch.tensor([-1.0, -3.0, -2.0]).double(), torch.tensor([-2.0, -0.5, -2.0]).double()
    found = PowerAdvantage(1e-6).advantage(student, teacher, None) / 1e-6
    torch.testing.assert_close(found, teacher - student, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("power", [0.0, -1.0, math.nan])
def test_power_that_is_not_positive_is_refused(power):
    with pytest.raises(ValueError, match=rf"power above 0, but got {power}\. Use SampledReverseKL"):
        PowerAdvantage(power)
