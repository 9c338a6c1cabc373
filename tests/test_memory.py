"""What a step is said to need of a device's memory, against what is really allocated."""

from functools import partial

import pytest
import torch
from torch import nn

from helpers import TOKENIZER, VOCABULARY, make_rollout, make_trainer, problems, tiny_model
from stable_opd import (
    LocalTeacher,
    OPDModule,
    PeriodicSuffix,
    PromptDataModule,
    ReferenceKL,
    ReverseKL,
    StudentOnly,
    Teacher,
)
from stable_opd.engines.decoder import Decoder
from stable_opd.memory import MemoryPlan, activation_bytes, cache_bytes, optimizer_bytes, plan_memory
from stable_opd.models import frozen_copy
from stable_opd.offload import module_bytes
from stable_opd.options import RolloutOptions, UpdateOptions
from stable_opd.readers import Readers
from stable_opd.scoring import body
from stable_opd.sources import Source
from stable_opd.students import LoRA, load_student

MIB, GIB = 2**20, 2**30
SHAPES = {
    "plain": {},
    "deep": {"num_hidden_layers": 4},
    "grouped queries": {"num_attention_heads": 4, "num_key_value_heads": 1},
    "wide MLP": {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 8, "head_dim": 8},
    "narrow MLP": {"hidden_size": 128, "intermediate_size": 128, "head_dim": 64},
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
# The older name of the switch, which every supported version of transformers knows.
adapted = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
checkpointed = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")


def kept_for_backward(model, rows):
    """Bytes of what the body of a model keeps for its backward pass, its parameters aside; nothing counts twice."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage  # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        body(model, make_rollout([[1] * length for length in rows]))
    return sum(storage.nbytes() for storage in kept.values())


@each_shape
@each_dtype
def test_cache_is_as_large_as_the_decoders(shape, dtype):
    model = tiny_model(1, **shape)
    cache = Decoder(model, 40, VOCABULARY, dtype).make_cache(3, 29)
    assert cache_bytes(model, 3, 29, dtype.itemsize) == cache.nbytes


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_that_are_shared_count_once(tied):
    model = tiny_model(1, tie_word_embeddings=tied)
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in model.parameters()}
    assert module_bytes(model) == sum(storage.nbytes() for storage in storages.values())
    embedding = VOCABULARY * 32 * 4
    assert module_bytes(model) == module_bytes(model.base_model) + (0 if tied else embedding)


def test_parameters_count_in_their_precision():
    mixed = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Linear(5, 7, bias=False).to(torch.bfloat16))
    assert module_bytes(mixed) == 15 * 4 + 35 * 2


@each_shape
@each_dtype
@pytest.mark.parametrize("rows", [[30] * 4, [40, 3, 17, 55], [90] * 12], ids=["even", "ragged", "many"])
def test_activations_are_about_what_is_kept(shape, dtype, rows):
    model = tiny_model(1, **shape).train().to(dtype)
    estimate, kept = activation_bytes(model, sum(rows), dtype.itemsize), kept_for_backward(model, rows)
    assert 1 / 1.3 < estimate / kept < 1.3


@checkpointed
@each_shape
def test_checkpointed_activations_are_the_inputs_of_the_layers_and_one_layer_at_work(shape):
    rows, tokens = [40, 3, 17, 55], 115
    one = kept_for_backward(tiny_model(1, **shape | {"num_hidden_layers": 1}).train(), rows)
    model = tiny_model(1, **shape).train()
    without = activation_bytes(model, tokens, 4)
    model.gradient_checkpointing_enable()
    estimate = activation_bytes(model, tokens, 4)
    assert estimate < without
    assert 1 / 1.3 < estimate / (kept_for_backward(model, rows) + one) < 1.3


@pytest.fixture
def plan(teacher_path):
    """Plan for a tiny student; what a test does not name is small and stays on the device."""

    def plan(student=None, teacher=None, offload=(), teacher_rests=False, reference=True, **options):
        student = student or tiny_model(1)
        if teacher is None:
            teacher = LocalTeacher(teacher_path, offload=teacher_rests)
            teacher.setup("student", TOKENIZER, torch.device("cpu"))
        readers = Readers(teacher, "reference" in offload)
        readers.reference = frozen_copy(student) if reference else None
        rollout = RolloutOptions(options.pop("samples", 4), options.pop("budget", 20))
        update = UpdateOptions(micro_batch_tokens=options.pop("tokens", 200), offload=offload)
        defaults = {
            "prompts": 6,
            "eval_answers": 3,
            "longest_prompt": 13,
            "vocabulary": VOCABULARY,
            "compute": torch.float32,
            "kept": 8,
        }
        return plan_memory(student, readers, rollout, update, **defaults | options)

    return plan


def test_evaluation_may_write_more_rows_than_training(plan):
    assert plan(eval_answers=25).rollout["cache"] == plan().rollout["cache"] * 25 // 24


def test_mixed_precision_keeps_the_weights_in_both(plan):
    assert "weights in lower precision" not in plan().update
    found = plan(compute=torch.bfloat16)
    assert found.update["weights in lower precision"] == module_bytes(tiny_model(1)) // 2


def test_plan_of_a_tiny_student(plan):
    found, weights = plan(), module_bytes(tiny_model(1))
    assert found.always == {"student": weights, "teacher": weights, "reference": weights, "optimizer": 2 * weights}
    cache = Decoder(tiny_model(1), 40, VOCABULARY, torch.float32).make_cache(6 * 4, 13 + 20)
    assert found.rollout == {"inference copy": weights, "cache": cache.nbytes}
    assert found.scoring == {}
    assert found.update["gradients"] == weights
    assert found.update["activations"] == activation_bytes(tiny_model(1), 200, 4)
    assert found.update["gradient of the head"] == VOCABULARY * 32 * 4
    assert found.update["tiles of logits"] > 0


def test_optimizer_has_the_size_of_what_adam_remembers(plan):
    model = tiny_model(1)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert plan().always["optimizer"] == sum(each.nbytes for each in moments)
    assert plan().update["gradients"] == sum(parameter.grad.nbytes for parameter in model.parameters())


SGD, ADAM = torch.optim.SGD, torch.optim.AdamW


@pytest.mark.parametrize(
    ("make", "dtype", "expected"),
    [
        (SGD, torch.float32, 0),
        (partial(SGD, lr=0.1, momentum=0.9), torch.float32, 4),
        (ADAM, torch.float32, 8),
        (ADAM, torch.bfloat16, 4),
        (torch.optim.Muon, torch.float32, 4),
    ],
    ids=["SGD", "momentum", "AdamW", "AdamW in bfloat16", "Muon"],
)
def test_optimizer_keeps_what_it_is_seen_to_keep(make, dtype, expected):
    assert optimizer_bytes(make, dtype) == expected


def test_optimizer_in_8_bits_keeps_two_bytes_and_a_little():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    assert 2 < optimizer_bytes(bitsandbytes.optim.AdamW8bit, torch.float32) < 2.1


def test_each_part_that_rests_moves_to_its_phase(plan):
    usual = plan()
    for name, phase, options in (
        ("optimizer", "update", {"offload": ("optimizer",)}),
        ("reference", "scoring", {"offload": ("reference",)}),
        ("teacher", "scoring", {"teacher_rests": True}),
    ):
        found = plan(**options)
        assert {**found.always, name: usual.always[name]} == usual.always
        assert name not in found.always
        assert getattr(found, phase)[name] == usual.always[name]
        gained = {other: usual.peaks[other] - found.peaks[other] for other in usual.peaks}
        assert gained == {other: 0 if other == phase else usual.always[name] for other in usual.peaks}


def test_parameters_that_do_not_learn_need_no_optimizer(plan):
    student = tiny_model(1, tie_word_embeddings=False).requires_grad_(False)
    student.model.norm.requires_grad_(True)
    found = plan(student)
    assert found.always["optimizer"] == 2 * 32 * 4
    assert found.update["gradients"] == 32 * 4
    assert found.update["gradient of the head"] == 0


@adapted
def test_plan_of_a_student_with_adapters_counts_their_training_and_no_reference(plan, student_path):
    pytest.importorskip("peft")
    student = load_student(student_path, LoRA(rank=2))
    adapters = sum(each.numel() for name, each in student.named_parameters() if ".lora_" in name)
    found = plan(student, reference=False)
    assert found.always["student"] == module_bytes(tiny_model(1)) + 4 * adapters
    assert found.always["optimizer"] == 8 * adapters
    assert found.update["gradients"] == 4 * adapters
    assert found.update["gradient of the head"] == 0
    pytest.importorskip("bitsandbytes")
    small = plan(load_student(student_path, LoRA(rank=2, quantization="nf4")), reference=False)
    rows = sum(each.mlp.down_proj.weight.nbytes for each in tiny_model(1).base_model.layers)  # 64 wide
    assert small.always["student"] == found.always["student"] - rows * 7 / 8
    assert small.rollout == found.rollout  # the inference copy is not quantised


def test_plan_counts_what_there_is(plan):
    class Elsewhere(LocalTeacher):
        """Scores on another machine."""

        footprint = Teacher.footprint

    found = plan(teacher=Elsewhere("nowhere"), reference=False, samples=0)
    assert found.always["teacher"] == 0
    assert "reference" not in found.always
    assert found.rollout["cache"] == cache_bytes(tiny_model(1), 6, 33, 4)  # an evaluation writes all the same
    assert "teacher" not in str(found)


def test_lower_precision_halves_the_copy_the_cache_and_the_activations(plan):
    usual, low = plan(), plan(compute=torch.bfloat16)
    assert 2 * low.rollout["inference copy"] == usual.rollout["inference copy"]
    assert 2 * low.rollout["cache"] == usual.rollout["cache"]
    assert low.update["activations"] < usual.update["activations"]
    assert low.always == usual.always


@checkpointed
def test_checkpointing_makes_the_update_smaller(plan):
    student = tiny_model(1)
    usual = plan(student).update
    student.gradient_checkpointing_enable()
    less = plan(student).update
    assert less["activations"] < usual["activations"]
    assert {**less, "activations": 0} == {**usual, "activations": 0}


SMALL = MemoryPlan(
    always={"student": 2 * GIB, "teacher": 0},
    rollout={"cache": 512 * MIB},
    scoring={"reference": 3 * GIB},
    update={"gradients": 2 * GIB, "activations": 256 * MIB, "gradient of the head": 4 * MIB},
)


def test_table():
    assert str(SMALL).splitlines() == [
        "Memory plan (estimates, in GiB)",
        "  always    student                         2.00",
        "  rollout   cache                           0.50",
        "  scoring   reference                       3.00",
        "  update    gradients                       2.00",
        "  update    activations                     0.25",
        "  update    gradient of the head            0.00",
        "  peak of rollout                           2.50",
        "  peak of scoring                           5.00",
        "  peak of update                            4.25",
    ]


def test_plan_that_just_fits_passes():
    SMALL.check(5 * GIB)


def test_plan_that_does_not_fit_is_refused_with_the_phase_the_largest_needs_and_the_way_out():
    with pytest.raises(
        ValueError, match=r"^The scoring phase needs about 5\.0 GiB, but the device has 4\.9"
    ) as refused:
        SMALL.check(5 * GIB - 100 * MIB)
    message = str(refused.value)
    assert "reference (3.0 GiB), student (2.0 GiB)" in message
    for option in ("data.batch_size", "model.rollout.max_new_tokens", "model.update.micro_batch_tokens", "offload"):
        assert option in message
    larger = MemoryPlan(SMALL.always, SMALL.rollout, {}, SMALL.update)
    with pytest.raises(ValueError, match=r"The update phase.*student .*gradients .*activations") as refused:
        larger.check(4 * GIB)
    assert "gradient of the head" not in str(refused.value)  # the three largest are named


@pytest.mark.parametrize(("precision", "width"), [("32-true", 4), ("bf16-mixed", 2), ("bf16-true", 2)])
def test_module_plans_with_its_data_its_options_and_its_precision(
    precision, width, student_path, teacher_path, train_path
):
    module = OPDModule(
        student_path,
        LocalTeacher(teacher_path, offload=True),
        ReverseKL(),
        StudentOnly(),
        PeriodicSuffix(4, 3, 3),
        {"anchor": ReferenceKL(0.1)},
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.5),
        rollout=RolloutOptions(2, 10),
        update=UpdateOptions(micro_batch_tokens=100, offload=("optimizer",)),
    )
    data = PromptDataModule(Source(train_path), batch_size=5)
    make_trainer(max_steps=1, precision=precision).fit(module, datamodule=data)
    found, model = module.memory_plan(), module.model
    longest = max(len(TOKENIZER.encode(record["prompt"])) for record in problems(24))
    assert found.always == {"student": module_bytes(model), "reference": module_bytes(model)}
    assert found.scoring == {"teacher": module.readers.teacher.footprint}
    assert found.rollout["cache"] == cache_bytes(model, 5 * 2, longest + 10, width)
    assert found.update["optimizer"] == module_bytes(model)
    assert found.update["activations"] == activation_bytes(model, 100, width)
