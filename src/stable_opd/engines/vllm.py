"""Generation by a vLLM server, which gets the student's weights after every update."""

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from torch import Tensor, distributed
from transformers import PreTrainedModel

from stable_opd.engines.agreement import Gap, gap
from stable_opd.engines.base import Blend, Completions, Request, RolloutEngine, check_drawn
from stable_opd.engines.handing_over import fingerprint, rehearsed, write_weights
from stable_opd.engines.in_process import LoopStop
from stable_opd.samplers.base import Sampler
from stable_opd.samplers.temperature import Temperature
from stable_opd.servers import GENERATE, Server, ServerError
from stable_opd.terminal import StopEvent
from stable_opd.types import Finish

#: What vLLM calls the ends of a row.
FINISH = {"stop": Finish.STOP, "length": Finish.LENGTH, "repetition": Finish.LOOP}

#: Version of a server whose weights are being changed.
UNDER_WAY = "stable-opd: under way"

#: The largest change of a logit that a server accepts; a token with it is e^100 times less likely than it was.
NEVER = -100.0


class VLLMEngine(RolloutEngine):
    """Generate by a vLLM server, which gets the student's weights after every update.

    Each row is a request with a seed of its own, so equal keys give equal rows up to rounding. Each answer says which
    version of the weights wrote it, and one by others is not accepted. In every rollout some log-probs are compared
    with those of the student's own forward pass, and before the first one with weights that were all changed for it:
    so a server that does not take them all is found before anything is learnt. What remains of the difference is
    corrected by the importance ratio of those terms that have one, because the behaviour's log-probs are the server's.

    The server needs routes that vLLM has in its development mode, which obey everybody: let it listen on loopback.
    `docs/vllm.md` says how to start it.

    Args:
        server: Where it is.
        weights: Folder through which the weights are handed over, which the server finds under the same path; none
            makes one in the place for temporary files.
        loops: Stop rows that repeat themselves before their budget is used up, by the server's own detection; none lets
            them run. A row that was stopped counts as truncated.
        largest_gap: Largest mean distance, in nats, between the server's log-probs and the student's own.
    """

    def __init__(
        self, server: Server, weights: str | None = None, loops: LoopStop | None = None, largest_gap: float = 0.1
    ) -> None:
        if largest_gap <= 0:
            raise ValueError(f"Expected largest_gap above 0, but got {largest_gap}: rounding alone makes one.")
        self.server, self.weights, self.loops, self.largest_gap = server, weights, loops, largest_gap
        self._detection = None if loops is None else _repetition_detection(loops)
        self._served: str | None = None  # version of the weights that the server has
        self._room = 0  # tokens that a row may have there
        self._gap: Gap | None = None

    @property
    def figures(self) -> Mapping[str, float]:
        """The gap between the server's log-probs and the student's own, of the last rollout."""
        return {} if self._gap is None else {"gap": self._gap.mean, "gap_max": self._gap.largest}

    def generate(
        self, model: PreTrainedModel, request: Request, sampler: Sampler, blend: Blend | None = None
    ) -> Completions:
        """Let ``model`` write one completion for each row of the request.

        Raises:
            ServerError: If the server does not answer, or answers with what it was not asked for.
            ValueError: If it cannot do what is asked.
        """
        if blend is not None:
            raise ValueError(
                "VLLMEngine runs one model, and this mixture lets the teacher have a say in every token. Use "
                "InProcessEngine, or another mixture, such as GoldenMixture."
            )
        rule = sampler.request()
        self._check_room(request)
        if self._served is None and _is_first():
            with rehearsed(model):
                self._write(model, _few(request), Temperature(1.0), {"temperature": 1.0})
        return self._write(model, request, sampler, rule)

    def _write(self, model: PreTrainedModel, request: Request, sampler: Sampler, rule: dict[str, Any]) -> Completions:
        """Let the server write all rows with the weights that the model has now, and check what it wrote."""
        version = self._hand_over(model)
        questions = self._questions(model, request, rule)
        written = [_read(self.server, each, request, version) for each in self.server.ask_all(GENERATE, questions)]
        late = [row for row, each in enumerate(written) if each is None]
        if late:  # the server was started again, or somebody else changed its weights
            self._served = None
            self._hand_over(model)
            answers = self.server.ask_all(GENERATE, [questions[row] for row in late])
            for row, answer in zip(late, answers, strict=True):
                written[row] = _read(self.server, answer, request, version)
        completions = _pack(self.server, written, model.device)
        if rule.get("temperature") == 0:  # the server gives the likeliest token the log-prob that it has at 1
            return replace(completions, logprobs=torch.zeros_like(completions.logprobs))
        check_drawn(completions)
        self._gap = gap(model, request, sampler, completions)
        self._check_gap(self._gap)
        return completions

    def _check_room(self, request: Request) -> None:
        """Make sure that the server is the right one, and that rows of this length fit into it."""
        if not self._room:
            self._room = self.server.context_length()
            self._check_mode()
        longest = max(len(request.prompts[index]) for index in set(request.prompt)) + request.max_new_tokens
        if longest > self._room:
            raise ValueError(
                f"Expected a server for rows of {longest} tokens, prompt and budget together, but "
                f"{self.server.whom('')} was started for {self._room}. Start it with --max-model-len {longest}, or "
                "lower model.rollout.max_new_tokens."
            )

    def _check_mode(self) -> None:
        """Make sure that its log-probs are those of the distribution it draws from.

        A token without an alternative then has the log-prob 0; otherwise at most one of two tokens can have.
        """
        for token in (0, 1):
            rule = {"max_tokens": 1, "logprobs": 0, "allowed_token_ids": [token], "detokenize": False}
            question = {"model": self.server.model, "token_ids": [0], "sampling_params": rule}
            answer = self.server.ask(GENERATE, question)
            self.server.check_name(answer, GENERATE)
            try:
                logprob = float(answer["choices"][0]["logprobs"]["content"][0]["logprob"])
            except (KeyError, IndexError, TypeError, ValueError):
                raise self.server.garbage(GENERATE, "the log-prob of one token", answer) from None
            if not abs(logprob) <= 1e-3:
                raise ValueError(
                    "Expected log-probs of the distribution that tokens are drawn from, but "
                    f"{self.server.whom('')} gives others. Start it with --logprobs-mode processed_logprobs."
                )

    def _hand_over(self, model: PreTrainedModel) -> str:
        """Let the server have the student's weights, unless it has them, and return their version."""
        version = f"stable-opd: {fingerprint(model)}"
        if version == self._served:
            return version
        if _is_first():
            self._push(model, version)
        else:
            self._await(version)
        self._served = version
        return version

    def _push(self, model: PreTrainedModel, version: str) -> None:
        """Write the weights into a folder, let the server read them, and let it forget what it computed with others."""
        self._name(UNDER_WAY)  # first, so that nobody takes a change that was not finished for one that was
        parent = None if self.weights is None else str(Path(self.weights).absolute())
        if parent is not None:
            Path(parent).mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix="stable-opd-weights-", dir=parent))
        try:
            write_weights(model, folder)
            self.server.ask("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
        finally:
            rmtree(folder, ignore_errors=True)
        self._forget()
        self._name(version)

    def _forget(self) -> None:
        """Let the server forget what it computed with earlier weights, which it cannot while it writes.

        What it still writes may be for a run that was killed, or for another process of this one: it has the weights
        of a run that goes on already, so the others need not wait for the first. Their rows are asked for again.
        """
        until = time.monotonic() + self.server.timeout
        while True:
            answer = self.server.ask("/reset_prefix_cache", {})
            if isinstance(answer, dict) and answer.get("success") is True:
                return
            if time.monotonic() > until:
                raise ServerError(
                    f"Expected {self.server.whom('/reset_prefix_cache')} to forget what it computed with earlier "
                    f"weights within {self.server.timeout:g} seconds, but got {answer!r}: it is busy with requests of "
                    "others. Let it serve this run alone."
                )
            time.sleep(0.1)

    def _name(self, version: str) -> None:
        self.server.ask("/update_weight_version", {"new_version": version})

    def _await(self, version: str) -> None:
        """Wait until the first process has handed over the weights."""
        until = time.monotonic() + self.server.timeout
        while (answer := self.server.ask("/weight_info")) != {"weight_version": version}:
            if time.monotonic() > until:
                raise ServerError(
                    f"Expected {self.server.whom('/weight_info')} to have weights of the version {version!r} from the "
                    f"first process within {self.server.timeout:g} seconds, but got {answer!r}. Look into that "
                    "process's log; all processes have to write in the same steps."
                )
            time.sleep(0.05)

    def _questions(self, model: PreTrainedModel, request: Request, rule: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the question for each row."""
        event = request.event
        terminal = [event.token, *event.others] if event is not None and event.adds else []
        never = list(event.others) if event is not None and not event.adds else []
        if request.vocabulary is not None:
            never += range(request.vocabulary, model.get_output_embeddings().weight.shape[0])
        common = {
            "max_tokens": request.max_new_tokens,
            "stop_token_ids": list(request.stop),
            "ignore_eos": True,  # those are all, whatever the served model's own config says
            "detokenize": False,
            "logprobs": len(terminal),
            **({"logprob_token_ids": terminal} if terminal else {}),
            **({"logit_bias": {str(token): NEVER for token in never}} if never else {}),
            **({} if self._detection is None else {"repetition_detection": self._detection}),
            **rule,
        }
        return [
            {
                "model": self.server.model,
                "token_ids": list(request.prompts[prompt]),
                "sampling_params": {**common, "seed": key},
                "return_token_ids": True,
            }
            for prompt, key in zip(request.prompt, request.keys, strict=True)
        ]

    def _check_gap(self, found: Gap) -> None:
        if not found.mean <= self.largest_gap:
            raise ServerError(
                f"Expected log-probs of {self.server.whom('')} as in the student's forward pass, to "
                f"{self.largest_gap:g} nats in the mean over some tokens of a rollout, but got some that are "
                f"{found.mean:.3f} nats away, and {found.largest:.3f} at most. Start it with --dtype as in "
                "trainer.precision and without a quantization; on a CPU let it serve a student whose head is apart "
                "(docs/vllm.md). Or raise model.engine.largest_gap."
            )


def _is_first() -> bool:
    """Return whether this process hands over the weights."""
    return not (distributed.is_available() and distributed.is_initialized() and distributed.get_rank())


def _few(request: Request) -> Request:
    """Return some rows of a request, and the beginning of each."""
    budget = min(16, request.max_new_tokens)
    return replace(request, prompt=request.prompt[:4], keys=request.keys[:4], max_new_tokens=budget)


def _repetition_detection(loops: LoopStop) -> dict[str, int]:
    """Return a rule for stopping loops in vLLM's words.

    It knows no least number of tokens. But a loop of a short block is one of several such blocks, too, so the shortest
    block that is looked for does the same.

    Raises:
        ValueError: If it is longer than the longest one.
    """
    shortest = math.ceil(loops.min_tokens / loops.min_copies)
    if shortest > loops.max_period:
        raise ValueError(
            f"Expected max_period of at least {shortest} for a server, which is min_tokens over min_copies, but got "
            f"{loops.max_period}. Raise it, or lower min_tokens."
        )
    return {
        "max_pattern_size": loops.max_period,
        "min_pattern_size": max(1, shortest),
        "min_count": loops.min_copies,
    }


#: Tokens of a row, their log-probs, and why it ended.
_Written = tuple[list[int], list[float], Finish]


def _read(server: Server, answer: Any, request: Request, version: str) -> _Written | None:
    """Return what an answer says, or None if it was written by other weights.

    Raises:
        ServerError: If it is no answer to the question.
    """
    server.check_name(answer, GENERATE)
    try:
        (choice,) = answer["choices"]
        tokens = [int(each) for each in choice["token_ids"]]
        content = choice["logprobs"]["content"]
        logprobs = [_logprob(each, request) for each in content]
        written_by = {span["version"] for span in choice["weight_versions"]}
        echoed = [int(each["token_id"]) for each in content]
        finish = FINISH[choice["finish_reason"]]
    except (KeyError, TypeError, ValueError, OverflowError):
        raise server.garbage(GENERATE, "tokens, log-probs and the version of the weights", answer) from None
    if written_by != {version}:
        return None
    problem = _problem(tokens, echoed, logprobs, finish, request)
    if problem:
        raise ServerError(
            f"Expected what was asked for of {server.whom(GENERATE)}, but got {problem}. Make sure that it is a vLLM "
            "server of a version that docs/vllm.md names, and that it serves the student."
        )
    event = request.event
    if event is not None and event.adds:
        tokens = [event.token if token in event.others else token for token in tokens]
    return tokens, logprobs, finish


def _problem(
    tokens: list[int], echoed: list[int], logprobs: list[float], finish: Finish, request: Request
) -> str | None:
    """Return what is wrong with a row, or None."""
    budget, size = request.max_new_tokens, request.vocabulary
    if not tokens or len(tokens) > budget:
        return f"{len(tokens)} tokens where 1 to {budget} were allowed"
    if echoed != tokens:
        return f"{len(tokens)} tokens and log-probs of {len(echoed)} others"
    if min(tokens) < 0 or (size is not None and max(tokens) >= size):
        return f"the token {max(tokens)}, which is not in the vocabulary of {size}"
    if not all(logprob <= 1e-4 for logprob in logprobs):  # nan, too
        return f"a log-prob of {max(logprobs)}"
    ended = [place for place, token in enumerate(tokens) if token in request.stop]
    if finish == Finish.STOP and ended != [len(tokens) - 1]:
        return "a row that is said to have ended with a stop token, but did not"
    if finish != Finish.STOP and ended:
        return "a row that went on after a stop token"
    if finish == Finish.LENGTH and len(tokens) < budget:
        return f"a row that was cut after {len(tokens)} of {budget} tokens"
    return None


def _logprob(entry: Mapping[str, Any], request: Request) -> float:
    """Return the log-prob of a token, or of the event that it stands for."""
    event: StopEvent | None = request.event
    if event is None or not event.adds or entry["token_id"] not in (event.token, *event.others):
        return float(entry["logprob"])
    found = {each["token_id"]: float(each["logprob"]) for each in entry["top_logprobs"]}
    parts = [found[token] for token in (event.token, *event.others)]
    return min(0.0, torch.tensor(parts, dtype=torch.float64).logsumexp(0).item())


def _pack(server: Server, written: Sequence[_Written | None], device: torch.device) -> Completions:
    """Put rows one after the other.

    Raises:
        ServerError: If one was written by other weights.
    """
    rows = [each for each in written if each is not None]
    if len(rows) < len(written):
        raise ServerError(
            f"Expected rows by the weights that {server.whom(GENERATE)} was given just before, but got some by others. "
            "Let it serve this run alone, as one server that nobody else changes."
        )

    def tensor(values: list[Any], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    return Completions(
        tensor([token for tokens, _, _ in rows for token in tokens], torch.long),
        tensor([logprob for _, logprobs, _ in rows for logprob in logprobs], torch.float32),
        tensor([len(tokens) for tokens, _, _ in rows], torch.long),
        tensor([int(finish) for _, _, finish in rows], torch.long),
    )
