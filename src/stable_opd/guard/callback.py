"""The callback: it watches the figures of each step, and carries out what the ladder decides."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from stable_opd.guard.checkpoints import HealthyCheckpoints
from stable_opd.guard.ladder import Action, Ladder
from stable_opd.guard.slowing import Slowing
from stable_opd.guard.terms import guarded_terms
from stable_opd.jsonl import write_records
from stable_opd.signals import SIGNALS, Watch
from stable_opd.terms import LossTerm

Mode = Literal["off", "warn", "act"]

#: The file in the run's folder.
EVENTS = "events.jsonl"


class CollapseGuard(Callback):
    """Notices a collapse by its early signs and says so, or answers it: weights up, back to a healthy state, a stop.

    After every step it looks at the signals of `stable_opd.signals.SIGNALS`, by the rule that `stable-opd report` goes
    by too. There is an alarm while ``votes`` of those that speak about loops and length are away from the level of the
    first ten steps at once. The other signals move in healthy runs too; a first change of any is noted and no more.

    With ``act`` an alarm is answered, and once more after ``patience`` steps if it lasts:

    1. raise: the guarded terms (the mixture and the constraints that hold on to the reference) count ``factor`` times
       as much. With ``resting`` they count nothing before the first alarm and cost nothing either: no golden row is
       written and the reference reads nothing. So plain distillation stays plain as long as it is healthy.
    2. roll back: weights, optimizer and whatever else a checkpoint holds of the module are those of the last healthy
       checkpoint before the first sign began; the terms are raised once more, and the learning rate is divided by
       ``factor`` for the rest of the run.
    3. stop, with the weights of that checkpoint.

    After ``calm`` steps without an alarm the terms are lowered by one step (see `Ladder`).

    The trainer's loops are not rewound: steps, schedules and the position in the data go forward. Random choices are
    keyed by the step, so the student meets other prompts and draws other tokens than on the way into the collapse.
    Every change, alarm and answer is a line in ``events.jsonl`` in the run's folder, with its step and its reason.

    All processes see the same figures, which are reduced already, and so decide alike. What was seen and done is part
    of the checkpoints. The healthy states are checkpoints of the trainer's own, the last three in ``healthy/`` in the
    run's folder; a run that is resumed without them goes on without a way back until it has made a new one.

    A run whose answers are meant to become longer by a quarter looks like the beginning of a collapse: there take
    ``warn``, or more votes.

        trainer:
          callbacks:
            - class_path: CollapseGuard
              init_args: {mode: act, resting: true}

    Source: the signs are those of Luo et al. 2026 (arXiv 2604.08527); that weights are doubled and the last good
    checkpoint is restored is known from public guard rails of on-policy distillation. The numbers are of this project.

    Args:
        mode: ``off``, ``warn`` to say it and do nothing, or ``act``.
        terms: Names of the guarded terms, ``mixture`` or a key of the constraints; none takes a mixture that brings
            rows of others, and all constraints that hold on to the reference.
        resting: The terms count nothing before the first alarm, and their own weight after it.
        factor: What the weights are multiplied by when they are raised; above 1.
        raises: Times that the weights are raised before the run goes back.
        rollbacks: Times that the run goes back before it stops.
        patience: Steps that an answer is given to work.
        calm: Steps without an alarm after which the weights are lowered.
        every: Steps between two healthy checkpoints.
        votes: Signals that make an alarm.

    Raises:
        ValueError: If a number is out of its range, or there is no term to raise.
    """

    def __init__(
        self,
        mode: Mode = "warn",
        terms: Sequence[str] | None = None,
        resting: bool = False,
        factor: float = 2.0,
        raises: int = 1,
        rollbacks: int = 2,
        patience: int = 10,
        calm: int = 50,
        every: int = 20,
        votes: int = 2,
    ) -> None:
        super().__init__()
        if mode not in get_args(Mode):
            raise ValueError(f"Expected a mode out of {', '.join(get_args(Mode))}, but got {mode!r}.")
        specific = sum(signal.specific for signal in SIGNALS)
        if factor <= 1 or min(raises, rollbacks) < 0 or min(patience, calm, every) < 1 or not 1 <= votes <= specific:
            raise ValueError(
                "Expected a factor above 1, raises and rollbacks of at least 0, patience, calm and every of at least "
                f"1, and votes between 1 and {specific}, but got {factor}, {raises}, {rollbacks}, {patience}, {calm}, "
                f"{every} and {votes}. With the mode warn nothing is done at all."
            )
        self.mode, self.chosen, self.resting, self.factor, self.votes = mode, terms, resting, factor, votes
        self.watches = [Watch(signal) for signal in SIGNALS]
        self.ladder = Ladder(raises, rollbacks, patience, calm)
        self.healthy = HealthyCheckpoints(every)
        self.slowing = Slowing()
        self.terms: dict[str, LossTerm] = {}
        self._warned = self._stopped = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the terms to raise.

        Raises:
            ValueError: If there is none.
        """
        if stage == "fit" and self.mode == "act":
            self.terms = guarded_terms(pl_module, self.chosen, self.resting)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the weights and the learning rate be what they are to be by now, also after a checkpoint was loaded."""
        if self.mode == "act":
            self.slowing.attach(trainer.optimizers)
            self._apply()
            trainer.should_stop = trainer.should_stop or self._stopped  # a run that was stopped for good stays so

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the terms and the optimizers as they were found."""
        for term in self.terms.values():
            term.strength = 1.0
        self.slowing.detach()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the step, and do what is to be done."""
        if self.mode == "off":
            return
        step = trainer.global_step - 1  # the number under which it is logged
        events = self._observe(step, pl_module)
        away = [watch for watch in self.watches if watch.signal.specific and watch.detector.away]
        alarm = len(away) >= self.votes
        if self.mode == "warn":
            if alarm and not self._warned:
                events.append({"action": "warn", "reason": _reason(away)})
            self._warned = alarm
        else:
            action = self.ladder.decide(alarm)
            if action:
                reason = "no alarm for a while" if action == "lower" else _reason(away)
                events.append({"action": action, "reason": reason, "done": self._act(action, trainer, away)})
            if not away and not trainer.should_stop:
                self.healthy.save(trainer)
        self._tell(trainer, step, events)

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen and done, for checkpoints."""
        return {
            "watches": [watch.state_dict() for watch in self.watches],
            "ladder": self.ladder.state_dict(),
            "healthy": self.healthy.state_dict(),
            "warned": self._warned,
            "stopped": self._stopped,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        for watch, state in zip(self.watches, state_dict["watches"], strict=True):
            watch.load_state_dict(state)
        self.ladder.load_state_dict(state_dict["ladder"])
        self.healthy.load_state_dict(state_dict["healthy"])
        self._warned, self._stopped = state_dict["warned"], state_dict["stopped"]

    def _observe(self, step: int, module: Any) -> list[dict[str, Any]]:
        """Take in the figures of a step, and return an event for each signal whose first change is sure by now."""
        columns = {column for watch in self.watches for column in watch.signal.columns}
        figures = {name: value.item() for name, value in module.report.figures.items() if name in columns}
        before = [watch.change is not None for watch in self.watches]
        for watch in self.watches:
            watch.observe(step, figures)
        changed = [watch for watch, known in zip(self.watches, before, strict=True) if watch.change and not known]
        return [{"action": "notice", "reason": _reason([watch])} for watch in changed]

    def _act(self, action: Action, trainer: Trainer, away: Sequence[Watch]) -> str:
        """Do it, and return what was done, in words."""
        told = []
        if action in ("roll back", "stop"):
            told.append(self.healthy.restore(trainer, min(watch.detector.start for watch in away)))
        if action == "stop":
            trainer.should_stop = self._stopped = True
            return f"{told[0]}; stopped"
        self._apply()
        strengths = f"{', '.join(self.terms)} count {self._strength():g} times their weight"
        return "; ".join([*told, strengths, f"the learning rate {self.slowing.factor:g} times its schedule"])

    def _apply(self) -> None:
        for term in self.terms.values():
            term.strength = self._strength()
        self.slowing.factor = self.factor**-self.ladder.returns

    def _strength(self) -> float:
        """Return the factor of the guarded terms at the present level."""
        if self.resting:
            return self.factor ** (self.ladder.level - 1) if self.ladder.level else 0.0
        return self.factor**self.ladder.level

    def _tell(self, trainer: Trainer, step: int, events: Sequence[dict[str, Any]]) -> None:
        """Say and write down what happened in a step."""
        if not events:
            return
        folder = trainer.log_dir  # processes agree on it, so all of them ask
        for event in events:
            say = rank_zero_info if event["action"] in ("notice", "lower") else rank_zero_warn
            done = f"; {event['done']}" if "done" in event else ""
            say(f"CollapseGuard at step {step}, {event['action']}: {event['reason']}{done}.")
        if folder is not None and trainer.is_global_zero and trainer.state.fn == TrainerFn.FITTING:
            write_records(Path(folder) / EVENTS, step, [{"step": step, **event} for event in events])


def _reason(away: Sequence[Watch]) -> str:
    """Return which signals are away, since when and how far."""
    return ", ".join(
        f"{watch.signal.name} {'rose' if watch.signal.verb == 'rise' else 'fell'} from {watch.detector.level:.3g} to "
        f"{watch.detector.mean:.3g} since step {watch.detector.start}"
        for watch in away
    )
