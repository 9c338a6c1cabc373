"""The guard's rules on recorded runs, each alone and together, and what became of runs under the guard.

    python -m benchmarks.guard --collapsing runs/opd --healthy runs/stable --guarded runs/guarded

reads finished runs of `stable-opd fit`, feeds their figures to the rules one step at a time, as in a run, and writes
benchmarks/results/reliability/guard.md.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from benchmarks.runs import RESULTS, versions

from stable_opd.report.runs import Curves, Run, read_runs
from stable_opd.signals import SIGNALS, Watch
from stable_opd.signals.changes import Effect, first_reaching

Steps = Sequence[int | None]

#: Accuracy has fallen when it is below that of the initial student by this much, and stays there.
POINTS = 0.05
#: Numbers of signals that could make an alarm.
VOTES = (1, 2, 3, 4)
#: The number that makes one for the guard.
TAKEN = 2
#: Factors of the smallest changes that matter.
SCALES = (1.0, 0.5, 0.25)

COMMANDS = """\
Runs like these come from, for a seed N:

    stable-opd fit -c configs/collapse.yaml --seed_everything N --trainer.max_steps 70 --trainer.val_check_interval 5
    stable-opd fit -c configs/guarded.yaml --seed_everything N --trainer.max_steps 80 --trainer.val_check_interval 10
    stable-opd fit -c configs/quickstart.yaml --seed_everything N --trainer.max_steps 200

The ones that were read:
"""


def fired(train: Curves, scale: float = 1.0) -> dict[str, int | None]:
    """Return the step after which each rule fires for the first time, by what the rule is called.

    Args:
        train: What was logged of each step.
        scale: Factor of the smallest changes that matter.
    """
    watches = [Watch(replace(signal, effect=_scaled(signal.effect, scale))) for signal in SIGNALS]
    first: dict[str, int | None] = {_name(watch): None for watch in watches}
    first |= {_votes(count): None for count in VOTES}
    for place, step in enumerate(train.steps.astype(int).tolist()):
        for watch in watches:
            watch.observe(step, {column: float(train[column][place]) for column in watch.signal.columns})
        away = [watch for watch in watches if watch.detector.away]
        specific = sum(watch.signal.specific for watch in away)
        for name in [*map(_name, away), *(_votes(count) for count in VOTES if specific >= count)]:
            first[name] = step if first[name] is None else first[name]
    return first


def fell(run: Run) -> int | None:
    """Return the step of the first evaluation from which on accuracy is below the first one by `POINTS`."""
    accuracy = run.validation["val/accuracy"]
    low = accuracy < accuracy[0] - POINTS
    for_good = low & (np.flip(np.cumprod(np.flip(low))) > 0)
    return int(run.validation.steps[for_good.argmax()]) if for_good.any() else None


def rule_table(collapsing: Sequence[Run], healthy: Sequence[Run]) -> list[str]:
    """Return a row for each rule: when it fires, its lead, and its false alarms."""
    found, calm = [fired(run.train) for run in collapsing], [fired(run.train) for run in healthy]
    rules = {name: ([each[name] for each in found], [each[name] for each in calm]) for name in found[0]}
    return _table("rule", rules, collapsing)


def scale_table(collapsing: Sequence[Run], healthy: Sequence[Run]) -> list[str]:
    """Return the same for the guard's rule, with changes that matter from a smaller size on."""
    name, rules = _votes(TAKEN), {}
    for scale in SCALES:
        runs = ([fired(run.train, scale)[name] for run in kind] for kind in (collapsing, healthy))
        rules[f"{scale:g} times the size"] = tuple(runs)
    return _table("smallest change", rules, collapsing)


def _table(what: str, rules: Mapping[str, tuple[Steps, Steps]], collapsing: Sequence[Run]) -> list[str]:
    """Return a row for each rule, of the steps after which it fires in collapsing and in healthy runs."""
    falls = [fell(run) for run in collapsing]
    ends = [first_reaching(run.train.steps, run.train["train/truncation_rate"], 0.9) for run in collapsing]
    head = [what, "fires", "step", "lead before accuracy fell", "lead before truncation 0.9", "false alarms"]
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, (steps, calm) in rules.items():
        cells = [
            name,
            f"{sum(step is not None for step in steps)} of {len(steps)}",
            _span(steps),
            _span([_difference(fall, step) for fall, step in zip(falls, steps, strict=True)]),
            _span([_difference(end, step) for end, step in zip(ends, steps, strict=True)]),
            f"{sum(step is not None for step in calm)} of {len(calm)}",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def guarded_table(guarded: Sequence[Run]) -> list[str]:
    """Return a row for each run under the guard."""
    head = ["run", "steps", "answers", "accuracy: first", "lowest", "last", "lost for good"]
    rows = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for run in guarded:
        accuracy = run.validation["val/accuracy"]
        answers = ", ".join(f"{e['action']} at {e['step']}" for e in run.events if e["action"] != "notice")
        lost = "yes" if fell(run) is not None else "no"
        figures = [f"{value:.3f}" for value in (accuracy[0], accuracy.min(), accuracy[-1])]
        cells = [f"seed {run.config['seed_everything']}", str(len(run.train.steps)), answers or "none", *figures, lost]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def described(runs: Sequence[Run]) -> list[str]:
    """Return what the runs were told, those of the same words in one line."""
    seeds: dict[str, list[str]] = {}
    for run in runs:
        model, trainer = run.config["model"], run.config["trainer"]
        parts = [model["mixture"], *(each for each in (model["constraints"] or {}).values() if each)]
        names = ", ".join(part["class_path"].rpartition(".")[2] for part in parts)
        told = f"{names}; {len(run.train.steps)} steps, validated every {trainer['val_check_interval']}"
        seeds.setdefault(told, []).append(str(run.config["seed_everything"]))
    return [f"{told}: seeds {', '.join(each)}" for told, each in seeds.items()]


def page(collapsing: Sequence[Run], healthy: Sequence[Run], guarded: Sequence[Run]) -> str:
    """Return the Markdown page."""
    kinds = {"collapsing": collapsing, "healthy": healthy, "guarded": guarded}
    told = [f"- {kind}: {line}" for kind, runs in kinds.items() for line in described(runs)]
    return "\n".join(
        [
            "# The collapse guard on the embedded testbed",
            "",
            f"Made by `python -m benchmarks.guard` with {versions()}.",
            "",
            COMMANDS,
            *told,
            "",
            "## Each rule alone and together",
            "",
            "The step is the one after which the rule fires for the first time; median, and range over the runs. A "
            "lead is in steps and negative where the rule fires later. Accuracy fell: it is below that of the initial "
            f"student by {POINTS:g} from this evaluation on. Several signals at once are of those that speak about "
            f"loops and length (without *); the guard takes {TAKEN}.",
            "",
            *rule_table(collapsing, healthy),
            "",
            "## Smaller changes",
            "",
            f"The guard's rule ({_votes(TAKEN)}), if smaller changes mattered. They are found earlier, and on this "
            "testbed never in vain; but here a healthy run leaves the length of the answers as it is, and in the world "
            "a teacher with another style changes it by more.",
            "",
            *scale_table(collapsing, healthy),
            "",
            "## Runs under the guard",
            "",
            *guarded_table(guarded),
            "",
        ]
    )


def main() -> None:
    """Read the runs and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind in ("collapsing", "healthy", "guarded"):
        parser.add_argument(f"--{kind}", type=Path, nargs="+", required=True, help="folders of runs")
    options = parser.parse_args()
    out = RESULTS / "reliability" / "guard.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    folders = (options.collapsing, options.healthy, options.guarded)
    read = [sorted(read_runs(each), key=lambda run: int(run.config["seed_everything"])) for each in folders]
    out.write_text(page(*read), encoding="utf-8")


def _name(watch: Watch) -> str:
    star = "" if watch.signal.specific else " *"
    return f"{watch.signal.name.removeprefix('the ')} {watch.signal.verb}s{star}"


def _scaled(effect: Effect, scale: float) -> Effect:
    return replace(effect, absolute=effect.absolute * scale, relative=effect.relative * scale)


def _votes(count: int) -> str:
    return f"{count} signals at once"


def _difference(later: int | None, earlier: int | None) -> int | None:
    return None if later is None or earlier is None else later - earlier


def _span(values: Sequence[int | None]) -> str:
    there = [value for value in values if value is not None]
    return f"{np.median(there):g} ({min(there)} to {max(there)})" if there else "-"


if __name__ == "__main__":
    main()
