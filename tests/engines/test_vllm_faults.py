"""Servers that write what they were not asked for: each is found, said, and never learnt from."""

import copy

import pytest
import torch

from helpers import EOS, TOKENIZER, VOCABULARY
from stable_opd import servers
from stable_opd.engines import LoopStop, Request, VLLMEngine
from stable_opd.engines.base import Blend
from stable_opd.engines.handing_over import rehearsed
from stable_opd.models import load_model
from stable_opd.samplers import Sampler, Temperature, TopP
from stable_opd.servers import GENERATE, Server, ServerError
from standing_in import first, standing_in
from writing import assert_equal_completions

PROMPT = TOKENIZER("Q 1 + 1 ;")["input_ids"]


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(servers, "FIRST_WAIT", 0.01)


@pytest.fixture
def stand_in():
    with standing_in("testbed:student", "student") as found:
        yield found


@pytest.fixture(scope="module")
def model():
    return load_model("testbed:student").eval()


def engine(stand_in, **options):
    return VLLMEngine(Server("student", stand_in.url, timeout=5, retries=1), **options)


def make_request(rows=3, budget=12, stop=(EOS,)):
    return Request([PROMPT], [0] * rows, [5 + row for row in range(rows)], budget, stop, VOCABULARY)


def generate(found, model, sampler=None):
    return found.generate(model, make_request(), sampler or Temperature(1.0))


def choice(**changed):
    """A fault: the answer to a question for a row has some fields of another value."""

    def fault(path, question, answer):
        if path == GENERATE and "seed" in question["sampling_params"]:
            answer["choices"][0] |= {
                name: change(answer["choices"][0]) if callable(change) else change for name, change in changed.items()
            }
        return answer

    return fault


def content(change):
    """The log-probs of a choice, each entry changed."""
    return lambda choice: {"content": [each | change for each in choice["logprobs"]["content"]]}


def shorter(choice):
    return {"content": choice["logprobs"]["content"][:-1]}


def choice_twice(path, question, answer):
    return answer | {"choices": answer["choices"] * 2} if "seed" in question["sampling_params"] else answer


FAULTS = {
    "fewer tokens than were cut": (choice(token_ids=[1], finish_reason="length"), "1 tokens and log-probs of"),
    "fewer log-probs": (choice(logprobs=shorter), "log-probs of"),
    "no tokens": (choice(token_ids=[], logprobs={"content": []}), "0 tokens where 1 to 12 were allowed"),
    "nan": (choice(logprobs=content({"logprob": float("nan")})), "a log-prob of nan"),
    "infinity": (choice(logprobs=content({"logprob": float("inf")})), "a log-prob of inf"),
    "positive": (choice(logprobs=content({"logprob": 0.5})), r"a log-prob of 0\.5"),
    "no number": (choice(logprobs=content({"logprob": "low"})), "Expected tokens, log-probs"),
    "none": (choice(logprobs=None), "Expected tokens, log-probs"),
    "shape": (choice(token_ids=[[1, 2]]), "Expected tokens, log-probs"),
    "too large to be an id": (choice(token_ids=[float("inf")]), "Expected tokens, log-probs"),
    "aborted": (choice(finish_reason="abort"), "Expected tokens, log-probs"),
    "several rows": (choice_twice, "Expected tokens, log-probs"),
    "a list": (lambda path, question, answer: [1], "by 'student' of .*, but got one by None"),
    "another model": (lambda path, question, answer: answer | {"model": "other"}, "but got one by 'other'"),
    "version": (choice(weight_versions=[{"version": "old", "start": 0, "end": 1}]), "but got some by others"),
    "no version": (choice(weight_versions=None), "the version of the weights"),
}


@pytest.mark.parametrize(("fault", "match"), FAULTS.values(), ids=FAULTS.keys())
def test_answers_that_are_wrong_are_refused(fault, match, stand_in, model):
    def only_rows(path, question, answer):
        return fault(path, question, answer) if path == GENERATE else answer

    stand_in.fault = only_rows
    with pytest.raises(ServerError, match=match):
        generate(engine(stand_in), model)


def row(tokens, reason, lp=-1.0):
    return choice(
        token_ids=tokens,
        finish_reason=reason,
        logprobs={"content": [{"token_id": token, "logprob": lp, "top_logprobs": []} for token in tokens]},
    )


@pytest.mark.parametrize(
    ("tokens", "reason", "match"),
    [
        ([1, 2], "stop", "said to have ended with a stop token"),
        ([1, EOS, 2], "stop", "said to have ended with a stop token"),
        ([1, EOS], "length", "went on after a stop token"),
        ([1, 2], "length", "cut after 2 of 12 tokens"),
        ([1] * 13, "length", "13 tokens where 1 to 12"),
        ([1, VOCABULARY, EOS], "stop", f"the token {VOCABULARY}, which is not in the vocabulary"),
        ([-1, EOS], "stop", "not in the vocabulary"),
    ],
)
def test_rows_that_no_server_can_have_written_are_refused(tokens, reason, match, stand_in, model):
    stand_in.fault = row(tokens, reason)
    with pytest.raises(ServerError, match=match):
        generate(engine(stand_in), model)


def test_rows_of_other_log_probs_are_refused_beyond_a_bound(stand_in, model):
    stand_in.fault = choice(
        logprobs=lambda choice: {
            "content": [each | {"logprob": each["logprob"] - 0.2} for each in choice["logprobs"]["content"]]
        }
    )
    with pytest.raises(ServerError, match=r"to 0\.1 nats in the mean .* 0\.200 nats away"):
        generate(engine(stand_in), model)
    found = engine(stand_in, largest_gap=0.3)
    generate(found, model)
    assert found.figures == pytest.approx({"gap": 0.2, "gap_max": 0.2}, abs=1e-5)


def test_weights_that_do_not_arrive_are_found_before_the_first_rollout(stand_in, model):
    """The version says that they did, and the first rollout would be right: the server has the initial student."""
    stand_in.reads_weights = False
    with pytest.raises(ServerError, match="nats away"):
        generate(engine(stand_in), model)


def test_weights_that_arrive_in_part_are_found_before_the_first_rollout(stand_in, model, monkeypatch):
    """As with a head that shares the weights of the embeddings, of which a server keeps a copy of its own."""
    load, head = stand_in.load, stand_in.model.lm_head.weight.detach().clone()

    def load_but_the_head(folder):
        load(folder)
        stand_in.model.lm_head.weight = torch.nn.Parameter(head)

    monkeypatch.setattr(stand_in, "load", load_but_the_head)
    with pytest.raises(ServerError, match="a student whose head is apart"):
        generate(engine(stand_in), model)


def test_weights_that_stop_arriving_are_found_when_they_matter(stand_in, model):
    found = engine(stand_in)
    generate(found, model)
    stand_in.reads_weights = False
    other = copy.deepcopy(model)
    with rehearsed(other), pytest.raises(ServerError, match="nats away"):
        generate(found, other)


def test_server_that_was_started_again_gets_the_weights_once_more(stand_in, model):
    found, other = engine(stand_in), copy.deepcopy(model)
    with rehearsed(other):
        before = generate(found, other)
        stand_in.restart()
        assert_equal_completions(generate(found, other), before)


def test_somebody_else_who_changes_the_weights_all_the_time_is_found(stand_in, model):
    found = engine(stand_in)
    generate(found, model)

    def meddle(path, question, answer):
        if path == "/update_weight_version":
            stand_in.version = "somebody else's"
        return answer

    stand_in.fault, stand_in.version = meddle, "somebody else's"
    with pytest.raises(ServerError, match="Let it serve this run alone"):
        generate(found, model)


def test_weights_that_are_refused_leave_no_folder_behind(stand_in, model, tmp_path):
    found = engine(stand_in, weights=str(tmp_path / "shared"))
    generate(found, model)
    stand_in.fault = lambda path, question, answer: 500 if path == "/collective_rpc" else answer
    with (
        pytest.raises(ServerError, match=r"/collective_rpc, .* asking 2 times"),
        rehearsed(other := copy.deepcopy(model)),
    ):
        generate(found, other)
    assert list((tmp_path / "shared").iterdir()) == []
    assert stand_in.version == "stable-opd: under way"  # so that nobody takes them for those of before


def test_busy_server_that_keeps_what_it_computed_with_other_weights_is_refused(stand_in, model):
    stand_in.fault = lambda path, question, answer: {"success": False} if path == "/reset_prefix_cache" else answer
    impatient = VLLMEngine(Server("student", stand_in.url, timeout=2, retries=0))
    with pytest.raises(ServerError, match=r"within 2 seconds.*busy with requests of others"):
        generate(impatient, model)


def test_server_that_still_writes_for_somebody_who_gave_up_is_waited_for(stand_in, model):
    """A run that was killed, or a process that finds the weights of the run there and does not wait for the first."""
    stand_in.fault = first(3, lambda path, question, answer: {"success": False}, "/reset_prefix_cache")
    generate(engine(stand_in), model)
    assert stand_in.asked["/reset_prefix_cache"] == 5  # two pushes: the rehearsal, and the weights


def test_server_that_fails_for_a_while_costs_a_few_tries_and_nothing_else(stand_in, model):
    expected = generate(engine(stand_in), model)
    found = engine(stand_in)
    generate(found, model)
    stand_in.fault = first(3, lambda path, question, answer: 503)
    assert_equal_completions(generate(found, model), expected)


def test_server_that_dies_is_said(stand_in, model):
    found = engine(stand_in)
    generate(found, model)
    stand_in.shutdown()
    stand_in.server_close()
    with pytest.raises(ServerError, match=r"ConnectError.*start it again; the run then goes on"):
        generate(found, model)


def test_log_probs_of_the_model_instead_of_the_sampler_are_refused(model):
    with standing_in("testbed:student", "student", raw=True) as raw:
        with pytest.raises(ValueError, match="Start it with --logprobs-mode processed_logprobs"):
            generate(engine(raw), model, TopP(0.9))
        raw.raw, raw.fault = False, lambda path, question, answer: answer | {"choices": []}
        with pytest.raises(ServerError, match="the log-prob of one token"):
            generate(engine(raw), model)


def test_rows_that_do_not_fit_are_refused(model):
    with (
        standing_in("testbed:student", "student", context=16) as small,
        pytest.raises(
            ValueError, match=rf"rows of {len(PROMPT) + 12} tokens.*started for 16\. Start it with --max-model-len"
        ),
    ):
        generate(engine(small), model)


class Odd(Sampler):
    """Cannot be said in a request."""

    def forward(self, logits, prefix):
        return logits


def test_what_a_server_cannot_do_is_refused_with_a_way_out(stand_in, model):
    with pytest.raises(ValueError, match="cannot be put into a request"):
        generate(engine(stand_in), model, Odd())
    with pytest.raises(ValueError, match=r"runs one model.*Use InProcessEngine"):
        engine(stand_in).generate(model, make_request(), Temperature(1.0), Blend(model, lambda one, two: one))
    with pytest.raises(ValueError, match="max_period of at least 16"):
        engine(stand_in, loops=LoopStop(max_period=8))
    with pytest.raises(ValueError, match="largest_gap above 0"):
        engine(stand_in, largest_gap=0.0)
    assert stand_in.asked == {}


def test_other_processes_wait_for_the_weights_of_the_first(stand_in, model, monkeypatch):
    expected = generate(engine(stand_in), model)
    version = stand_in.version
    asked = stand_in.asked.copy()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    found = engine(stand_in)
    versions = iter(["stable-opd: under way", version])

    def arrives(path, question, answer):
        return {"weight_version": next(versions)} if path == "/weight_info" else answer

    stand_in.fault = arrives
    assert_equal_completions(generate(found, model), expected)
    assert stand_in.asked["/weight_info"] == 2
    assert stand_in.asked["/collective_rpc"] == asked["/collective_rpc"]
    late = VLLMEngine(Server("student", stand_in.url, timeout=0.2, retries=0))
    stand_in.fault = lambda path, question, answer: {"weight_version": "x"} if path == "/weight_info" else answer
    with pytest.raises(ServerError, match="first process within"):
        generate(late, model)
