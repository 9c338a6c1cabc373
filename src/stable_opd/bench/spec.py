"""What a benchmark is: a recipe, axes of variants, seeds and figures; read from one YAML file and checked."""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast, get_args

from stable_opd.bench.yamls import SpecError, load_file

Command = Literal["fit", "detect"]
Reduction = Literal["last", "max", "min", "mean", "first"]
Better = Literal["higher", "lower"]

#: Keys of a recipe that belong to the runner.
OWNED = {
    "config": "Name it as `config` of the spec or of a variant.",
    "seed_everything": "List the `seeds` of the spec.",
    "trainer.logger": "The runner logs into the folder of each run.",
    "out": "The runner names the folder of each run.",
    "ckpt_path": "The runner resumes by itself.",
}
#: Columns of the usual table for mathematics, which `table: math` asks for.
MATH = ("MATH500", "Minerva", "Olympiad", "AMC", "AIME24", "AIME25")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.=,-]*")
_KEY = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*")


@dataclass(frozen=True)
class Metric:
    """One figure of a run.

    Attributes:
        column: Column of the run's metrics.csv.
        reduce: How its values over the steps become one: the last, the largest, the smallest, a mean of the last, or
            the optimizer steps before the first that is above a bound.
        window: How many values that mean is over.
        better: Which values are the better ones; none marks nothing.
        above: That bound.
    """

    column: str
    reduce: Reduction = "last"
    window: int = 10
    better: Better | None = None
    above: float | None = None


@dataclass(frozen=True)
class Plot:
    """A picture of curves over the steps, in panels beside each other.

    Attributes:
        panels: Columns by what they are called in the legend, by title of the panel; a column without a name of its
            own is called after the variant.
        variants: The combinations that it shows: some names of some axes; all if it is empty.
    """

    panels: Mapping[str, Mapping[str, str]]
    variants: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """One value of an axis.

    Attributes:
        overrides: What it changes in the recipe: values by dotted keys.
        config: A recipe of its own.
    """

    overrides: Mapping[str, Any] = field(default_factory=dict)
    config: Path | None = None


#: What is looked at if the spec does not say.
METRICS = {
    "accuracy": Metric("val/accuracy", "last", better="higher"),
    "best_accuracy": Metric("val/accuracy", "max", better="higher"),
    "truncation": Metric("train/truncation_rate", "max", better="lower"),
    "repetition": Metric("train/repetition_rate", "max", better="lower"),
}


@dataclass(frozen=True)
class Spec:
    """A benchmark.

    Attributes:
        path: Where it was read.
        config: The recipe; a command other than `fit` can do without.
        axes: Variants by name, by axis.
        seeds: Seeds of every combination.
        metrics: Figures by name; the first is drawn.
        exclude: Combinations that are left out: the names of an axis that meet the others of the entry.
        baseline: The combination that the others are tested against.
        options: What all runs change in the recipe, before their variants do.
        table: A further layout of the results.
        alpha: Largest p-value that counts as significant.
        plots: Pictures of curves by name of the file; one of all metrics if it is empty.
        command: What is run: `stable-opd fit` or `stable-opd detect`.
    """

    path: Path
    config: Path | None
    axes: Mapping[str, Mapping[str, Variant]]
    seeds: tuple[int, ...] = (0,)
    metrics: Mapping[str, Metric] = field(default_factory=lambda: dict(METRICS))
    exclude: tuple[Mapping[str, tuple[str, ...]], ...] = ()
    baseline: Mapping[str, str] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    table: Literal["math"] | None = None
    alpha: float = 0.05
    plots: Mapping[str, Plot] = field(default_factory=dict)
    command: Command = "fit"


def read(path: Path) -> Spec:
    """Read a spec.

    Raises:
        SpecError: If something in it is not as it should be.
    """
    given = _mapping(load_file(path, "a benchmark spec"), "the spec")
    _known("key of the spec", given, [each.name for each in fields(Spec) if each.name != "path"])
    command = _command(given.get("command", "fit"))
    for key in ("config", "axes") if command == "fit" else ("axes",):
        if key not in given:
            raise SpecError(f"Expected `{key}` in {path}, but got only {_list(given)}. Add it.")
    axes = _axes(given["axes"], path.parent)
    readers: dict[str, Callable[[Any], Any]] = {
        "config": lambda each: _recipe(each, path.parent, "`config`"),
        "seeds": _seeds,
        "metrics": _metrics,
        "options": lambda each: _overrides(_mapping(each, "`options`"), "`options`"),
        "exclude": lambda each: tuple(_exclusion(entry, axes) for entry in _sequence(each, "`exclude`")),
        "plots": lambda each: _plots(each, axes),
        "baseline": lambda each: None if each is None else _combination(each, axes),
        "table": _table,
        "alpha": _alpha,
    }
    found = {key: reader(given[key]) for key, reader in readers.items() if key in given}
    return Spec(path=path, axes=axes, command=command, **{"config": None, **found})


def _command(given: Any) -> Command:
    if given not in get_args(Command):
        raise SpecError(f"Expected `command` out of {_list(get_args(Command))}, but got {given!r}. Change it.")
    return cast(Command, given)


def _table(given: Any) -> Literal["math"] | None:
    if given not in (None, "math"):
        raise SpecError(f"Expected `table: math` or no table, but got {given!r}. Change or remove it.")
    return cast(Literal["math"] | None, given)


def _axes(given: Any, folder: Path) -> dict[str, dict[str, Variant]]:
    axes = _mapping(given, "`axes`")
    if not axes:
        raise SpecError("Expected at least one axis in `axes`, but got none. Name one, with its variants.")
    found: dict[str, dict[str, Variant]] = {}
    for axis, variants in axes.items():
        where = f"axis {_name(axis, 'an axis')!r}"
        variants = _mapping(variants, where)
        if not variants:
            raise SpecError(f"Expected at least one variant of {where}, but got none. Add one, or remove the axis.")
        found[str(axis)] = {}
        for raw, changes in variants.items():
            name = _name(raw, f"a variant of {where}")
            if name in found[str(axis)]:
                raise SpecError(f"Expected each variant of {where} once, but got {name!r} twice. Rename one.")
            found[str(axis)][name] = _variant(changes, f"variant {name!r} of {where}", folder)
    return found


def _variant(given: Any, where: str, folder: Path) -> Variant:
    changes = dict(_mapping({} if given is None else given, where))
    config = changes.pop("config", None)
    recipe = None if config is None else _recipe(config, folder, f"`config` of {where}")
    return Variant(_overrides(changes, where), recipe)


def _overrides(given: Mapping[Any, Any], where: str) -> dict[str, Any]:
    for key in given:
        if not isinstance(key, str) or not _KEY.fullmatch(key):
            raise SpecError(
                f"Expected dotted keys such as model.divergence in {where}, but got {key!r}. Write it like a flag of "
                "`stable-opd fit`, without the dashes."
            )
        for owned, way_out in OWNED.items():
            if key == owned or key.startswith(f"{owned}."):
                raise SpecError(f"Expected {where} to leave {owned} to the runner, but got {key!r}. {way_out}")
    return dict(given)


def _metrics(given: Any) -> dict[str, Metric]:
    metrics = _mapping(given, "`metrics`")
    if not metrics:
        raise SpecError("Expected at least one metric in `metrics`, but got none. Add one, or remove the key.")
    return {_name(name, "a metric"): _metric(each, f"metric {name!r}") for name, each in metrics.items()}


def _metric(given: Any, where: str) -> Metric:
    given = {"column": given} if isinstance(given, str) else _mapping(given, where)
    _known(f"key of {where}", given, [each.name for each in fields(Metric)])
    if not isinstance(given.get("column"), str):
        raise SpecError(
            f"Expected {where} to have a `column` of metrics.csv, but got {given.get('column')!r}. Name it."
        )
    for key, known in (("reduce", get_args(Reduction)), ("better", (*get_args(Better), None))):
        if key in given and given[key] not in known:
            raise SpecError(f"Expected `{key}` of {where} out of {_list(known)}, but got {given[key]!r}. Change it.")
    window = given.get("window", 1)
    if not _is_int(window) or window < 1:
        raise SpecError(f"Expected `window` of {where} to be a positive integer, but got {window!r}. Change it.")
    if "window" in given and given.get("reduce") != "mean":
        raise SpecError(f"Expected `window` only beside `reduce: mean`, but got it in {where}. Remove one of them.")
    _check_bound(given, where)
    return Metric(**given)


def _check_bound(given: Mapping[Any, Any], where: str) -> None:
    if (given.get("reduce") == "first") != ("above" in given):
        raise SpecError(
            f"Expected `reduce: first` and `above` together, but got one of them in {where}. Add or remove one."
        )
    above = given.get("above", 0)
    if isinstance(above, bool) or not isinstance(above, int | float):
        raise SpecError(f"Expected `above` of {where} to be a number, but got {above!r}. Change it.")
    if "above" in given and given.get("better") is not None:
        raise SpecError(
            f"Expected no `better` beside `reduce: first`, but got it in {where}: seeds in which it never happens "
            "have no figure that could be compared. Remove it."
        )


def _exclusion(given: Any, axes: Mapping[str, Mapping[str, Variant]]) -> dict[str, tuple[str, ...]]:
    entry = _mapping(given, "an entry of `exclude`")
    if not entry:
        raise SpecError(
            "Expected axes in every entry of `exclude`, but got an empty one. It would leave out everything."
        )
    return _selection(entry, "`exclude`", axes)


def _selection(
    entry: Mapping[Any, Any], where: str, axes: Mapping[str, Mapping[str, Variant]]
) -> dict[str, tuple[str, ...]]:
    """Return the variants that are named, by axis; one alone needs no list."""
    _known(f"axis in {where}", entry, axes)
    found = {}
    for axis, names in entry.items():
        found[axis] = tuple(str(each) for each in (names if isinstance(names, list) else [names]))
        _known(f"variant of axis {axis!r} in {where}", found[axis], axes[axis])
    return found


def _plots(given: Any, axes: Mapping[str, Mapping[str, Variant]]) -> dict[str, Plot]:
    plots = _mapping(given, "`plots`")
    return {_name(name, "a plot"): _plot(each, f"plot {name!r}", axes) for name, each in plots.items()}


def _plot(given: Any, where: str, axes: Mapping[str, Mapping[str, Variant]]) -> Plot:
    given = _mapping(given, where)
    _known(f"key of {where}", given, [each.name for each in fields(Plot)])
    panels = _mapping(given.get("panels", {}), f"`panels` of {where}")
    if not panels:
        raise SpecError(f"Expected at least one panel in {where}, but got none. Write `panels: {{title: column}}`.")
    found = {str(title): _panel(each, f"panel {title!r} of {where}") for title, each in panels.items()}
    variants = _mapping(given.get("variants", {}), f"`variants` of {where}")
    return Plot(found, _selection(variants, f"`variants` of {where}", axes))


def _panel(given: Any, where: str) -> dict[str, str]:
    found = {"": given} if isinstance(given, str) else dict(_mapping(given, where))
    for name, column in found.items():
        if not isinstance(name, str) or not isinstance(column, str):
            raise SpecError(
                f"Expected {where} to be a column of metrics.csv, or columns by name, but got {column!r}. Change it."
            )
    return found


def _combination(given: Any, axes: Mapping[str, Mapping[str, Variant]]) -> dict[str, str]:
    entry = {axis: str(name) for axis, name in _mapping(given, "`baseline`").items()}
    _known("axis in `baseline`", entry, axes)
    missing = [axis for axis in axes if axis not in entry]
    if missing:
        raise SpecError(f"Expected a variant of every axis in `baseline`, but got none of {_list(missing)}. Add it.")
    for axis, name in entry.items():
        _known(f"variant of axis {axis!r} in `baseline`", [name], axes[axis])
    return entry


def _seeds(given: Any) -> tuple[int, ...]:
    seeds = _sequence(given, "`seeds`")
    if not seeds or not all(_is_int(each) and each >= 0 for each in seeds) or len(set(seeds)) < len(seeds):
        raise SpecError(f"Expected `seeds` to be different integers, none negative, but got {given!r}. Change them.")
    return tuple(seeds)


def _alpha(given: Any) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given < 1:
        raise SpecError(f"Expected `alpha` between 0 and 1, but got {given!r}. 0.05 is usual.")
    return float(given)


def _recipe(given: Any, folder: Path, where: str) -> Path:
    if not isinstance(given, str):
        raise SpecError(f"Expected {where} to be the path of a recipe, but got {given!r}. Write one.")
    path = folder / given
    if not path.is_file():
        raise SpecError(f"Expected {where} to be a recipe, but got {path}, which is no file. Paths start at the spec.")
    return path


def _name(given: Any, what: str) -> str:
    if isinstance(given, bool) or not isinstance(given, str | int | float) or not _NAME.fullmatch(str(given)):
        raise SpecError(
            f"Expected the name of {what} to be letters, digits, '_', '.', '=', ',' and '-', but got {given!r}. "
            "Change it, or quote it if YAML takes it for something else; it becomes the name of a folder."
        )
    return str(given)


def _known(what: str, given: Iterable[Any], known: Iterable[str]) -> None:
    known = list(known)
    for each in given:
        if each not in known:
            near = difflib.get_close_matches(str(each), known, n=1)
            meant = f"Did you mean {near[0]!r}?" if near else "Change or remove it."
            raise SpecError(f"Expected a {what} out of {_list(known)}, but got {each!r}. {meant}")


def _mapping(given: Any, where: str) -> Mapping[Any, Any]:
    if not isinstance(given, dict):
        raise SpecError(f"Expected {where} to be a mapping, but got {given!r}. Write `name: ...` in it.")
    return cast(Mapping[Any, Any], given)


def _sequence(given: Any, where: str) -> list[Any]:
    if not isinstance(given, list):
        raise SpecError(f"Expected {where} to be a list, but got {given!r}. Write it in brackets.")
    return given


def _is_int(given: Any) -> bool:
    return isinstance(given, int) and not isinstance(given, bool)


def _list(names: Iterable[Any]) -> str:
    return ", ".join(str(each) for each in names)
