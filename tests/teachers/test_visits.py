"""Teachers come when they are asked, and one at a time."""

from contextlib import contextmanager

import pytest

from helpers import make_rollout
from stable_opd import LocalTeacher
from stable_opd.teachers.visits import Visits


@pytest.fixture
def guests():
    events = []

    class Guest(LocalTeacher):
        """Says when it comes and goes."""

        @contextmanager
        def present(self):
            events.append(f"{self.path} comes")
            yield
            events.append(f"{self.path} goes")

        def score(self, rollout):
            events.append(self.path)
            if len(rollout) > 1:
                raise ValueError("too much")

    return Guest("a"), Guest("b"), events


def test_who_was_asked_last_stays(guests):
    one, two, events = guests
    visits, rollout = Visits(), make_rollout([[1]])
    with visits.open():
        for each in (one, one, two, one):
            visits.score(each, rollout)
    assert events == [*["a comes", "a", "a", "a goes"], *["b comes", "b", "b goes"], *["a comes", "a", "a goes"]]


def test_without_a_context_each_comes_for_itself_also_after_an_error(guests):
    one, _, events = guests
    visits, rollout = Visits(), make_rollout([[1]])
    with pytest.raises(ValueError, match="too much"), visits.open():
        visits.score(one, make_rollout([[1], [2]]))
    visits.score(one, rollout)
    visits.score(one, rollout)
    assert events[2:] == ["a comes", "a", "a goes"] * 2
