"""Generation in this process, through the model's own forward."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from stable_opd.engines.base import Blend, Completions, Request, RolloutEngine, check_drawn
from stable_opd.randomness import uniforms
from stable_opd.samplers.base import Sampler, draw
from stable_opd.types import Finish


class TransformersEngine(RolloutEngine):
    """Generate in this process with any causal language model of transformers.

    The rows of a prompt share its prefill, rows that have ended leave the batch, and the log-prob of each token is kept
    from the pass that drew it.
    """

    @torch.no_grad()
    def generate(
        self, model: PreTrainedModel, request: Request, sampler: Sampler, blend: Blend | None = None
    ) -> Completions:
        """Let ``model`` write one completion for each row of the request."""
        device = model.device
        batch = _Batch(model, request)
        second = None if blend is None else _Batch(blend.model, request)
        noise = uniforms(request.keys, request.max_new_tokens).to(device)
        stop = torch.tensor(list(request.stop), device=device)
        tokens = torch.zeros(noise.shape, dtype=torch.long, device=device)
        logprobs = torch.zeros(noise.shape, dtype=torch.float32, device=device)
        lengths = torch.full((len(noise),), request.max_new_tokens, device=device)
        finish = torch.full((len(noise),), int(Finish.LENGTH), device=device)
        for step in range(request.max_new_tokens):
            rows = batch.rows
            logits = sampler(request.seen(batch.logits), tokens[rows, :step])
            if blend is not None and second is not None:
                logits = blend(logits, second.logits)
            drawn, drawn_logprobs = draw(logits, noise[rows, step])
            tokens[rows, step], logprobs[rows, step] = drawn, drawn_logprobs
            done = torch.isin(drawn, stop)
            lengths[rows[done]], finish[rows[done]] = step + 1, int(Finish.STOP)
            batches = [batch] if second is None else [batch, second]
            if bool(done.any()):
                for each in batches:
                    each.keep(~done)
                drawn = drawn[~done]
            if len(batch.rows) == 0 or step + 1 == request.max_new_tokens:
                break
            for each in batches:
                each.advance(drawn)
        inside = torch.arange(tokens.shape[1], device=device) < lengths[:, None]
        completions = Completions(tokens[inside], logprobs[inside], lengths, finish)
        check_drawn(completions)
        return completions


class _Batch:
    """The rows that are still being written: their numbers, their cache, and the logits of their next token."""

    def __init__(self, model: PreTrainedModel, request: Request) -> None:
        self.model, self.vocabulary = model, request.vocabulary
        prompt = torch.tensor(list(request.prompt), device=model.device)
        used, share = prompt.unique(return_inverse=True)
        ids, mask = _left_padded([request.prompts[index] for index in used.tolist()], model.device)
        # Without a pad there is no mask to build, which spares the attention its slow path.
        self.mask = None if bool(mask.all()) else mask
        self.position = mask.sum(1, keepdim=True)
        self.cache = DynamicCache(config=model.config)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        self.logits = self._forward(ids, positions)
        self.rows = torch.arange(len(prompt), device=model.device)
        self._select(share)

    def advance(self, tokens: Tensor) -> None:
        """Append one token to each row, tokens (rows,)."""
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], 1)
        self.logits = self._forward(tokens[:, None], self.position)
        self.position = self.position + 1

    def keep(self, mask: Tensor) -> None:
        """Drop the rows whose mark is false, (rows,) bool."""
        index = mask.nonzero().squeeze(1)
        self.rows = self.rows[index]
        if len(index):
            self._select(index)

    def _select(self, index: Tensor) -> None:
        self.cache.reorder_cache(index)  # type: ignore[arg-type]
        self.position, self.logits = self.position[index], self.logits[index]
        self.mask = None if self.mask is None else self.mask[index]

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        output: Any = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1, : self.vocabulary].float()
        return logits


def _left_padded(prompts: list[Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return token ids and mask of ragged prompts, aligned at their ends, both (B, P)."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    return ids, (torch.arange(width, device=device) >= (width - lengths)[:, None]).long()
