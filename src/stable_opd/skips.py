"""Steps whose loss or gradient is not finite: they are skipped and counted, and the batch is kept for study."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from stable_opd.learning import Learner, Moment, Work
from stable_opd.look import read_again
from stable_opd.objective import Reading
from stable_opd.processes import Processes
from stable_opd.scoring import Opinion
from stable_opd.sharding import whole
from stable_opd.streaming import opinion, tiles
from stable_opd.types import Rollout

#: The folder in that of the run.
FOLDER = "skipped"
#: Files that a process leaves there; those of the first faults say most.
KEPT = 10
#: Who gives log-probs.
MODELS = ("student", "teacher", "reference")

_WAYS_OUT = {
    "student": "Lower the learning rate, or go on from an earlier checkpoint.",
    "teacher": "Look at the teacher's weights, its precision, or its server.",
    "reference": "Look at the weights of model.student, and at trainer.precision.",
}


class NonFiniteError(ArithmeticError):
    """The loss or the gradient is not finite, and no more steps may be skipped; all processes raise it together."""


@dataclass(frozen=True, slots=True)
class Case:
    """A step that cannot be taken.

    Attributes:
        learner: Who learns.
        work: What was to be learnt.
        rollout: From what.
        index: Positions of the prompts in their dataset.
        scalars: What is logged of it: ``loss/<term>`` and ``grad_norm``, the same on all processes.
        moment: Where the training is.
        backward: Adds up gradients.
    """

    learner: Learner
    work: Work
    rollout: Rollout
    index: tuple[int, ...]
    scalars: Mapping[str, Any]
    moment: Moment
    backward: Callable[[Tensor], None]


@dataclass(frozen=True, slots=True)
class Study:
    """What a second look at such a step showed.

    Attributes:
        logprobs: What each model gave each completion token, (N,) each; nan where it was not asked.
        wrong: Tokens without a log-prob, and tokens at all, for each model, over all processes.
        norms: Norm of the gradient of each term.
    """

    logprobs: dict[str, Tensor]
    wrong: dict[str, tuple[int, int]]
    norms: dict[str, float]


class Skips(nn.Module):
    """Counts the steps that were skipped; checkpoints hold the numbers.

    Args:
        most: Steps that may be skipped in a row.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.total = self.in_a_row = 0

    def take(self, case: Case, processes: Processes) -> bool:
        """Say whether a step can be taken; every process has to ask.

        Raises:
            NonFiniteError: If it cannot, and no more steps may be skipped.
        """
        broken = _broken(case.scalars)
        # The figures are those of all processes, but one that went on alone would leave the others waiting.
        if not processes.some(bool(broken)):
            self.in_a_row = 0
            return True
        case.learner.model.zero_grad()
        stops, step = self.in_a_row >= self.most, case.moment.step
        if stops or self.in_a_row == 0:
            found = study(case, processes)
            run = processes.trainer.log_dir  # processes agree on it, so all of them ask
            folder = None if run is None else Path(run) / FOLDER
            kept = f"The first such batch is in {folder}."
            if self.in_a_row == 0:
                kept = _save(case, found, folder, processes.trainer.global_rank)
            what = f"{_named(broken, found)}. {kept}"
            if stops:
                raise NonFiniteError(_refusal(what, found, step, self.in_a_row))
            rank_zero_warn(f"Step {step} is skipped, because of {what}")
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        return False

    def get_extra_state(self) -> Any:
        """Return both numbers, for checkpoints."""
        return torch.tensor([self.total, self.in_a_row])

    def set_extra_state(self, state: Any) -> None:
        """Go on with the numbers of a checkpoint."""
        self.total, self.in_a_row = state.tolist()


def study(case: Case, processes: Processes) -> Study:
    """Look once more at a step that cannot be taken: who gave what, and whose gradient is not finite.

    It costs a backward pass for each term; every process has to take part.
    """
    readings = list(case.learner.read(case.work.pieces))
    logprobs, counts = _log_probs(case, readings)
    totals = processes.total(counts).long().tolist()
    norms = {}
    for name in case.work.shares:
        case.learner.differentiate(case.work, readings, name, case.backward, processes)
        gradients = [each.grad for each in case.learner.model.parameters() if each.grad is not None]
        norms[name] = float(whole(nn.utils.get_total_norm(gradients))) if gradients else 0.0
        case.learner.model.zero_grad()
    return Study(logprobs, {name: tuple(pair) for name, pair in zip(MODELS, totals, strict=True)}, norms)


@torch.no_grad()
def _log_probs(case: Case, readings: list[list[Reading]]) -> tuple[dict[str, Tensor], Tensor]:
    """Return the log-probs of `Study`, and the counts of this process, (models, 2)."""
    model, learner, device = case.learner.model, case.learner, case.rollout.row.device
    nothing = torch.full((len(case.rollout.row),), torch.nan, dtype=torch.float32, device=device)
    found = {name: nothing.clone() for name in MODELS}
    counts = torch.zeros(len(MODELS), 2, dtype=torch.float32, device=device)
    for group, reading, own in read_again(case.work.pieces, readings, model, learner.vocabulary, learner.rule.student):
        tokens = group.evidence.tokens
        for number, each in enumerate((own, reading.teacher, reading.reference)):
            if each is not None:
                given, wrong = _read(MODELS[number], each, tokens, tiles(len(tokens), own))
                found[MODELS[number]][group.places] = given
                counts[number] += torch.stack([wrong.sum(), wrong.new_tensor(len(wrong), dtype=torch.long)])
    asked = dict(zip(MODELS, counts[:, 1].bool().tolist(), strict=True))
    return {name: each for name, each in found.items() if asked[name]}, counts


def _read(name: str, model: Opinion, tokens: Tensor, places: Iterable[slice]) -> tuple[Tensor, Tensor]:
    """Return a model's log-probs of tokens, and whether it failed to give any there, (n,) each."""
    given, wrong = [], []
    with torch.autocast(tokens.device.type, enabled=False):  # precision is decided by the dtypes that arrive
        for tile in places:
            seen = opinion(name, model, tile, tokens[tile])
            given.append(seen.sampled)
            wrong.append(~seen.sampled.isfinite())
            if seen.whole:
                wrong[-1] |= seen.logprobs.isnan().any(-1)
    return torch.cat(given), torch.cat(wrong)


def _broken(scalars: Mapping[str, Any]) -> list[str]:
    """Return the names of the losses that are not finite, and of the norm of the gradient if it is not."""
    names = [name for name in scalars if name.startswith("loss/") or name == "grad_norm"]
    finite = torch.stack([torch.as_tensor(scalars[name]).detach().float() for name in names]).isfinite().tolist()
    return [name for name, fine in zip(names, finite, strict=True) if not fine]


def _named(broken: list[str], found: Study) -> str:
    """Return what is not finite, in words."""
    losses = [name.removeprefix("loss/") for name in broken if name != "grad_norm"]
    gradients = [name for name, norm in found.norms.items() if not torch.tensor(norm).isfinite()]
    said = [f"a loss that is not finite ({', '.join(losses)})"] if losses else []
    if "grad_norm" in broken:
        said.append(f"a gradient that is not finite ({', '.join(gradients) or 'that of all terms together'})")
    counts = [(name, wrong, count) for name, (wrong, count) in found.wrong.items() if wrong]
    blamed = [f"the {name} gave {wrong} of {count} tokens no log-prob" for name, wrong, count in counts]
    return "; ".join([" and ".join(said), *blamed])


def _refusal(what: str, found: Study, step: int, skipped: int) -> str:
    ways = [_WAYS_OUT[name] for name, (wrong, _) in found.wrong.items() if wrong]
    before = f", after {skipped} steps in a row that were skipped" if skipped else ""
    return (
        f"Expected a finite loss and a finite gradient in step {step}, but got {what} The run stops{before}; "
        f"model.update.max_skipped says how many may be. {ways[0] if ways else 'Look at train/grad_norm before.'}"
    )


def _save(case: Case, found: Study, folder: Path | None, rank: int) -> str:
    """Write this process's part of the batch; return where it is, or why it could not be written, in words."""
    if folder is None:
        return "The batch is not kept, as the run has no folder."
    path = folder / f"step={case.moment.step}-process={rank}.safetensors"
    others = [each for each in folder.glob(f"*-process={rank}.safetensors") if each != path]
    if len(others) >= KEPT:
        return f"The batch is not kept: there are {KEPT} in {folder} already."
    rollout = {f.name: getattr(case.rollout, f.name) for f in fields(case.rollout)}
    plain = {name: rollout.pop(name) for name in ("texts", "fields")}
    tensors = rollout | {"index": torch.tensor(case.index)}
    tensors |= {f"logprobs/{name}": each for name, each in found.logprobs.items()}
    tensors |= {f"share/{name}": each for name, each in case.work.shares.items()}
    figures = {name: float(each) for name, each in case.scalars.items()}
    about = {"step": case.moment.step, "process": rank, "gradient_norms": found.norms, **plain}
    about |= {"without_logprob": {name: wrong for name, (wrong, _) in found.wrong.items()}, "figures": figures}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: each.detach().cpu().contiguous().clone() for name, each in tensors.items()},
            path,
            {"about": json.dumps(about, default=str)},
        )
    except (OSError, SafetensorError) as error:  # the latter on a full disk
        return f"The batch could not be kept: {error}."
    return f"The batch is in {path}."


@contextmanager
def undone_if_it_fails(module: LightningModule, parts: Mapping[str, nn.Module]) -> Iterator[None]:
    """Leave everything as it was before a step that fails before the optimizer takes it, so that it can be saved.

    Args:
        module: What is trained.
        parts: What may remember something of the step; the model that is trained changes with the optimizer alone.
    """
    before, kept = module.global_step, {name: _copied(part.state_dict()) for name, part in parts.items()}
    try:
        yield
    except BaseException:
        if module.global_step == before:
            for name, part in parts.items():
                part.load_state_dict(kept[name])
            module.zero_grad()
        raise


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: each.clone() if isinstance(each, Tensor) else each for name, each in state.items()}
