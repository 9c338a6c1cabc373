"""The command `stable-opd report`."""

import argparse
import inspect
from collections.abc import Sequence
from pathlib import Path

from stable_opd.report.page import Picture, page
from stable_opd.report.panels import Heat, Panel, heats, panels
from stable_opd.report.runs import Run, read_runs
from stable_opd.report.verdict import COLLAPSED, Verdict, judge


def report(args: Sequence[str]) -> None:
    """Say what became of runs, when, and by which signal: one self-contained page with plots."""
    parser = argparse.ArgumentParser("stable-opd report", description=inspect.getdoc(report))
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a folder that `stable-opd fit` left, or one that holds such folders"
    )
    parser.add_argument("--out", default="report.html", help="file to write; the plots go into a folder beside it")
    chosen = parser.parse_args(args)
    try:
        runs = read_runs(chosen.runs)
        verdicts = [judge(run) for run in runs]
        for run, verdict in zip(runs, verdicts, strict=True):
            print(verdict.sentence if len(runs) == 1 else f"{run.name}: {verdict.sentence}")
        written = write(runs, verdicts, Path(chosen.out))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"Report written to {written}")


def write(runs: Sequence[Run], verdicts: Sequence[Verdict], out: Path) -> Path:
    """Write the page, and its plots into a folder beside it; return where the page is.

    Raises:
        ValueError: If matplotlib is missing.
    """
    try:
        from stable_opd.report import plots
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "matplotlib":
            raise
        raise ValueError(
            "Expected matplotlib for the plots, but got none. Install it with: pip install 'stable-opd[plot]'"
        ) from error
    shown: list[Panel | Heat] = [*panels(runs, marks(verdicts)), *heats(runs)]
    drawn = [Picture(what, plots.draw(what, plots.LIGHT), plots.draw(what, plots.DARK)) for what in shown]
    folder = out.with_name(f"{out.stem}-plots")
    folder.mkdir(parents=True, exist_ok=True)
    for picture in drawn:
        (folder / f"{picture.what.key}-light.png").write_bytes(picture.light)
        (folder / f"{picture.what.key}-dark.png").write_bytes(picture.dark)
    out.write_text(page(runs, verdicts, drawn), encoding="utf-8", errors="replace")
    return out


def marks(verdicts: Sequence[Verdict]) -> list[tuple[int, str]]:
    """Return the steps that are marked in the plots of a single run: the first sign and the collapse."""
    if len(verdicts) != 1:
        return []
    (verdict,) = verdicts
    found = [(verdict.first.change.start, "first sign")] if verdict.first else []
    if verdict.kind in ("collapsed", "recovered") and verdict.collapsed_at is not None:
        found.append((verdict.collapsed_at, f"truncation > {COLLAPSED:g}:"))
    return found
