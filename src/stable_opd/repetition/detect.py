"""The command `stable-opd detect`: try a detector on a data set of one's own before a run relies on it."""

import csv
import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from stable_opd.models import load_tokenizer
from stable_opd.repetition.base import RepetitionDetector
from stable_opd.repetition.calibration import golden_texts
from stable_opd.repetition.trial import Trial


def detect(args: Sequence[str]) -> None:
    """Try a repetition detector on labelled loops and on golden texts: how late it is, and how often in vain."""
    from stable_opd.cli import Parser  # which knows this command

    parser = Parser(prog="stable-opd detect", description=inspect.getdoc(detect) or "")
    parser.add_argument("-c", "--config", action="config", help="YAML file with what stands below")
    parser.add_function_arguments(measure)
    parser.add_argument("--out", type=str | None, help="folder for config.yaml and metrics.csv; none only prints")
    config = parser.parse_args(list(args))
    chosen = parser.instantiate_classes(config).as_dict()
    out, _ = chosen.pop("out"), chosen.pop("config", None)
    try:
        figures = measure(**chosen)
    except ValueError as error:
        parser.error(str(error))
    print(table(figures))
    if out is not None:
        write(figures, Path(out))
        parser.save(config, str(Path(out) / "config.yaml"), overwrite=True)


def measure(
    repetition: RepetitionDetector,
    data: str = "testbed:validation",
    column: str = "golden",
    tokenizer: str = "testbed:student",
    texts: int = 64,
    periods: tuple[int, ...] = (1, 4, 16, 64),
    budget: int = 1024,
    every: int = 8,
    seed_everything: int = 0,
) -> dict[str, float]:
    """Return the figures of a detector on a data set.

    Args:
        repetition: The detector, as in model.repetition.
        data: What data.train.path takes: a file, a folder, a hub name or testbed:validation.
        column: Column that holds the golden texts.
        tokenizer: Folder or hub name of the student, whose tokens are repeated.
        texts: How many of the texts are looked at, from the first one on.
        periods: Tokens of the blocks that are repeated.
        budget: Tokens at which a loop is cut off, as by model.rollout.max_new_tokens.
        every: Tokens after which a growing text is looked at again.
        seed_everything: Seed of the places at which texts begin to loop.

    Raises:
        ValueError: If the data cannot be read, or no loop can be made of it.
    """
    if min(texts, budget, every, *periods) < 1:
        raise ValueError(
            f"Expected texts, periods, budget and every to be at least 1, but got {texts}, {list(periods)}, {budget} "
            f"and {every}. Change them."
        )
    words = load_tokenizer(tokenizer)
    golden = [words.encode(text, add_special_tokens=False) for text in golden_texts(data, column)[:texts]]
    if words.eos_token_id is None:
        raise ValueError(f"Expected {tokenizer} to have a stop token, but got none. Set eos_token in its tokenizer.")

    def decode(rows: Sequence[Sequence[int]]) -> list[str]:
        found: list[str] = words.batch_decode(list(map(list, rows)), skip_special_tokens=True)
        return found

    trial = Trial(golden, decode, words.eos_token_id, periods, budget, every, seed_everything)
    return trial.run(repetition)


def table(figures: Mapping[str, float]) -> str:
    """Return a line per figure."""
    width = max(map(len, figures))
    return "\n".join(f"{name:<{width}}  {value:.4g}" for name, value in figures.items())


def write(figures: Mapping[str, float], folder: Path) -> None:
    """Write the figures as a metrics.csv of one row, which `stable-opd bench` reads; a delay of nothing stays empty."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *figures])
        writer.writerow([0, *("" if math.isnan(value) else value for value in figures.values())])
