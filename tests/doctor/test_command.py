"""`stable-opd doctor` on pairs with a planted fault, and on healthy ones."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from families import family_model
from helpers import EOS, VOCABULARY, save, tiny_model, write_jsonl
from stable_opd.cli import main
from stable_opd.doctor import CHECKS
from stable_opd.testbed import PLACES

ROOT = Path(__file__).parent.parent.parent
#: Checks that look at what the models say, and so speak of models that were never trained.
SIGNAL = {"inert-signal", "extreme-signal", "teacher-stop", "golden-ending", "student-stop"}


class Pair:
    """The testbed's pair in a folder of its own, its data, and a recipe for them."""

    def __init__(self, folder):
        self.student, self.teacher, self.config = folder / "student", folder / "teacher", folder / "recipe.yaml"
        for name in ("student", "teacher"):
            shutil.copytree(PLACES[name], folder / name)
        lines = PLACES["train"].read_text().splitlines()[:40]
        self.rows, self.train = [json.loads(line) for line in lines], folder / "train.jsonl"
        self.recipe = {
            "model": {
                "student": str(self.student),
                "teacher": {"class_path": "LocalTeacher", "init_args": {"path": str(self.teacher)}},
                "divergence": "SampledReverseKL",
                "mixture": "GoldenMixture",
                "repetition": "PeriodicSuffix",
                "rollout": {"max_new_tokens": 64},
            },
            "data": {
                "class_path": "PromptDataModule",
                "init_args": {"train": {"path": str(self.train)}, "batch_size": 8},
            },
            "trainer": {"max_steps": 1, "accelerator": "cpu"},
        }

    @property
    def both(self):
        return self.student, self.teacher

    def write(self):
        write_jsonl(self.train, self.rows)
        self.config.write_text(yaml.safe_dump(self.recipe))
        return str(self.config)


@pytest.fixture
def pair(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Pair(tmp_path)


def edit(folder, name, **changes):
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def doctor(capsys, *args):
    """Exit status, and what `--json` prints."""
    status = 0
    capsys.readouterr()
    try:
        main(["doctor", *args, "--json"])
    except SystemExit as done:
        status = done.code
    return status, json.loads(capsys.readouterr().out)


def change_model(folder, change):
    """Load a model of the pair, change it, and save it in its place."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder)


def templates(folders, text):
    for folder in folders:
        (folder / "chat_template.jinja").write_text(text)


PROMPT = (
    "{% for each in messages %}{{ each['content'] }}{% if each['role'] == 'assistant' %}<eos>{% endif %}{% endfor %}"
)


def other_stop_ids(pair):
    edit(pair.teacher, "generation_config.json", eos_token_id=[EOS, 3])
    return ["--model.terminal", "Baseline"]


def tokenizer_ends_otherwise(pair):
    for folder in pair.both:
        edit(folder, "generation_config.json", eos_token_id=3)
    return []


def turn_ends_otherwise(pair):
    templates(pair.both, PROMPT.replace("<eos>", "<pad>"))
    return ["--data.chat_template", "true"]


def padded_with_stop(pair):
    edit(pair.student, "tokenizer_config.json", pad_token="<eos>")
    return []


def stop_within_golden(pair):
    for row in pair.rows[:3]:
        row["golden"] = row["golden"].replace(" ; ", " <eos> ; ")
    return []


def start_twice(pair):
    for folder in pair.both:
        edit(folder, "tokenizer_config.json", bos_token="Q")
    for row in pair.rows[:5]:
        row["prompt"] = f"Q {row['prompt']}"
    return []


def start_left_out(pair):
    for folder in pair.both:
        edit(folder, "tokenizer_config.json", bos_token="Q")
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        start = ("Q", tokenizer.token_to_id("Q"))
        tokenizer.post_processor = TemplateProcessing(single="Q $A", special_tokens=[start])
        tokenizer.save(str(folder / "tokenizer.json"))
    templates(pair.both, PROMPT.replace("each['content']", "each['content'][2:]"))
    return ["--data.chat_template", "true"]


def chat_teacher_without_chat(pair):
    templates([pair.teacher], PROMPT)
    return []


def templates_differ(pair):
    templates([pair.student], PROMPT)
    templates([pair.teacher], f"? {PROMPT}")
    return ["--data.chat_template", "true"]


def know_other_words(pair):
    for folder in pair.both:
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokenizer["model"]["unk_token"] = "?"
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def thinking_is_closed(pair):
    know_other_words(pair)
    templates(pair.both, f"{PROMPT}{{% if add_generation_prompt %}}<think>\n\n</think>\n\n{{% endif %}}")
    for row in pair.rows[:4]:
        row["golden"] = f"<think> ? </think> {row['golden']}"
    return ["--data.chat_template", "true"]


def budget_beyond_context(pair):
    return ["--model.rollout.max_new_tokens", "4096"]


def golden_beyond_context(pair):
    pair.rows[0]["golden"] = " ".join(["1 + 1 = 2 ;"] * 25)
    return []


def golden_left_out(pair):
    for row in pair.rows[:2]:
        row["golden"] = ""
    return []


def golden_beyond_budget(pair):
    return ["--model.rollout.max_new_tokens", "8"]


def reference_for_nobody(pair):
    return ["--model.reference", "MovingAverage"]


def loops_for_nobody(pair):
    return ["--model.mixture", "StudentOnly", "--model.policies.loops", "golden"]


def cold_sampler(pair):
    return ["--model.sampler", "Temperature", "--model.sampler.temperature", "0.5"]


def teacher_is_student(pair):
    return ["--model.teacher.path", str(pair.student)]


def strange_teacher(pair):
    shutil.rmtree(pair.teacher)
    save(tiny_model(5, initializer_range=0.6), pair.teacher)
    return []


def teacher_ends_otherwise(pair):
    """A teacher that ends with <pad> where the student ends with <eos>: the mismatch of arXiv 2609.20511."""

    def swap(model):
        rows = model.get_output_embeddings().weight
        rows[[18, 19]] = rows[[19, 18]]

    change_model(pair.teacher, swap)
    edit(pair.teacher, "generation_config.json", eos_token_id=19, pad_token_id=18)
    edit(pair.teacher, "tokenizer_config.json", eos_token="<pad>", pad_token="<eos>")
    return ["--model.terminal", "Baseline"]


def student_never_stops(pair):
    change_model(pair.student, lambda model: model.get_output_embeddings().weight[EOS].mul_(-1))
    return []


def vast_batch(pair):
    return ["--model.rollout.samples_per_prompt", "1000000000"]


def rows_missing(pair):
    for folder in pair.both:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens(["@"])
        tokenizer.save_pretrained(folder)
    change_model(pair.student, lambda model: model.resize_token_embeddings(VOCABULARY + 1, mean_resizing=False))
    return []


def added_tokens_differ(pair):
    for folder, name in zip(pair.both, ("<|im_start|>", "<think>"), strict=True):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens([name])
        tokenizer.save_pretrained(folder)
        change_model(folder, lambda model: model.resize_token_embeddings(VOCABULARY + 1, mean_resizing=False))
    return []


def other_vocabulary(pair):
    text = (pair.teacher / "tokenizer.json").read_text()
    (pair.teacher / "tokenizer.json").write_text(text.replace('"#"', '"@"'))
    return []


def no_stop_token(pair):
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        edit(pair.student, name, **{"eos_token" if name.startswith("tok") else "eos_token_id": None})
    return []


def no_data(pair):
    return ["--data.train.path", "nowhere.jsonl"]


def adapters_with_a_copy(pair):
    anchor = {"class_path": "ReferenceKL", "init_args": {"weight": 0.1}}
    pair.recipe["model"]["constraints"] = {"anchor": anchor}
    return ["--model.adapter.rank", "2", "--model.reference", "MovingAverage"]


def adapters_under_held_weights(pair):
    return ["--model.adapter.rank", "2", "--model.constraints.held", "InitialWeights"]


def adapters_with_a_resting_reference(pair):
    return ["--model.adapter.rank", "2", "--model.update.offload", "[reference]"]


FAULTS = [
    (other_stop_ids, "stop-sets", "warning", "SemanticClass"),
    (tokenizer_ends_otherwise, "generation-stop", "warning", '"eos_token_id": [3, 18]'),
    (turn_ends_otherwise, "end-of-turn", "warning", '"eos_token_id": [18, 19]'),
    (padded_with_stop, "pad-is-stop", "note", "tokenizer.pad_token"),
    (stop_within_golden, "golden-stop", "warning", "column 'golden'"),
    (start_twice, "doubled-start", "error", "Take Q out of the column 'prompt'"),
    (start_left_out, "missing-start", "warning", "begin with {{ bos_token }}"),
    (chat_teacher_without_chat, "no-template", "note", "data.chat_template: true"),
    (templates_differ, "template", "warning", "chat_template.jinja"),
    (thinking_is_closed, "thinking", "warning", "golden solutions without thoughts"),
    (budget_beyond_context, "context", "error", "model.rollout.max_new_tokens to 103 or less"),
    (golden_beyond_context, "golden-context", "error", "data.max_golden_tokens"),
    (golden_left_out, "golden-missing", "error", "data.columns.golden"),
    (golden_beyond_budget, "golden-budget", "warning", "model.rollout.max_new_tokens to 21"),
    (reference_for_nobody, "reference", "error", "ReferenceKL, or leave model.reference out"),
    (loops_for_nobody, "loops", "error", "Use GoldenMixture"),
    (adapters_with_a_copy, "adapter-reference", "error", "Leave model.reference out"),
    (adapters_under_held_weights, "adapter-weights", "error", "Use ReferenceKL"),
    (adapters_with_a_resting_reference, "adapter-offload", "error", "Leave it out of model.update.offload"),
    (cold_sampler, "sampler", "warning", "leave model.sampler out"),
    (teacher_is_student, "inert-signal", "warning", "model.teacher.path"),
    (strange_teacher, "extreme-signal", "warning", "model.rollout.samples_per_prompt: 0"),
    (strange_teacher, "golden-ending", "warning", "data.train.path"),
    (teacher_ends_otherwise, "teacher-stop", "error", "model.terminal: SemanticClass"),
    (student_never_stops, "student-stop", "warning", "Warm the student up first"),
    (vast_batch, "memory", "error", "model.rollout.samples_per_prompt"),
    (rows_missing, "padded-vocabulary", "error", "resize_token_embeddings(21)"),
    (added_tokens_differ, "added-tokens", "warning", "leave data.chat_template out"),
    (other_vocabulary, "models", "error", "of one model family"),
    (no_stop_token, "models", "error", "Set eos_token in its tokenizer"),
    (no_data, "data", "error", ".jsonl"),
]


@pytest.mark.parametrize(
    ("plant", "check", "severity", "fix"), FAULTS, ids=[f"{each[0].__name__}-{each[1]}" for each in FAULTS]
)
def test_planted_fault_is_found_with_its_fix(pair, capsys, plant, check, severity, fix):
    flags = plant(pair)
    status, facts = doctor(capsys, "-c", pair.write(), *flags)
    found = {each["check"]: each for each in facts["findings"]}
    assert check in found, facts
    assert found[check]["severity"] == severity
    assert fix in found[check]["fix"]
    assert found[check]["found"]
    assert found[check]["causes"]
    errors = any(each["severity"] == "error" for each in facts["findings"])
    assert status == (1 if errors else 0)
    assert errors == (severity == "error")
    assert not facts["healthy"]


@pytest.mark.parametrize("plant", [other_stop_ids, teacher_ends_otherwise])
def test_the_fix_for_other_stop_tokens_is_the_default(pair, capsys, plant):
    plant(pair)
    status, facts = doctor(capsys, "-c", pair.write())
    assert status == 0
    assert not {"stop-sets", "teacher-stop"} & {each["check"] for each in facts["findings"]}


HOT_ENGINE = """
from stable_opd.engines import InProcessEngine
from stable_opd.samplers import Temperature


class HotEngine(InProcessEngine):
    def generate(self, model, request, sampler, blend=None):
        return super().generate(model, request, Temperature(2.0), blend)
"""


def test_engine_that_draws_from_another_distribution_is_found(pair, capsys, monkeypatch):
    Path("hot_engine.py").write_text(HOT_ENGINE)
    monkeypatch.syspath_prepend(Path.cwd())
    pair.recipe["model"]["engine"] = "hot_engine.HotEngine"
    status, facts = doctor(capsys, "-c", pair.write())
    (finding,) = (each for each in facts["findings"] if each["check"] == "drift")
    assert (status, finding["severity"]) == (1, "error")
    assert "model.engine" in finding["fix"]
    assert facts["measured"]["drift"] > 0.05


def test_every_check_was_planted():
    """Those that only a plug-in can offend are in test_checks.py."""
    planted = {check for _, check, _, _ in FAULTS} | {"drift"}
    assert set(CHECKS) - planted == {"golden-end", "weighting", "precision"}


def test_healthy_pair_is_passed_in_silence(pair, capsys):
    status, facts = doctor(capsys, "-c", pair.write())
    assert (status, facts["healthy"], facts["findings"]) == (0, True, [])
    assert sorted(facts["checked"]) == sorted(CHECKS)
    assert facts["not_checked"] == {}
    assert facts["measured"]["kl"] > 0
    assert facts["measured"]["drift"] < 1e-4
    assert 0 < facts["memory"]["needed"] < facts["memory"]["capacity"]
    assert not (pair.config.parent / "runs").exists()  # nothing is left behind


@pytest.mark.parametrize("config", ["quickstart", "collapse"])
def test_shipped_recipes_are_healthy(config, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["doctor", "-c", str(ROOT / "configs" / f"{config}.yaml")])
    text = capsys.readouterr().out
    assert text.endswith(f"Healthy: {len(CHECKS)} checks found nothing.\n")
    assert len(text.splitlines()) < 24  # one screen
    assert max(map(len, text.splitlines())) <= 120
    assert "\033" not in text


def test_padded_vocabularies_of_different_sizes_are_healthy(pair, capsys):
    """As 151936 and 152064 within Qwen2.5."""
    for folder, rows in zip(pair.both, (24, 32), strict=True):
        change_model(folder, lambda model, rows=rows: model.resize_token_embeddings(rows, mean_resizing=False))
    status, facts = doctor(capsys, "-c", pair.write())
    assert (status, facts["findings"]) == (0, [])


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma3_text"])
def test_other_families_are_healthy_up_to_what_they_never_learned(pair, capsys, family):
    for seed, (folder, padding) in enumerate(zip(pair.both, (4, 12), strict=True)):
        shutil.rmtree(folder)
        save(family_model(family, seed, vocab_size=VOCABULARY + padding, eos_token_id=EOS, pad_token_id=19), folder)
    status, facts = doctor(capsys, "-c", pair.write())
    assert status == 0
    assert {each["check"] for each in facts["findings"]} <= SIGNAL
    assert facts["measured"]["drift"] < 1e-3


def wrapped(**teacher):
    return {"class_path": teacher.pop("name"), "init_args": teacher}


@pytest.mark.parametrize("template", ["{golden} {prompt}", "{prompt}"])
def test_teacher_who_reads_more_is_measured_as_it_reads(pair, capsys, template):
    """Some golden solutions do not fit behind their own, and are left out; on the prompt alone the student agrees."""
    pair.rows = [pair.rows[0] | {"golden": "1 ; " * 25 + "# 1"}, *pair.rows]
    pair.recipe["model"] |= {"teacher": wrapped(name="PrivilegedTeacher", teacher="SelfTeacher", template=template)}
    pair.recipe["model"]["rollout"]["max_new_tokens"] = 16
    status, facts = doctor(capsys, "-c", pair.write())
    assert status == 0
    assert facts["measured"]["stop_student"] > 0.9
    assert (facts["measured"]["kl"] > 0.1) == (template != "{prompt}")
    assert facts["not_checked"]["stop-sets"] == "teacher"


def test_several_teachers_are_measured_each_on_its_rows(pair, capsys):
    measured = []
    for path in (pair.teacher, pair.student):
        teachers = {"a": wrapped(name="LocalTeacher", path=str(path)), "b": "SelfTeacher"}
        pair.rows = [row | {"whose": "ab"[number % 2]} for number, row in enumerate(pair.rows)]
        pair.recipe["model"]["teacher"] = wrapped(name="RoutedTeacher", teachers=teachers, column="whose")
        status, facts = doctor(capsys, "-c", pair.write())
        assert status == 0
        measured.append(facts["measured"]["kl"])
    assert measured[0] > 1e-3 > measured[1]


def test_without_a_teacher_there_is_nothing_to_measure(pair, capsys):
    del pair.recipe["model"]["teacher"]
    pair.recipe["model"]["rollout"]["samples_per_prompt"] = 0
    status, facts = doctor(capsys, "-c", pair.write())
    assert (status, facts["findings"], facts["measured"]) == (0, [], None)


def test_all_faults_are_told_at_once_the_worst_first(pair, capsys):
    flags = [*golden_beyond_budget(pair), *start_twice(pair), *padded_with_stop(pair), *other_vocabulary(pair)]
    with pytest.raises(SystemExit) as done:
        main(["doctor", "-c", pair.write(), *flags])
    assert done.value.code == 1
    text = capsys.readouterr().out
    places = [text.index(each) for each in ("error: doubled-start", "warning: golden-budget", "note: pad-is-stop")]
    assert places == sorted(places)
    assert text.index("error: models") < places[1]
    assert "Found: 2 errors, 1 warning, 1 note." in text
    assert "Not checked: " in text
    assert "no one model of this process is the teacher, or it was refused" in " ".join(text.split())


def test_config_that_is_refused_is_status_2(pair, capsys):
    for flags in (["--model.divergence", "Nonesuch"], ["--model.nonesuch", "1"], ["--model.student", "nowhere"]):
        with pytest.raises(SystemExit) as done:
            main(["doctor", "-c", pair.write(), *flags])
        assert done.value.code == 2
        assert "stable-opd" in capsys.readouterr().err


def test_config_of_a_finished_run_is_understood(pair, capsys):
    main(["fit", "-c", pair.write(), "--trainer.enable_progress_bar", "false", "--trainer.num_sanity_val_steps", "0"])
    (config,) = Path().rglob("config.yaml")
    status, facts = doctor(capsys, "-c", str(config))
    assert (status, facts["findings"]) == (0, [])


def test_seed_decides_what_is_measured(pair, capsys):
    config = pair.write()
    first, again, other = (
        doctor(capsys, "-c", config, "--seed_everything", seed)[1]["measured"] for seed in ("1", "1", "2")
    )
    assert first == again != other
