"""Rows that a server writes, against the model's own forward passes; of the stand-in, and of vLLM itself."""

import math

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from helpers import EOS, TOKENIZER, VOCABULARY
from serving import BOTH, served
from stable_opd import Finish
from stable_opd.engines import InProcessEngine, LoopStop, Request, VLLMEngine
from stable_opd.engines.agreement import gap
from stable_opd.engines.handing_over import fingerprint, rehearsed, write_weights
from stable_opd.models import load_model
from stable_opd.randomness import key
from stable_opd.samplers import MinP, Temperature, TopK, TopP
from stable_opd.students import LoRA, load_student
from stable_opd.terminal import StopEvent
from writing import assert_equal_completions, own_generate, rows

PROMPTS = [TOKENIZER(text)["input_ids"] for text in ("Q 3 * 7 + 8 - 2 ;", "Q 1 + 1 ;", "Q 9 * 9 * 9 ;")]
BUDGET = 40


@pytest.fixture(scope="module", params=BOTH)
def server(request, tmp_path_factory):
    with served(request.param, "testbed:student", "student", tmp_path_factory.mktemp("log")) as found:
        yield found


@pytest.fixture
def engine(server):
    return VLLMEngine(server)


@pytest.fixture
def model():
    return load_model("testbed:student").eval()


def make_request(rows=8, stop=(EOS,), event=None, vocabulary=VOCABULARY, budget=BUDGET):
    prompt = [number % len(PROMPTS) for number in range(rows)]
    return Request(PROMPTS, prompt, [key("test", row) for row in range(rows)], budget, stop, vocabulary, event)


def expected(model, sampler, request, completions, event=None):
    """Log-probs of all tokens from full forwards, by formulas of this test's own."""
    found = []
    for number, row in zip(request.prompt, rows(completions), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([PROMPTS[number] + row])).logits[0, len(PROMPTS[number]) - 1 : -1]
        probs = sampler(logits, torch.zeros(len(row), 0)).softmax(-1)
        if event is not None:
            probs[:, event.token] += probs[:, list(event.others)].sum(-1)
        found.append(probs[torch.arange(len(row)), row].log())
    return torch.cat(found)


@pytest.mark.parametrize("sampler", [Temperature(1.0), Temperature(0.6), TopP(0.8, 1.2), TopK(3), MinP(0.1)], ids=str)
def test_log_probs_are_those_of_the_sampler(sampler, engine, model):
    request = make_request()
    written = engine.generate(model, request, sampler)
    torch.testing.assert_close(written.logprobs, expected(model, sampler, request, written), rtol=0, atol=1e-4)
    assert engine.figures["gap"] <= engine.figures["gap_max"] < 1e-4


def test_greedy_rows_are_the_models_own_and_certain(engine, model):
    request = make_request(rows=3)
    written = engine.generate(model, request, Temperature(0.0))
    assert rows(written) == [own_generate(model, prompt, (EOS,), BUDGET) for prompt in PROMPTS]
    assert written.logprobs.tolist() == [0.0] * len(written.tokens)


def test_equal_keys_give_equal_rows_and_others_differ(engine, model):
    request = make_request()
    first, second = (engine.generate(model, request, Temperature(1.0)) for _ in range(2))
    assert_equal_completions(first, second)
    other = Request(PROMPTS, request.prompt, [each + 1 for each in request.keys], BUDGET, (EOS,), VOCABULARY)
    assert rows(engine.generate(model, other, Temperature(1.0))) != rows(first)


def test_rows_end_with_any_stop_token_or_at_the_budget(engine, model):
    stop = (EOS, *TOKENIZER.convert_tokens_to_ids(["=", "?"]))
    written = engine.generate(model, make_request(stop=stop), Temperature(1.0))
    assert all(row[-1] in stop and not set(row[:-1]) & set(stop) for row in rows(written))
    assert set(written.finish.tolist()) == {Finish.STOP}
    written = engine.generate(model, make_request(stop=(VOCABULARY - 1,), budget=5), Temperature(0.0))
    assert written.lengths.tolist() == [5] * 8
    assert set(written.finish.tolist()) == {Finish.LENGTH}


def test_new_weights_are_handed_over_and_old_ones_only_once(server, engine, model):
    request, sampler = make_request(), Temperature(1.0)
    before = engine.generate(model, request, sampler)
    version = server.ask("/weight_info")
    engine.generate(model, request, sampler)
    assert server.ask("/weight_info") == version
    with rehearsed(model):
        after = engine.generate(model, request, sampler)
        torch.testing.assert_close(after.logprobs, expected(model, sampler, request, after), rtol=0, atol=1e-4)
        assert server.ask("/weight_info") != version
        assert gap(model, request, sampler, before).mean > 0.1  # so the right ones were no accident
    again = engine.generate(model, request, sampler)
    assert_equal_completions(again, before)
    assert server.ask("/weight_info") == version


def test_terminal_ids_are_one_event(engine, model):
    others = tuple(TOKENIZER.convert_tokens_to_ids(["=", "?"]))
    event = StopEvent(EOS, others)
    request = make_request(stop=(EOS, *others), event=event)
    written = engine.generate(model, request, Temperature(1.0))
    assert not set(written.tokens.tolist()) & set(others)
    assert set(written.finish.tolist()) == {Finish.STOP}
    found = expected(model, Temperature(1.0), request, written, event)
    torch.testing.assert_close(written.logprobs, found, rtol=0, atol=1e-4)
    assert engine.figures["gap_max"] < 1e-4


def test_terminal_ids_that_are_ruled_out_are_never_drawn(engine, model):
    others = tuple(TOKENIZER.convert_tokens_to_ids(["=", "*"]))  # "=" would come in every line
    request = make_request(event=StopEvent(EOS, others, adds=False))
    written = engine.generate(model, request, Temperature(1.0))
    assert not set(written.tokens.tolist()) & set(others)
    ruled_out = lambda logits, prefix: logits.index_fill(-1, torch.tensor(others), -torch.inf)  # noqa: E731
    torch.testing.assert_close(written.logprobs, expected(model, ruled_out, request, written), rtol=0, atol=1e-4)


def test_ids_beyond_the_tokenizer_are_never_drawn(engine, model):
    """As if the last ids, among them the one that ends each line, were those with which a model is padded."""
    request = make_request(vocabulary=12, stop=(11,), rows=4)
    written = engine.generate(model, request, Temperature(1.0))
    assert max(written.tokens.tolist()) < 12
    cut = lambda logits, prefix: logits.index_fill(-1, torch.arange(12, VOCABULARY), -torch.inf)  # noqa: E731
    torch.testing.assert_close(written.logprobs, expected(model, cut, request, written), rtol=0, atol=1e-4)


def test_rows_in_a_loop_are_stopped_as_the_engine_in_this_process_finds_them(server, model):
    """Without a stop token the student goes round in circles, greedily."""
    loops = LoopStop(max_period=24, min_copies=3, min_tokens=18, every=1)
    request = make_request(rows=3, stop=(VOCABULARY - 1,), budget=90)
    written = VLLMEngine(server, loops=loops).generate(model, request, Temperature(0.0))
    found = InProcessEngine(loops).generate(model, request, Temperature(0.0))
    assert Finish.LOOP in written.finish.tolist()
    assert written.finish.tolist() == found.finish.tolist()
    for row, finish in zip(rows(written), written.finish, strict=True):
        if finish == Finish.LOOP:
            assert any(row[-3 * n :] == row[-n:] * 3 for n in range(6, 25))
            assert not any(row[-3 * n - 1 : -1] == row[-n - 1 : -1] * 3 for n in range(6, 25))  # at once


@pytest.mark.parametrize(
    "adapter", [LoRA(rank=4), LoRA(rank=4, target_modules=["q_proj"], quantization="int8")], ids=str
)
def test_student_with_adapters_is_handed_over_merged(adapter, server):
    model = load_student("testbed:student", adapter).eval()
    with torch.no_grad():
        for name, each in model.named_parameters():
            if "lora_B" in name:
                each.normal_(std=0.5)
    request = make_request()
    written = VLLMEngine(server).generate(model, request, Temperature(1.0))
    found = expected(model, Temperature(1.0), request, written)
    # In 8 bits the inputs of a layer are rounded, too, which merged weights do not do.
    assert (written.logprobs - found).abs().mean() < (1e-5 if adapter.quantization is None else 0.05)
    plain = load_model("testbed:student").eval()
    assert gap(plain, request, Temperature(1.0), written).mean > 0.1


def test_fingerprint_follows_every_bit_and_nothing_else(model):
    name = fingerprint(model)
    assert fingerprint(load_model("testbed:student")) == name
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(math.inf))
    assert fingerprint(model) != name
    with torch.no_grad():
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(-math.inf))
    assert fingerprint(model) == name


@pytest.mark.parametrize("places", [((0, 0), (0, 1)), ((0, 0), (1, 0)), ((0, 0), (1, 1))], ids=str)
def test_fingerprint_follows_changes_in_opposite_directions(places, model):
    """As of an update that rounds two weights of bfloat16 to the next number."""
    name, weight = fingerprint(model), model.model.layers[0].mlp.up_proj.weight
    one, other = places
    with torch.no_grad():
        weight[one], weight[other] = weight[other].clone(), weight[one].clone()
    assert fingerprint(model) != name


def test_rehearsal_changes_all_weights_and_leaves_no_trace(model):
    before = {name: each.detach().clone() for name, each in model.named_parameters()}
    with rehearsed(model):
        for name, each in model.named_parameters():
            assert (each - before[name]).abs().mean() > 0.1 * before[name].square().mean().sqrt(), name
    for name, each in model.named_parameters():
        assert torch.equal(each, before[name]), name


def test_written_weights_load_and_compute_the_same(model, tmp_path):
    write_weights(model, tmp_path)
    read = load_model(str(tmp_path)).eval()
    ids = torch.tensor([PROMPTS[0]])
    assert torch.equal(read(ids).logits, model(ids).logits)
    assert read.lm_head.weight.data_ptr() != read.model.embed_tokens.weight.data_ptr()


def test_student_that_is_sharded_is_refused(tmp_path):
    model = load_model("testbed:student")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"one that is sharded.*a copy that is whole"):
            fingerprint(model)
    finally:
        distributed.destroy_process_group()
