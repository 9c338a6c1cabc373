"""Generation in this process, as fast as it goes."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stable_opd.engines.base import Blend, Completions, Request, RolloutEngine, check_drawn
from stable_opd.engines.decoder import Decoder, obstacle
from stable_opd.engines.replay import ReplayedStep, recordable
from stable_opd.engines.transformers import TransformersEngine
from stable_opd.packing import Packing
from stable_opd.randomness import uniforms
from stable_opd.repetition.suffix import repeated_suffix
from stable_opd.samplers.base import Sampler, draw
from stable_opd.types import Finish

_log = logging.getLogger(__name__)

#: Tokens that are written between two looks at which rows have ended. A look makes a GPU wait, and costs a CPU little.
POLL = {"cpu": 4, "cuda": 16}


@dataclass(frozen=True)
class LoopStop:
    """When a row that repeats itself is stopped early.

    Args:
        max_period: Longest block looked for, in tokens.
        min_copies: Copies that make a loop.
        min_tokens: Tokens that make a loop, the first copy included.
        every: Tokens between two looks.
    """

    max_period: int = 128
    min_copies: int = 3
    min_tokens: int = 48
    every: int = 32

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        if self.max_period < 1 or self.min_copies < 2 or self.every < 1:
            raise ValueError(
                f"Expected max_period and every of at least 1 and min_copies of at least 2, but got {self.max_period}, "
                f"{self.every} and {self.min_copies}."
            )


class InProcessEngine(RolloutEngine):
    """Generate in this process, by the library's own decoder where it knows the model's layers.

    The cache is allocated once and written in place, prompts are not padded and are read once for all their rows, rows
    that have ended leave the batch, and the log-prob of each token is kept from the pass that drew it. Models of other
    types go through `TransformersEngine`; the log says so.

    Args:
        loops: Stop rows that repeat themselves before their budget is used up; none lets them run. A row that was
            stopped counts as truncated.
    """

    def __init__(self, loops: LoopStop | None = None) -> None:
        self.loops = loops
        self._said: set[str] = set()

    def generate(
        self, model: PreTrainedModel, request: Request, sampler: Sampler, blend: Blend | None = None
    ) -> Completions:
        """Let ``model`` write one completion for each row of the request."""
        models = [_unwrapped(each) for each in ([model] if blend is None else [model, blend.model])]
        reason = next(filter(None, map(obstacle, models)), None)
        if reason is not None:
            self._say(f"Rollouts go through the model's own forward, which is slower, because {reason}.")
            second = None if blend is None else replace(blend, model=models[1])
            return TransformersEngine().generate(models[0], request, sampler, second)
        device = model.device
        automatic = torch.is_autocast_enabled(device.type)
        longest = max(len(request.prompts[index]) for index in set(request.prompt)) + request.max_new_tokens
        with torch.inference_mode(), torch.autocast(device.type, enabled=False):
            decoders = [
                Decoder(
                    each,
                    longest,
                    request.vocabulary,
                    torch.get_autocast_dtype(device.type) if automatic else each.dtype,
                )
                for each in models
            ]
            batch = _Batch(decoders, request, self.loops)
            batch.write(sampler, blend)
            inside = torch.arange(request.max_new_tokens, device=device) < batch.lengths[:, None]
            written = batch.tokens[inside], batch.logprobs[inside], batch.lengths, batch.finish
        completions = Completions(*(each.clone() for each in written))  # tensors that autograd may keep
        check_drawn(completions)
        return completions

    def _say(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            _log.warning(message)


def _unwrapped(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model in which the adapters of peft are, or the model itself."""
    return cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model


class _Reader:
    """A model that follows the rows: its cache, and the logits of the token to come.

    All rows end at the same column of the cache, so a token of each is written by one copy. A row with a shorter prompt
    starts further to the right, and what stands before it is hidden by a bias.
    """

    def __init__(self, decoder: Decoder, request: Request) -> None:
        self.decoder = decoder
        device = decoder.embedding.device
        prompt = torch.tensor(list(request.prompt), device=device)
        used, share = prompt.unique(return_inverse=True)
        prompts = [request.prompts[index] for index in used.tolist()]
        sizes = torch.tensor([len(each) for each in prompts], device=device)
        self.width = int(sizes.max())
        starts = self.width - sizes
        # The prompts are read once, and then stand in front of each of their rows.
        ids = torch.tensor([token for each in prompts for token in each], device=device)
        read = decoder.make_cache(len(prompts), self.width)
        self.logits = decoder.prefill(ids, Packing(sizes), read, starts)[share]
        self.cache = decoder.make_cache(len(prompt), self.width + request.max_new_tokens)
        self.cache[:, :, :, :, : self.width] = read[:, :, share]
        del read
        self.starts = starts[share]
        self.replayed: ReplayedStep | None = None
        self.first, self.bias = 0, None  # type: int, Tensor | None
        self._arrange()

    def advance(self, tokens: Tensor, written: int) -> None:
        """Read one more token of each live row, after ``written`` others."""
        column = self.width + written
        if recordable(tokens.device):
            if self.replayed is None or self.replayed.width <= column:
                self.replayed = ReplayedStep(self.decoder, self.cells, self.starts, column)
            self.logits = self.replayed(tokens, column)
            return
        first, last = self.first, column + 1
        cells = [layer.narrow(3, first, last - first) for layer in self.cells]
        bias = None if self.bias is None else self.bias.narrow(3, first, last - first)
        self.logits = self.decoder.step(tokens, self.decoder.rotation[column - self.starts], cells, bias)

    def keep(self, index: Tensor, written: int) -> None:
        """Go on with some of the live rows."""
        used = self.width + written
        for layer in self.cache:  # one by one, because what is moved is in memory twice
            layer[:, : len(index), :, :used] = layer[:, index, :, :used]
        self.starts, self.logits = self.starts[index], self.logits[index]
        if len(index):
            self._arrange()

    def _arrange(self) -> None:
        """Make the views of the cache that the live rows need."""
        self.cells = [layer[:, : len(self.starts)] for layer in self.cache]
        self.replayed = None
        self.first = int(self.starts.min())
        self.bias = None
        if self.first != int(self.starts.max()):
            column = torch.arange(self.cache.shape[4], device=self.starts.device)
            hidden = column < self.starts[:, None]
            self.bias = torch.zeros(hidden.shape, dtype=self.cache.dtype, device=hidden.device)
            self.bias = self.bias.masked_fill_(hidden, -float("inf"))[:, None, None]


class _Batch:
    """The rows of a request; those that are still being written stand first in the buffers."""

    def __init__(self, decoders: Sequence[Decoder], request: Request, loops: LoopStop | None) -> None:
        self.request, self.loops, self.budget = request, loops, request.max_new_tokens
        self.readers = [_Reader(decoder, request) for decoder in decoders]
        device, count = decoders[0].embedding.device, len(request.prompt)
        self.poll = POLL.get(device.type, 1)
        self.rows = torch.arange(count, device=device)
        # What was written, by the number of the row, and the same for the rows that are still being written.
        self.tokens = torch.zeros(count, self.budget, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(count, self.budget, dtype=torch.float32, device=device)
        self.lengths = torch.full((count,), self.budget, device=device)
        self.finish = torch.full((count,), int(Finish.LENGTH), device=device)
        self.noise = uniforms(request.keys, self.budget).to(device)
        self.live_tokens, self.live_logprobs = self.tokens.clone(), self.logprobs.clone()
        self.going = torch.ones(count, dtype=torch.bool, device=device)
        self.stops = torch.zeros(len(decoders[0].embedding), dtype=torch.bool, device=device)
        self.stops[torch.tensor(list(request.stop), dtype=torch.long, device=device)] = True

    def write(self, sampler: Sampler, blend: Blend | None) -> None:
        """Write all rows to their end."""
        looked = 0
        for step in range(self.budget):
            logits = sampler(self.request.seen(self.readers[0].logits), self.live_tokens[:, :step])
            if blend is not None:
                logits = blend(logits, self.readers[1].logits)
            drawn, logprobs = draw(logits, self.noise[:, step])
            self.live_tokens[:, step] = drawn
            self.live_logprobs[:, step] = logprobs
            done = step + 1
            if done % self.poll == 0 or done == self.budget or self._seeks_loops(done):
                self._look(looked, done)
                looked = done
                if len(self.rows) == 0:
                    return
                drawn = self.live_tokens[:, step]
            if done < self.budget:
                for reader in self.readers:
                    reader.advance(drawn, step)

    def _look(self, since: int, done: int) -> None:
        """Find the rows that have ended since the last look, and drop them when that pays."""
        stopped = self.stops[self.live_tokens[:, since:done]]
        ended = stopped.any(1) & self.going
        length, reason = since + 1 + stopped.int().argmax(1), int(Finish.STOP)
        self._end(ended, length, reason)
        if self.loops is not None and self._seeks_loops(done):
            written = torch.full_like(self.rows, done)
            repeated = repeated_suffix(
                self.live_tokens[:, :done], written, self.loops.max_period, self.loops.min_copies, self.loops.min_tokens
            )
            self._end((repeated > 0) & self.going, written, int(Finish.LOOP))
        count = int(self.going.sum())
        if done == self.budget or count == 0:
            self._keep(self.going & False, done)
        # Moving the rest costs about as much as reading it once; on a GPU a new step is recorded besides.
        elif count <= (0.5 if recordable(self.going.device) else 0.9) * len(self.rows):
            self._keep(self.going, done)

    def _seeks_loops(self, done: int) -> bool:
        # At the same lengths whatever else is in the batch, so that a row does not depend on it.
        return self.loops is not None and done % self.loops.every == 0

    def _end(self, ended: Tensor, length: Tensor, reason: int) -> None:
        rows = self.rows[ended]
        self.lengths[rows], self.finish[rows] = length[ended], reason
        self.going = self.going & ~ended

    def _keep(self, mask: Tensor, done: int) -> None:
        """Put what the live rows have written where it belongs, and go on with some of them, (rows,) bool."""
        self.tokens[self.rows], self.logprobs[self.rows] = self.live_tokens, self.live_logprobs
        index = mask.nonzero().squeeze(1)
        for reader in self.readers:
            reader.keep(index, done)
        self.rows, self.going, self.noise = self.rows[index], self.going[index], self.noise[index]
        self.live_tokens, self.live_logprobs = self.live_tokens[index], self.live_logprobs[index]
