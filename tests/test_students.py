"""Students with adapters: what they read, what their reference is, what their checkpoints hold."""

import gc
from dataclasses import asdict
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from transformers import PreTrainedModel

from families import family_model
from helpers import Recorder, make_rollout, make_trainer, save, tiny_model, weights
from stable_opd import (
    GoldenMixture,
    InProcessEngine,
    LocalTeacher,
    LoRA,
    OPDModule,
    PeriodicSuffix,
    PromptDataModule,
    ReferenceKL,
    ReverseKL,
    StudentOnly,
    Temperature,
    packing,
)
from stable_opd.constraints import InitialWeights
from stable_opd.models import frozen_copy, load_model, output_head, trained
from stable_opd.options import RolloutOptions, UpdateOptions
from stable_opd.references import MovingAverage, PeriodicReset
from stable_opd.scoring import body
from stable_opd.sources import Source
from stable_opd.students import adapters_off, add_adapters, describe_adapter, load_student, without_base
from writing import assert_captured, make_request

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

STEPS = 4
ROLLOUT = make_rollout([[4, 5, 6], [7, 8, 9, 10, 11, 12, 2], [3]], [[2, 3], [4], [5, 6, 7, 8]])
PLAIN, NF4, INT8 = LoRA(rank=4), LoRA(rank=4, quantization="nf4"), LoRA(rank=4, quantization="int8")


def speaking(model: PreTrainedModel) -> PreTrainedModel:
    """Let the adapters of a model say something."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trained(model):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def states_and_gradients(model, states):
    """Gradients of a random linear functional in what is trained."""
    direction = torch.randn(states.shape, generator=torch.Generator().manual_seed(7))
    return states.detach(), torch.autograd.grad((states * direction).sum(), trained(model))


def assert_same(found, expected, rtol=2e-4):
    for one, other in zip([found[0], *found[1]], [expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=rtol * other.abs().max().item())


def each_row_alone(model, base):
    """The states before each completion token, by the model's own forward over one row at a time."""
    states = []
    for row in range(len(ROLLOUT)):
        part = ROLLOUT.select(torch.tensor([row]))
        hidden = base(input_ids=part.tokens[None], use_cache=False).last_hidden_state[0]
        states.append(hidden[int(part.prompt_lengths) - 1 : -1])
    return states_and_gradients(model, torch.cat(states))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3_text", "phi3"])
def test_packed_is_padded_is_the_model_of_peft(name, monkeypatch):
    wrapped = speaking(peft.get_peft_model(family_model(name, attention="eager"), PLAIN.config()))
    model = family_model(name)
    add_adapters(model, PLAIN)
    with torch.no_grad():
        for ours, theirs in zip(trained(model), trained(wrapped), strict=True):
            ours.copy_(theirs)
    expected = each_row_alone(wrapped, wrapped.base_model.model.base_model)
    assert packing.packs(model)
    assert_same(states_and_gradients(model, body(model, ROLLOUT)), expected)
    monkeypatch.setattr(packing, "PACKABLE", frozenset())
    assert_same(states_and_gradients(model, body(model, ROLLOUT)), expected)
    assert (body(family_model(name), ROLLOUT) - expected[0]).abs().max() > 1e-2


@pytest.mark.parametrize("tied", [True, False])
def test_adapters_are_in_all_linear_layers_but_the_head_and_only_they_learn(tied):
    model = tiny_model(1, tie_word_embeddings=tied)
    linear = sum(isinstance(each, nn.Linear) for each in model.base_model.modules())
    add_adapters(model, LoRA(rank=3))
    assert type(model.get_output_embeddings()) is nn.Linear
    assert len(trained(model)) == 2 * linear
    assert all(".lora_" in name for name, each in model.named_parameters() if each.requires_grad)
    assert {each.dtype for each in trained(model)} == {torch.float32}


def test_weights_stay_in_the_precision_in_which_they_were_saved(tmp_path):
    model = load_student(save(tiny_model(1).bfloat16(), tmp_path), LoRA())
    assert {each.dtype for each in trained(model)} == {torch.float32}
    assert {each.dtype for each in model.parameters() if not each.requires_grad} == {torch.bfloat16}
    states = body(model, ROLLOUT)
    gradients = states_and_gradients(model, states)[1]
    assert states.dtype == torch.bfloat16
    assert {each.dtype for each in gradients} == {torch.float32}


def test_adapters_follow_from_the_seed_alone(student_path, monkeypatch):
    first = [each.clone() for each in trained(load_student(student_path, LoRA()))]
    torch.rand(5)
    state = torch.get_rng_state()
    second = trained(load_student(student_path, LoRA()))
    assert (torch.get_rng_state() == state).all()
    assert all((one == other).all() for one, other in zip(first, second, strict=True))
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert (trained(load_student(student_path, LoRA()))[0] != first[0]).any()


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_head_and_embeddings_are_refused(target):
    with pytest.raises(ValueError, match=r"linear layers of the body.*use all-linear"):
        add_adapters(tiny_model(1, tie_word_embeddings=False), LoRA(target_modules=[target]))


def test_what_makes_no_sense_is_refused():
    for options in ({"rank": 0}, {"alpha": 0}, {"dropout": 1.0}):
        with pytest.raises(ValueError, match="Expected a rank of at least 1"):
            LoRA(**options)


# The reference: the student with its adapters off.


@pytest.mark.parametrize("adapter", [LoRA(rank=4, dropout=0.5), NF4, INT8], ids=["dropout", "nf4", "int8"])
def test_without_its_adapters_the_student_is_the_initial_one_and_gets_them_back(adapter, student_path):
    initial = load_model(student_path, quantization=adapter.quantization).eval()
    model = speaking(load_student(student_path, adapter))
    body(model, ROLLOUT).sum().backward()
    gradients, values = [each.grad.clone() for each in trained(model)], [each.clone() for each in trained(model)]
    with torch.no_grad():
        with adapters_off(model):
            assert (body(model, ROLLOUT) == body(initial, ROLLOUT)).all()
        assert (body(model, ROLLOUT) != body(initial, ROLLOUT)).any()
    assert model.training
    assert all(module.training for module in model.modules())
    assert len(trained(model)) == len(gradients)
    for parameter, gradient, value in zip(trained(model), gradients, values, strict=True):
        assert (parameter.grad == gradient).all()
        assert (parameter == value).all()


@pytest.fixture
def run(student_path, teacher_path, train_path):
    """Train a student with adapters; returns the module and what was logged."""

    def run(*callbacks, adapter=PLAIN, checkpoint=None, prepare=None, student=student_path, steps=STEPS, **options):
        parts = {
            "constraints": {"anchor": ReferenceKL(0.5)},
            "mixture": StudentOnly(),
            "optimizer": partial(torch.optim.AdamW, lr=1e-2),
            "update": UpdateOptions(micro_batch_tokens=60),
        }
        module = OPDModule(
            student,
            LocalTeacher(teacher_path),
            ReverseKL(),
            repetition=PeriodicSuffix(4, 3, 3),
            rollout=RolloutOptions(samples_per_prompt=2, max_new_tokens=10),
            adapter=adapter,
            **parts | options,
        )
        if prepare is not None:
            prepare(module)
        recorder = Recorder()
        trainer = make_trainer(recorder, *callbacks, max_steps=steps, enable_checkpointing=bool(callbacks))
        trainer.fit(module, datamodule=PromptDataModule(Source(train_path), batch_size=4), ckpt_path=checkpoint)
        return module, recorder

    return run


def figures(recorder):
    return [{name: repr(step[name]) for name in step if name.startswith("train/")} for step in recorder.steps]


def copies(module):
    """Have the reference be a frozen copy, as without adapters."""
    readers = module.readers
    readers.keep_reference = lambda student, adapted: setattr(readers, "reference", frozen_copy(student))


def numbers_in_memory():
    """How many numbers the parameters have that are alive in this process."""
    gc.collect()
    alive = [each for each in gc.get_objects() if type(each) is nn.Parameter]
    return sum(each.numel() for each in alive)


def test_reference_is_that_of_a_frozen_copy_and_takes_no_memory(run):
    before = numbers_in_memory()
    module, recorder = run()
    student, teacher = module.model.num_parameters(), module.readers.teacher.model.num_parameters()
    assert numbers_in_memory() - before == student + teacher
    other, expected = run(prepare=copies)
    assert numbers_in_memory() - before == 2 * (student + teacher) + student
    assert "reference" not in module.memory_plan().always
    assert figures(recorder) == figures(expected)
    values = [step["train/value/anchor"] for step in recorder.steps]
    assert values[0] == pytest.approx(0, abs=1e-6)
    assert values[-1] > 1e-4
    for name, tensor in weights(other).items():
        assert (weights(module)[name] == tensor).all()


@pytest.mark.parametrize("adapter", [PLAIN, NF4, INT8], ids=["plain", "nf4", "int8"])
def test_training_moves_the_adapters_and_nothing_else(adapter, run, student_path):
    module, recorder = run(adapter=adapter, mixture=GoldenMixture())
    start = load_student(student_path, adapter)
    assert len(recorder.steps) == STEPS
    for (name, found), other in zip(module.model.named_parameters(), start.parameters(), strict=True):
        assert (found != other).any() == (".lora_" in name), name
    assert output_head(module.model).weight.dtype == torch.float32


REFUSED = {
    "average": ({"reference": MovingAverage(0.5)}, "MovingAverage. It needs a copy of all weights"),
    "reset": ({"reference": PeriodicReset(2)}, "PeriodicReset. It needs a copy of all weights"),
    "weights": ({"constraints": {"w": InitialWeights(0.1)}}, "w, which holds the student's weights. .*Use ReferenceKL"),
    "offload": ({"update": UpdateOptions(offload=("reference",))}, "takes no memory. Leave it out"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_needs_a_copy_of_the_weights_is_refused(options, message, run):
    with pytest.raises(ValueError, match=message):
        run(**options)


# Checkpoints.


def keep(folder):
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)


@pytest.mark.parametrize("adapter", [PLAIN, NF4], ids=["plain", "nf4"])
def test_checkpoint_holds_the_adapters_and_a_resumed_run_equals_an_uninterrupted_one(adapter, run, tmp_path):
    whole, _ = run(keep(tmp_path / "whole"), adapter=adapter)
    path = tmp_path / "whole" / "step=2.ckpt"
    saved = torch.load(path, weights_only=True)
    learnt = {f"student.{name}" for name, each in whole.model.named_parameters() if each.requires_grad}
    assert {name for name in saved["state_dict"] if name.startswith("student.")} == learnt
    (state,) = saved["optimizer_states"]
    assert len(state["state"]) == len(learnt)
    resumed, recorder = run(keep(tmp_path / "resumed"), adapter=adapter, checkpoint=path)
    assert len(recorder.steps) == STEPS - 2
    for name, tensor in weights(whole).items():
        assert (weights(resumed)[name] == tensor).all(), name


OTHERS = {
    "rank": (LoRA(rank=8), r"adapters of rank 8, but got rank 4\. Set model\.adapter as in"),
    "alpha": (LoRA(rank=4, alpha=8), "adapters of alpha 8, but got alpha 32"),
    "layers": (
        LoRA(rank=4, target_modules=["q_proj"]),
        r"target_modules \['q_proj'\], but got target_modules all",
    ),
    "quantization": (NF4, "quantization nf4, but got quantization None"),
    "none": (None, r"all weights, but got one with adapters\. Set model\.adapter"),
}


def test_adapters_of_another_kind_or_student_are_refused(run, tmp_path, teacher_path):
    run(keep(tmp_path), steps=1)
    resume = partial(run, checkpoint=tmp_path / "step=1.ckpt")
    for adapter, message in OTHERS.values():
        with pytest.raises(ValueError, match=message):
            resume(adapter=adapter)
    with pytest.raises(ValueError, match=r"trained beside other weights\. Name the student of that run"):
        resume(student=teacher_path)
    resume(keep(tmp_path / "on"), steps=2)


def test_checkpoint_of_all_weights_is_refused(run, tmp_path):
    run(keep(tmp_path), adapter=None, steps=1)
    with pytest.raises(ValueError, match=r"with adapters.*got one with all weights\. Export"):
        run(checkpoint=tmp_path / "step=1.ckpt")


def test_digest_is_of_the_weights_and_of_nothing_else():
    adapter = LoRA(rank=4)
    plain = describe_adapter(tiny_model(1), adapter)
    adapted = tiny_model(1)
    add_adapters(adapted, adapter)
    assert plain == describe_adapter(speaking(adapted), adapter)
    assert plain == describe_adapter(tiny_model(1).double(), adapter)
    changed = tiny_model(1)
    with torch.no_grad():
        changed.base_model.layers[1].mlp.down_proj.weight[0, 0] += 1e-3
    assert plain["base"] != describe_adapter(changed, adapter)["base"]
    assert {name: plain[name] for name in asdict(adapter)} == asdict(adapter)


def test_state_without_the_base_keeps_all_others():
    state = {"student.q.lora_A.default.weight": 1, "student.q.base_layer.weight": 2, "constraints.a.x": 3}
    assert without_base(state) == {"student.q.lora_A.default.weight": 1, "constraints.a.x": 3}


# Quantised weights.


@pytest.mark.parametrize("adapter", [NF4, INT8], ids=["nf4", "int8"])
def test_quantised_student_writes_as_it_reads(adapter, student_path):
    """The engine multiplies with what the layers make of the unit vectors; int8 rounds what they are given, too."""
    model = speaking(load_student(student_path, adapter)).eval()
    completions = InProcessEngine().generate(model, make_request(stop=()), Temperature(1.0))
    if adapter is NF4:
        assert_captured(completions, model, Temperature(1.0), [0, 1, 2, 3], atol=1e-3)
    else:
        assert completions.logprobs.isfinite().all()
    body(model, ROLLOUT).sum().backward()  # what inference has touched can still learn


def test_four_bits_err_as_their_definition_does_and_leave_out_what_would_be_decoded_wrongly(tmp_path):
    """NF4 by hand: blocks of 64 in units of their largest entry, each to the nearest level."""
    functional = pytest.importorskip("bitsandbytes").functional
    path = save(tiny_model(1, hidden_size=64, intermediate_size=96, initializer_range=0.1), tmp_path)
    full, small = load_model(path), load_model(path, quantization="nf4")
    assert type(small.get_output_embeddings()) is nn.Linear
    levels = functional.get_4bit_type("nf4", "cpu")
    for name, layer in full.base_model.layers.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        found = small.base_model.layers.get_submodule(name)
        assert (type(found) is nn.Linear) == (layer.in_features != 64)
        if type(found) is nn.Linear:
            assert torch.equal(found.weight, layer.weight)
            continue
        blocks = layer.weight.detach().reshape(-1, 64)
        units = blocks.abs().amax(1, keepdim=True)
        expected = (levels[((blocks / units)[..., None] - levels).abs().argmin(-1)] * units).reshape_as(layer.weight)
        decoded = functional.dequantize_4bit(found.weight.data, found.weight.quant_state)
        # The units are stored in 8 bits themselves.
        torch.testing.assert_close(decoded, expected, rtol=0, atol=0.02 * units.max().item())


def test_model_without_a_layer_for_four_bits_is_refused(tmp_path):
    path = save(tiny_model(1, intermediate_size=48), tmp_path)
    with pytest.raises(ValueError, match=r"multiples of 64 inputs.*width 32\. Use int8"):
        load_model(path, quantization="nf4")


# Gradient checkpointing.


def measure(sizes, tensor):
    """Note how large a tensor is that is kept for the backward pass."""
    sizes.append(tensor.nbytes)
    return tensor


@pytest.mark.parametrize("adapter", [None, PLAIN, NF4], ids=["all weights", "lora", "qlora"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_gradient_checkpointing_changes_no_gradient(adapter, packed, student_path, monkeypatch):
    if not packed:
        monkeypatch.setattr(packing, "PACKABLE", frozenset())
    found, kept = [], []
    for checkpointing in (False, True):
        model = speaking(load_student(student_path, adapter, checkpointing))
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(partial(measure, sizes), lambda tensor: tensor):
            states = body(model, ROLLOUT)
        kept.append(sum(sizes))
        found.append(states_and_gradients(model, states))
    assert_same(found[1], found[0], rtol=1e-6)
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize("adapter", [None, PLAIN], ids=["all weights", "lora"])
def test_gradient_checkpointing_changes_no_training(adapter, run):
    plain, expected = run(adapter=adapter, mixture=GoldenMixture())
    update = UpdateOptions(micro_batch_tokens=60, gradient_checkpointing=True)
    module, recorder = run(adapter=adapter, mixture=GoldenMixture(), update=update)
    assert any(getattr(each, "gradient_checkpointing", False) for each in module.model.modules())
    assert figures(recorder) == figures(expected)
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(weights(module)[name], tensor, rtol=0, atol=0)
