"""Which checks a component has to pass, and what is said when it does not."""

import warnings
from collections.abc import Collection, Mapping
from importlib import import_module
from typing import Any

from stable_opd.registry import Component, components, kinds, unknown_name
from stable_opd.testing import losses, parts
from stable_opd.testing.form import FORM, copies, nothing
from stable_opd.testing.subject import Check, Subject

_BY_KIND: dict[str, dict[str, Check]] = {
    "divergence": {**losses.LOSS, "agreement": losses.agreement},
    "constraint": losses.LOSS,
    "mixture": {**losses.LOSS, "plan": parts.plan, "blend": parts.blend, "revise": parts.revise},
    "sampler": {"logits": parts.sampler, "request": parts.request},
    "repetition": {"marks": parts.detector},
    "weighting": {"weights": parts.weighting},
    "schedule": {"factor": parts.schedule},
    "controller": {"factor": parts.controller},
    "transform": {"advantages": parts.transform},
    "baseline": {"baseline": parts.baseline},
    "reference": {"update": parts.reference},
    "terminal": {"rule": parts.terminal},
    "task": {"grade": parts.task},
}

#: Checks without which the others would only say the same once more.
_FIRST = ("construction", "shapes")

#: The names of the checks, by kind. Engines and teachers serve a model, so that only their form is checked.
CHECKS: dict[str, tuple[str, ...]] = {
    kind: (*FORM, *_BY_KIND.get(kind, ()), "copies") for kind in (*_BY_KIND, "engine", "teacher")
}


def check_component(
    component: type[Component] | str,
    kind: str | None = None,
    *,
    init_args: Mapping[str, Any] | None = None,
    require_source: bool = True,
    skip: Collection[str] = (),
) -> None:
    """Check that a component keeps to the contract of its kind.

    All that is wrong is reported together, unless it cannot be built or called. A class that is local to a function
    cannot be named in YAML, so its way through YAML is not checked.

    Args:
        component: The class, its short name or its full import path.
        kind: Its kind; only needed for a short name that two kinds share.
        init_args: Values of parameters that have no sensible default, as a YAML would have them.
        require_source: Whether the docstring has to say, after ``Source: ``, where the component comes from.
        skip: Names of checks to leave out (`CHECKS`), for what a component does on purpose.

    Raises:
        AssertionError: If something is wrong; the message says what, and the way out.
        ValueError: If there is no such component, kind or check.
    """
    cls = _resolve(component, kind)
    subject = Subject(cls, cls.kind, dict(init_args or {}), require_source)
    checks = {**FORM, **_BY_KIND.get(cls.kind, {}), "copies": copies(parts.USE.get(cls.kind, nothing))}
    unknown = sorted(set(skip) - checks.keys())
    if unknown:
        raise ValueError(f"Expected checks to skip out of {', '.join(checks)}, but got {', '.join(unknown)}.")
    wrong: dict[str, str] = {}
    for name, check in checks.items():
        problem = "" if name in skip else _problem(check, subject)
        if problem:
            wrong[name] = problem
        if problem and name in _FIRST:
            break
    if wrong:
        said = "\n".join(f"  {name}: {problem}" for name, problem in wrong.items())
        raise AssertionError(f"The {cls.kind} {cls.__name__} does not keep to its contract.\n{said}")


def _problem(check: Check, subject: Subject) -> str:
    """Return what is wrong; empty if nothing is."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # those of libraries are not the component's
            warnings.filterwarnings("error", message=r"\s*Unable to serialize")
            check(subject)
    except AssertionError as error:
        return str(error)
    except Exception as error:  # whatever a component raises is to be told together with the rest
        return f"Expected no error, but got {type(error).__name__}: {error}"
    return ""


def _resolve(component: type[Component] | str, kind: str | None) -> type[Component]:
    """Return the class that is meant.

    Raises:
        ValueError: If there is none, or more than one.
    """
    if kind is not None and kind not in kinds():
        raise ValueError(f"Expected a kind of component out of {sorted(kinds())}, but got {kind!r}.")
    found: Any = _named(component, kind) if isinstance(component, str) else component
    if not (isinstance(found, type) and issubclass(found, Component) and hasattr(found, "kind")):
        raise ValueError(
            f"Expected the class of a component, but got {component!r}. Derive it from the base of a kind."
        )
    if kind is not None and found.kind != kind:
        raise ValueError(f"Expected a {kind}, but {found.__name__} is a {found.kind}. Leave the kind out.")
    return found


def _named(name: str, kind: str | None) -> object:
    if "." in name:
        module, _, attribute = name.rpartition(".")
        return getattr(import_module(module), attribute, None)
    considered = [kind] if kind else sorted(kinds())
    found = {each: components(each)[name] for each in considered if name in components(each)}
    if len(found) > 1:
        raise ValueError(f"Expected a name of one kind, but {name!r} is one of {', '.join(found)}. Give the kind.")
    if not found:
        raise ValueError(unknown_name(kind, name) if kind else f"There is no component named {name!r}.")
    return next(iter(found.values()))
