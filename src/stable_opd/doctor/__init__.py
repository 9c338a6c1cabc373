"""Whether a run can work: what goes wrong with real pairs of models, found before the first step."""

from stable_opd.doctor.findings import CHECKS, Check, Finding, Report, examine, refuse
from stable_opd.doctor.patient import Patient, Speaker

# Importing a family of checks makes it known, and this is the order in which they are reported.
from stable_opd.doctor import (  # isort: skip
    vocabulary,  # noqa: F401
    terminal,  # noqa: F401
    templates,  # noqa: F401
    lengths,  # noqa: F401
    parts,  # noqa: F401
    numerics,  # noqa: F401
    signal,  # noqa: F401
    memory,  # noqa: F401
)

__all__ = ["CHECKS", "Check", "Finding", "Patient", "Report", "Speaker", "examine", "refuse"]
