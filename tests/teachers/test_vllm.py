"""A teacher in a server, against one in this process: of the stand-in, and of vLLM itself; and what is not accepted."""

import pytest
import torch

from helpers import EOS, TOKENIZER, VOCABULARY, make_rollout
from serving import BOTH, served
from stable_opd import servers
from stable_opd.models import load_model, load_tokenizer
from stable_opd.servers import GENERATE, Server, ServerError
from stable_opd.streaming import known_logprobs
from stable_opd.teachers import LocalTeacher, VLLMTeacher
from stable_opd.terminal import NEVER
from standing_in import first, standing_in

PROMPTS = [TOKENIZER(text)["input_ids"] for text in ("Q 3 * 7 + 8 - 2 ;", "Q 1 + 1 ;")]
ROWS = [TOKENIZER("3 * 7 = 8 ; 8 + 8 = 3 ; # 1")["input_ids"] + [EOS], TOKENIZER("1 + 1 = 2 ; # 7")["input_ids"]]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(servers, "FIRST_WAIT", 0.01)


@pytest.fixture(scope="module", params=BOTH)
def server(request, tmp_path_factory):
    with served(request.param, "testbed:teacher", "teacher", tmp_path_factory.mktemp("log")) as found:
        yield found


@pytest.fixture
def stand_in():
    with standing_in("testbed:teacher", "teacher") as found:
        yield found


def set_up(server, k=4, **options):
    teacher = VLLMTeacher(server, k=k, **options)
    teacher.setup("testbed:student", TOKENIZER, CPU)
    return teacher


def patient(stand_in):
    return Server("teacher", stand_in.url, timeout=5, retries=1)


@pytest.mark.parametrize("k", [0, 1, 4, VOCABULARY])
def test_log_probs_are_those_of_a_teacher_in_this_process(k, server):
    rollout = make_rollout(ROWS, PROMPTS)
    local = LocalTeacher("testbed:teacher")
    local.setup("testbed:student", TOKENIZER, CPU)
    expected = known_logprobs(local.score(rollout), rollout.completion, k)
    found = set_up(server, k=k).score(rollout)
    assert torch.equal(found.written, rollout.completion)
    torch.testing.assert_close(found.sampled, expected.sampled, rtol=0, atol=1e-4)
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=0, atol=1e-4)
    apart = expected.logprobs.diff(dim=-1).abs().amin(-1) > 1e-3 if k > 1 else torch.ones(len(found.written)).bool()
    assert torch.equal(found.tokens[apart], expected.tokens[apart])


def test_says_what_it_tells_and_how_far_it_reads(server):
    assert (VLLMTeacher(server, k=0).support, VLLMTeacher(server, k=3).support, VLLMTeacher(server, k=3).k) == (
        "sampled",
        "topk",
        3,
    )
    teacher = VLLMTeacher(server, k=1, stop_ids=[3, 5])
    assert (teacher.context_length, teacher.stop_ids, VLLMTeacher(server, k=1).stop_ids) == (None, (3, 5), None)
    teacher.setup("testbed:student", TOKENIZER, CPU)
    assert teacher.context_length == server.context_length() - 1
    longest = make_rollout([[1] * (teacher.context_length - 4)], [PROMPTS[0][:4]])
    assert len(teacher.score(longest).sampled) == teacher.context_length - 4
    with pytest.raises(ServerError, match="the status 400"):
        teacher.score(make_rollout([[1] * (teacher.context_length - 3)], [PROMPTS[0][:4]]))
    with pytest.raises(ValueError, match="k of at least 0"):
        VLLMTeacher(server, k=-1)
    with pytest.raises(ValueError, match="k of at least 1 with stop_ids"):
        VLLMTeacher(server, stop_ids=[3])


def test_padding_of_the_model_takes_no_place_among_the_likeliest(stand_in):
    """As if its last four tokens, one of which ends each line, were unknown to the tokenizer.

    What takes their places is the written token, which the server always tells, or one that counts as impossible.
    """
    teacher = VLLMTeacher(patient(stand_in), k=6)
    teacher._vocabulary = 14
    rollout = make_rollout([[1, 12, 7]], [PROMPTS[1]])
    found = teacher.score(rollout)
    with torch.no_grad():
        logits = load_model("testbed:teacher")(rollout.tokens[None]).logits[0, len(PROMPTS[1]) - 1 : -1]
    best = logits.log_softmax(-1).topk(6)
    for place, row in enumerate(found.tokens.tolist()):
        known = [token for token in best.indices[place].tolist() if token < 14]
        assert row[: len(known)] == known
        assert len(set(row)) == 6
        assert max(row) < 14
        for token, logprob in zip(row[len(known) :], found.logprobs[place, len(known) :].tolist(), strict=True):
            assert logprob == NEVER or token == rollout.completion[place]


def changed(change):
    """A fault: the last place of the log-probs is another."""

    def fault(path, question, answer):
        if path == GENERATE and len(question["token_ids"]) > 2:
            answer["prompt_logprobs"][-1] = change(answer["prompt_logprobs"][-1], str(question["token_ids"][-1]))
        return answer

    return fault


def of_rows(**fields):
    def fault(path, question, answer):
        return answer | fields if path == GENERATE and len(question["token_ids"]) > 2 else answer

    return fault


FAULTS = {
    "another model": (of_rows(model="student"), "but got one by 'student'"),
    "other tokens": (of_rows(prompt_token_ids=[1, 2, 3]), "scores of 3 other tokens than the"),
    "no tokens": (of_rows(prompt_token_ids=None), "Expected the log-probs of a prompt's tokens of the server"),
    "too few": (of_rows(prompt_logprobs=[None, {}]), "log-probs of 2 tokens where"),
    "none": (of_rows(prompt_logprobs=None), "the log-probs of a prompt's tokens"),
    "numbers": (of_rows(prompt_logprobs=[1.0] * 20), "the log-probs of a prompt's tokens"),
    "not of the written token": (changed(lambda place, token: {"99": place[token]}), "no log-prob for the token"),
    "nan": (changed(lambda place, token: place | {token: {"logprob": float("nan")}}), "a log-prob of nan"),
    "positive": (changed(lambda place, token: place | {token: {"logprob": 3.0}}), r"a log-prob of 3\.0"),
    "null": (changed(lambda place, token: place | {token: {"logprob": None}}), "the log-probs of a prompt's tokens"),
    "logits": (
        changed(lambda place, token: {each: {"logprob": -0.1} for each in place}),
        "probabilities that add up to more than 1",
    ),
    "status": (lambda path, question, answer: 500 if path == GENERATE else answer, "asking 2 times.*the status 500"),
}


@pytest.mark.parametrize(("fault", "match"), FAULTS.values(), ids=FAULTS.keys())
def test_answers_that_are_wrong_are_refused(fault, match, stand_in):
    teacher = set_up(patient(stand_in))
    stand_in.fault = fault
    with pytest.raises(ServerError, match=match):
        teacher.score(make_rollout(ROWS, PROMPTS))


def test_server_that_fails_for_a_while_costs_a_few_tries(stand_in):
    teacher, rollout = set_up(patient(stand_in)), make_rollout(ROWS, PROMPTS)
    expected = teacher.score(rollout).sampled
    stand_in.fault = first(2, lambda path, question, answer: 503)
    assert torch.equal(teacher.score(rollout).sampled, expected)


def test_other_vocabulary_is_refused(stand_in):
    stand_in.tokenizer = load_tokenizer("testbed:student")
    vocabulary = dict(stand_in.tokenizer.get_vocab())
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]
    stand_in.fault = lambda path, question, answer: (
        {"tokens": [vocabulary[each] for each in question["prompt"].split()]} if path == "/tokenize" else answer
    )
    with pytest.raises(ValueError, match=r"must have the vocabulary of the student 'testbed:student'.*one family"):
        set_up(patient(stand_in))
    stand_in.fault = lambda path, question, answer: [] if path == "/tokenize" else answer
    with pytest.raises(ValueError, match="must have the vocabulary"):
        set_up(patient(stand_in))


def test_smaller_vocabulary_is_refused(stand_in):
    stand_in.fault = lambda path, question, answer: (
        400 if path == GENERATE and max(question["token_ids"]) >= VOCABULARY - 1 else answer
    )
    with pytest.raises(ServerError, match="the status 400"):
        set_up(patient(stand_in))


def test_setup_asks_once(stand_in):
    teacher = set_up(patient(stand_in))
    asked = dict(stand_in.asked)
    teacher.setup("testbed:student", TOKENIZER, CPU)
    assert stand_in.asked == asked
    assert asked == {"/v1/models": 1, "/tokenize": 1, GENERATE: 1}
