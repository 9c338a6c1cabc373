import pytest
import torch

from stable_opd import Temperature
from stable_opd.samplers import draw

LOGITS = torch.randn(10, 7, generator=torch.Generator().manual_seed(0))
PREFIX = torch.zeros(10, 0, dtype=torch.long)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_distribution_is_a_power_of_the_students(temperature):
    power = LOGITS.softmax(-1) ** (1 / temperature)
    expected = power / power.sum(-1, keepdim=True)
    torch.testing.assert_close(Temperature(temperature)(LOGITS, PREFIX).softmax(-1), expected)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24])
def test_temperature_zero_is_greedy_with_log_prob_zero(uniform):
    tokens, logprobs = draw(Temperature(0.0)(LOGITS, PREFIX), torch.full((10,), uniform))
    assert tokens.tolist() == LOGITS.argmax(-1).tolist()
    assert logprobs.tolist() == [0.0] * 10


def test_inputs_are_left_alone():
    before = LOGITS.clone()
    Temperature(0.0)(LOGITS, PREFIX)
    Temperature(0.5)(LOGITS, PREFIX)
    torch.testing.assert_close(LOGITS, before, rtol=0, atol=0)


def test_negative_temperature_is_refused():
    with pytest.raises(ValueError, match=r"at least 0 .*but got -0\.5"):
        Temperature(-0.5)


def test_request_tells_a_server_the_same_temperature():
    assert Temperature(0.7).request() == {"temperature": 0.7}
