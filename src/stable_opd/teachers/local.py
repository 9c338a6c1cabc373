"""A teacher in this process."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stable_opd.models import (
    Quantization,
    check_same_vocabulary,
    context_length,
    digest,
    load_model,
    load_tokenizer,
    output_head,
    stop_ids,
)
from stable_opd.offload import module_bytes, visiting
from stable_opd.scoring import HiddenStates, body
from stable_opd.sharding import inside
from stable_opd.teachers.base import Teacher
from stable_opd.types import Rollout


class LocalTeacher(Teacher):
    """A causal language model of transformers, frozen, in this process.

    Args:
        path: A folder, a hub name, or one of the testbed's (``testbed:teacher``).
        offload: Let it rest in the host's memory while it does not score, which makes room on a GPU for the rollouts
            and the student's update; all rows of a step are then scored in one go. Its head stays until they are used.
        quantization: Store its layers in 4 bits (``nf4``) or in 8 (``int8``), by bitsandbytes; none leaves them as they
            were saved. The log-probs then have an error, which `stable_opd.logprob_error` measures; it depends on the
            model.
    """

    def __init__(self, path: str, offload: bool = False, quantization: Quantization | None = None) -> None:
        self.path = path
        self.offload = offload
        self.quantization = quantization
        self._device = torch.device("cpu")
        self._model: PreTrainedModel | None = None
        self._vocabulary = 0
        self._stop_ids: tuple[int, ...] = ()

    @property
    def model(self) -> PreTrainedModel:
        """The loaded model."""
        if self._model is None:
            raise RuntimeError(f"The teacher {self.path!r} was asked for scores before its `setup` was called.")
        return self._model

    @property
    def language_model(self) -> PreTrainedModel:
        """The loaded model."""
        return self.model

    @property
    def context_length(self) -> int | None:
        """How many tokens the teacher can read."""
        return context_length(self.model)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Those of its generation config and its tokenizer."""
        return self._stop_ids

    @property
    def identity(self) -> str:
        """A digest of its files, and how its layers are stored."""
        return f"{digest(self.path)} {self.quantization}"

    def setup(self, student: str, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> None:
        """Load the model and compare the vocabularies."""
        theirs = load_tokenizer(self.path)
        check_same_vocabulary(tokenizer, theirs, student, self.path)
        if self._model is None:
            self._model = load_model(self.path, quantization=self.quantization).requires_grad_(False).eval()
        self._stop_ids = tuple(stop_ids(self._model, theirs))
        self._device = device
        self._vocabulary = len(tokenizer)
        nn.Module.to(self._model, "cpu" if self.offload else device)

    @property
    def footprint(self) -> int:
        """Bytes of the model."""
        return module_bytes(self.model)

    def present(self) -> AbstractContextManager[None]:
        """Have the model on the device."""
        return visiting(self.model, self._device) if self.offload else nullcontext()

    def shard(self, spread: Callable[[PreTrainedModel], None]) -> None:
        """Spread its weights over processes.

        Raises:
            ValueError: If they are in 4 or 8 bits, or rest in the host's memory.
        """
        if self.quantization is not None or self.offload:
            raise ValueError(
                "Expected a LocalTeacher without quantization and offload, because trainer.strategy is sharded, but "
                f"got quantization {self.quantization} and offload {self.offload}. Leave them out: each process keeps "
                "but a part of the teacher. Or use trainer.strategy: ddp."
            )
        if not self.sharded:
            spread(self.model)
            self.sharded = True

    @torch.no_grad()
    def score(self, rollout: Rollout) -> HiddenStates:
        """Read some rows and return the hidden states from which their completion tokens are predicted."""

        def read() -> HiddenStates:
            return HiddenStates(body(self.model, rollout), output_head(self.model, self._vocabulary).detached())

        return inside(self.model, read)
