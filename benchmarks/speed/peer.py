"""TRL's side: an ordinary `DistillationTrainer` with its best honest settings."""

import tempfile
import time
from typing import Any

import datasets
import torch
from benchmarks.speed.ours import LEARNING_RATE, Settings
from benchmarks.speed.stats import Step
from benchmarks.speed.turns import Job, Turns
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import DistillationConfig, DistillationTrainer

DTYPES = {"32-true": "float32", "bf16-true": "bfloat16", "bf16-mixed": "float32"}


class Generation:
    """Stands in for the model's ``generate``: remembers how long it took and what it returned.

    Args:
        trainer: Whose model it is.
    """

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.real, self.stop = trainer.model.generate, torch.tensor(trainer.eos_token_ids)
        self.cuda = trainer.args.device.type == "cuda"
        trainer.model.generate = self
        self.seconds, self.prompt, self.tokens = 0.0, 0, torch.zeros(0)

    def __call__(self, *args: Any, **options: Any) -> Tensor:
        """Generate."""
        start = time.perf_counter()
        self.tokens = self.real(*args, **options)
        if self.cuda:  # the trainer reads the tokens next, so this wait moves and adds none
            torch.cuda.synchronize()
        self.seconds, self.prompt = time.perf_counter() - start, options["input_ids"].shape[1]
        return self.tokens

    def facts(self) -> Step:
        """Return the answers' tokens up to the first stop token, and the seconds."""
        ended = torch.isin(self.tokens[:, self.prompt :].cpu(), self.stop).cumsum(1)
        # Before the first stop token, and that token itself.
        tokens = (ended == 0).sum() + (ended[:, -1] > 0).sum()
        return {"tokens": int(tokens), "rollout": self.seconds}


class Reporter(TrainerCallback):
    """Ends a step of the benchmark where the trainer ends one."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns
        self.generation: Generation | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Wait for the first release."""
        control.should_training_stop = not self.turns.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Report a step."""
        assert self.generation is not None
        control.should_training_stop = not self.turns.finish(self.generation.facts)


def make_trainer(settings: Settings, device: str, output: str, *callbacks: TrainerCallback) -> DistillationTrainer:
    """Return a trainer of the recipe that both sides share.

    TRL has no answers per prompt, so a prompt stands in its data that many times, one after the other.
    """
    prompts = datasets.load_dataset("json", data_files=settings.prompts, split="train").select_columns("prompt")
    repeated = [prompt for prompt in prompts["prompt"] for _ in range(settings.samples)]
    dtype = DTYPES[settings.precision]
    config = DistillationConfig(
        output_dir=output,
        use_cpu=device == "cpu",
        bf16=settings.precision != "32-true",
        model_init_kwargs={"dtype": dtype},
        teacher_model_init_kwargs={"dtype": "auto"},
        gradient_checkpointing=False,
        per_device_train_batch_size=settings.rows,
        gradient_accumulation_steps=1,
        max_steps=10**6,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_completion_length=settings.limit,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        beta=1.0,
        cache_implementation=settings.cache,
        shuffle_dataset=False,
        dataloader_pin_memory=device == "cuda",
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        seed=0,
    )
    return DistillationTrainer(
        model=settings.student,
        teacher_model=settings.teacher,
        args=config,
        train_dataset=datasets.Dataset.from_dict({"prompt": repeated}),
        callbacks=list(callbacks),
    )


def train(job: Job, turns: Turns) -> None:
    """Take steps while released."""
    settings = Settings(**job.settings)
    reporter = Reporter(turns)
    with tempfile.TemporaryDirectory() as output:
        trainer = make_trainer(settings, job.device, output, reporter)
        reporter.generation = Generation(trainer)
        trainer.train()
