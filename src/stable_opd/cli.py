"""The command line: `stable-opd fit|validate|test|predict` by LightningCLI, and commands of our own beside it."""

import contextlib
import logging
import os
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import datasets
import transformers
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from stable_opd import registry, resume, secrets
from stable_opd.bench.yamls import SpecError, load, load_file
from stable_opd.callbacks import AnswerWriter, OPDProgressBar, RolloutSamples, RunCheckpoint
from stable_opd.commands import COMMANDS
from stable_opd.data import PromptDataModule
from stable_opd.guard import CollapseGuard
from stable_opd.hints import hints, options
from stable_opd.module import OPDModule
from stable_opd.report.text import visible
from stable_opd.strategy import check_checkpoint, check_strategy

#: Trainer values that suit on-policy distillation; a YAML may change them.
TRAINER_DEFAULTS: dict[str, Any] = {
    "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs", "name": "opd"}},
    "log_every_n_steps": 1,
    "num_sanity_val_steps": -1,  # evaluate the initial student first
    "enable_model_summary": False,
    "use_distributed_sampler": False,  # the data module spreads the prompts itself
}

DESCRIPTION = f"stable-opd {version('stable-opd')}. Other commands: {', '.join(COMMANDS)} (each with --help)."


class Parser(LightningArgumentParser):
    """Says in a few lines what is wrong, instead of printing every option there is."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Explain and exit with 2; a parser of one possibility among several leaves it to the others."""
        if not self.exit_on_error:
            raise ArgumentError(None, message) from ex
        said = [f"stable-opd: error: {message.strip()}", *hints(message, options(self))]
        print(*map(visible, said), sep="\n\n", file=sys.stderr)  # a file may hold what turns a terminal round
        sys.exit(2)

    def parse_path(self, cfg_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Read a file of settings; refuse one that is no mapping or has a key twice, and say in which line."""
        if str(cfg_path) == "-" or Path(cfg_path).is_fifo():  # which can be read only once
            return super().parse_path(cfg_path, *args, **kwargs)
        try:
            settings = load_file(Path(cfg_path), "a recipe")
        except SpecError as error:
            self.error(str(error))
        if not isinstance(settings, dict):
            found = "nothing" if settings is None else repr(settings)[:60]
            self.error(f"Expected `name: value` lines in {cfg_path}, but got {found}. Write a recipe there.")
        known = {each.partition(".")[0] for each in options(self)}
        known |= set(self._subcommands_action.choices if self._subcommands_action else ())
        for key in settings:  # one without settings of its own would be passed over
            if key not in known:
                self.error(f"Option '{key}' is not accepted")
        return super().parse_path(cfg_path, *args, **kwargs)


class CLI(LightningCLI):
    """LightningCLI whose trainer shows our progress bar, keeps answers, and saves what a killed run goes on from."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Let flags and YAML say how runs are saved."""
        parser.add_class_arguments(RunCheckpoint, "checkpoint")

    def before_instantiate_classes(self) -> None:
        """Find where a run goes on: its logger has to write into the folder of that run."""
        self.record: resume.Config = load(self.parser.dump(self.config, skip_none=False))[self.subcommand]
        secrets.check(self.record)
        options = self.config[self.subcommand]
        path = options.ckpt_path
        if path is None and self.subcommand == "fit" and int(os.environ.get("SLURM_RESTART_COUNT", 0)):
            path = "last"  # the same command, which Slurm has queued again
        if path == "last":
            place = resume.last(self.record, trains=self.subcommand == "fit")
            path = place and place.checkpoint
            if place and self.subcommand == "fit" and self._logger() is not None:
                self._logger().version = place.folder.name
                # The metrics that it says it will delete are in the checkpoint.
                warnings.filterwarnings("ignore", message="Experiment logs directory .* is not empty")
        elif path is not None:
            resume.check_whole(Path(path))
        self.checkpoint = path

    def after_instantiate_classes(self) -> None:
        """Hand the checkpoint over, and let config.yaml keep the command as it was given."""
        self.config_init[self.subcommand].ckpt_path = self.checkpoint
        if self._logger() is not None:
            self._logger().version = resume.logger_settings(self.record)["version"]

    def _logger(self) -> Any:
        """Return the settings of the first logger, if it has numbered folders."""
        logger = self.config[self.subcommand].trainer.logger
        logger = logger[0] if isinstance(logger, list) and logger else logger
        settings = getattr(logger, "init_args", None)
        return settings if settings is not None and "version" in settings else None

    def _parse_ckpt_path(self) -> None:
        """Take no settings out of a checkpoint: config.yaml is the record."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer; a callback of the same kind in the YAML takes the place of ours."""
        options = self.config_init[self.subcommand].trainer
        check_strategy(options.strategy)
        callbacks = options.callbacks or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        if options.enable_progress_bar is not False and not any(isinstance(each, ProgressBar) for each in callbacks):
            callbacks.append(OPDProgressBar())
        for kind in (AnswerWriter, RolloutSamples, CollapseGuard):
            if not any(isinstance(each, kind) for each in callbacks):
                callbacks.append(kind())
        if options.enable_checkpointing is not False and not any(isinstance(each, RunCheckpoint) for each in callbacks):
            callbacks.append(self.config_init[self.subcommand].checkpoint)
        for each in callbacks:
            if isinstance(each, RunCheckpoint):
                each.config = self.record
        trainer = super().instantiate_trainer(callbacks=callbacks, **kwargs)
        check_checkpoint(self.checkpoint, trainer.strategy)
        return trainer


C = TypeVar("C", bound=CLI)


def main(args: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        args: Arguments as in a shell, without the program's name; none takes those of the process.
    """
    argv = list(sys.argv[1:] if args is None else args)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # so that `my_losses.MyKL` beside the YAML is found
    quiet()
    registry.load_plugins()
    if argv and argv[0] in COMMANDS:
        COMMANDS[argv[0]](argv[1:])
        return
    start(CLI, None if args is None else argv)


def start(cli: type[C], args: list[str] | None) -> C:
    """Parse arguments of `fit`, `validate`, `test` or `predict`, and do what they ask for.

    Args:
        cli: Does it.
        args: The arguments; none takes those of the process.
    """
    return cli(
        OPDModule,
        PromptDataModule,
        subclass_mode_data=True,
        parser_class=Parser,
        parser_kwargs={"prog": "stable-opd", "description": DESCRIPTION},
        trainer_defaults=TRAINER_DEFAULTS,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        auto_configure_optimizers=False,
        load_from_checkpoint_support=False,  # config.yaml is the record; checkpoints hold tensors only
        args=args,
    )


@contextlib.contextmanager
def no_arguments() -> Iterator[None]:
    """The parser warns of arguments of the process if it is given others."""
    kept = sys.argv
    sys.argv = kept[:1]
    try:
        yield
    finally:
        sys.argv = kept


def quiet() -> None:
    """Keep advertisements and bars of a fraction of a second off the terminal, for the run's own words."""
    rank_zero = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    rank_zero.addFilter(lambda record: not str(record.msg).startswith("💡"))
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    # https://github.com/Lightning-AI/pytorch-lightning: deprecated calls that lightning 2.6.6 makes itself
    warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated", module="lightning")
    # peft 0.21 asks in words that transformers 5.23 deprecates.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
    # They are figures of all processes when they are logged.
    warnings.filterwarnings("ignore", message="It is recommended to use `self.log")
    # The prompts are in memory already, so workers would only copy them.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    # Ours is: the sampler goes on where the global step says.
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable")
