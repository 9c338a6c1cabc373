"""Questions in JSON to a server of models: with a time limit, repeated a few times, and then given up with a reason."""

import asyncio
import os
import random
import ssl
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any
from urllib.parse import urlsplit

import httpx2

#: Seconds before a question is asked again for the first time, and by how much the wait grows from then on.
FIRST_WAIT, GROWTH = 2.0, 3.0

#: Where tokens go in and come out of a vLLM server, with their log-probs and the version of the weights.
GENERATE = "/inference/v1/generate"

#: What a server that may recover answers: it is overloaded, or something behind it is not there.
MAY_RECOVER = frozenset({408, 425, 429})


class ServerError(RuntimeError):
    """A server of models gave no answer that can be used."""


@dataclass(frozen=True)
class Server:
    """A server of models: where it is, and how patiently it is asked.

    Args:
        model: Name under which it serves the model.
        url: Its address.
        timeout: Seconds to wait for an answer. All rows of a rollout are asked for at once, so it is about as long as
            the slowest rollout may take.
        retries: How often a question is asked again that got no answer, a late one, or an error of the server's own.
            The waits in between grow from 2 seconds threefold each time.
        parallel: Questions that are under way at once.
        api_key_variable: Environment variable with the server's key; none is sent if it is not set. The key itself
            stands in no config and in no log.
    """

    model: str
    url: str = "http://127.0.0.1:8000"
    timeout: float = 600.0
    retries: int = 4
    parallel: int = 256
    api_key_variable: str = "VLLM_API_KEY"

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"Expected an address such as http://127.0.0.1:8000 as url, but got {self.url!r}.")
        if parts.username or parts.password or parts.query:  # not repeated in the message
            raise ValueError(
                "Expected a url without a name, a password and a query, because configs are kept. Put the server's key "
                f"into the environment variable {self.api_key_variable}."
            )
        try:
            _ = parts.port
        except ValueError as error:
            raise ValueError(f"Expected a port from 0 to 65535 in url, but got {self.url!r}.") from error
        if self.timeout <= 0 or self.retries < 0 or self.parallel < 1:
            raise ValueError(
                "Expected a timeout above 0, retries of at least 0 and parallel of at least 1, but got "
                f"{self.timeout}, {self.retries} and {self.parallel}."
            )

    def ask(self, path: str, question: dict[str, Any] | None = None) -> Any:
        """Ask one question.

        Args:
            path: Where, below the server's address.
            question: What to post; None gets instead.

        Raises:
            ServerError: If there is no answer in JSON after all retries, or if the server refuses the question.
        """
        return self.ask_all(path, [question])[0]

    def ask_all(self, path: str, questions: Sequence[dict[str, Any] | None]) -> list[Any]:
        """Ask several questions at once, and return the answers in their order.

        Raises:
            ServerError: As `ask`, as soon as one question is given up.
        """
        work = self._ask_all(path, questions)
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(work)
        with ThreadPoolExecutor(1) as thread:  # a notebook has a loop of its own
            return thread.submit(asyncio.run, work).result()

    async def _ask_all(self, path: str, questions: Sequence[dict[str, Any] | None]) -> list[Any]:
        key = self._key()
        gate = asyncio.Semaphore(self.parallel)
        async with httpx2.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=None,  # the limit is on the whole answer and not on the pause between two of its pieces
            limits=httpx2.Limits(max_connections=None),  # the gate bounds them, and who waits there is not late
            verify=_certificates() if self.url.startswith("https") else False,
            trust_env=False,  # a proxy of the environment is not meant for a server of one's own
        ) as client:
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(self._ask(client, gate, path, each)) for each in questions]
            except* ServerError as failed:
                raise failed.exceptions[0] from None
        return [task.result() for task in tasks]

    def _key(self) -> str:
        """Return the server's key, which is in no message; those of the client would show one that cannot be sent."""
        key = os.environ.get(self.api_key_variable, "").strip()  # a file that it is read from ends with a line break
        if not (key.isascii() and key.isprintable()):
            raise ServerError(
                "Expected a key of printable ASCII characters in the environment variable "
                f"{self.api_key_variable}, but got others, too. Put the key alone there."
            )
        return key

    async def _ask(
        self, client: httpx2.AsyncClient, gate: asyncio.Semaphore, path: str, question: dict[str, Any] | None
    ) -> Any:
        """Ask until there is an answer."""
        went_wrong = ""
        for attempt in range(self.retries + 1):
            if attempt:  # with jitter, so that many who failed together do not come back together
                await asyncio.sleep(FIRST_WAIT * GROWTH ** (attempt - 1) * random.SystemRandom().uniform(0.5, 1.5))
            try:
                async with gate, asyncio.timeout(self.timeout):
                    response = await client.request("GET" if question is None else "POST", path, json=question)
            except TimeoutError:
                went_wrong = f"no answer within {self.timeout:g} seconds"
                continue
            except httpx2.RequestError as error:
                went_wrong = f"{type(error).__name__} ({error})"
                continue
            if response.is_success:
                try:
                    return response.json()
                except (ValueError, RecursionError):
                    went_wrong = f"an answer that is no JSON: {_shown(response)}"
            elif response.is_server_error or response.status_code in MAY_RECOVER:
                went_wrong = f"the status {response.status_code}: {_shown(response)}"
            else:
                raise ServerError(
                    f"Expected an answer of {self.whom(path)}, but it refused the question with the status "
                    f"{response.status_code}: {_shown(response)}. "
                    f"{_way_out(response.status_code, self.api_key_variable)}"
                )
        raise ServerError(
            f"Expected an answer of {self.whom(path)}, but got none that can be used after asking {self.retries + 1} "
            f"times; the last time it was {went_wrong}. Look into the server's log and start it again; the run then "
            "goes on from its last checkpoint with the same command and --ckpt_path last."
        )

    def whom(self, path: str) -> str:
        """Say who is meant, for messages."""
        return f"the server of {self.model!r} at {self.url}{path}"

    def check_name(self, answer: Any, path: str) -> None:
        """Make sure that an answer is by the right model.

        Raises:
            ServerError: If it says that it is another's.
        """
        name = answer.get("model") if isinstance(answer, dict) else None
        if name != self.model:
            raise ServerError(
                f"Expected an answer by {self.model!r} of {self.whom(path)}, but got one by {name!r}. Start it with "
                f"--served-model-name {self.model}, or set server.model to what it serves."
            )

    def context_length(self) -> int:
        """Return how many tokens the model can read there.

        Raises:
            ServerError: If the server does not serve it, or does not say.
        """
        answer = self.ask("/v1/models")
        try:
            served = {each["id"]: each["max_model_len"] for each in answer["data"]}
        except (KeyError, TypeError):
            raise self.garbage("/v1/models", "a list of models", answer) from None
        if not isinstance(served.get(self.model), int):
            raise ServerError(
                f"Expected {self.whom('/v1/models')}, but it serves {', '.join(map(repr, served)) or 'nothing'}. "
                f"Start it with --served-model-name {self.model}, or set server.model to what it serves."
            )
        length: int = served[self.model]
        return length

    def garbage(self, path: str, expected: str, arrived: Any) -> ServerError:
        """Return the error for an answer of another form."""
        return ServerError(
            f"Expected {expected} of {self.whom(path)}, but got {_cut(repr(arrived))}. Make sure that it is a vLLM "
            "server of a version that docs/vllm.md names."
        )


@cache
def _certificates() -> ssl.SSLContext:
    return ssl.create_default_context()


def _shown(response: httpx2.Response) -> str:
    key = response.request.headers.get("Authorization", "").removeprefix("Bearer ")
    return _cut(repr(response.text.replace(key, "...") if key else response.text))  # some say which key they refuse


def _cut(text: str, length: int = 300) -> str:
    return text if len(text) <= length else f"{text[:length]}..."


def _way_out(status: int, variable: str) -> str:
    if status in (401, 403):
        return f"Put the server's key into the environment variable {variable}."
    if status == 404:
        return "Start it as docs/vllm.md says: it may serve another model, or lack the routes that are needed."
    return "What it says there is what has to change: the request, or the options the server was started with."
