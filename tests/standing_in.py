"""A small server of models on loopback, which answers as vLLM 0.32 does, and misbehaves when a test says so.

The tests marked `vllm` hold the same expectations against the real one.
"""

import json
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from stable_opd.engines import Request, TransformersEngine
from stable_opd.samplers import Sampler
from stable_opd.samplers.min_p import near_likeliest
from stable_opd.samplers.temperature import tempered
from stable_opd.samplers.top_k import likeliest
from stable_opd.samplers.top_p import nucleus
from stable_opd.testbed import resolve

#: What a fault returns to close the connection without an answer.
DROP = object()

#: A fault: path, question and right answer to what is sent. Bytes are sent as they are, a number is a status.
Fault = Callable[[str, Any, Any], Any]


class Rule(Sampler):
    """How vLLM draws: biases, temperature, and what is ruled out."""

    def __init__(self, asked: dict[str, Any]) -> None:
        super().__init__()
        self.asked = asked

    def forward(self, logits: Tensor, prefix: Tensor) -> Tensor:
        logits, asked = logits.clone(), self.asked
        for token, bias in asked.get("logit_bias", {}).items():
            logits[:, int(token)] += bias
        if asked.get("allowed_token_ids"):
            ruled_out = torch.ones(logits.shape[-1], dtype=torch.bool)
            ruled_out[asked["allowed_token_ids"]] = False
            logits = logits.masked_fill(ruled_out, -torch.inf)
        logits = tempered(logits, asked.get("temperature", 1.0))
        if asked.get("top_k"):
            logits = likeliest(logits, asked["top_k"])
        if asked.get("top_p", 1.0) < 1:
            logits = nucleus(logits, asked["top_p"])
        return near_likeliest(logits, asked["min_p"]) if asked.get("min_p") else logits


class StandIn(ThreadingHTTPServer):
    """Serves one model under a name.

    Attributes:
        fault: What goes wrong, if anything.
        asked: How often each path was asked.
        reads_weights: Whether it takes the weights that it is given.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, path: str, name: str, context: int = 112, raw: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.path, self.name, self.context, self.raw = path, name, context, raw
        self.fault: Fault = lambda path, question, answer: answer
        self.asked: dict[str, int] = {}
        self.keys: list[str | None] = []
        self.reads_weights, self.version = True, "default"
        self.tokenizer = AutoTokenizer.from_pretrained(resolve(path))
        self.lock = threading.Lock()
        self.load(resolve(path))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def load(self, folder: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def restart(self) -> None:
        """Come back with the weights it was started with."""
        self.version = "default"
        self.load(resolve(self.path))

    def answer(self, path: str, question: Any) -> Any:
        with self.lock:
            self.asked[path] = self.asked.get(path, 0) + 1
        if path == "/v1/models":
            return {"data": [{"id": self.name, "max_model_len": self.context}]}
        if path == "/tokenize":
            return {"tokens": self.tokenizer(question["prompt"], add_special_tokens=False)["input_ids"]}
        if path == "/weight_info":
            return {"weight_version": self.version}
        if path == "/update_weight_version":
            self.version = question["new_version"]
            return {"success": True, "new_version": self.version}
        if path == "/collective_rpc":
            assert question["method"] == "reload_weights"
            if self.reads_weights:
                with self.lock:
                    self.load(question["kwargs"]["weights_path"])
            return {"results": [None]}
        if path == "/reset_prefix_cache":
            return {"success": True}
        if path != "/inference/v1/generate" or question["model"] != self.name:
            return 404
        with self.lock:
            return self.generate(question)

    @torch.no_grad()
    def generate(self, question: Any) -> Any:
        prompt, asked = question["token_ids"], question["sampling_params"]
        if len(prompt) + 1 > self.context or max(prompt) >= self.model.config.vocab_size:
            return 400
        rule = Rule(asked)
        seed, stop = asked.get("seed", 0), asked.get("stop_token_ids", [])
        request = Request([prompt], [0], [seed], asked["max_tokens"], stop)
        tokens = TransformersEngine().generate(self.model, request, rule).tokens.tolist()
        tokens, reason = ended(tokens, stop, asked.get("repetition_detection"))
        logits = self.model(torch.tensor([prompt + tokens])).logits[0]
        greedy = asked.get("temperature", 1.0) == 0
        drawn = logits[len(prompt) - 1 : -1]
        own = (drawn if self.raw or greedy else rule(drawn, torch.zeros(len(drawn), 0))).log_softmax(-1)
        content = [
            {
                "token_id": token,
                "logprob": max(float(own[place, token]), -9999.0),
                "top_logprobs": [
                    {"token_id": other, "logprob": max(float(own[place, other]), -9999.0)}
                    for other in asked.get("logprob_token_ids", [])
                ],
            }
            for place, token in enumerate(tokens)
        ]
        return {
            "model": self.name,
            "prompt_token_ids": prompt if question.get("return_token_ids") else None,
            "prompt_logprobs": self.prompt_logprobs(prompt, logits, asked.get("prompt_logprobs")),
            "choices": [
                {
                    "token_ids": tokens,
                    "finish_reason": reason,
                    "weight_versions": [{"version": self.version, "start": 0, "end": len(tokens)}],
                    "logprobs": {"content": content},
                }
            ],
        }

    def prompt_logprobs(self, prompt: list[int], logits: Tensor, k: int | None) -> list[Any] | None:
        if k is None:
            return None
        said: list[Any] = [None]
        for token, row in zip(prompt[1:], logits.log_softmax(-1), strict=False):
            named = dict.fromkeys([token, *row.topk(min(k, len(row))).indices.tolist()])
            said.append({str(each): {"logprob": float(row[each])} for each in named})
        return said


def ended(tokens: list[int], stop: list[int], loops: dict[str, int] | None) -> tuple[list[int], str]:
    """Return tokens up to where vLLM would have ended them, and why."""
    for length in range(1, len(tokens) + 1):
        if tokens[length - 1] in stop:
            return tokens[:length], "stop"
        for period in range(loops["min_pattern_size"], loops["max_pattern_size"] + 1) if loops else ():
            tail = tokens[length - period * loops["min_count"] : length] if loops else []
            if period * (loops or {})["min_count"] <= length and tail == tail[:period] * (loops or {})["min_count"]:
                return tokens[:length], "repetition"
    return tokens, "length"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StandIn

    def do_GET(self) -> None:
        self.reply(None)

    def do_POST(self) -> None:
        self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def reply(self, question: Any) -> None:
        self.server.keys.append(self.headers["Authorization"])
        answer = self.server.fault(self.path, question, self.server.answer(self.path, question))
        if answer is DROP:
            self.close_connection = True
            return
        status = answer if isinstance(answer, int) else 200
        body = answer if isinstance(answer, bytes) else json.dumps({"error": status} if status != 200 else answer)
        data = body if isinstance(body, bytes) else body.encode()
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # whoever asked did not wait

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def standing_in(path: str, name: str, **options: Any):
    """Have a server for the time of a context."""
    with StandIn(path, name, **options) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def first(count: int, wrong: Fault, path: str = "/inference/v1/generate") -> Fault:
    """Return a fault that goes away: the first answers of a path are wrong, the others right."""
    seen = [0]

    def fault(asked: str, question: Any, answer: Any) -> Any:
        if asked != path:
            return answer
        seen[0] += 1
        return wrong(asked, question, answer) if seen[0] <= count else answer

    return fault


def late(seconds: float) -> Fault:
    """Return a fault: answers take their time."""

    def fault(path: str, question: Any, answer: Any) -> Any:
        time.sleep(seconds)
        return answer

    return fault
