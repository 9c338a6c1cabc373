"""Sharded training (FSDP2): two processes do what one does, and go on where any number of them stopped."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml
from transformers import AutoModelForCausalLM

from runs import logged, write_recipe
from sharded import run
from stable_opd import shards
from stable_opd.cli import main
from stable_opd.resume import check_whole, checkpoints, newest
from stable_opd.sharding import blocks

STEPS = 4
ANCHOR = {
    "class_path": "ReferenceKL",
    "init_args": {"weight": 0.5, "controller": {"class_path": "DualAscent"}},
}
SHARDED = ["--trainer.strategy", "sharded"]
#: Added in another order.
EQUAL = {"rtol": 0, "atol": 2e-6}


@pytest.fixture(scope="module")
def place(student_path, teacher_path, train_path, validation_path, tmp_path_factory):
    """A folder with a recipe: rows of two authors, a reference, a controller, and an optimizer that remembers."""
    model = {
        "constraints": {"anchor": ANCHOR},
        # Adam would blow the rounding of a vanishing gradient up to a whole step.
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1, "momentum": 0.9}},
        "update": {"micro_batch_tokens": 100},  # several micro-batches, and not as many on each process
    }
    return write_recipe(
        tmp_path_factory.mktemp("sharding"),
        *(student_path, teacher_path, train_path, validation_path),
        model,
        trainer={"max_steps": STEPS, "val_check_interval": 2},
        checkpoint={"every_n_steps": 1, "keep": STEPS},
    )


@pytest.fixture
def recipe(place, monkeypatch):
    """Go to the folder, and return what makes the arguments of a run of 8 prompts a step on some processes."""
    monkeypatch.chdir(place)

    def arguments(name, count, *flags, command="fit"):
        options = ["-c", "recipe.yaml", "--trainer.logger.name", name, "--ckpt_path", "last"]
        return [command, *options, "--trainer.devices", str(count), "--data.batch_size", str(8 // count), *flags]

    return arguments


@pytest.fixture
def whole(recipe):
    """A run on one process with the usual strategy."""
    if not Path("runs/whole").exists():
        main(recipe("whole", 1))
    return recipe


@pytest.fixture
def two(recipe):
    """The same on two processes, sharded."""
    if not Path("runs/two").exists():
        probe = json.dumps([{"class_path": "sharded.Probe", "init_args": {"file": "probe"}}])
        assert run(recipe("two", 2, *SHARDED, "--trainer.callbacks", probe), 2) == [0, 0]
    return recipe


def read(name, step=STEPS):
    """What a checkpoint holds, whether it is in shards or not."""
    path = Path("runs", name, "version_0", "checkpoints", f"last-step={step}.ckpt")
    if path.is_dir():
        return shards.read(path, lambda size, dtype: torch.empty(size, dtype=dtype))
    return torch.load(path, weights_only=True)


def assert_same_run(name, other, but=()):
    """Weights, memory of the optimizer, controllers, and every figure that does not depend on the clock."""
    found, expected = read(name), read(other)
    assert found["global_step"] == expected["global_step"] == STEPS
    assert found["state_dict"].keys() == expected["state_dict"].keys()
    for key, value in expected["state_dict"].items():
        if key.startswith("student."):
            torch.testing.assert_close(found["state_dict"][key], value, **EQUAL)
    (memory,), (wanted,) = found["optimizer_states"], expected["optimizer_states"]
    assert len(memory["state"]) == len(wanted["state"]) > 0
    for number, kept in wanted["state"].items():
        torch.testing.assert_close(memory["state"][number]["momentum_buffer"], kept["momentum_buffer"], **EQUAL)
    controllers = [key for key in expected["state_dict"] if "controller" in key]
    assert controllers
    for key in controllers:
        torch.testing.assert_close(found["state_dict"][key], expected["state_dict"][key], rtol=1e-6, atol=1e-6)
    for row, wanted in zip(figures(name), figures(other), strict=True):
        for key in wanted.keys() | row.keys():
            if key not in but:
                assert row[key] == pytest.approx(wanted[key], rel=1e-4, abs=1e-5, nan_ok=True), key


def figures(name):
    return numbers(Path("runs", name, "version_0"))


def numbers(folder):
    return [{key: float(each) for key, each in row.items() if each} for row in logged(folder)]


def test_two_sharded_processes_are_one(whole, two):
    assert_same_run("two", "whole")
    probes = [json.loads(Path(f"probe-{rank}.json").read_text()) for rank in range(2)]
    assert probes[0]["pieces"] != probes[1]["pieces"]  # or nothing would have had to be agreed on
    assert max(probes[0]["pieces"]) > 1
    assert probes[0]["padded"] == probes[1]["padded"]
    size = 4 * sum(each.numel() for each in AutoModelForCausalLM.from_pretrained(student_of(two)).parameters())
    for name in ("student", "teacher", "reference"):
        shares = [probe[name] for probe in probes]
        assert sum(shares) == size
        assert max(shares) < 0.55 * size
    assert [probe["copy"] for probe in probes] == [0, 0]  # given back before the student learns


def student_of(recipe):
    return yaml.safe_load(Path("recipe.yaml").read_text())["model"]["student"]


def copied(name, original, step):
    """Copy a run as if it had been killed after a step, with what a process leaves that dies while it writes."""
    shutil.copytree(Path("runs", original), Path("runs", name))
    folder = Path("runs", name, "version_0", "checkpoints")
    for path in checkpoints(folder):
        if path.name > f"last-step={step}.ckpt":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    half = folder / f".last-step={step + 1}.ckpt.part"
    half.mkdir()
    (half / "__2_0.distcp").write_bytes(b"half")
    return folder


#: Each process remembers the first answers of its own.
INFLATION = ["train/length_inflation"]
ACCEPT = ["--checkpoint.accept_changes", "true"]


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(before, after, two):
    if not Path("runs/alone").exists():
        assert run(two("alone", 1, *SHARDED), 1) == [0]
        assert_same_run("alone", "two")
    name = f"from-{before}-to-{after}"
    folder = copied(name, {1: "alone", 2: "two"}[before], 2)
    assert run(two(name, after, *SHARDED, *ACCEPT), after) == [0] * after
    assert_same_run(name, "two", but=INFLATION)
    assert {path.name for path in folder.iterdir()} == {f"last-step={step}.ckpt" for step in range(1, STEPS + 1)}


def test_one_file_of_two_processes_goes_on_with_any_strategy(whole, two):
    one_file = {"class_path": "stable_opd.ShardedStrategy", "init_args": {"save_distributed_checkpoint": False}}
    assert run(two("file", 2, "--trainer.strategy", json.dumps(one_file)), 2) == [0, 0]
    assert_same_run("file", "whole")
    folder = copied("from-file", "file", 2)
    assert all(path.is_file() for path in checkpoints(folder))
    with pytest.warns(UserWarning, match="goes on with another configuration: .*trainer.strategy"):
        main(two("from-file", 1, *ACCEPT))
    assert_same_run("from-file", "whole", but=INFLATION)
    copied("from-whole", "whole", 2)
    assert run(two("from-whole", 2, *SHARDED, *ACCEPT), 2) == [0, 0]
    assert_same_run("from-whole", "whole", but=INFLATION)


def test_a_sharded_checkpoint_is_evaluated_and_exported(two, tmp_path):
    path = Path("runs/two/version_0/checkpoints/last-step=4.ckpt")
    main(["export", str(path), str(tmp_path / "out")])
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, value in read("two")["state_dict"].items():
        if name.startswith("student."):
            assert torch.equal(exported[name.removeprefix("student.")], value)
    copied("evaluated", "two", 2)
    assert run(two("evaluated", 2, *SHARDED, command="validate"), 2) == [0, 0]
    (row,) = (each for each in map(numbers, Path("runs/evaluated").glob("version_*")) if len(each) == 1)
    *_, expected = (each for each in figures("two") if "val/length_mean" in each)  # those of step 2
    evaluated = {key: value for key, value in row[0].items() if key.startswith("val/")}
    assert evaluated == pytest.approx({key: expected[key] for key in evaluated})


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_a_sharded_checkpoint_is_refused_by_another_strategy(command, two):
    copied(f"plain-{command}", "two", 2)
    with pytest.raises(ValueError, match=r"Expected trainer.strategy: sharded, because .*last-step=2.ckpt is in shard"):
        main(two(f"plain-{command}", 1, *ACCEPT, command=command))


def test_a_privileged_teacher_is_sharded(recipe, teacher_path):
    """It is asked as often as its teacher, so the processes agree on that."""
    teacher = privileged({"class_path": "LocalTeacher", "init_args": {"path": teacher_path}})
    Path("privileged.yaml").write_text(yaml.safe_dump({"model": {"teacher": teacher}}))
    options = ["-c", "privileged.yaml"]
    main(recipe("privileged-one", 1, *options))
    probe = json.dumps([{"class_path": "sharded.Probe", "init_args": {"file": "privileged"}}])
    assert run(recipe("privileged-two", 2, *options, *SHARDED, "--trainer.callbacks", probe), 2) == [0, 0]
    assert_same_run("privileged-two", "privileged-one")
    probes = [json.loads(Path(f"privileged-{rank}.json").read_text()) for rank in range(2)]
    assert probes[0]["pieces"] != probes[1]["pieces"]
    assert max(probe["teacher"] for probe in probes) < 0.55 * sum(probe["teacher"] for probe in probes)


ROUNDING = ["anchor/mixture", "divergence/anchor"]
EVERYTHING = {
    "constraints": {"anchor": ANCHOR, "near": {"class_path": "InitialWeights", "init_args": {"weight": 0.05}}},
    "reference": {"class_path": "MovingAverage", "init_args": {"decay": 0.9}},
    "weighting": {"selection": {"class_path": "TokenSelection", "init_args": {"share": 0.5}}},
    "mixture": "TeacherMixture",
    "engine": "TransformersEngine",
    "update": {"micro_batch_tokens": 100, "compare_gradients_every": 1, "gradient_checkpointing": True},
}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
def test_whatever_touches_the_weights_sees_all_of_them(recipe):
    """A reference that moves, a pull on the weights, a look before the loss, gradients of single terms, a teacher that
    writes, the engine of transformers, and a resume with all of that."""
    Path("everything.yaml").write_text(yaml.safe_dump({"model": EVERYTHING}))
    options = ["-c", "everything.yaml"]
    main(recipe("all-one", 1, *options))
    assert run(recipe("all-two", 2, *options, *SHARDED), 2) == [0, 0]
    # The gradient of the anchor is nothing but rounding as long as the student is the reference.
    cosines = [f"train/gradient_cosine/{pair}" for pair in ROUNDING]
    assert_same_run("all-two", "all-one", but=cosines)
    assert {"train/gradient_cosine/divergence/mixture", "train/value/near"} <= figures("all-two")[-1].keys()
    copied("all-resumed", "all-one", 2)
    assert run(recipe("all-resumed", 2, *options, *SHARDED, *ACCEPT), 2) == [0, 0]
    assert_same_run("all-resumed", "all-one", but=[*INFLATION, *cosines])
    for name, value in read("all-one")["reference"].items():
        for other in ("all-two", "all-resumed"):
            torch.testing.assert_close(read(other)["reference"][name], value, **EQUAL)


def cut(folder):
    part = folder / "__1_0.distcp"
    part.write_bytes(part.read_bytes()[:-100])


def flip(folder):
    part = folder / "__0_0.distcp"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)


def lose(folder):
    (folder / "__1_0.distcp").unlink()


def lose_all_that_is_plain(folder):
    (folder / "meta.pt").unlink()


@pytest.mark.parametrize("harm", [cut, flip, lose, lose_all_that_is_plain])
def test_a_damaged_shard_is_named_and_the_checkpoint_before_is_taken(harm, two, tmp_path):
    shutil.copytree("runs/two/version_0/checkpoints", tmp_path / "checkpoints")
    paths = checkpoints(tmp_path / "checkpoints")
    check_whole(paths[0])
    harm(paths[0])
    with pytest.warns(UserWarning, match=r"Expected a whole checkpoint of plain values.*last-step=4"):
        assert newest(tmp_path / "checkpoints") == paths[1]


def test_a_description_of_shards_that_holds_an_object_does_not_make_it(two, tmp_path):
    folder = tmp_path / "last-step=4.ckpt"
    shutil.copytree("runs/two/version_0/checkpoints/last-step=4.ckpt", folder)
    (folder / ".metadata").write_bytes(pickle.dumps(Unpickled()))
    plain = torch.load(folder / "meta.pt", weights_only=True)
    plain["sharded_files"][".metadata"] = shards._fingerprint(folder / ".metadata")
    torch.save(plain, folder / "meta.pt")
    with pytest.raises(ValueError, match=r"Expected a whole checkpoint of plain values.*it holds the object builtins"):
        check_whole(folder)
    assert not Unpickled.called


class Unpickled:
    """What a checkpoint must not be able to call."""

    called = False

    def __reduce__(self):
        return setattr, (Unpickled, "called", True)


def privileged(teacher):
    return {"class_path": "PrivilegedTeacher", "init_args": {"teacher": teacher, "template": "{golden} {prompt}"}}


REFUSED = {
    "FSDP1": (["--trainer.strategy", "fsdp"], r"got fsdp \(FSDP1\).*trainer.strategy: sharded"),
    "Lightning's own": (
        ["--trainer.strategy", '{"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}'],
        r"Expected trainer.strategy: sharded .*got ModelParallelStrategy",
    ),
    "adapters": (["--model.adapter.rank", "2"], r"Expected neither model.adapter nor .*trainer.strategy: ddp"),
    "offload": (["--model.update.offload", "[optimizer]"], r"model.update.offload.*trainer.strategy: ddp"),
    "optimizer of 8 bits": (
        ["--model.optimizer", '{"class_path": "bitsandbytes.optim.AdamW8bit", "init_args": {"lr": 0.1}}'],
        "Expected an optimizer of torch.*got AdamW8bit of bitsandbytes.*torch.optim.AdamW",
    ),
    "student as its own teacher": (
        ["--trainer.max_steps", "0", "--model.teacher", json.dumps(privileged({"class_path": "SelfTeacher"}))],
        r"Expected a teacher with weights of its own.*got PrivilegedTeacher with the student.*trainer.strategy: ddp",
    ),
    "precision": (["--trainer.precision", "64-true"], "Expected a trainer.precision of 32-true, bf16-mixed, bf16-true"),
    "quantised teacher": (
        ["--model.teacher.quantization", "int8"],
        r"Expected a LocalTeacher without quantization.*got quantization int8",
    ),
}


@pytest.mark.filterwarnings("ignore:.*(quantiz|bitsandbytes|MatMul8bitLt)")
@pytest.mark.parametrize(("flags", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_sharded_is_refused(flags, message, recipe):
    strategy = [] if "--trainer.strategy" in flags else SHARDED
    try:
        with pytest.raises(ValueError, match=message):
            main(recipe("refused", 1, *strategy, *flags))
    finally:
        if dist.is_initialized():  # here alone, and for nobody else
            dist.destroy_process_group()


def test_a_model_without_known_blocks_is_refused(student_path):
    model = AutoModelForCausalLM.from_pretrained(student_path)
    assert len(blocks(model)) == model.config.num_hidden_layers
    model._no_split_modules = None
    with pytest.raises(ValueError, match="Expected a model that names its blocks"):
        blocks(model)
