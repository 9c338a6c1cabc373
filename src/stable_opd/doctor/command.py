"""The command `stable-opd doctor`."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, Trainer

from stable_opd.cli import CLI, no_arguments, start
from stable_opd.doctor import CHECKS, Finding, Patient, Report, examine
from stable_opd.doctor.measure import Measured, measure
from stable_opd.doctor.text import page
from stable_opd.module import OPDModule

DESCRIPTION = """\
Say what will go wrong with a run before its first step: stop tokens, templates, lengths, numerics, the signal of the
teacher, memory.
"""
EPILOG = """\
Everything else is as in `stable-opd fit`: -c CONFIG, and flags over it. Both models are loaded, and the student answers
a few prompts; nothing is trained, and nothing is written.

Exit status: 0 without an error (there may be warnings and notes), 1 with one, 2 if the config itself is refused.
docs/doctor.md has a table of all checks.
"""


def doctor(args: Sequence[str]) -> None:
    """Say what will go wrong with a run before its first step.

    Args:
        args: What follows `stable-opd doctor`.
    """
    parser = argparse.ArgumentParser(
        "stable-opd doctor",
        usage="stable-opd doctor -c CONFIG [--json] [FLAGS OF FIT]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a text")
    chosen, rest = parser.parse_known_args(args)
    try:
        with no_arguments():
            diagnosis = start(Examination, ["fit", *rest]).diagnosis
    except (ValueError, OSError, MisconfigurationException) as error:
        parser.error(str(error))
    print(json.dumps(diagnosis.facts(), indent=2) if chosen.json else page(diagnosis))
    if diagnosis.report.of("error"):
        sys.exit(1)


@dataclass
class Diagnosis:
    """What is known of a run before its first step.

    Attributes:
        report: What was checked and found.
        measured: What the models said of some prompts.
        memory: Bytes that the largest phase of a step needs.
        capacity: Bytes of the device.
    """

    report: Report = field(default_factory=Report)
    measured: Measured | None = None
    memory: int | None = None
    capacity: int | None = None

    def facts(self) -> dict[str, Any]:
        """Return all of it in the types of JSON."""
        return {
            "healthy": not self.report.findings,
            "findings": [asdict(each) for each in self.report.findings],
            "checked": self.report.checked,
            "not_checked": self.report.missing,
            "measured": None if self.measured is None else asdict(self.measured),
            "memory": None if self.memory is None else {"needed": self.memory, "capacity": self.capacity},
        }


class Examination(CLI):
    """`stable-opd fit` that looks instead of training."""

    diagnosis: Diagnosis

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Only that of `fit`; to make the parsers of the others takes longer than to look."""
        return {"fit": CLI.subcommands()["fit"]}

    def fit(self, model: OPDModule, datamodule: LightningDataModule | None = None, **_: Any) -> None:
        """Load what a run needs, and check it; LightningCLI calls this in place of the trainer's method."""
        self.diagnosis = Diagnosis()
        _attach(self.trainer, model, datamodule)
        if datamodule is not None:
            self._try("data", datamodule.prepare_data)
            self._try("data", lambda: datamodule.setup("fit"))
        self._try("models", lambda: model.load("fit"))
        if model.student is None:
            return
        patient = Patient.of(model, "fit")
        self._examine(patient)
        self.trainer.precision_plugin.convert_module(model)
        if patient.learner and self.trainer.num_devices * self.trainer.num_nodes == 1:
            plan, capacity = model.memory_plan(), _capacity(self.trainer.strategy.root_device)
            self.diagnosis.memory, self.diagnosis.capacity = max(plan.peaks.values()), capacity
            self._examine(replace(patient, memory=plan, capacity=capacity))
        comparable = patient.learner and model.asks_teacher and model.readers.teacher.support == "full"
        if not self.diagnosis.report.of("error") and comparable and patient.examples:
            self._try("models", lambda: self._measure(model, patient))

    def _measure(self, model: OPDModule, patient: Patient) -> None:
        model.to(self.trainer.strategy.root_device)
        model.place()
        room = min((each for each in patient.contexts.values() if each is not None), default=sys.maxsize)
        stop = sorted(model.readers.teacher.stop_ids or model.stop)
        with self.trainer.precision_plugin.forward_context():
            self.diagnosis.measured = measure(model, patient.examples or [], stop, room)
        self._examine(replace(patient, measured=self.diagnosis.measured))

    def _examine(self, patient: Patient) -> None:
        """Make the checks that were not made yet."""
        known = self.diagnosis.report
        found = examine(patient, [each for name, each in CHECKS.items() if name not in known.checked])
        known.findings += found.findings
        known.checked += found.checked
        known.missing = found.missing

    def _try(self, name: str, step: Callable[[], None]) -> None:
        """Take a step that `fit` takes, too; what it refuses is a finding."""
        try:
            step()
        except (ValueError, OSError) as error:
            # The way out is the last sentence of a refusal.
            found, _, fix = str(error).strip().rpartition(". ")
            facts, way_out = (f"{found}.", fix) if found else (fix, "")
            self.diagnosis.report.findings.append(Finding(name, "error", facts, "The run cannot start.", way_out))


def _attach(trainer: Trainer, module: OPDModule, data: LightningDataModule | None) -> None:
    """Let trainer, module and data know of each other, as the trainer does before it calls their setup."""
    trainer.strategy.connect(module)
    module.trainer = trainer
    if data is not None:
        trainer.datamodule, data.trainer = data, trainer  # type: ignore[attr-defined]


def _capacity(device: torch.device) -> int:
    """Return the bytes of a device's memory; for a CPU, of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
