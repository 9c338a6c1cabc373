"""No input makes a door do anything else than let it in or refuse it in words of this library.

    FUZZ_EXAMPLES=2000 python -m pytest tests/fuzz

tries other inputs every time, and many more; `python -m benchmarks.fuzz` is guided by the code that they reach.
"""

import json
import os
from unittest import mock

import pytest
import yaml
from benchmarks.fuzz import doors
from benchmarks.fuzz.doors import DOORS, Finding, enter
from benchmarks.fuzz.seeds import EXAMPLE, RECORD, SAMPLE, seeds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stable_opd.bench.spec import read

MANY = os.environ.get("FUZZ_EXAMPLES")
#: Inputs for each test; those doors behind which a process or a whole parser stands get fewer.
EXAMPLES, SLOW = int(MANY or 120), {"recipe": 16, "mathematics": 8, "examples": 2, "answers": 2, "metrics": 2}

SEEDS = seeds()
NASTY = (
    *(
        b"\xff\xfe",
        b"\0",
        b"\xe2\x80\xae",
        b"\xed\xa0\x80",
        b"\x1b[31m",
        b"NaN",
        b"1e999",
        b"-1",
        b"null",
        b"{}",
        b"[]",
    ),
    *(b'"', b"'", b",", b":", b"\r", b"\n", b"&a ", b"*a", b"!!int ", b"!!binary ", b"<<: ", b"9" * 5000, b"[" * 3000),
)


def fuzzed(door=""):
    count = max(1, EXAMPLES // SLOW.get(door, 1))
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=count, deadline=None, derandomize=MANY is None, database=None, suppress_health_check=quiet
    )


@st.composite
def damaged(draw, door):
    """A good or bad input with some of it cut, doubled, replaced or moved."""
    data = draw(st.sampled_from(SEEDS[door]))
    for _ in range(draw(st.integers(1, 3))):
        start, length = draw(st.integers(0, len(data))), draw(st.integers(0, 40))
        middle = data[start : start + length]
        new = draw(st.sampled_from((b"", middle * 2, middle[::-1], *NASTY)) | st.binary(max_size=8))
        data = data[:start] + new + data[start + length :] if draw(st.booleans()) else data[:start] + new
    return data


@pytest.mark.parametrize("door", DOORS)
def test_damaged_input_is_let_in_or_refused_in_words_of_ours(door):
    @fuzzed(door)
    @given(damaged(door))
    def check(data):
        enter(door, data)

    check()


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)


def with_odd_values(pattern):
    """The pattern with some of its values replaced by others of any type."""
    odd = st.dictionaries(st.sampled_from(sorted(pattern)), VALUES, min_size=1)
    return st.builds(lambda changes: pattern | changes, odd)


@pytest.mark.parametrize(("door", "pattern"), [("examples", EXAMPLE), ("answers", SAMPLE), ("record", RECORD)])
def test_objects_with_values_of_other_types_are_let_in_or_refused(door, pattern):
    @fuzzed(door)
    @given(st.lists(with_odd_values(pattern), min_size=1, max_size=3))
    def check(objects):
        lines = "".join(json.dumps(each) + "\n" for each in objects).encode()
        enter(door, lines + (b"\0" + doors.HEALTHY if door == "record" else b""))

    check()


SPEC = {
    **{"axes": {"a": {"x": {}, "y": {"model.divergence": "ReverseKL"}}}, "config": "recipe.yaml", "seeds": [0, 1]},
    **{"metrics": {"m": {"column": "val/accuracy", "reduce": "first", "above": 0.5}}, "exclude": [{"a": "x"}]},
    **{"baseline": {"a": "y"}, "plots": {"p": {"panels": {"t": "val/accuracy"}}}, "alpha": 0.1, "options": {}},
}


@st.composite
def with_odd_parts(draw, value):
    """A nested value in which something at any depth is replaced by a value of any type."""
    if isinstance(value, dict) and value and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(value)))
        name = key if draw(st.integers(0, 3)) else draw(st.text(max_size=6) | st.integers())
        return {**{each: value[each] for each in value if each != key}, name: draw(with_odd_parts(value[key]))}
    return draw(VALUES)


@fuzzed()
@given(with_odd_parts(SPEC))
def test_specs_with_odd_parts_are_let_in_or_refused(spec):
    enter("spec", yaml.safe_dump(spec, allow_unicode=True).encode("utf-8", "surrogatepass"))


def test_good_input_is_let_in():
    assert all(enter(door, SEEDS[door][0]) for door in DOORS)
    assert set(SEEDS) == set(DOORS)
    (doors.FOLDER / "spec.yaml").write_text(yaml.safe_dump(SPEC))
    assert read(doors.FOLDER / "spec.yaml").alpha == 0.1  # the pattern is a spec


def test_refusals_are_told_from_findings():
    """The net itself: a refusal by the library passes, and anything else is caught."""
    assert not enter("spec", b"axes: 5")
    foreign = (ValueError("Expected this, but it is raised by another file."), KeyError("a"), RecursionError("deep"))
    for error in foreign:
        with (
            mock.patch.dict(DOORS, {"spec": mock.Mock(side_effect=error)}),
            pytest.raises(Finding, match=type(error).__name__),
        ):
            enter("spec", b"")
    with (
        mock.patch("stable_opd.bench.spec._axes", side_effect=KeyError("lost")),
        pytest.raises(Finding, match=r"KeyError at spec\.py:"),
    ):
        enter("spec", SEEDS["spec"][0])
