import pytest

from stable_opd.guard import Ladder


def decisions(ladder, alarms):
    """What is done after which step."""
    found = [(step, ladder.decide(bool(alarm))) for step, alarm in enumerate(alarms)]
    return [each for each in found if each[1]]


def test_an_alarm_that_lasts_climbs_the_ladder_to_its_end():
    ladder = Ladder(raises=2, rollbacks=2, patience=3, calm=100)
    found = decisions(ladder, [0, 0] + [1] * 20)
    assert found[:5] == [(2, "raise"), (6, "raise"), (10, "roll back"), (14, "roll back"), (18, "stop")]


def test_each_way_back_raises_the_weights_once_more():
    ladder = Ladder(raises=1, rollbacks=2, patience=1, calm=100)
    levels = []
    for _ in range(6):
        ladder.decide(True)
        levels.append((ladder.level, ladder.returns))
    assert levels == [(1, 0), (1, 0), (2, 1), (2, 1), (3, 2), (3, 2)]


def test_without_an_alarm_nothing_is_done():
    assert decisions(Ladder(1, 1, 1, 1), [0] * 100) == []


def test_calm_lowers_the_weights_and_each_relapse_makes_it_wait_longer():
    ladder = Ladder(raises=1, rollbacks=1, patience=2, calm=4)
    alarms = [1] + [0] * 9 + [1] + [0] * 20 + [1] + [0] * 20
    found = decisions(ladder, alarms)
    assert found == [(0, "raise"), (4, "lower"), (10, "raise"), (18, "lower"), (31, "raise"), (43, "lower")]
    assert ladder.level == 0


def test_every_level_is_lowered_by_itself():
    ladder = Ladder(raises=2, rollbacks=0, patience=1, calm=3)
    assert decisions(ladder, [1, 0, 1] + [0] * 20) == [(0, "raise"), (2, "raise"), (8, "lower"), (14, "lower")]


def test_without_raises_and_rollbacks_it_stops_at_once():
    assert decisions(Ladder(0, 0, 1, 1), [0, 1]) == [(1, "stop")]


@pytest.mark.parametrize("cut", [0, 3, 8, 14])
def test_it_goes_on_from_its_state(cut):
    alarms = [0, 1, 1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    whole, first, second = (Ladder(1, 1, 2, 2) for _ in range(3))
    expected = decisions(whole, alarms)
    found = decisions(first, alarms[:cut])
    second.load_state_dict(first.state_dict())
    found += [(step + cut, action) for step, action in decisions(second, alarms[cut:])]
    assert found == expected
