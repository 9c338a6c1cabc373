"""Constraints in the streamed loss: closed form, autograd, tiles and whole rows give the same."""

from dataclasses import replace

import pytest
import torch

from constraints.common import ALL, FULL, STOP
from stable_opd.constraints import InitialWeights
from streams import compare, draw_evidence, draw_states

EVIDENCE, SHARES = draw_evidence()
EVIDENCE = replace(EVIDENCE, stop=STOP, tokens=EVIDENCE.tokens % 3)  # of three tokens, so that some are repeated


@pytest.mark.parametrize("softcap", [None, 2.0], ids=["no softcap", "softcap"])
@pytest.mark.parametrize("make", ALL.values(), ids=ALL.keys())
def test_streamed_loss_is_that_of_all_positions_at_once(make, softcap, tile):
    leaves = compare({"term": make(0.7)}, EVIDENCE, SHARES, draw_states(0, bias=True, softcap=softcap))
    assert all(leaf.grad.abs().max() > 1e-4 for leaf in leaves)


@pytest.mark.parametrize("make", FULL.values(), ids=FULL.keys())
def test_streamed_loss_is_the_same_by_autograd(make, tile):
    gradients = []
    for generic in (False, True):
        term = make(0.7)
        if generic:
            term.closed_form = lambda evidence, out: None
        leaves = compare({"term": term}, EVIDENCE, SHARES, draw_states(0, bias=True))
        gradients.append([leaf.grad for leaf in leaves])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_term_that_speaks_about_no_token_adds_nothing(tile):
    leaves = compare({"term": InitialWeights()}, EVIDENCE, SHARES, draw_states(0, bias=True))
    assert all(leaf.grad.abs().max() == 0 for leaf in leaves)


def test_all_constraints_at_once(tile):
    terms = {name: make(0.3) for name, make in ALL.items()}
    compare(terms, EVIDENCE, SHARES, draw_states(0, bias=True, softcap=4.0))
