"""One seed of every component on the embedded testbed: who collapses, when, and who does not.

    python -m benchmarks.components

runs every component in the recipe that collapses, the divergences and constraints also with golden mixture (a finished
run is not repeated), and writes
benchmarks/results/components.md and .csv. All components have their defaults, except where the table says so: a
testbed of 0.1 million parameters and answers of 96 tokens needs other weights and windows than a model of billions.
"""

import argparse
import os
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from benchmarks.runs import OPD, RESULTS, STABLE, Run, execute_all, onset, versions

from stable_opd.registry import components

STEPS = 100

#: What differs from the defaults, because the testbed's answers are short and its models tiny.
SETTINGS: dict[str, dict[str, str]] = {
    "ReferenceKL": {"weight": "0.1"},
    "ReferenceForwardKL": {"weight": "0.1"},
    "EstimatedReferenceKL": {"weight": "0.1"},
    "StopReferenceKL": {"weight": "1.0"},
    "EntropyFloor": {"weight": "0.1"},
    "LengthPenalty": {"weight": "1.0", "budget": "96", "buffer": "20"},
    "RepetitionPenalty": {"weight": "1.0"},
    "Unlikelihood": {"weight": "1.0"},
    "RatioPenalty": {"weight": "1.0"},
    "InitialWeights": {"weight": "0.1"},
    "PrefixMixture": {"prefix": "24"},
    "PrefixHorizon": {"horizon": "32"},
    "SpecialTokens": {"tokens": "[10]"},
    "AgreementCut": {"window": "8", "warm_up": "5", "samples": "256"},
    "TopK": {"k": "5"},
    # The vocabulary has 20 tokens, so the default of 32 would be all of them.
    "TeacherTopK": {"k": "5"},
    "TeacherTopKForwardKL": {"k": "5"},
    "StudentTopK": {"k": "5"},
    "TailBucketTopK": {"k": "5"},
    "HeadTailKL": {"k": "3"},
    "EntropyAware": {"k": "5"},
}

POLICIES = {
    "loops: mask": ("--model.policies.loops", "mask"),
    "loops: down_weight": ("--model.policies.loops", "down_weight"),
    "truncated: mask": ("--model.policies.truncated", "mask"),
    "truncated: down_weight": ("--model.policies.truncated", "down_weight"),
    "truncated: last_window (24)": ("--model.policies.truncated", "last_window", "--model.policies.window", "24"),
    "truncated: drop": ("--model.policies.truncated", "drop"),
}

#: With the clipped surrogate and its own advantage, so that the parts are compared on one divergence.
PARTS = {"transform": "model.divergence.transform", "baseline": "model.divergence.baseline"}

GOLDEN = ("-c", STABLE, "--model.constraints.anchor", "null")


@dataclass(frozen=True)
class Row:
    """One line of the table: a component, and the flags that put it into a recipe."""

    kind: str
    title: str
    flags: tuple[str, ...]

    @property
    def slug(self) -> str:
        """Name of its folder."""
        return "".join(each if each.isalnum() else "_" for each in f"{self.kind}_{self.title}")


def flags_of(place: str, name: str) -> tuple[str, ...]:
    """Return the flags that put a component at a place of the configuration."""
    given = [(f"--{place}.{key}", value) for key, value in SETTINGS.get(name, {}).items()]
    return (f"--{place}", name, *(each for pair in given for each in pair))


def rows() -> list[Row]:
    """Return everything that is run beside the two recipes."""
    places = {"divergence": "model.divergence", "constraint": "model.constraints.it", "weighting": "model.weighting.it"}
    places |= {"sampler": "model.sampler"} | PARTS
    found = []
    for kind, place in places.items():
        for name in components(kind):
            settings = ", ".join(f"{key} {value}" for key, value in SETTINGS.get(name, {}).items())
            found.append(Row(kind, f"{name} ({settings})" if settings else name, flags_of(place, name)))
    return found + [Row("policy", title, flags) for title, flags in POLICIES.items()]


def mixture_rows() -> list[Row]:
    """Return the mixtures; those that are made of others are left out."""
    names = [name for name in components("mixture") if name != "CombinedMixture"]
    return [Row("mixture", name, flags_of("model.mixture", name)) for name in names]


def runs() -> dict[tuple[str, str, str], Run]:
    """Return every run by kind, title and recipe."""
    short = ("--trainer.max_steps", str(STEPS), "--trainer.val_check_interval", "50")
    found = {}
    for row in rows():
        found[row.kind, row.title, "alone"] = Run(f"{row.slug}-alone", ("-c", OPD, *row.flags, *short))
        if row.kind in ("divergence", "constraint"):
            found[row.kind, row.title, "golden"] = Run(f"{row.slug}-golden", (*GOLDEN, *row.flags, *short))
    for row in mixture_rows():
        found[row.kind, row.title, "alone"] = Run(f"{row.slug}-alone", ("-c", OPD, *row.flags, *short))
    return found


def figures(run: Run, out: Path) -> dict[str, float]:
    """Return what the table says of one run."""
    train, val = run.curves(out)
    accuracy = val["val/accuracy"]
    return {"accuracy": accuracy.iloc[-1], "peak": accuracy.max(), "initial": accuracy.iloc[0], **onset(train)}


def cell(row: pd.Series) -> str:
    """Return one run in a few words."""
    if row.get("failed"):
        return "failed"
    if row["onset_steps"] == row["onset_steps"]:
        return f"collapses at {int(row['quiet_steps'] + row['onset_steps'])}, {row['accuracy']:.2f}"
    if row["max_truncation"] > 0.5:
        return f"truncated {row['max_truncation']:.2f}, {row['accuracy']:.2f}"
    return f"{row['accuracy']:.2f}"


def table(found: pd.DataFrame) -> str:
    """Return the Markdown page."""
    lines = []
    for kind in found.kind.unique():
        mine = found[found.kind == kind]
        recipes = [each for each in ("alone", "golden") if (mine.recipe == each).any()]
        heads = {"alone": "instead of, or added to, plain OPD", "golden": "and golden mixture"}
        lines += [
            f"| {kind} | " + " | ".join(heads[each] for each in recipes) + " |",
            "|---" * (len(recipes) + 1) + "|",
        ]
        for title in mine.title.unique():
            one = mine[mine.title == title].set_index("recipe")
            lines.append(f"| {title} | " + " | ".join(cell(one.loc[each]) for each in recipes) + " |")
        lines.append("")
    initial = found.initial.dropna().iloc[0]
    text = f"""\
    Greedy accuracy on 256 problems after {STEPS} steps, one seed; the initial student has {initial:.3f}. *Collapses at
    s*: from step s on truncation has exceeded 0.9 and repetition 0.3. *Truncated t*: it did not, but at some step more
    than half of the rollouts were cut. The standard error of an accuracy is about 0.03, and the onset of plain OPD
    varies by several steps from seed to seed: this says who collapses, and not who is best. Settings other than the
    defaults stand in parentheses.

    Made by `python -m benchmarks.components` with {versions()}; each run is
    `stable-opd fit -c {OPD} FLAGS --trainer.max_steps {STEPS} --trainer.val_check_interval 50 --seed_everything 0`, or
    `-c {STABLE} --model.constraints.anchor null` for the one with golden mixture; components.csv has every command.
    """
    return "\n".join(["# Every component on the embedded testbed", "", textwrap.dedent(text), *lines])


def main() -> None:
    """Run and summarise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side")
    parser.add_argument("--out", type=Path, default=Path("runs/components"), help="folder of the runs")
    options = parser.parse_args()
    out, work = options.out.resolve(), runs()
    failed = execute_all(list(work.values()), out, options.jobs)
    found = []
    for (kind, title, recipe), run in work.items():
        command = " ".join(run.command(Path("runs/components")))
        row = {"kind": kind, "title": title, "recipe": recipe, "command": command}
        reason = failed.get(run.name)
        found.append(row | ({"failed": reason} if reason else figures(run, out)))
    page = pd.DataFrame(found)
    page.to_csv(RESULTS / "components.csv", index=False, float_format="%.4f")
    (RESULTS / "components.md").write_text(table(page), encoding="utf-8")
    if failed:
        raise SystemExit("\n".join(failed.values()))


if __name__ == "__main__":
    main()
