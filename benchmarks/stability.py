"""The ablation of the Stable-OPD paper on the embedded testbed: who collapses, when, and who does not.

    python -m benchmarks.stability

runs every variant with every seed (a finished run is not repeated), and writes tables and plots to benchmarks/results/.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from benchmarks.runs import OPD, RESULTS, STABLE, Run, execute_all, onset, versions


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        title: What the row is called.
        flags: The arguments of `stable-opd fit` that make it.
    """

    title: str
    flags: tuple[str, ...]


ANCHOR_OFF = ("--model.constraints.anchor", "null")
VARIANTS = {
    "opd": Variant("OPD", ("-c", OPD)),
    "kl": Variant("OPD + KL", ("-c", STABLE, "--model.mixture", "StudentOnly")),
    "mixture": Variant("OPD + mixture", ("-c", STABLE, *ANCHOR_OFF)),
    "stable": Variant("OPD + KL + mixture (Stable-OPD)", ("-c", STABLE)),
    "finetune": Variant("fine-tuning alone", ("-c", STABLE, *ANCHOR_OFF, "--model.rollout.samples_per_prompt", "0")),
    "control": Variant("OPD, teacher without runaways", ("-c", OPD, "--model.teacher.path", "testbed:control")),
}


def run_of(name: str, seed: int) -> Run:
    """Return one variant with one seed."""
    return Run(name, VARIANTS[name].flags, seed)


def curves(name: str, seed: int, out: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the training and the validation rows of one run."""
    return run_of(name, seed).curves(out)


def figures(name: str, seed: int, out: Path) -> dict[str, float]:
    """Return what the table says of one run; for the steps see `onset`."""
    train, val = curves(name, seed, out)
    accuracy = val["val/accuracy"].to_numpy()
    row = {
        "initial_accuracy": accuracy[0],
        "peak_accuracy": accuracy.max(),
        "final_accuracy": accuracy[-1],
        "final_sampled_accuracy": val["val/sampled/accuracy"].iloc[-1],
        "final_val_truncation": val["val/truncation_rate"].iloc[-1],
    }
    if "train/truncation_rate" not in train:
        return row
    row |= onset(train)
    after = train[train["train/truncation_rate"] > 0.9]
    if len(after):
        row |= {
            "repeated_share": after["train/repeated_share"].mean(),
            "advantage_repeated": after["train/advantage_repeated"].mean(),
            "advantage_regular": after["train/advantage_regular"].mean(),
        }
    return row


def table(rows: pd.DataFrame, seeds: Sequence[int]) -> str:
    """Return the Markdown page of results: the ablation in the paper's order, then every run."""
    shown = ["final_accuracy", "peak_accuracy", "quiet_steps", "onset_steps", "max_truncation", "max_repetition"]
    lines = ["| variant | " + " | ".join(each.replace("_", " ") for each in shown) + " |"]
    lines += ["|---" * (len(shown) + 1) + "|"]
    for name, variant in VARIANTS.items():
        mine = rows[rows.variant == name]
        cells = [
            "-" if mine[each].isna().all() else f"{mine[each].mean():.3g} ± {mine[each].std():.2g}" for each in shown
        ]
        lines.append(f"| {variant.title} | " + " | ".join(cells) + " |")
    each_run = rows.round(3).astype(object).where(rows.notna(), "").astype(str)
    lines += ["", "| " + " | ".join(each_run.columns) + " |", "|---" * len(each_run.columns) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in each_run.itertuples(index=False)]
    head = [
        "# Stability on the embedded testbed",
        "",
        f"Mean ± standard deviation over seeds {', '.join(map(str, seeds))}; validation on 256 problems that are in no "
        f"training set, greedy. The initial student has {rows.initial_accuracy.mean():.3f}.",
        "Quiet steps: until truncation first reaches 0.1 or repetition 0.02. Onset steps: from then until truncation "
        "exceeds 0.9 and repetition has exceeded 0.3. Maxima are over all training steps.",
        "",
        f"Made by `python -m benchmarks.stability` with {versions()}. The runs:",
        "",
        *(
            f"- {variant.title}: `{' '.join(run_of(name, 0).command(Path('runs/stability')))}`"
            for name, variant in VARIANTS.items()
        ),
        "",
    ]
    return "\n".join([*head, *lines]) + "\n"


def band(axis: plt.Axes, tables: Sequence[pd.DataFrame], column: str, label: str, color: str) -> None:
    """Draw the mean over seeds, and the range between the extremes."""
    steps = tables[0]["step"].to_numpy()
    values = np.ma.masked_invalid(np.stack([each[column].to_numpy() for each in tables]))
    axis.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.2, lw=0)
    axis.plot(steps, values.mean(0), color=color, label=label)


def plot_stability(seeds: Sequence[int], out: Path, place: Path) -> None:
    """Draw the picture of the README: truncation, repetition and accuracy, OPD beside Stable-OPD."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for name, label, color in (("opd", "OPD", "#c1432e"), ("stable", "Stable-OPD", "#1f6fb2")):
        train, val = zip(*(curves(name, seed, out) for seed in seeds), strict=True)
        band(axes[0], train, "train/truncation_rate", label, color)
        band(axes[1], train, "train/repetition_rate", label, color)
        band(axes[2], val, "val/accuracy", label, color)
    tuned = [curves("finetune", seed, out)[1] for seed in seeds]
    band(axes[2], tuned, "val/accuracy", "fine-tuning alone", "#888888")
    axes[2].legend(frameon=False)
    for axis, title in zip(axes, ("Truncated rollouts", "Repetitive rollouts", "Validation accuracy"), strict=True):
        axis.set(title=title, xlabel="optimizer step", ylim=(-0.03, 1.03))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, loc="center right")
    figure.suptitle(f"Two terms apart: mean and range over {len(seeds)} seeds", fontsize=11)
    figure.savefig(place, dpi=130)


def plot_tokens(seeds: Sequence[int], out: Path, place: Path) -> None:
    """Draw what happens at the onset under plain OPD: tokens on the left, rollouts on the right."""
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.4), layout="constrained")
    train = [curves("opd", seed, out)[0] for seed in seeds]
    band(axes[0], train, "train/advantage_repeated", "repeated tokens", "#c1432e")
    band(axes[0], train, "train/advantage_regular", "regular tokens", "#1f6fb2")
    band(axes[1], train, "train/repeated_share", "share of repeated tokens", "#c1432e")
    band(axes[2], train, "train/length_mean", "mean length", "#444444")
    band(axes[3], train, "train/advantage_mean", "mean advantage", "#444444")
    band(axes[3], train, "train/logprob_student", "mean log-prob, student", "#1f6fb2")
    band(axes[3], train, "train/logprob_teacher", "mean log-prob, teacher", "#c1432e")
    titles = ("Advantage by kind of token", "Repeated tokens", "Response length (tokens)", "Rollout level")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="optimizer step")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    axes[3].legend(frameon=False)
    figure.savefig(place, dpi=130)


def main() -> None:
    """Run, summarise and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side")
    parser.add_argument("--out", type=Path, default=Path("runs/stability"), help="folder of the runs")
    options = parser.parse_args()
    out = options.out.resolve()
    work = [(name, seed) for seed in options.seeds for name in VARIANTS]
    failed = execute_all([run_of(*each) for each in work], out, options.jobs)
    if failed:
        raise SystemExit("\n".join(failed.values()))
    rows = pd.DataFrame([{"variant": name, "seed": seed, **figures(name, seed, out)} for name, seed in work])
    RESULTS.mkdir(exist_ok=True)
    rows.to_csv(RESULTS / "stability.csv", index=False, float_format="%.4f")
    (RESULTS / "stability.md").write_text(table(rows, options.seeds), encoding="utf-8")
    plot_stability(options.seeds, out, RESULTS / "stability.png")
    plot_tokens(options.seeds, out, RESULTS / "tokens.png")


if __name__ == "__main__":
    main()
