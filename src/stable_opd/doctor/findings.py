"""What a check is, what it finds, and what becomes of it."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from lightning.pytorch.utilities import rank_zero_warn

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = get_args(Severity)  # the most severe first

F = TypeVar("F", bound=Callable[..., Iterator["Symptom"]])


class Symptom(NamedTuple):
    """What a check saw.

    Attributes:
        found: A sentence with the facts.
        values: What goes into the braces of the check's fix.
    """

    found: str
    values: dict[str, Any]


def symptom(found: str, **values: Any) -> Symptom:
    """Return what a check saw, with what goes into the braces of its fix."""
    return Symptom(found, values)


@dataclass(frozen=True)
class Finding:
    """Something that is wrong, or may become so.

    Attributes:
        check: Name of the check.
        severity: ``error``: the run cannot work, or would learn what is wrong; ``warning``: it will probably cost
            something; ``note``: good to know.
        found: The facts.
        causes: What they will cost.
        fix: What to change.
    """

    check: str
    severity: Severity
    found: str
    causes: str
    fix: str

    def __str__(self) -> str:
        """Return all of it as one message."""
        return f"{self.found} {self.causes} {self.fix}"


@dataclass(frozen=True)
class Check:
    """A kind of fault.

    Attributes:
        name: What it is called.
        severity: How bad it is.
        causes: What it costs.
        fix: What to change; facts stand in braces.
        find: Yields what it sees. Its parameters are named like the attributes of the patient that it looks at.
    """

    name: str
    severity: Severity
    causes: str
    fix: str
    find: Callable[..., Iterable[Symptom]]

    @property
    def looks_at(self) -> str:
        """What it compares, in a line."""
        return (inspect.getdoc(self.find) or "").partition("\n")[0].removesuffix(".")

    def __call__(self, patient: object) -> list[Finding]:
        """Return what is found.

        Raises:
            Missing: If the patient lacks something that the check looks at.
        """
        seen = {name: getattr(patient, name) for name in inspect.signature(self.find).parameters}
        for name, value in seen.items():
            if value is None:
                raise Missing(name)
        return [
            Finding(self.name, self.severity, found, self.causes, self.fix.format(**values))
            for found, values in self.find(**seen)
        ]


class Missing(Exception):
    """A check cannot look at what it would have to."""


#: All checks by name.
CHECKS: dict[str, Check] = {}


def check(name: str, severity: Severity, causes: str, fix: str) -> Callable[[F], F]:
    """Make a function a check; the first line of its docstring says what it looks at."""

    def known(find: F) -> F:
        CHECKS[name] = Check(name, severity, causes, fix, find)
        return find

    return known


@dataclass
class Report:
    """What an examination came to.

    Attributes:
        findings: What was found.
        checked: Names of the checks that were made.
        missing: What other checks lacked, by their names.
    """

    findings: list[Finding] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)

    def of(self, severity: Severity) -> list[Finding]:
        """Return the findings of one severity."""
        return [each for each in self.findings if each.severity == severity]


def examine(patient: object, checks: Iterable[Check] | None = None) -> Report:
    """Make all checks for which there is something to look at.

    Args:
        patient: What they look at.
        checks: Some of them; none makes all.
    """
    report = Report()
    for each in CHECKS.values() if checks is None else checks:
        try:
            report.findings += each(patient)
            report.checked.append(each.name)
        except Missing as missing:
            report.missing[each.name] = str(missing)
        except Exception as error:  # of a template or a tokenizer, which must not stop a run that would go well
            report.missing[each.name] = f"{type(error).__name__}: {error}"
    return report


def refuse(report: Report) -> None:
    """Warn of what may cost something, and refuse what cannot work.

    Raises:
        ValueError: If there is an error; the message has all of them.
    """
    for warning in report.of("warning"):
        rank_zero_warn(str(warning))
    if report.of("error"):
        raise ValueError("\n".join(map(str, report.of("error"))))
