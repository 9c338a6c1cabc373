import math
import random
import zlib

import pytest

from helpers import make_rollout
from stable_opd import ZlibRepetition
from stable_opd.repetition import compression_ratio, is_compressible

LOOP = "so x = 3 ; "


def noise(count: int, seed: int = 0) -> str:
    return "".join(random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz 0123456789", k=count))


def words(count: int) -> str:
    """Sixty words in random order: something that the levels compress differently."""
    rng = random.Random(0)
    known = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(60)]
    return " ".join(rng.choices(known, k=count))


def flags(detector, texts):
    return detector(make_rollout([[1, 2]] * len(texts), texts=texts)).repetitive.tolist()


@pytest.mark.parametrize("text", ["a", LOOP * 50, noise(3000), "naïve 解答 🙂" * 7, words(3000)])
def test_ratio_is_that_of_zlib_level_9_on_utf8_bytes(text):
    data = text.encode("utf-8")
    assert compression_ratio(text) == len(data) / len(zlib.compress(data, 9))


def test_levels_can_be_told_apart():
    """Otherwise the test above would not notice another level."""
    data = words(3000).encode()
    assert len({len(zlib.compress(data, level)) for level in (1, 6, 9)}) == 3


def test_ratio_of_an_empty_text_is_zero():
    assert compression_ratio("") == 0.0


def test_half_a_character_is_no_reason_to_fail():
    assert compression_ratio("ab\ud83d" * 100) > 1


def test_papers_rule_is_the_default():
    """L = 10000 characters, tau = 10."""
    detector = ZlibRepetition()
    assert (detector.window, detector.threshold) == (10_000, 10.0)


@pytest.mark.parametrize(
    ("text", "repetitive"),
    [
        ((LOOP * 1000)[:10_001], True),
        ((LOOP * 1000)[:10_000], False),  # strictly longer than L
        (noise(10_001), False),
        (noise(30_000), False),
        (noise(20_000) + LOOP * 1000, True),  # only the last L characters count
        (LOOP * 3000 + noise(10_000), False),
        ("", False),
    ],
    ids=["loop", "loop as long as L", "noise", "long noise", "ends in a loop", "began with a loop", "empty"],
)
def test_papers_rule_by_cases(text, repetitive):
    assert flags(ZlibRepetition(), [text]) == [repetitive]


def test_threshold_must_be_strictly_exceeded():
    tail = (LOOP * 1000)[:10_000]
    ratio = len(tail) / len(zlib.compress(tail.encode(), 9))
    text = "x" + tail
    assert not is_compressible(text, 10_000, ratio)
    assert is_compressible(text, 10_000, math.nextafter(ratio, 0))


def test_bytes_and_not_characters_are_counted():
    """Two Chinese characters in random order: 3 bytes and about 1 bit each, so bytes tell what characters do not."""
    text = "".join(random.Random(0).choices("解答", k=10_001))
    compressed = len(zlib.compress(text[-10_000:].encode(), 9))
    assert 10_000 / compressed < 10 < 30_000 / compressed
    assert flags(ZlibRepetition(), [text]) == [True]


def test_marks_cover_the_flagged_rows_last_tokens_in_proportion():
    """200 characters, of which the last 50 are looked at: the last quarter of 8 tokens, and nothing of the others."""
    rollout = make_rollout([list(range(8)), list(range(5)), [], [7]], texts=["ab" * 100, noise(200), "", "ab" * 100])
    found = ZlibRepetition(window=50, threshold=3.0)(rollout)
    assert found.repetitive.tolist() == [True, False, False, True]
    assert found.in_loop.tolist() == [False] * 6 + [True] * 2 + [False] * 5 + [True]


def test_marks_are_rounded_up():
    rollout = make_rollout([list(range(7))], texts=["ab" * 100])
    assert ZlibRepetition(window=50, threshold=3.0)(rollout).in_loop.sum().item() == 2  # 7 / 4 = 1.75
