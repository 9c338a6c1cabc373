"""A progress bar that shows what matters in on-policy distillation."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

SHOWN = {
    "train/truncation_rate": ("trunc", "{:.2f}"),
    "train/repetition_rate": ("rep", "{:.2f}"),
    "train/length_mean": ("len", "{:.0f}"),
    "val/accuracy": ("acc", "{:.3f}"),
    "throughput/rollout_tokens_per_s": ("tok/s", "{:.0f}"),
}


class OPDProgressBar(TQDMProgressBar):
    """One bar over all optimizer steps, with truncation, repetition, length, accuracy and rollout tokens per second."""

    @property
    def sanity_check_description(self) -> str:
        """What the evaluation before the first step is called."""
        return "Initial student"

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return the figures to show."""
        logged = trainer.callback_metrics
        return {short: form.format(float(logged[name])) for name, (short, form) in SHOWN.items() if name in logged}

    def on_train_epoch_start(self, trainer: Trainer, *_: Any) -> None:
        """Count all steps of the run and not those of the epoch."""
        total = trainer.estimated_stepping_batches
        bar = self.train_progress_bar
        bar.total = None if total == float("inf") else int(total)
        bar.set_description("Step")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Show the step that has just been taken."""
        bar = self.train_progress_bar
        if self.is_enabled and (trainer.global_step % self.refresh_rate == 0 or trainer.global_step == bar.total):
            bar.n = trainer.global_step
            bar.set_postfix(self.get_metrics(trainer, pl_module))
