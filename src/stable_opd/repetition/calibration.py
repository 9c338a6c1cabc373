"""Which window and threshold of `ZlibRepetition` suit a data set: what its golden texts say."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stable_opd.repetition.compression import compression_ratio, is_compressible

#: Windows that are considered where none is given; the first is the paper's.
WINDOWS = (10_000, 5_000, 2_000, 1_000, 500, 256, 128, 64, 32)

#: How far the threshold is above what golden texts reach.
MARGIN = 2.0

#: Characters that the loops have on which a calibration is tried out, where two copies fit into the window.
PERIODS = (1, 4, 16, 64, 256)

#: Texts below which a 99th percentile is hardly more than the largest value.
FEW = 100


@dataclass(frozen=True)
class Calibration:
    """A window and a threshold, and what they were derived from.

    Attributes:
        window: Characters at the end of an answer that are looked at.
        threshold: Compression ratio above which they count as repetitive.
        texts: Golden texts that are longer than the window, from which the threshold was derived.
        ratio_p50: Median of their compression ratios.
        ratio_p99: 99th percentile of their compression ratios.
        false_alarms: Share of them that would be called repetitive.
    """

    window: int
    threshold: float
    texts: int
    ratio_p50: float
    ratio_p99: float
    false_alarms: float


def suggest_window(texts: Sequence[str]) -> int:
    """Return the largest of `WINDOWS` that at least half of the golden texts exceed.

    An answer that runs away becomes longer than most golden ones, so it fills such a window with its loop before the
    budget ends; and the threshold then rests on half of the texts at least. A larger window is the better one, because
    loops stand out the more, the longer they are.

    Raises:
        ValueError: If the texts are too short for all of them.
    """
    lengths = sorted(map(len, texts), reverse=True)
    middle = lengths[(len(lengths) - 1) // 2]
    for window in WINDOWS:
        if middle > window:
            return window
    raise ValueError(
        f"Expected half of the golden texts to have more than {WINDOWS[-1]} characters, but half of the {len(lengths)} "
        f"have at most {middle}. Compression tells little about so short a text: use PeriodicSuffix, or give a window "
        f"(the longest text has {lengths[0]} characters)."
    )


def calibrate_zlib(texts: Sequence[str], window: int | None = None) -> Calibration:
    """Choose the threshold of `ZlibRepetition` such that golden texts stay well below it.

        threshold = 2 * 99th percentile of |tail| / |zlib(tail)|,  tail = last `window` characters

    over the golden texts that are longer than the window.

    Args:
        texts: Golden texts; empty ones are left out.
        window: Characters at the end that are looked at; none takes `suggest_window`.

    Raises:
        ValueError: If no text is longer than the window; the message says which window would do.
    """
    texts = [text for text in texts if text]
    if not texts:
        raise ValueError("Expected some golden texts, but got none. Name the column that holds them.")
    if window is None:
        window = suggest_window(texts)
    if window < 1:
        raise ValueError(
            f"Expected a window of at least 1 character, but got {window}. Leave it out to have one chosen."
        )
    used = [text for text in texts if len(text) > window]
    if not used:
        longest = max(map(len, texts))
        raise ValueError(
            f"Expected golden texts of more than window={window} characters, but the longest of {len(texts)} has "
            f"{longest}. Give a window below {longest}, or leave it out to have one chosen."
        )
    ratios = torch.tensor([compression_ratio(text[-window:]) for text in used], dtype=torch.float64).sort().values
    p50, p99 = (_percentile(ratios, share) for share in (0.5, 0.99))
    threshold = MARGIN * p99
    false_alarms = sum(is_compressible(text, window, threshold) for text in used) / len(used)
    return Calibration(window, threshold, len(used), p50, p99, false_alarms)


def _percentile(ordered: torch.Tensor, share: float) -> float:
    # torch.quantile interpolates in the same way, but refuses large inputs.
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (place - low) * (ordered[high] - ordered[low]))


def loops_caught(texts: Sequence[str], window: int, threshold: float, period: int) -> float:
    """Return the share of texts whose last characters would be called repetitive if they went round for ever.

    Args:
        texts: Texts of at least ``period`` characters; shorter ones are left out.
        window: Characters at the end that are looked at.
        threshold: Compression ratio above which they count as repetitive.
        period: Characters of each text that are repeated.
    """
    pieces = [text[-period:] for text in texts if len(text) >= period]
    copies = window // period + 2
    return sum(is_compressible(piece * copies, window, threshold) for piece in pieces) / max(len(pieces), 1)


def calibrate(args: Sequence[str]) -> None:
    """Choose the window and the threshold of ZlibRepetition by the golden texts of a data set."""
    parser = argparse.ArgumentParser("stable-opd calibrate", description=calibrate.__doc__)
    parser.add_argument("data", help="what data.train.path takes: a file, a folder, a hub name or testbed:train")
    parser.add_argument("--column", default="golden", help="column that holds the golden texts (default: golden)")
    parser.add_argument("--window", type=int, help="characters at the end that are looked at; chosen if left out")
    parser.add_argument("--split", default="train", help="split of a folder or of a hub's dataset (default: train)")
    parser.add_argument("--subset", help="configuration of a hub's dataset")
    chosen = parser.parse_args(args)
    try:
        texts = golden_texts(chosen.data, chosen.column, chosen.split, chosen.subset)
        print(report(texts, calibrate_zlib(texts, chosen.window)))
    except ValueError as error:
        parser.error(str(error))


def golden_texts(path: str, column: str = "golden", split: str = "train", subset: str | None = None) -> list[str]:
    """Read the texts of one column; empty ones are left out.

    Args:
        path: What the data module takes.
        column: Column that holds the texts.
        split: Which split of a folder or of a hub's dataset.
        subset: Which configuration of a hub's dataset.

    Raises:
        ValueError: If the source cannot be read, has no such column, or has something else than text there.
    """
    # Here, because a detector can do without Lightning and the datasets library.
    from stable_opd.sources import Source, read_source

    table = read_source(Source(path, split, subset))
    if column not in table[0]:
        raise ValueError(
            f"Expected {path} to have a column {column!r} with the golden texts, but it has {list(table[0])}. Name "
            "the column with --column."
        )
    values = [value for row in table if (value := row[column])]
    odd = next((value for value in values if not isinstance(value, str)), None)
    if odd is not None:
        raise ValueError(
            f"Expected the column {column!r} of {path} to hold text, but got a {type(odd).__name__}. Name another "
            "column with --column."
        )
    return values


def report(texts: Sequence[str], found: Calibration) -> str:
    """Say what was found, how well loops stand out, and what to write into a recipe."""
    note = f" (few: the 99th percentile of less than {FEW} is nearly their maximum)" if found.texts < FEW else ""
    lines = [
        f"golden texts                     {len(texts)}",
        f"longer than the window           {found.texts}{note}",
        f"window                           {found.window} characters",
        f"compression ratio, median        {found.ratio_p50:.2f}",
        f"compression ratio, 99th perc.    {found.ratio_p99:.2f}",
        f"threshold                        {found.threshold:.2f}",
        f"golden texts called repetitive   {found.false_alarms:.2%}",
    ]
    some = texts[:: len(texts) // 200 + 1]  # enough for a percentage
    periods = [period for period in PERIODS if 2 * period <= found.window]
    caught = {period: loops_caught(some, found.window, found.threshold, period) for period in periods}
    lines += [f"loops of {period:>4} characters caught    {share:.0%}" for period, share in caught.items()]
    if min(caught.values(), default=0.0) < 0.5:
        lines.append("Loops escape this window. PeriodicSuffix finds them by their tokens, without a threshold.")
    return "\n".join(
        [
            *lines,
            "",
            "model:",
            "  repetition:",
            "    class_path: ZlibRepetition",
            "    init_args:",
            f"      window: {found.window}",
            f"      threshold: {round(found.threshold, 2)}",
        ]
    )
