"""Detectors on labelled loops: what the labels say, and what the figures are, for detectors that are known."""

import csv
import math
import random
import re
import statistics

import pytest
import yaml

from helpers import write_jsonl
from stable_opd import PeriodicSuffix, Repetition, RepetitionDetector
from stable_opd.cli import main
from stable_opd.repetition.trial import LOOPS, Trial, counting_loop, exact_loop, noisy_loop

TEXT = list(range(10, 30))


def trial(golden=(TEXT, TEXT[::-1]), periods=(1, 4), budget=40, every=1, seed=0):
    return Trial(golden, lambda rows: [" ".join(map(str, row)) for row in rows], 2, periods, budget, every, seed)


class Never(RepetitionDetector):
    """Finds nothing."""

    def forward(self, rollout):
        nothing = rollout.completion < 0
        return Repetition(nothing, rollout.lengths < 0)


class LongerThan(RepetitionDetector):
    """Takes every answer above a length for a loop, and all of its tokens; counts the stop token."""

    def __init__(self, length=24):
        super().__init__()
        self.length = length

    def forward(self, rollout):
        flagged = rollout.lengths > self.length
        return Repetition(flagged[rollout.row], flagged)


@pytest.mark.parametrize("period", [1, 4, 20])
@pytest.mark.parametrize("seed", range(5))
def test_exact_loop_is_a_beginning_and_copies_of_its_last_tokens(period, seed):
    loop = exact_loop(TEXT, period, 50, random.Random(seed))
    assert len(loop.tokens) == 50
    assert period <= loop.onset <= len(TEXT)
    assert loop.tokens[: loop.onset] == TEXT[: loop.onset]
    assert all(loop.tokens[place] == loop.tokens[place - period] for place in range(loop.onset, 50))
    assert loop.tokens[loop.onset - period] != loop.tokens[loop.onset - 1] or period == 1


def test_counting_loop_changes_one_place_of_every_copy():
    loop, exact = (make(TEXT, 5, 200, random.Random(3)) for make in (counting_loop, exact_loop))
    changed = [place for place, (a, b) in enumerate(zip(loop.tokens, exact.tokens, strict=True)) if a != b]
    assert loop.onset == exact.onset
    assert len({(place - loop.onset) % 5 for place in changed}) == 1
    assert len(changed) > (200 - loop.onset) / 5 * 0.7  # now and then the same token is drawn again
    assert min(changed) >= loop.onset


def test_noisy_loop_changes_about_one_token_in_twenty():
    loop, exact = (make(TEXT, 5, 5000, random.Random(3)) for make in (noisy_loop, exact_loop))
    changed = sum(a != b for a, b in zip(loop.tokens, exact.tokens, strict=True))
    assert loop.tokens[: loop.onset] == exact.tokens[: exact.onset]
    assert 0.03 < changed / 5000 < 0.07


def test_specimens_are_of_all_sorts_and_depend_on_the_seed_alone():
    found = trial(periods=(1, 4)).specimens()
    assert list(found) == ["exact-1", "exact-4", "counting-4", "noisy-4"]
    assert {name.partition("-")[0] for name in found} == set(LOOPS)
    assert found == trial(periods=(1, 4)).specimens()
    assert found != trial(periods=(1, 4), seed=1).specimens()
    assert found["exact-4"] == trial(periods=(4,)).specimens()["exact-4"]


def test_detector_that_finds_nothing():
    figures = trial().run(Never())
    assert figures["golden/flagged"] == figures["golden/flagged_early"] == figures["golden/marked"] == 0
    assert figures["loops/found"] == figures["exact-4/found"] == figures["loops/recall"] == 0
    assert math.isnan(figures["loops/delay"])
    assert math.isnan(figures["loops/precision"])


@pytest.mark.parametrize("every", [1, 3])
def test_delay_counts_from_the_first_repeated_token_to_the_first_look_that_flags(every):
    """The detector looks at lengths only, so delay and marks follow from where the loops begin."""
    setting = trial(every=every)
    loops = [loop for each in setting.specimens().values() for loop in each]
    delays = [next(n for n in range(every, 99, every) if loop.onset + n > 24) for loop in loops]
    figures = setting.run(LongerThan(24))
    assert figures["loops/found"] == 1
    assert figures["loops/delay"] == statistics.median(delays)
    assert figures["loops/recall"] == 1
    assert figures["loops/precision"] == pytest.approx(sum(40 - loop.onset for loop in loops) / (40 * len(loops)))


def test_false_alarms_on_whole_texts_and_while_they_are_written():
    """20 tokens and a stop token: a detector that starts at 20 flags the whole, and no text while it is written."""
    figures = trial().run(LongerThan(20))
    assert (figures["golden/flagged"], figures["golden/marked"], figures["golden/flagged_early"]) == (1, 1, 0)
    assert trial().run(LongerThan(19))["golden/flagged_early"] == 1


def test_periodic_suffix_is_as_late_as_its_condition_says():
    """Three copies of four tokens: the second and the third are complete after 8 repeated tokens."""
    figures = trial(periods=(4,)).run(PeriodicSuffix(max_period=8, min_copies=3, min_tokens=4))
    assert figures["exact-4/found"] == 1
    assert figures["exact-4/delay"] == 8
    assert figures["golden/flagged_early"] == 0


def test_prefixes_end_at_multiples_and_are_never_none():
    setting = trial(every=8)
    assert [len(each) for each in setting._prefixes(TEXT, 0)] == [8, 16]
    assert setting._prefixes(TEXT[:5], 0) == [TEXT[:5]]


@pytest.mark.parametrize(("periods", "budget"), [((21,), 40), ((4,), 20)])
def test_loops_that_cannot_be_made_are_refused(periods, budget):
    with pytest.raises(ValueError, match=r"20 to 20 tokens and a budget of .*Leave out long periods, or raise"):
        trial(periods=periods, budget=budget).specimens()


def test_command_prints_and_writes_what_the_trial_says(tmp_path, capsys):
    out = tmp_path / "out"
    args = ["--repetition", "PeriodicSuffix", "--repetition.min_tokens", "18", "--periods", "[6]", "--budget", "60"]
    main(["detect", *args, "--texts", "4", "--every", "1", "--out", str(out)])
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    (row,) = csv.DictReader((out / "metrics.csv").read_text().splitlines())
    assert row.pop("step") == "0"
    assert {name: f"{float(value or 'nan'):.4g}" for name, value in row.items()} == printed
    assert printed["exact-6/found"] == "1"
    assert printed["golden/flagged"] == "0"
    assert yaml.safe_load((out / "config.yaml").read_text())["periods"] == [6]
    main(["detect", "-c", str(out / "config.yaml"), "--out", str(tmp_path / "again")])
    assert (tmp_path / "again" / "metrics.csv").read_bytes() == (out / "metrics.csv").read_bytes()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--repetition", "PeriodicSufix"], "Did you mean 'PeriodicSuffix'"),
        (["--repetition", "PeriodicSuffix", "--budget", "10"], "Leave out long periods, or raise the budget"),
        (["--repetition", "PeriodicSuffix", "--every", "0"], "to be at least 1"),
        (["--repetition", "PeriodicSuffix", "--column", "nothing"], "Name the column with --column"),
    ],
)
def test_command_refuses_what_cannot_be_tried(args, message, capsys):
    with pytest.raises(SystemExit) as status:
        main(["detect", *args])
    assert status.value.code == 2
    assert message in capsys.readouterr().err


def test_data_and_tokenizer_are_the_users(tmp_path, capsys):
    path = write_jsonl(tmp_path / "data.jsonl", [{"solution": "1 + 2 = 3 ; # 3"}, {"solution": "2 + 2 = 4 ; # 4"}])
    args = ["--data", path, "--column", "solution", "--periods", "[2]", "--budget", "30", "--every", "1"]
    main(["detect", "--repetition", "PeriodicSuffix", "--repetition.min_tokens", "6", *args])
    assert re.search(r"^exact-2/found +1$", capsys.readouterr().out, re.MULTILINE)
