"""Components that are wrong in one way, and what is said of them; all are local, so that none is registered."""

import re

import pytest

from stable_opd import (
    Author,
    Divergence,
)
from stable_opd.testing import check_component

DOCUMENTED = """Is one.

Source: of the tests.
"""


def failures(cls, **options):
    """What is said by the name of the check."""
    cls.__doc__ = cls.__doc__ or DOCUMENTED
    with pytest.raises(AssertionError) as found:
        check_component(cls, **options)
    return dict(re.findall(r"^  ([a-z ]+): (.*)$", str(found.value), re.MULTILINE))


def fails(cls, check, match, **options):
    found = failures(cls, **options)
    assert list(found) == [check], found
    assert re.search(match, found[check]), found[check]


def surprise(evidence):
    """A loss that is right: the written token's, with 0 where teacher and student agree."""
    return (evidence.student.sampled - evidence.teacher.sampled).square() / 2


def own(evidence):
    return evidence.written_by(Author.STUDENT)


def term(function, base=Divergence, **declared):
    """A class whose forward is a function of the evidence."""
    body = {"forward": lambda self, evidence: function(evidence), "__doc__": DOCUMENTED, **declared}
    return type("Made", (base,), body | {"__qualname__": "term.<locals>.Term"})
