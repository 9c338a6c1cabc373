"""Steps of fixed shape, as they are recorded on a GPU, against the usual ones; the recording itself needs a GPU."""

import pytest
import torch

from families import family_model
from helpers import EOS, VOCABULARY
from stable_opd import InProcessEngine, Temperature
from stable_opd.engines import in_process, replay
from stable_opd.engines.decoder import Decoder
from stable_opd.engines.in_process import LoopStop
from stable_opd.engines.replay import ReplayedStep
from stable_opd.packing import Packing
from writing import PROMPTS, assert_captured, assert_equal_completions, make_request

MODELS = {
    "llama": ("llama", {}),
    "one key head": ("llama", {"num_key_value_heads": 1}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen3": ("qwen3", {"rms_norm_eps": 0.3}),
}
each_model = pytest.mark.parametrize(("name", "overrides"), MODELS.values(), ids=MODELS)
each_stride = pytest.mark.parametrize("stride", [8, 512])
PROMPT = [2, 0, 1, 0, 3, 3, 1, 2]  # ragged, and in no order
SAMPLER = Temperature(1.2)


@pytest.fixture
def replayed(monkeypatch):
    """Write with steps of fixed shape; returns the completions and the width of each shape."""

    def write(model, stride, engine=InProcessEngine, **options):
        widths = []

        class Noting(ReplayedStep):
            """Notes its width."""

            def __init__(self, *args):
                super().__init__(*args)
                widths.append(self.width)

        with monkeypatch.context() as patch:
            patch.setattr(in_process, "recordable", lambda device: True)
            patch.setattr(in_process, "ReplayedStep", Noting)
            patch.setattr(replay, "STRIDE", stride)
            return engine().generate(model, make_request(**options), SAMPLER), widths

    return write


def usual(model, engine=InProcessEngine, **options):
    return engine().generate(model, make_request(**options), SAMPLER)


@each_model
@each_stride
def test_same_tokens_as_usual_where_rows_end_at_different_times(name, overrides, stride, replayed):
    model, options = family_model(name, **overrides), {"prompt": PROMPT, "stop": (EOS, 7, 11)}
    found, widths = replayed(model, stride, **options)
    assert_equal_completions(found, usual(model, **options))
    assert_captured(found, model, SAMPLER, PROMPT)
    assert len(set(found.lengths.tolist())) > 3
    assert len(widths) > 1


@each_model
@pytest.mark.parametrize(("stride", "expected"), [(8, [16, 24, 32]), (11, [11, 22, 33]), (32, [32]), (512, [33])])
def test_same_tokens_as_usual_while_the_width_grows(name, overrides, stride, expected, replayed):
    """Nine tokens of the longest prompt and 24 of an answer that nothing stops, the last of which is not read."""
    model, options = family_model(name, **overrides), {"prompt": PROMPT, "stop": ()}
    found, widths = replayed(model, stride, **options)
    assert widths == expected
    assert_equal_completions(found, usual(model, **options))
    assert found.lengths.tolist() == [24] * len(PROMPT)


@each_stride
@pytest.mark.parametrize("prompt", [[2, 2, 2], [3]], ids=["equal prompts", "one token"])
def test_same_tokens_as_usual_where_nothing_is_hidden_on_the_left(stride, prompt, replayed):
    model = family_model("llama")
    found, _ = replayed(model, stride, prompt=prompt)
    assert_equal_completions(found, usual(model, prompt=prompt))


@each_stride
def test_same_tokens_as_usual_where_loops_are_stopped(stride, replayed):
    def engine():
        return InProcessEngine(LoopStop(max_period=2, min_copies=2, min_tokens=2, every=3))

    model, options = family_model("llama"), {"prompt": PROMPT * 2, "stop": (EOS,)}
    found, _ = replayed(model, stride, engine, **options)
    assert_equal_completions(found, usual(model, engine, **options))
    assert found.lengths.min() < 24


def test_low_precision_is_no_obstacle(replayed):
    """Rounding may let a row go another way now and then."""
    model = family_model("llama").to(torch.bfloat16)
    found, _ = replayed(model, 8, prompt=PROMPT, stop=())
    expected = usual(model, prompt=PROMPT, stop=())
    assert (found.tokens == expected.tokens).float().mean() > 0.5
    assert found.logprobs.isfinite().all()


def start(stride, monkeypatch):
    """A decoder that has read two prompts into a cache, and a step for what comes next."""
    monkeypatch.setattr(replay, "STRIDE", stride)
    decoder = Decoder(family_model("llama"), 40, VOCABULARY, torch.float32)
    prompts = PROMPTS[:2]
    sizes = torch.tensor([len(each) for each in prompts])
    cache, starts = decoder.make_cache(2, 30), 6 - sizes
    decoder.prefill(torch.tensor([token for each in prompts for token in each]), Packing(sizes), cache, starts)
    return ReplayedStep(decoder, list(cache), starts, 6)


@torch.inference_mode()
@torch.inference_mode()
def test_step_that_is_repeated_changes_nothing(monkeypatch):
    """A recording takes the first step more than once."""
    once, twice = start(8, monkeypatch), start(8, monkeypatch)
    tokens = torch.tensor([3, 5])
    twice(tokens, 6)
    for column in (6, 7):
        torch.testing.assert_close(twice(tokens, column), once(tokens, column), rtol=0, atol=0)
    torch.testing.assert_close(torch.stack(twice.cells), torch.stack(once.cells), rtol=0, atol=0)


@torch.inference_mode()
@torch.inference_mode()
def test_columns_that_are_not_written_yet_are_not_seen(monkeypatch):
    """Whatever stands in them."""
    clean, dirty = start(16, monkeypatch), start(16, monkeypatch)
    for cells in dirty.cells:
        cells[..., 7:, :] = 1e3
    tokens = torch.tensor([3, 5])
    torch.testing.assert_close(dirty(tokens, 6), clean(tokens, 6), rtol=0, atol=0)


def test_only_a_gpu_records():
    assert replay.recordable(torch.device("cuda"))
    assert not replay.recordable(torch.device("cpu"))


@pytest.mark.gpu
@each_model
@each_stride
def test_recorded_steps_write_what_unrecorded_ones_write(name, overrides, stride, monkeypatch):
    """In float32; a student that has learnt in between is recorded anew."""
    monkeypatch.setattr(replay, "STRIDE", stride)
    model, options = family_model(name, **overrides).cuda(), {"prompt": PROMPT, "stop": (EOS, 7, 11)}
    engine, before = InProcessEngine(), None
    for _ in range(2):
        found = engine.generate(model, make_request(**options), SAMPLER)
        with monkeypatch.context() as patch:
            patch.setattr(in_process, "recordable", lambda device: False)
            expected = engine.generate(model, make_request(**options), SAMPLER)
        assert_equal_completions(found, expected)
        assert found.tokens.tolist() != before
        before = found.tokens.tolist()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.3)
