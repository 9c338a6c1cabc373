import math

import pytest
import torch

from stable_opd.divergences.transforms import AdvantageTransform, ClipAdvantage, LowerClip, SoftLog, TanhAdvantage

ADVANTAGES = torch.tensor([-1e4, -20.0, -2.0, -0.5, 0.0, 0.5, 2.0, 20.0, 1e4], dtype=torch.float64)
ALL = [ClipAdvantage(), LowerClip(), TanhAdvantage(), SoftLog()]
each = pytest.mark.parametrize("transform", ALL, ids=lambda each: type(each).__name__)

BY_HAND = [
    (ClipAdvantage(), [-1, -1, -1, -0.5, 0, 0.5, 1, 1, 1]),
    (ClipAdvantage(5.0), [-5, -5, -2, -0.5, 0, 0.5, 2, 5, 5]),
    (LowerClip(), [-1.719961] * 3 + [-0.5, 0, 0.5, 2, 20, 1e4]),  # log(0.3) / 0.7
    (LowerClip(0.5), [2 * math.log(0.5)] * 3 + [-0.5, 0, 0.5, 2, 20, 1e4]),
    (TanhAdvantage(), [-1, -0.99932930, -0.37994896, -0.09966799, 0, 0.09966799, 0.37994896, 0.99932930, 1]),
    (SoftLog(), [-9.21044037, -3.04452244, -1.09861229, -0.40546511, 0, 0.40546511, 1.09861229, 3.04452244, 9.2104404]),
]


@pytest.mark.parametrize(("transform", "expected"), BY_HAND)
def test_by_hand(transform, expected):
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(transform(ADVANTAGES), expected, rtol=1e-6, atol=1e-7)


@each
def test_sign_and_order_stay_and_zero_is_zero(transform):
    found = transform(ADVANTAGES)
    assert (found.sign() == ADVANTAGES.sign()).all()
    assert (found.diff() >= 0).all()


@each
def test_every_entry_by_itself(transform):
    torch.manual_seed(0)
    advantages = 3 * torch.randn(4, 5)
    single = torch.stack([transform(entry) for entry in advantages.flatten()]).view(4, 5)
    torch.testing.assert_close(transform(advantages), single)


@each
def test_is_a_component_of_its_kind(transform):
    assert isinstance(transform, AdvantageTransform)
    assert transform.kind == "transform"


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
@pytest.mark.parametrize(("make", "name"), [(ClipAdvantage, "limit"), (TanhAdvantage, "scale")])
def test_bounds_that_are_not_positive_are_refused(make, name, value):
    with pytest.raises(ValueError, match=rf"Expected a {name} above 0, but got {value}\. Leave the transform out"):
        make(value)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, math.nan])
def test_share_outside_of_its_interval_is_refused(share):
    with pytest.raises(ValueError, match=rf"above 0 and below 1, but got {share}\. Leave the transform out"):
        LowerClip(share)
