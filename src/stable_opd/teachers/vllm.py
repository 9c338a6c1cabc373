"""A teacher that a vLLM server runs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from stable_opd.models import added_ids
from stable_opd.scoring import KnownLogprobs
from stable_opd.servers import GENERATE, Server, ServerError
from stable_opd.teachers.base import Teacher
from stable_opd.terminal import NEVER
from stable_opd.terms import Support
from stable_opd.types import Rollout

#: Tokens of the vocabulary on which both tokenizers are compared, and how many of them make one text.
SAMPLED, TEXT = 1024, 32


class VLLMTeacher(Teacher):
    """A teacher that a vLLM server runs: it tells the log-probs of the written tokens and its likeliest tokens.

    Rows are sent as token ids, all at once, and nothing is generated. What comes back is checked: the model's name, the
    token ids, a finite log-prob for every one of them, and that they are of one distribution. `docs/vllm.md` says how
    to start the server.

    Args:
        server: Where it is.
        k: How many of its likeliest tokens it tells at each place; a server allows 20 unless it is started with
            ``--max-logprobs``. With 0, components that read written tokens alone are served. Where several tokens end
            an answer, their probabilities are looked for here, so a few are needed: 4, for instance.
        stop_ids: Token ids that end the teacher's answers, which a server does not say; none takes the student's.
    """

    def __init__(self, server: Server, k: int = 0, stop_ids: Sequence[int] = ()) -> None:
        if k < 0:
            raise ValueError(f"Expected k of at least 0, but got {k}.")
        if stop_ids and not k:
            raise ValueError(
                "Expected k of at least 1 with stop_ids, because the probabilities of stop tokens that were not "
                "written are looked for among the likeliest tokens, but got 0. Set model.teacher.k to 4."
            )
        self.server, self.k = server, k
        self.support: Support = "topk" if k else "sampled"
        self._stop_ids = tuple(stop_ids)
        self._room = self._vocabulary = 0

    @property
    def context_length(self) -> int | None:
        """How many tokens of a row the server can read; it always writes one more."""
        return self._room - 1 if self._room else None

    @property
    def stop_ids(self) -> tuple[int, ...] | None:
        """Those that were given."""
        return self._stop_ids or None

    def setup(self, student: str, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> None:
        """Make sure that the server is there, and that its token ids are the student's.

        Raises:
            ServerError: If it does not answer, or answers with what it was not asked for.
            ValueError: If it has another vocabulary.
        """
        if self._room:
            return
        room = self.server.context_length()
        self._vocabulary = len(tokenizer)
        self._check_vocabulary(student, tokenizer)
        last = self._vocabulary - 1
        self._ask([[last, last]])  # an id that it does not have, or a k that it does not allow, is refused now
        self._room = room

    def score(self, rollout: Rollout) -> KnownLogprobs:
        """Let the server read some rows."""
        totals = (rollout.prompt_lengths + rollout.lengths).tolist()
        rows = [row.tolist() for row in rollout.tokens.split(totals)]
        answers = self._ask(rows)
        found: list[tuple[float, list[int], list[float]]] = []
        for row, said, length in zip(rows, answers, rollout.lengths.tolist(), strict=True):
            places = range(len(row) - length, len(row))
            found += [self._place(row[place], said[place]) for place in places]
        device = rollout.tokens.device

        def tensor(values: list[Any], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        k = min(self.k or 0, self._vocabulary)
        return KnownLogprobs(
            rollout.completion,
            tensor([sampled for sampled, _, _ in found], torch.float32),
            tensor([tokens for _, tokens, _ in found], torch.long).view(len(found), k),
            tensor([logprobs for _, _, logprobs in found], torch.float32).view(len(found), k),
        )

    def _ask(self, rows: Sequence[list[int]]) -> list[list[dict[int, float]]]:
        """Return the log-probs that the server knows at each token of each row, by token id; none at the first."""
        questions: list[dict[str, Any] | None] = [
            {
                "model": self.server.model,
                "token_ids": row,
                "sampling_params": {"max_tokens": 1, "prompt_logprobs": self.k, "detokenize": False},
                "return_token_ids": True,
            }
            for row in rows
        ]
        answers = self.server.ask_all(GENERATE, questions)
        return [self._read(row, answer) for row, answer in zip(rows, answers, strict=True)]

    def _read(self, row: list[int], answer: Any) -> list[dict[int, float]]:
        """Return what an answer says of a row.

        Raises:
            ServerError: If it is no answer to the question.
        """
        self.server.check_name(answer, GENERATE)
        try:
            echoed = list(answer["prompt_token_ids"])
            said = [
                {int(token): float(each["logprob"]) for token, each in (place or {}).items()}
                for place in answer["prompt_logprobs"]
            ]
        except (AttributeError, KeyError, TypeError, ValueError):
            raise self.server.garbage(GENERATE, "the log-probs of a prompt's tokens", answer) from None
        problem = _problem(row, echoed, said)
        if problem:
            raise ServerError(
                f"Expected what was asked for of {self.server.whom(GENERATE)}, but got {problem}. Make sure that it is "
                "a vLLM server of a version that docs/vllm.md names, and that it serves the teacher."
            )
        return said

    def _place(self, written: int, said: Mapping[int, float]) -> tuple[float, list[int], list[float]]:
        """Return the log-prob of a written token, and the likeliest tokens with theirs."""
        size = min(self.k or 0, self._vocabulary)
        # Models are padded with tokens that no tokenizer knows and that are not worth telling apart.
        known = sorted(((lp, token) for token, lp in said.items() if token < self._vocabulary), reverse=True)[:size]
        absent = (token for token in range(self._vocabulary) if token not in said)
        known += [(NEVER, next(absent)) for _ in range(size - len(known))]
        return said[written], [token for _, token in known], [logprob for logprob, _ in known]

    def _check_vocabulary(self, student: str, tokenizer: PreTrainedTokenizerBase) -> None:
        """Let both tokenizers read some texts, in which tokens of all parts of the vocabulary occur.

        Raises:
            ValueError: If they read another one.
        """
        added = added_ids(tokenizer)  # which may differ, as with a teacher in this process
        usual = [token for token in range(len(tokenizer)) if token not in added]
        some = usual[:: math.ceil(len(usual) / SAMPLED)]
        texts = [tokenizer.decode(some[start : start + TEXT]) for start in range(0, len(some), TEXT)]
        questions = [{"model": self.server.model, "prompt": text, "add_special_tokens": False} for text in texts]
        for text, answer in zip(texts, self.server.ask_all("/tokenize", questions), strict=True):
            ours = tokenizer(text, add_special_tokens=False)["input_ids"]
            theirs = answer.get("tokens") if isinstance(answer, dict) else None
            if theirs != ours:
                raise ValueError(
                    f"The teacher must have the vocabulary of the student {student!r}, because it scores the student's "
                    f"token ids. But {self.server.whom('/tokenize')} reads {text[:60]!r} as {str(theirs)[:60]}, and "
                    f"the student's tokenizer reads {str(ours)[:60]}. Choose a student and a teacher of one family."
                )


def _problem(row: list[int], echoed: list[Any], said: list[dict[int, float]]) -> str | None:
    """Return what is wrong with an answer, or None."""
    if echoed != row:
        return f"scores of {len(echoed)} other tokens than the {len(row)} that were sent"
    if len(said) != len(row):
        return f"log-probs of {len(said)} tokens where {len(row)} were sent"
    for place, (token, known) in enumerate(zip(row, said, strict=True)):
        if place == 0:
            continue  # nothing predicts the first
        if token not in known:
            return f"no log-prob for the token {token} at place {place}"
        if not all(logprob <= 1e-4 for logprob in known.values()):  # nan, too
            return f"a log-prob of {max(known.values())} at place {place}"
        if sum(map(math.exp, known.values())) > 1.01:
            return f"probabilities that add up to more than 1 at place {place}"
    return None
