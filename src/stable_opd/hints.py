"""What was probably meant: near names for what the command line could not understand."""

import difflib
import inspect
import re
import sys
from typing import Any

from stable_opd import registry
from stable_opd.data import PromptDataModule


def options(parser: Any) -> set[str]:
    """Return the long options of a parser and of its subcommands, without their dashes."""
    found: set[str] = set()
    for action in parser._actions:
        found |= {each.removeprefix("--") for each in action.option_strings if each.startswith("--")}
        for subparser in (action.choices or {}).values() if isinstance(action.choices, dict) else ():
            found |= options(subparser)
    return found


def hints(message: str, known_options: set[str]) -> list[str]:
    """Return what is worth adding to a parser's message.

    Args:
        message: What the parser says.
        known_options: All long options that there are.
    """
    found = _components(message), *(each(message, known_options) for each in (_parameters, _sections, _options))
    return list(dict.fromkeys(hint for each in found for hint in each))


def _components(message: str) -> list[str]:
    """A component that is not known: name the near ones, and all of its kind."""
    found = []
    for match in re.finditer(r"Expected a dot import path string: (\S+)", message):
        # The kind that the message mentions last before the name is the one that the name should be of.
        mentioned = re.findall(rf"\b({'|'.join(registry.kinds())})s?\b", message[: match.start()].lower())
        if mentioned:
            found.append(registry.unknown_name(mentioned[-1], match.group(1)))
    return found


def _parameters(message: str, known: set[str]) -> list[str]:
    """A parameter that a component does not take: name those that it takes."""
    found = []
    for path, option in re.findall(r"class_path '([\w.]+)':\s+Option '(\w+)' is not accepted", message):
        module, _, name = path.rpartition(".")
        accepted = list(inspect.signature(getattr(sys.modules[module], name)).parameters)
        meant = _did_you_mean(option, accepted)
        found.append(f"{name} takes {', '.join(accepted) or 'no parameters'}, but not {option!r}.{meant}")
    for option in re.findall(r"^Option '(\w+)' is not accepted", message.strip()):
        section = _did_you_mean(option, sorted({each.partition(".")[0] for each in known}))
        if section:
            found.append(section.strip())
            continue
        owners = {name: cls for kind in registry.kinds() for name, cls in registry.components(kind).items()}
        near = [
            f"{name}.{parameter}"
            for name, cls in {**owners, "data": PromptDataModule}.items()
            for parameter in difflib.get_close_matches(option, inspect.signature(cls).parameters, n=1)
        ]
        found += [f"Did you mean {' or '.join(near)}?"] if near else []
    return found


def _sections(message: str, known: set[str]) -> list[str]:
    """A key that a section does not have: name those that it has."""
    found = []
    for group, key in re.findall(r"(?:Group '([\w.]+)'|Subcommand '\w+') does not accept option '([^']+)'", message):
        section, inside = "", known
        for name in f"{group}.{key}".removeprefix(".").split("."):
            names = sorted({each.partition(".")[0] for each in inside})
            if name not in names:
                where, near = section or "a recipe", _did_you_mean(name, names)
                found += [f"Expected one of {', '.join(names)} in {where}, but got {name!r}.{near}"] if names else []
                break
            section = f"{section}.{name}".removeprefix(".")
            inside = {each.removeprefix(f"{section}.") for each in known if each.startswith(f"{section}.")}
    return found


def _options(message: str, known: set[str]) -> list[str]:
    """An option that does not exist: name the nearest."""
    unknown = re.findall(r"unrecognized arguments: --([\w.]+)", message)
    return [meant.strip() for option in unknown if (meant := _did_you_mean(option, sorted(known)))]


def _did_you_mean(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
