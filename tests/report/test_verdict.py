import numpy as np
import pytest

from report.made import collapsing, noise, quiet, ramp, write_run
from stable_opd.report.runs import Curves, read_run
from stable_opd.report.verdict import ENOUGH, Levels, classify, find_signs, judge, levels


def verdict(tmp_path, train, validation=None):
    return judge(read_run(write_run(tmp_path / "run", train, validation), "run"))


def test_a_collapse_is_named_with_its_step_and_its_first_sign(tmp_path):
    found = verdict(tmp_path, collapsing(), {"val/accuracy": [0.35, 0.2, 0.0]})
    assert found.kind == "collapsed"
    assert found.first.signal.name == "the stop hazard"
    assert 31 <= found.first.change.start <= 34
    assert 48 <= found.collapsed_at <= 50
    assert found.sentence == (
        f"Collapsed: truncation passed 0.9 at step {found.collapsed_at}; the first sign was the stop hazard, which "
        f"began to fall at step {found.first.change.start}; validation accuracy went from 0.35 to 0.00."
    )


def test_a_quiet_run_is_stable_without_a_sign(tmp_path):
    found = verdict(tmp_path, quiet())
    assert (found.kind, found.first, found.collapsed_at) == ("stable", None, None)
    assert found.sentence.startswith("Stable: truncation stayed at 0, and the mean length went from 20 to 20 tokens;")


def test_a_bound_is_rounded_up(tmp_path):
    train = quiet() | {"train/truncation_rate": np.where(np.arange(100) < 50, 0.0, 0.011)}
    assert "truncation stayed at 0.02 or below" in verdict(tmp_path, train).sentence


def test_a_run_that_ends_on_the_way_up_is_inflating(tmp_path):
    train = {name: values[:48] for name, values in collapsing().items()}
    found = verdict(tmp_path, train)
    assert found.kind == "inflating"
    assert "; the first sign was the stop hazard" in found.sentence


def test_longer_answers_alone_are_inflation(tmp_path):
    found = verdict(tmp_path, quiet() | {"train/length_mean": ramp(100, 40, 20.0, 31.0)})
    assert found.kind == "inflating"
    assert "the mean length from 20 to 31 tokens" in found.sentence
    assert verdict(tmp_path, quiet() | {"train/length_mean": ramp(100, 40, 20.0, 29.0)}).kind == "stable"


def test_an_inflation_whose_height_is_over_says_how_high_it_was(tmp_path):
    train = quiet() | {"train/truncation_rate": np.interp(np.arange(100), [40, 50, 60, 70], [0, 0.7, 0.7, 0.2])}
    assert "truncation went from 0.00 to 0.20 after 0.70" in verdict(tmp_path, train).sentence


def test_a_run_that_came_back_has_recovered(tmp_path):
    rise, fall = ramp(100, 30, 0.0, 1.0), ramp(100, 60, 0.0, 1.0)
    found = verdict(tmp_path, quiet() | {"train/truncation_rate": rise - fall})
    assert found.kind == "recovered"
    assert found.collapsed_at is not None
    assert "truncation came back to 0.00 after 1.00" in found.sentence


def test_a_length_that_came_back_is_told_by_the_length(tmp_path):
    found = verdict(tmp_path, quiet() | {"train/length_mean": 20 + ramp(100, 30, 0, 40) - ramp(100, 60, 0, 40)})
    assert "the mean length came back to 20 tokens after 60" in found.sentence


@pytest.mark.parametrize(("count", "kind"), [(ENOUGH - 1, "too short to say"), (ENOUGH, "stable")])
def test_a_short_run_is_not_judged(tmp_path, count, kind):
    found = verdict(tmp_path, quiet(count))
    assert found.kind == kind
    assert (f"{count} training steps" in found.sentence) == (kind == "too short to say")


def test_nan_is_no_measurement(tmp_path):
    train = quiet()
    train["train/truncation_rate"][5:] = np.nan
    assert "Too short to say: 5 training steps" in verdict(tmp_path, train).sentence


def test_truncation_from_the_start_is_told_apart(tmp_path):
    found = verdict(tmp_path, quiet() | {"train/truncation_rate": np.full(100, 0.97)})
    assert found.kind == "collapsed"
    assert "0.97 in the first 10 steps already" in found.sentence


@pytest.mark.parametrize("seed", range(10))
def test_high_truncation_that_does_not_rise_is_stable(tmp_path, seed):
    """As in the paper, where healthy runs have a truncation of about a half."""
    found = verdict(tmp_path, quiet() | {"train/truncation_rate": noise(100, 0.5, 0.08, seed)})
    assert found.kind == "stable"


def test_unspecific_signals_are_never_the_first_sign(tmp_path):
    found = verdict(tmp_path, collapsing() | {"train/grad_norm": ramp(100, 12, 1.0, 9.0)})
    assert found.signs[0].signal.name == "the gradient norm"
    assert found.first.signal.name == "the stop hazard"


def test_advantage_counts_only_together_with_the_length():
    steps = np.arange(100.0)
    advantage, length = noise(100, -0.5, 0.02) + ramp(100, 30, 0, 0.4), noise(100, 20, 0.3, 1)
    name = "the mean advantage together with the length"

    def names(length):
        signs = find_signs(Curves(steps, {"train/advantage_mean": advantage, "train/length_mean": length}))
        return {sign.signal.name: sign.change.start for sign in signs}

    assert name not in names(length)
    assert 48 <= names(length + ramp(100, 50, 0, 60))[name] <= 52


def test_without_rollouts_in_training_the_evaluations_decide(tmp_path):
    train = {"train/loss": noise(100)}
    stable = {"val/accuracy": [0.3, 0.4, 0.5], "val/truncation_rate": [0.0, 0.01, 0.0]}
    found = verdict(tmp_path, train, stable)
    assert found.kind == "stable"
    assert "by the evaluations alone, truncation stayed at 0.01 or below" in found.sentence
    risen = {"val/accuracy": [0.3, 0.4, 0.0], "val/truncation_rate": [0.0, 0.2, 1.0]}
    assert verdict(tmp_path, train, risen).kind == "collapsed"
    few = {"val/accuracy": [0.3, 0.4], "val/truncation_rate": [0.0, 1.0]}
    assert verdict(tmp_path, train, few).kind == "too short to say"


NONE = Levels(np.nan, np.nan, np.nan)


@pytest.mark.parametrize(
    ("truncation", "length", "repetition", "kind"),
    [
        (Levels(0, 0.95, 1.0), NONE, NONE, "collapsed"),
        (Levels(0, 0.5, 1.0), NONE, NONE, "collapsed"),
        (Levels(0, 0.0, 1.0), NONE, NONE, "recovered"),
        (Levels(0, 0.0, 0.9), NONE, NONE, "recovered"),
        (Levels(0, 0.1, 0.1), NONE, NONE, "inflating"),
        (Levels(0, 0.09, 0.09), NONE, NONE, "stable"),
        (Levels(0, 0, 0), Levels(10, 15, 15), NONE, "inflating"),
        (Levels(0, 0, 0), Levels(10, 14, 14), NONE, "stable"),
        (Levels(0, 0, 0), Levels(10, 10, 20), NONE, "recovered"),
        (Levels(0, 0, 0), NONE, Levels(0, 0.2, 0.2), "inflating"),
        (Levels(0.5, 0.2, 0.65), NONE, NONE, "recovered"),
        (Levels(0.5, 0.2, 0.55), NONE, NONE, "stable"),
        (Levels(0.5, 0.7, 0.7, noise=0.1), NONE, NONE, "stable"),
        (Levels(0.5, 0.7, 0.7, noise=0.05), NONE, NONE, "inflating"),
        (Levels(0, 0.05, 0.2, end=0.2), NONE, NONE, "inflating"),
        (Levels(0, 0.05, 0.2, end=0.05), NONE, NONE, "recovered"),
        (Levels(0, 0, 0), Levels(10, 16, 16, noise=3.0), NONE, "stable"),
    ],
)
def test_classes_by_their_thresholds(truncation, length, repetition, kind):
    assert classify(truncation, length, repetition) == kind


def test_levels_are_of_first_last_and_highest_measurements():
    found = levels(np.array([*[1.0] * 10, *[8.0] * 5, np.nan, *[2.0] * 10]))
    assert found == Levels(1.0, 2.0, 8.0, 0.0, 2.0)
