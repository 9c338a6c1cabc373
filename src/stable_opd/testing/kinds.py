"""What the components of one kind have to keep to together."""

import inspect
import re
from collections import defaultdict
from typing import Any

from stable_opd.registry import components, summary
from stable_opd.testing.subject import parameters

#: Parameters whose unit differs from one component to the next, so that no default suits all.
EXEMPT = frozenset({"weight"})


def check_kind(kind: str) -> None:
    """Check that one parameter name has one meaning within a kind, and that components can be told apart.

    The same name has the same type and the same default in all components of the kind; ``weight`` is exempt, because
    it is in the units of the term that it multiplies.

    Args:
        kind: Name of the kind.

    Raises:
        AssertionError: If something is wrong; the message names all that is.
        ValueError: If there is no such kind.
    """
    wrong = [*_parameters(kind), *_lines(kind), *_names(kind)]
    if wrong:
        said = "\n".join(f"  {each}" for each in wrong)
        raise AssertionError(f"The components of kind {kind} do not go together.\n{said}")


def _parameters(kind: str) -> list[str]:
    uses: dict[str, dict[tuple[str, str], list[str]]] = defaultdict(lambda: defaultdict(list))
    for owner, cls in components(kind).items():
        for name, parameter in parameters(cls).items():
            uses[name][_default(parameter.default), _annotation(parameter.annotation)].append(owner)
    return [
        f"Expected one type and one default of `{name}`, but got "
        + "; ".join(f"{type_} = {default} in {', '.join(owners)}" for (default, type_), owners in found.items())
        + ". Agree on one, or name it after what is different."
        for name, found in uses.items()
        if len(found) > 1 and name not in EXEMPT
    ]


def _lines(kind: str) -> list[str]:
    owners: dict[str, list[str]] = defaultdict(list)
    for name, cls in components(kind).items():
        owners[summary(cls)].append(name)
    return [
        f"Expected first lines that tell components apart, but got {line!r} for {', '.join(names)}. Say what differs."
        for line, names in owners.items()
        if len(names) > 1
    ]


def _names(kind: str) -> list[str]:
    return [
        f"Expected names in CamelCase, but got {name!r}. Rename the class."
        for name in components(kind)
        if not re.fullmatch(r"[A-Z][A-Za-z0-9]+", name)
    ]


def _default(value: Any) -> str:
    return "required" if value is inspect.Parameter.empty else repr(value)


def _annotation(value: Any) -> str:
    return value if isinstance(value, str) else inspect.formatannotation(value)
