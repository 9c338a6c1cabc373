"""Models with adapters by peft: what is written must be what the adapted model would have written."""

import pytest
import torch

from families import family_model
from stable_opd import InProcessEngine, Temperature
from writing import PROMPTS, assert_captured, make_request, own_generate, rows

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "all layers": lambda: peft.LoraConfig(r=4, target_modules=LINEAR, init_lora_weights=False),
    "two layers": lambda: peft.LoraConfig(r=4, lora_alpha=3, target_modules=["q_proj", "up_proj"], use_rslora=True),
    "dora": lambda: peft.LoraConfig(r=4, target_modules=LINEAR, init_lora_weights=False, use_dora=True),
    "lora with a bias": lambda: peft.LoraConfig(r=4, target_modules=LINEAR, init_lora_weights=False, lora_bias=True),
    "embedding": lambda: peft.LoraConfig(r=4, target_modules=["embed_tokens", "v_proj"], init_lora_weights=False),
    "saved embedding": lambda: peft.LoraConfig(r=4, target_modules=["v_proj"], modules_to_save=["embed_tokens"]),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "oft": lambda: peft.OFTConfig(r=4, oft_block_size=0, target_modules=["v_proj", "up_proj"], init_weights=False),
}


def base_model(name="llama"):
    return family_model(name, **{"attention_bias": True, "mlp_bias": True} if name == "llama" else {})


def adapted(config, name="llama"):
    """A model with adapters that say something, and the model within."""
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(base_model(name), config).eval()
    with torch.no_grad():
        for key, parameter in wrapped.named_parameters():
            if parameter.requires_grad and "embed_tokens" not in key:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return wrapped, wrapped.get_base_model()


def assert_writes_as_it_is(model):
    completions = InProcessEngine().generate(model, make_request(stop=()), Temperature(1.0))
    assert_captured(completions, model, Temperature(1.0), [0, 1, 2, 3])
    found = InProcessEngine().generate(model, make_request(stop=(7,)), Temperature(0.0))
    assert rows(found) == [own_generate(model, prompt, (7,)) for prompt in PROMPTS]


@pytest.mark.parametrize("config", ADAPTERS.values(), ids=ADAPTERS.keys())
def test_adapters_take_part(config):
    _, model = adapted(config())
    assert_writes_as_it_is(model)
    plain = InProcessEngine().generate(base_model(), make_request(), Temperature(0.0))
    assert rows(InProcessEngine().generate(model, make_request(), Temperature(0.0))) != rows(plain)


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_adapters_take_part_in_other_families(name):
    assert_writes_as_it_is(adapted(ADAPTERS["all layers"](), name)[1])


def test_adapters_that_are_disabled_or_one_of_two_or_both():
    wrapped, model = adapted(ADAPTERS["all layers"]())
    with wrapped.disable_adapter():
        assert_writes_as_it_is(model)
    wrapped.add_adapter("other", ADAPTERS["all layers"]())
    wrapped.set_adapter("other")
    assert_writes_as_it_is(model)
    wrapped.base_model.set_adapter(["default", "other"])
    assert_writes_as_it_is(model)


def test_adapters_that_are_merged_take_part_once():
    wrapped, model = adapted(ADAPTERS["all layers"]())
    wrapped.merge_adapter()
    assert_writes_as_it_is(model)


def test_wrapped_model_writes_what_the_model_within_writes():
    wrapped, model = adapted(ADAPTERS["all layers"]())
    found = InProcessEngine().generate(wrapped, make_request(), Temperature(0.0))
    assert rows(found) == rows(InProcessEngine().generate(model, make_request(), Temperature(0.0)))
