"""From a spec to runs: the product of its axes and seeds, each with the command line that makes it."""

import contextlib
import copy
import hashlib
import itertools
import json
import os
import shlex
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stable_opd.bench.recipes import Config, Resolve, explicit, flags, place, resolve
from stable_opd.bench.spec import Spec, Variant
from stable_opd.bench.yamls import SpecError, dump, load_file

#: Joins the names of variants; no name has it.
JOINT = "+"

#: Of the logger's settings, what makes it write into the folder of a run.
_LOGGER = "lightning.pytorch.loggers.CSVLogger"


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        variants: Name of its variant, by axis.
        seed: Its seed.
        out: Folder of the benchmark.
        arguments: What follows `stable-opd`.
        config: What they come to, without the places that it writes to.
    """

    variants: Mapping[str, str]
    seed: int
    out: Path
    arguments: tuple[str, ...] = ()
    config: Config = field(default_factory=dict, repr=False)

    @property
    def combination(self) -> str:
        """Name of its variants together."""
        return JOINT.join(self.variants.values())

    @property
    def name(self) -> str:
        """Name among all runs."""
        return f"{self.combination}/seed-{self.seed}"

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self.out / self.combination / f"seed-{self.seed}"

    @property
    def command(self) -> str:
        """One line that can be pasted into a shell."""
        return shlex.join(["stable-opd", *self.arguments])

    @property
    def fingerprint(self) -> str:
        """What a finished run must have been made from, to count: the config and this package's version."""
        text = json.dumps([version("stable-opd"), self.config], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


def expand(spec: Spec, out: Path, resolve: Resolve = resolve) -> list[Run]:
    """Return all runs of a spec, seed by seed of each combination.

    Args:
        spec: The benchmark.
        out: Folder of its runs.
        resolve: Returns the config that arguments of `stable-opd` come to.

    Raises:
        SpecError: If nothing is left, or a combination cannot be written as a command.
    """
    found = []
    for variants in combinations(spec):
        found += _runs(spec, variants, out, resolve)
    return found


def combinations(spec: Spec) -> list[dict[str, str]]:
    """Return the combinations that are not excluded, the last axis fastest.

    Raises:
        SpecError: If there is none, or if the baseline is none of them.
    """
    product = [dict(zip(spec.axes, names, strict=True)) for names in itertools.product(*spec.axes.values())]
    left = [each for each in product if not any(_excluded(each, entry) for entry in spec.exclude)]
    if not left:
        raise SpecError("Expected some combination to be left, but got an `exclude` that leaves out all. Loosen it.")
    if spec.baseline is not None and dict(spec.baseline) not in left:
        raise SpecError(f"Expected the baseline to be run, but got {spec.baseline}, which `exclude` leaves out.")
    return left


def _excluded(variants: Mapping[str, str], entry: Mapping[str, tuple[str, ...]]) -> bool:
    return all(variants[axis] in names for axis, names in entry.items())


def gather(spec: Spec, variants: Mapping[str, str]) -> tuple[Path | None, dict[str, Any]]:
    """Return the recipe of a combination, if there is one, and everything that is changed in it, in order.

    Raises:
        SpecError: If two axes name a recipe, or one undoes what another one sets.
    """
    chosen = {axis: spec.axes[axis][name] for axis, name in variants.items()}
    owners: dict[str, str] = {}
    changes: dict[str, Any] = {}
    for axis, variant in chosen.items():
        for key, value in variant.overrides.items():
            # A component may be followed by its settings, but not the other way round.
            undone = [each for each in owners if each == key or each.startswith(f"{key}.")]
            if undone:
                raise SpecError(
                    f"Expected axes that change different things, but got {undone[0]} of axis {owners[undone[0]]!r} "
                    f"undone by {key} of axis {axis!r}. Join the axes, or let the more general one come first."
                )
            changes[key] = value
        owners |= dict.fromkeys(variant.overrides, axis)
    common = {
        key: value
        for key, value in spec.options.items()
        if not any(key == each or key.startswith(f"{each}.") for each in changes)
    }
    return _config(spec, chosen), common | changes


def _config(spec: Spec, chosen: Mapping[str, Variant]) -> Path | None:
    named = {axis: variant.config for axis, variant in chosen.items() if variant.config is not None}
    if len(named) > 1:
        raise SpecError(f"Expected one axis to name a recipe, but got {', '.join(named)}. Join these axes.")
    return next(iter(named.values()), spec.config)


def _runs(spec: Spec, variants: Mapping[str, str], out: Path, resolve: Resolve) -> list[Run]:
    """Return the runs of one combination; their command lines differ in the seed only."""
    path, changes = gather(spec, variants)
    first = Run(variants, spec.seeds[0], out)
    recipe = {} if path is None else load_file(path, "a recipe")
    changes |= _place(spec, first) | {"seed_everything": first.seed}
    changed = copy.deepcopy(recipe)
    for key, value in changes.items():
        place(changed, key, value)
    start = [spec.command, *_named(path)]
    try:
        with _written(changed) as copied:
            truth = resolve([spec.command, "-c", str(copied)])
        _check_checkpoints(truth)
        written = explicit(_short_logger(changes, recipe), truth, start, resolve)
    except SpecError as error:
        raise SpecError(f"Variant {first.combination}: {error}") from error
    found = []
    for seed in spec.seeds:
        run = Run(variants, seed, out)
        mine = {key: _of_seed(run, key, value) for key, value in written.items()}
        config = copy.deepcopy(truth) | {"seed_everything": seed}
        config.pop("out", None)
        config.get("trainer", {}).pop("logger", None)
        found.append(Run(variants, seed, out, (*start, *flags(mine)), config))
    return found


def _named(path: Path | None) -> list[str]:
    """Return the arguments that name a recipe, relative if it lies below the working directory."""
    if path is None:
        return []
    return ["-c", os.path.relpath(path) if path.resolve().is_relative_to(Path.cwd()) else str(path.resolve())]


def _check_checkpoints(config: Config) -> None:
    """Refuse a folder of checkpoints that all runs would share, and in which none would find its own again."""
    callbacks = config.get("trainer", {}).get("callbacks") or []
    for each in callbacks if isinstance(callbacks, list) else [callbacks]:
        folder = (each.get("init_args") or {}).get("dirpath")
        if folder is not None:
            raise SpecError(
                f"Expected checkpoints in the folder of each run, but got dirpath {folder!r} of {each['class_path']}. "
                "Take it out of the recipe."
            )


def _place(spec: Spec, run: Run) -> Config:
    """Return the overrides that make a run write into its folder."""
    return {"trainer.logger": _logger(run)} if spec.command == "fit" else {"out": str(run.folder)}


def _logger(run: Run) -> Config:
    place = {"save_dir": str(run.out), "name": run.combination, "version": f"seed-{run.seed}"}
    return {"class_path": _LOGGER, "init_args": place}


def _short_logger(changes: Mapping[str, Any], recipe: Config) -> dict[str, Any]:
    """Write the logger as flags of its settings, if the recipe has a logger of that class."""
    if "trainer.logger" not in changes:
        return dict(changes)
    trainer = recipe.get("trainer") or {}
    logger = trainer.get("logger", _LOGGER)
    name = logger.get("class_path", "") if isinstance(logger, dict) else logger
    if not isinstance(name, str) or name.rpartition(".")[2] != "CSVLogger":
        return dict(changes)
    if isinstance(logger, dict) and set(logger.get("init_args") or {}) - {"save_dir", "name", "version"}:
        return dict(changes)
    found = {key: value for key, value in changes.items() if key != "trainer.logger"}
    settings = changes["trainer.logger"]["init_args"]
    return found | {f"trainer.logger.{key}": value for key, value in settings.items()}


def _of_seed(run: Run, key: str, value: Any) -> Any:
    """Return an override of the first seed as that of another."""
    if key == "seed_everything":
        return run.seed
    if key == "out":
        return str(run.folder)
    if key == "trainer.logger.version":
        return f"seed-{run.seed}"
    if key == "trainer.logger":
        return {**value, "init_args": {**value["init_args"], "version": f"seed-{run.seed}"}}
    return value


@contextlib.contextmanager
def _written(recipe: Config) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(dump(recipe), encoding="utf-8")
        yield path
