"""`stable-opd export`: what transformers and peft make of the folder, against the student of the run itself."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import EOS, TOKENIZER, save, tiny_model
from stable_opd.cli import main
from stable_opd.resume import step_of
from stable_opd.students import LoRA, load_student

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

PROMPTS = ["Q 3 * 7 + 8 ;", "Q 4 - 9 ;"]
ADAPTER = {"rank": 4, "alpha": 16}


@pytest.fixture
def trained(teacher_path, train_path, validation_path, tmp_path, monkeypatch):
    """Run the command line on a small recipe; returns the path of the checkpoint."""
    monkeypatch.chdir(tmp_path)

    def trained(student, adapter=None):
        config = {
            "model": {
                "student": student,
                "teacher": {"class_path": "LocalTeacher", "init_args": {"path": teacher_path}},
                "divergence": "ReverseKL",
                "mixture": "GoldenMixture",
                "repetition": {"class_path": "PeriodicSuffix", "init_args": {"min_tokens": 3, "max_period": 4}},
                "rollout": {"samples_per_prompt": 1, "max_new_tokens": 10},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.02}},
                **({} if adapter is None else {"adapter": adapter}),
            },
            "data": {
                "class_path": "PromptDataModule",
                "init_args": {"train": {"path": train_path}, "validation": {"path": validation_path}, "batch_size": 8},
            },
            "trainer": {"max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False, "num_sanity_val_steps": 0},
        }
        Path("recipe.yaml").write_text(yaml.safe_dump(config))
        main(["fit", "-c", "recipe.yaml", "--trainer.val_check_interval", "1"])
        return max(Path("runs").rglob("*.ckpt"), key=step_of)

    return trained


@pytest.fixture
def student(tmp_path_factory):
    """A folder with everything that a real one has."""
    model = tiny_model(1)
    model.generation_config.max_new_tokens = 7
    folder = tmp_path_factory.mktemp("student")
    save(model, folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    return str(folder)


def of_the_run(path, student, adapter=None):
    """The student of a checkpoint, as the module holds it."""
    model = load_student(student, None if adapter is None else LoRA(**adapter)).eval()
    state = torch.load(path, weights_only=True)["state_dict"]
    found = {name.removeprefix("student."): each for name, each in state.items() if name.startswith("student.")}
    missing = model.load_state_dict(found, strict=False).missing_keys
    assert not [name for name in missing if adapter is None or ".lora_" in name]
    return model


def answers(model):
    """Greedy answers, and the log-probs that they were drawn with."""
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([TOKENIZER.encode(prompt)])
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        found.append((written[0].tolist(), model(written).logits.log_softmax(-1)))
    return found


def assert_answers_alike(found, expected, atol=1e-4):
    for (tokens, logprobs), (other_tokens, other) in zip(answers(found), answers(expected), strict=True):
        assert tokens == other_tokens
        torch.testing.assert_close(logprobs, other, rtol=0, atol=atol)


@torch.no_grad()
@pytest.mark.parametrize("adapter", [None, ADAPTER, ADAPTER | {"quantization": "nf4"}], ids=["all", "lora", "qlora"])
def test_exported_student_answers_as_that_of_the_run(adapter, trained, student):
    path = trained(student, adapter)
    main(["export", str(path), "out"])
    exported = AutoModelForCausalLM.from_pretrained("out").eval()
    assert_answers_alike(exported, of_the_run(path, student, adapter))
    moved = (exported.get_input_embeddings().weight - tiny_model(1).get_input_embeddings().weight).abs().max()
    assert (moved > 1e-3) == (adapter is None)
    assert answers(exported)[0][0] != answers(tiny_model(1))[0][0]
    assert exported.dtype == torch.float32
    config = json.loads(Path("out/config.json").read_text())
    assert "quantization_config" not in config
    assert exported.generation_config.max_new_tokens == 7
    tokenizer = AutoTokenizer.from_pretrained("out")
    assert tokenizer.get_vocab() == TOKENIZER.get_vocab()
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert Path("out/model.safetensors").exists()


@torch.no_grad()
@pytest.mark.parametrize("adapter", [ADAPTER, ADAPTER | {"quantization": "nf4"}], ids=["lora", "qlora"])
def test_adapters_alone_are_a_folder_of_peft(adapter, trained, student):
    path = trained(student, adapter)
    main(["export", str(path), "out", "--adapter"])
    base = load_student(student, None) if "quantization" not in adapter else _base(student)
    assert_answers_alike(peft.PeftModel.from_pretrained(base, "out").eval(), of_the_run(path, student, adapter))
    if "quantization" not in adapter:
        assert_answers_alike(AutoModelForCausalLM.from_pretrained("out").eval(), of_the_run(path, student, adapter))
    assert AutoTokenizer.from_pretrained("out").get_vocab() == TOKENIZER.get_vocab()
    assert Path("out/adapter_model.safetensors").stat().st_size < Path(student, "model.safetensors").stat().st_size


def _base(student):
    from stable_opd.models import load_model

    return load_model(student, quantization="nf4")


@pytest.mark.parametrize("stop", [[EOS, 3], [EOS]])
def test_exported_student_ends_its_answers_as_in_training(stop, trained, student):
    path = trained(student)
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["stop_ids"] == [EOS]
    torch.save(checkpoint | {"stop_ids": stop}, path)
    main(["export", str(path), "out"])
    found = AutoModelForCausalLM.from_pretrained("out").generation_config.eos_token_id
    assert found == (stop if len(stop) > 1 else EOS)


@torch.no_grad()
def test_precision_is_that_of_the_initial_student_or_what_is_asked_for(trained, tmp_path):
    student = save(tiny_model(1).bfloat16(), tmp_path / "student")
    path = trained(student)
    assert next(iter(torch.load(path, weights_only=True)["state_dict"].values())).dtype == torch.float32
    main(["export", str(path), "out"])
    main(["export", str(path), "wide", "--dtype", "float32"])
    narrow, wide = (AutoModelForCausalLM.from_pretrained(folder, dtype="auto") for folder in ("out", "wide"))
    assert (narrow.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
    for one, other in zip(narrow.parameters(), wide.parameters(), strict=True):
        assert (one == other.bfloat16()).all()


def refused(capsys, *args):
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        main(["export", *map(str, args)])
    assert exit.value.code == 2
    return capsys.readouterr().err


def test_what_cannot_be_exported_is_refused(trained, student, capsys, tmp_path):
    path = trained(student)
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")
    assert "Expected an empty folder to write to, but got full" in refused(capsys, path, "full")
    assert [each.name for each in Path("full").iterdir()] == ["notes.txt"]
    assert "Leave out --adapter" in refused(capsys, path, "out", "--adapter")
    assert "there is no whole one at nowhere.ckpt" in refused(capsys, "nowhere.ckpt", "out", "--config", "recipe.yaml")
    Path("shards.ckpt").mkdir()
    empty = refused(capsys, "shards.ckpt", "out", "--config", "recipe.yaml")
    assert "Expected a checkpoint, but there is no whole one at shards.ckpt" in " ".join(empty.split())
    moved = path.rename(tmp_path / "moved.ckpt")
    Path("recipe.yaml").rename("renamed.yaml")
    assert "Name it with --config" in " ".join(refused(capsys, moved, "out").split())
    assert not Path("out").exists()
    main(["export", str(moved), "out", "--config", "renamed.yaml"])
    assert Path("out/model.safetensors").exists()


def test_config_of_another_run_is_refused(trained, student, capsys):
    path = trained(student, ADAPTER)
    recipe = yaml.safe_load(Path("recipe.yaml").read_text())
    recipe["model"]["adapter"]["rank"] = 8
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert "adapters of rank 8, but got rank 4" in refused(capsys, path, "out", "--config", "recipe.yaml")
    assert not Path("out").exists()
