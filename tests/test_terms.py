"""What is checked when a term is defined, and when it is named."""

import pytest

from stable_opd.divergences import Divergence
from stable_opd.terms import check_term_names


def test_unknown_support_is_refused_where_it_is_written():
    with pytest.raises(ValueError, match=r"Typo\.support to be one of \('sampled', 'topk', 'full'\), but got 'top'"):

        class Typo(Divergence):
            support = "top"

            def forward(self, evidence):
                raise AssertionError("never called")


@pytest.mark.parametrize("names", [["divergence"], ["anchor", "mixture"], ["mixture", "divergence"]])
def test_constraint_under_the_name_of_another_term_is_refused(names):
    with pytest.raises(ValueError, match=r"no other term has, but got '(divergence|mixture)'.*choose another key"):
        check_term_names("model.constraints", names, {"divergence", "mixture"})


def test_other_constraint_names_are_accepted():
    check_term_names("model.constraints", ["anchor", "entropy"], {"mixture"})


@pytest.mark.parametrize("name", ["kl.anchor", "keys", "type", "two words", ""])
def test_constraint_that_could_not_be_held_or_logged_is_refused(name):
    with pytest.raises(ValueError, match=r"plain words as keys of model\.constraints.*'anchor'"):
        check_term_names("model.constraints", ["entropy", name], {"divergence", "mixture"})
