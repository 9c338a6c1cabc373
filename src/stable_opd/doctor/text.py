"""A diagnosis as a text for people."""

import os
import shutil
import sys
import textwrap
from collections import Counter
from typing import TYPE_CHECKING

from stable_opd.doctor.findings import SEVERITIES, Finding, Severity
from stable_opd.memory import GIB

if TYPE_CHECKING:
    from stable_opd.doctor.command import Diagnosis

COLOURS: dict[Severity, str] = {"error": "31", "warning": "33", "note": "36"}

#: Why a check could not be made, by what it lacked.
REASONS = {
    "teacher": "no one model of this process is the teacher, or it was refused",
    "contexts": "no model was loaded",
    "data": "no data was loaded",
    "examples": "no data was loaded",
    "learner": "a model was refused",
    "mixture": "a model was refused",
    "measured": "needs student, teacher and data, and no error",
    "memory": "several devices, or a model was refused",
}


def page(diagnosis: "Diagnosis") -> str:
    """Return findings, the most severe first, and what was looked at."""
    report = diagnosis.report
    parts = [_finding(each) for severity in SEVERITIES for each in report.of(severity)]
    lines = [_paragraph("Checked", ", ".join(report.checked) or "nothing")]
    by_reason: dict[str, list[str]] = {}
    for name, lacking in report.missing.items():
        by_reason.setdefault(REASONS.get(lacking, lacking), []).append(name)
    missing = "; ".join(f"{', '.join(names)} ({reason})" for reason, names in by_reason.items())
    lines += [_paragraph("Not checked", missing)] if missing else []
    if diagnosis.measured is not None:
        lines.append(_paragraph("Measured", _measured(diagnosis)))
    if diagnosis.memory is not None and diagnosis.capacity is not None:
        needed, capacity = diagnosis.memory / GIB, diagnosis.capacity / GIB
        lines.append(_paragraph("Memory", f"about {needed:.2f} of {capacity:.2f} GiB in the largest phase of a step"))
    return "\n\n".join([*parts, "\n".join([*lines, _verdict(report.findings, len(report.checked))])])


def _finding(finding: Finding) -> str:
    label = f"\033[{COLOURS[finding.severity]}m{finding.severity}\033[0m" if _coloured() else finding.severity
    rest = [("found", finding.found), ("costs", finding.causes), ("fix", finding.fix)]
    return "\n".join([f"{label}: {finding.check}", *(_paragraph(f"  {name}", text) for name, text in rest if text)])


def _measured(diagnosis: "Diagnosis") -> str:
    measured = diagnosis.measured
    assert measured is not None
    text = (
        f"over {measured.tokens} tokens of the student's, KL to the teacher {measured.kl:.3f} nats a token, overlap of "
        f"the likeliest {measured.overlap:.2f}, engine off by {measured.drift:.1e} nats"
    )
    if measured.stop_student is None:
        return text
    return (
        f"{text}; probability of a stop where golden solutions end, student {measured.stop_student:.2f}, teacher "
        f"{measured.stop_teacher:.2f}"
    )


def _verdict(findings: list[Finding], checks: int) -> str:
    if not findings:
        return f"Healthy: {checks} checks found nothing."
    counts = Counter(each.severity for each in findings)
    found = [f"{counts[each]} {each}{'s' * (counts[each] > 1)}" for each in SEVERITIES if counts[each]]
    return f"Found: {', '.join(found)}."


def _paragraph(name: str, text: str) -> str:
    width = min(120, shutil.get_terminal_size((120, 24)).columns)
    indent = " " * (len(name) - len(name.lstrip()) + 2)
    return textwrap.fill(f"{name}: {text}", width, subsequent_indent=indent, break_on_hyphens=False)


def _coloured() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ
