"""The command line: `stable-opd fit|validate|test|predict` by LightningCLI, and commands of our own beside it."""

import contextlib
import logging
import os
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any, NoReturn, TypeVar

import datasets
import transformers
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from stable_opd import registry
from stable_opd.callbacks import AnswerWriter, OPDProgressBar, RolloutSamples
from stable_opd.commands import COMMANDS
from stable_opd.data import PromptDataModule
from stable_opd.guard import CollapseGuard
from stable_opd.hints import hints, options
from stable_opd.module import OPDModule

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
        print(f"stable-opd: error: {message.strip()}", *hints(message, options(self)), sep="\n\n", file=sys.stderr)
        sys.exit(2)


class CLI(LightningCLI):
    """LightningCLI whose trainer shows our progress bar, and keeps answers of evaluations and predictions."""

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer; a callback of the same kind in the YAML takes the place of ours."""
        options = self.config_init[self.subcommand].trainer
        callbacks = options.callbacks or []
        callbacks = list(callbacks) if isinstance(callbacks, list) else [callbacks]
        if options.enable_progress_bar is not False and not any(isinstance(each, ProgressBar) for each in callbacks):
            callbacks.append(OPDProgressBar())
        for kind in (AnswerWriter, RolloutSamples, CollapseGuard):
            if not any(isinstance(each, kind) for each in callbacks):
                callbacks.append(kind())
        return super().instantiate_trainer(callbacks=callbacks, **kwargs)


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
    # The prompts are in memory already, so workers would only copy them.
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    # Ours is: the sampler goes on where the global step says.
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable")
