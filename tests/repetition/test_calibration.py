import random
import statistics

import pytest
import yaml

from helpers import make_rollout, write_jsonl
from stable_opd import ZlibRepetition
from stable_opd.repetition import Calibration, calibrate_zlib, compression_ratio, suggest_window
from stable_opd.repetition.calibration import calibrate, golden_texts, loops_caught, report

WORDS = ["".join(random.Random(seed).choices("abcdefghij", k=3 + seed % 5)) for seed in range(60)]


def prose(length: int, seed: int = 0) -> str:
    """Sixty words in random order."""
    return " ".join(random.Random(seed).choices(WORDS, k=length))[:length]


TEXTS = [prose(length, seed=length) for length in range(150, 400)]


@pytest.mark.parametrize("window", [100, 128, 300])
def test_threshold_is_twice_the_99th_percentile_of_the_tails(window):
    ratios = [compression_ratio(text[-window:]) for text in TEXTS if len(text) > window]
    found = calibrate_zlib(TEXTS, window)
    percentiles = statistics.quantiles(ratios, n=100, method="inclusive")
    assert found.ratio_p99 == pytest.approx(percentiles[98])
    assert found.ratio_p50 == pytest.approx(statistics.median(ratios))
    assert found.threshold == 2 * found.ratio_p99
    assert (found.window, found.texts) == (window, len(ratios))


def test_texts_as_long_as_the_window_are_not_used():
    texts = ["ab" * 50, prose(101)]
    found = calibrate_zlib(texts, 100)
    assert found.texts == 1
    assert found.ratio_p99 == found.ratio_p50 == compression_ratio(texts[1][-100:])


def test_tail_and_not_the_beginning_is_looked_at():
    assert calibrate_zlib(["a" * 1000 + prose(100)], 100).ratio_p50 == compression_ratio(prose(100))


def test_false_alarms_are_those_of_the_detector():
    """One golden text in 300 that are long enough is a loop; the 99th percentile does not see it."""
    texts = [*TEXTS[:200], *TEXTS[-99:], "so it is. " * 50, *["so it is. "] * 40]
    found = calibrate_zlib(texts, 128)
    assert found.false_alarms == 1 / 300
    flags = ZlibRepetition(found.window, found.threshold)(make_rollout([[1]] * 340, texts=texts)).repetitive
    assert flags.sum() == 1


def test_empty_texts_are_left_out():
    assert calibrate_zlib(["", *TEXTS, ""], 128) == calibrate_zlib(TEXTS, 128)


@pytest.mark.parametrize(
    ("lengths", "window"),
    [
        ([10_001, 10_001], 10_000),
        ([10_001, 10_001, 10_000], 10_000),
        ([10_001, 10_000, 10_000], 5_000),
        ([10_001, 33], 10_000),  # exactly half of them
        ([1_001, 33, 33], 32),
        ([300, 129, 129, 5], 128),
        ([39], 32),
    ],
)
def test_suggested_window_is_the_largest_that_half_of_the_texts_exceed(lengths, window):
    texts = ["x" * length for length in lengths]
    assert suggest_window(texts) == window
    assert calibrate_zlib(texts).window == window


def test_texts_too_short_for_any_window_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"more than 32 characters, but half of the 3 .*PeriodicSuffix.*\(.*has 50 "):
        suggest_window(["x" * 50, "x" * 32, "x" * 32])


def test_window_longer_than_all_texts_is_refused_with_one_that_works():
    texts = ["x" * 50, "x" * 40]
    with pytest.raises(ValueError, match=r"window=50 characters, but the longest of 2 has 50\. Give a window below 50"):
        calibrate_zlib(texts, 50)
    assert calibrate_zlib(texts, 49).texts == 1


@pytest.mark.parametrize("texts", [[], ["", ""]])
@pytest.mark.parametrize("window", [None, 10])
def test_no_texts_are_refused(texts, window):
    with pytest.raises(ValueError, match="some golden texts, but got none"):
        calibrate_zlib(texts, window)


def test_window_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least 1 character, but got 0"):
        calibrate_zlib(TEXTS, 0)


def test_loops_caught_are_those_that_the_detector_flags():
    pieces = [prose(40, seed) for seed in range(20)]
    loops = [piece[-16:] * 100 for piece in pieces]
    shares = set()
    for threshold in (2.0, 4.4, 4.6, 4.8, 20.0):
        flags = ZlibRepetition(128, threshold)(make_rollout([[1]] * 20, texts=loops)).repetitive
        shares.add(loops_caught(pieces, 128, threshold, 16))
        assert loops_caught(pieces, 128, threshold, 16) == flags.double().mean()
    assert len(shares) > 2  # some thresholds lie between the loops
    assert loops_caught(pieces, 128, 2.0, 16) == 1
    assert loops_caught(pieces, 128, 20.0, 16) == 0
    assert loops_caught(pieces, 128, 2.0, 41) == 0  # no text is that long


@pytest.fixture
def data(tmp_path):
    records = [{"prompt": "p", "golden": text, "other": "x" * 40, "number": 3} for text in TEXTS]
    return write_jsonl(tmp_path / "data.jsonl", [*records, {"prompt": "p", "golden": None, "other": "", "number": 4}])


def test_command_prints_the_numbers_and_a_recipe(data, capsys):
    calibrate([data])
    printed = capsys.readouterr().out
    found = calibrate_zlib(TEXTS)
    assert printed.strip() == report(TEXTS, found)
    numbers, _, snippet = printed.partition("\n\n")
    for value in (len(TEXTS), "256 characters", f"{found.ratio_p50:.2f}", f"{found.ratio_p99:.2f}", "0.00%"):
        assert str(value) in numbers
    assert "loops of   64 characters" in numbers
    assert "loops of  256 characters" not in numbers  # two copies do not fit
    repetition = yaml.safe_load(snippet)["model"]["repetition"]
    assert repetition["class_path"] == "ZlibRepetition"
    assert repetition["init_args"]["window"] == 256
    assert repetition["init_args"]["threshold"] == pytest.approx(found.threshold, abs=0.005)
    ZlibRepetition(**repetition["init_args"])


def test_command_takes_a_column_and_a_window(data, capsys):
    calibrate([data, "--column", "other", "--window", "39"])
    assert "window                           39 characters" in capsys.readouterr().out


def test_command_reads_the_testbed_and_says_that_its_texts_are_short(capsys):
    calibrate(["testbed:train"])
    printed = capsys.readouterr().out
    assert "window                           32 characters" in printed
    assert "PeriodicSuffix" in printed


def test_report_says_where_a_percentile_rests_on_little():
    few, many = TEXTS[-99:], TEXTS[-100:]
    assert "few" in report(few, calibrate_zlib(few, 128))
    assert "few" not in report(many, calibrate_zlib(many, 128))


def test_report_has_no_advice_where_loops_stand_out():
    texts = [prose(2000, seed) for seed in range(20)]
    printed = report(texts, calibrate_zlib(texts, 1000))
    assert "loops of  256 characters caught" in printed
    caught = Calibration(1000, 3.0, 100, 1.0, 1.5, 0.0)
    assert "PeriodicSuffix" not in report(texts, caught)


WRONG = {
    "no file": (["nowhere.jsonl"], "nowhere.jsonl"),
    "no column": (["DATA", "--column", "solution"], "'solution'"),
    "no text": (["DATA", "--column", "number"], "int"),
    "long window": (["DATA", "--window", "500"], "below 399"),
    "no number": (["DATA", "--window", "wide"], "invalid int"),
}


@pytest.mark.parametrize(("args", "what"), WRONG.values(), ids=WRONG)
def test_command_refuses_with_the_reason(args, what, data, capsys):
    with pytest.raises(SystemExit) as refused:
        calibrate([data if arg == "DATA" else arg for arg in args])
    assert refused.value.code == 2
    message = capsys.readouterr().err
    assert what in message
    assert "Traceback" not in message


def test_golden_texts_leave_out_the_empty_ones(data):
    assert golden_texts(data) == TEXTS
