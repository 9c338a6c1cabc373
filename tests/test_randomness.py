import itertools
import random

import numpy as np
import torch

from stable_opd.randomness import global_seed, key, seed_step, uniforms


def test_a_key_follows_from_its_parts_and_nothing_else():
    first = key(0, 12, "evaluation", 3)
    torch.rand(5)
    assert key(0, 12, "evaluation", 3) == first


def test_keys_differ_when_any_part_order_or_type_differs():
    parts = [(0, 1, 2), (1, 0, 2), (0, 12), (0, 1, "2"), (0, 1), (0, 1, 2, 0), ("0", 1, 2), (0, 1, -2)]
    keys = [key(*each) for each in parts]
    assert len(set(keys)) == len(parts)


def test_keys_are_seeds_that_torch_accepts():
    assert all(0 <= key(number) < 2**63 for number in range(1000))


def test_uniforms_of_a_row_do_not_depend_on_the_other_rows():
    together = uniforms([7, 8, 9], 5)
    torch.testing.assert_close(uniforms([8], 5)[0], together[1], rtol=0, atol=0)
    assert together.shape == (3, 5)


def test_uniforms_leave_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    uniforms([1, 2], 4)
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)


def test_uniforms_are_float32_whatever_the_default_is():
    """Precision "bf16-true" sets the default, and 256 different numbers do not draw from a vocabulary."""
    expected = uniforms([7, 8], 50)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = uniforms([7, 8], 50)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_uniforms_over_keys_are_uniform():
    """Kolmogorov-Smirnov against the uniform distribution; 1.95 / sqrt(n) is passed with probability 0.999."""
    drawn = uniforms([key(0, step, row) for step, row in itertools.product(range(40), range(50))], 1).flatten()
    ordered = drawn.sort().values
    n = len(ordered)
    distance = (ordered - (torch.arange(n) + 0.5) / n).abs().max() + 0.5 / n
    assert distance < 1.95 / n**0.5
    assert drawn.min() >= 0
    assert drawn.max() < 1


def test_seed_is_the_one_that_seed_everything_leaves(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "17")
    assert global_seed() == 17
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert global_seed() == 0


def test_what_a_step_draws_does_not_depend_on_what_was_drawn_before():
    def drawn(step, rank):
        seed_step(step, rank)
        return torch.rand(()).item(), float(np.random.rand()), random.random()

    first = drawn(3, 0)
    assert drawn(3, 0) == first
    for step, rank in ((4, 0), (3, 1)):
        assert all(one != other for one, other in zip(drawn(step, rank), first, strict=True))
