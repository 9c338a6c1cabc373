"""What is checked when a term is defined."""

import pytest

from stable_opd.divergences import Divergence


def test_unknown_support_is_refused_where_it_is_written():
    with pytest.raises(ValueError, match=r"Typo\.support to be one of \('sampled', 'topk', 'full'\), but got 'top'"):

        class Typo(Divergence):
            support = "top"

            def forward(self, evidence):
                raise AssertionError("never called")
