"""Overrides of a recipe, as a recipe and as flags, and the proof that both mean the same.

The parser keeps the settings of a recipe's component when a flag or a second file names another class that happens to
have a setting of the same name. A variant is therefore written twice: into a copy of the recipe, where it replaces what
was there, and as flags. Where the flags come to something else, they get every setting of the component written out.
"""

import contextlib
import copy
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stable_opd import secrets
from stable_opd.bench.yamls import SpecError, load

Config = dict[str, Any]
Resolve = Callable[[Sequence[str]], Config]

_MISSING = object()


def place(recipe: Config, key: str, value: Any) -> None:
    """Put a value into a recipe, in place of what is there.

    Args:
        recipe: The recipe, changed in place.
        key: Dotted; settings of a component may leave out ``init_args``, as in a flag.
        value: The value.

    Raises:
        SpecError: If the way there leads through something that has no keys.
    """
    node: Any = recipe
    *way, last = key.split(".")
    for index, part in enumerate(way):
        inner = _settings(node, part)
        if isinstance(inner.get(part), str):
            inner[part] = {"class_path": inner[part]}
        elif inner.get(part) is None:
            inner[part] = {}
        node = inner[part]
        if not isinstance(node, dict):
            here = ".".join(way[: index + 1])
            raise SpecError(f"Expected {here} to have keys, but got {node!r} in the recipe, so {key} cannot be set.")
    _settings(node, last)[last] = copy.deepcopy(value)


def find(config: Config, key: str) -> Any:
    """Return what is at a dotted key of a config; something that equals nothing else if there is nothing."""
    node: Any = config
    for part in key.split("."):
        if not isinstance(node, dict):
            return _MISSING
        node = _settings(dict(node), part).get(part, _MISSING)
    return node


def flags(overrides: Mapping[str, Any]) -> list[str]:
    """Return overrides as arguments of a command."""
    return [part for key, value in overrides.items() for part in (f"--{key}", argument(value))]


def argument(value: Any) -> str:
    """Return a value as the command line takes it: a bare word where that is enough, JSON otherwise."""
    if isinstance(value, dict) and set(value) <= {"class_path", "init_args"} and not value.get("init_args"):
        value = value.get("class_path", value)
    if isinstance(value, str) and value and value.strip() == value:
        with contextlib.suppress(SpecError):
            if load(value) == value:
                return value
    return json.dumps(value)


def explicit(overrides: Mapping[str, Any], truth: Config, start: Sequence[str], resolve: Resolve) -> dict[str, Any]:
    """Return overrides that, as flags, come to what the recipe with the overrides in it comes to.

    Args:
        overrides: As they are written.
        truth: The resolved config of the recipe that has them in it.
        start: The command and the arguments before the flags.
        resolve: Returns the config that arguments come to.

    Raises:
        SpecError: If the command line carries something over, whatever is written.
    """
    found = resolve([*start, *flags(overrides)])
    if _same(found, truth):
        return dict(overrides)
    complete = {
        key: value if _same(find(found, key), find(truth, key)) else find(truth, key)
        for key, value in overrides.items()
    }
    found = resolve([*start, *flags(complete)])
    if not _same(found, truth):
        raise SpecError(
            "Expected the flags to replace what the recipe has, but got settings that are carried over: "
            f"{'; '.join(differences(truth, found))}. Take them out of the recipe, or set them in every variant."
        )
    return complete


def differences(before: Any, after: Any, key: str = "") -> list[str]:
    """Return what differs between two configs, a phrase per dotted key."""
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return [] if before == after else [f"{key}: {_shown(before)} became {_shown(after)}"]
    return [
        phrase
        for name in dict.fromkeys([*before, *after])
        for phrase in differences(before.get(name, _MISSING), after.get(name, _MISSING), f"{key}.{name}".lstrip("."))
    ]


def resolve(arguments: Sequence[str]) -> Config:
    """Return the config that arguments of `stable-opd` come to, with all defaults.

    Args:
        arguments: A command that takes a config, and what follows it.

    Raises:
        SpecError: If the command line refuses them; it says what the command line says.
    """
    from stable_opd.cli import main, no_arguments

    printed, complaints = io.StringIO(), io.StringIO()
    status: Any = 0
    with no_arguments(), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaints):
        try:
            main([*arguments, "--print_config"])
        except SystemExit as done:
            status = done.code
    if status:
        raise SpecError(complaints.getvalue().strip().removeprefix("stable-opd: error:").strip())
    config: Config = load(printed.getvalue(), "the resolved recipe")
    try:
        secrets.check(config)
    except ValueError as error:
        raise SpecError(str(error)) from None
    return config


def _same(first: Any, second: Any) -> bool:
    """Return whether two configs are the same; where text is allowed too, a flag turns a number into text."""
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    if isinstance(first, str) != isinstance(second, str):
        text, other = (first, second) if isinstance(first, str) else (second, first)
        return isinstance(other, int | float) and not isinstance(other, bool) and text == str(other)
    return bool(first == second)


def _settings(node: Config, part: str) -> Config:
    """Return the mapping that a key belongs into: a component's settings are one level deeper."""
    if "class_path" not in node or part in ("class_path", "init_args", "dict_kwargs"):
        return node
    if not isinstance(node.get("init_args"), dict):
        node["init_args"] = {}
    settings: Config = node["init_args"]
    return settings


def _shown(value: Any) -> str:
    text = "nothing" if value is _MISSING else json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
