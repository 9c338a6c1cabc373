"""What is never done with what comes from elsewhere; docs/security.md has the threats, and names these tests."""

import ast
import contextlib
import json
import os
import re
from pathlib import Path

import pytest
import torch
import yaml

from helpers import problems, save, tiny_model, write_jsonl
from stable_opd import secrets
from stable_opd.cli import main
from stable_opd.models import load_model, load_tokenizer
from stable_opd.tasks import MathVerify

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src").rglob("*.py"))


def name_of(node):
    """The dotted name that is called or imported, as far as it is one."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


FORBIDDEN = re.compile(
    r"(eval|exec|compile|__import__|input|os\.(system|popen|exec\w*|spawn\w*)|pty\.\w+|marshal\.\w+|shelve\.\w+"
    r"|c?pickle\.(loads?|Unpickler)|dill\.\w+|joblib\.\w+|torch\.hub\.\w+|yaml\.(unsafe_|full_)?load(_all)?"
    r"|numpy\.load|np\.load|subprocess\.get(status)?output|logging\.config\.listen)"
)


def dangers(source):
    """What in a source runs code that it was given, as `line: what`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, given = name_of(node.func), {each.arg: each.value for each in node.keywords}
        literal = {key: value.value for key, value in given.items() if isinstance(value, ast.Constant)}
        loads = name.endswith(("torch.load", ".load_checkpoint", "load_state_dict_from_url"))
        if FORBIDDEN.fullmatch(name):
            found.append(f"{node.lineno}: {name}")
        elif loads and literal.get("weights_only") is not True:
            found.append(f"{node.lineno}: {name} without weights_only=True")
        elif name.endswith(".from_pretrained") and literal.get("trust_remote_code") is not False:
            found.append(f"{node.lineno}: {name} without trust_remote_code=False")
        elif "shell" in given or literal.get("trust_remote_code") is True or literal.get("allow_pickle") is True:
            found.append(f"{node.lineno}: {name} with {', '.join(given)}")
    return found


@pytest.mark.parametrize(
    "code",
    [
        *("eval('1')", "exec('1')", "os.system('ls')", "pickle.loads(b'')", "pickle.Unpickler(f)", "yaml.load(t)"),
        *(
            "torch.load(f)",
            "torch.load(f, weights_only=False)",
            "subprocess.run(a, shell=True)",
            "yaml.unsafe_load(t)",
        ),
        *("A.from_pretrained(p)", "A.from_pretrained(p, trust_remote_code=True)", "_read(p, trust_remote_code=True)"),
        *("np.load(p, allow_pickle=True)", "strategy.load_checkpoint(path)"),
    ],
)
def test_what_the_search_for_dangers_finds(code):
    assert dangers(f"def f():\n    {code}\n")[0].startswith("2: ")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src/stable_opd")))
def test_no_source_runs_code_that_it_was_given(path):
    assert dangers(path.read_text(encoding="utf-8")) == []


LISTENS = re.compile(
    r"0\.0\.0\.0|--host[= ]+(?!\$|127\.|localhost|::1)\S+|\bbind\(\(\s*['\"]{2}|host\s*[=:]\s*['\"]::['\"]"
)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        *[(text, True) for text in ("serve --host 0.0.0.0", "--host example.org", "bind(('', 80))", 'host="::"')],
        *[(text, False) for text in ("--host 127.0.0.1", "--host=localhost", "ghost: 3", 'host="127.0.0.1"')],
    ],
)
def test_what_the_search_for_open_servers_finds(text, found):
    assert bool(LISTENS.search(text)) == found


def test_servers_are_bound_to_loopback():
    folders = [each for each in ("src", "scripts", "docs", "configs", "benchmarks") if (ROOT / each).is_dir()]
    texts = [
        path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in KINDS and path.is_file()
    ]
    assert len(texts) > 200
    wrong = {path: LISTENS.findall(path.read_text(encoding="utf-8")) for path in [ROOT / "README.md", *texts]}
    assert {path: found for path, found in wrong.items() if found} == {}


KINDS = {".py", ".md", ".yaml", ".sh", ".txt", ""}


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
def test_code_that_comes_with_a_model_is_never_run_and_nobody_is_asked(load, tmp_path, monkeypatch):
    folder = Path(save(tiny_model(1), tmp_path / "student"))
    config = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "its-own", "auto_map": auto}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "ItsOwn", "auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match=r"brings code of its own, which is never run\. Take a model of a family"):
        load(str(folder))
    assert not (tmp_path / "pwned").exists()


class Harm:
    """What makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_weights_that_are_pickled_objects_are_refused_and_never_made(tmp_path):
    folder = Path(save(tiny_model(1), tmp_path / "student"))
    (folder / "model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Harm(tmp_path / "pwned")}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="Expected a causal language model in"):
        load_model(str(folder))
    assert not (tmp_path / "pwned").exists()


def refusal(*arguments):
    with pytest.raises((ValueError, SystemExit)) as found:
        main(list(arguments))
    return str(found.value)


FIT = ("fit", "-c", str(ROOT / "configs/quickstart.yaml"))


def test_objects_in_a_checkpoint_of_an_export_are_never_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "hook": Harm("pwned")}, "a.ckpt")
    Path("config.yaml").write_text("model: {student: testbed:student}\n")
    refusal("export", "a.ckpt", "out")
    assert "Expected a whole checkpoint of plain values, but got a.ckpt" in " ".join(capsys.readouterr().err.split())
    assert not Path("pwned").exists()


@pytest.mark.parametrize("path", ["http://127.0.0.1:9/a.ckpt", "https://127.0.0.1:9/a", "nowhere.ckpt", "registry:a"])
def test_checkpoints_are_never_fetched(path):
    """Lightning would unpickle whatever an address gives it."""
    assert "Expected a checkpoint on this machine, but there is no" in refusal(*FIT, "--ckpt_path", path)


def test_answers_are_never_run():
    place = Path("/tmp") / f"stable-opd-was-here-{os.getpid()}"
    task = MathVerify(seconds=1.0)
    for code in (
        f"__import__('os').system('touch {place}')",
        f"open('{place}', 'w')",
        f"\\text{{open('{place}','w')}}",
    ):
        for answer in (code, f"1+{code}", f"({code})", f"x = {code}", f"1 * eval({code!r})"):
            assert task.grade(f"\\boxed{{{answer}}}", {"answer": "12345"}) == 0.0
    assert not place.exists()


CANARY = "canary-5f2d-of-the-security-tests"


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"trainer": {"logger": {"init_args": {"api_key": CANARY}}}}, "trainer.logger.init_args.api_key"),
        ({"a": [{"headers": {"Authorization": CANARY}}]}, "a.0.headers.Authorization"),
        ({"hf_token": CANARY}, "hf_token"),
        ({"token": CANARY}, "token"),
        ({"save": {"db_password": CANARY}}, "save.db_password"),
        ({"uri": f"https://user:{CANARY}@host/path"}, "uri"),
    ],
)
def test_secrets_in_a_configuration_are_refused_by_their_name(config, name):
    with pytest.raises(ValueError, match=f"got some in {re.escape(name)}") as refusal:
        secrets.check(config)
    assert CANARY not in str(refusal.value)


@pytest.mark.parametrize(
    "config",
    [
        {"eos_token": "<|endoftext|>"},
        {"token": "</s>"},
        {"token": "<|im_end|>"},
        {"max_new_tokens": 12345678},
        {"uri": "http://host:80/a@b"},
        5,
    ],
)
def test_what_is_no_secret_is_left_alone(config):
    secrets.check(config)


@pytest.fixture
def recipe(student_path, teacher_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "train.jsonl", problems(8))
    config = {
        "model": {
            "student": student_path,
            "teacher": {"class_path": "LocalTeacher", "init_args": {"path": teacher_path}},
            "divergence": "ReverseKL",
            "mixture": "StudentOnly",
            "repetition": "NGramLoop",
            "rollout": {"samples_per_prompt": 1, "max_new_tokens": 4},
        },
        "data": {"class_path": "PromptDataModule", "init_args": {"train": {"path": "train.jsonl"}, "batch_size": 4}},
        "trainer": {"max_steps": 1, "accelerator": "cpu", "enable_progress_bar": False},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(config))
    return config


def test_a_run_with_a_secret_in_its_configuration_is_refused_and_leaves_nothing(recipe, capsys):
    recipe["trainer"]["logger"] = {
        "class_path": "lightning.pytorch.loggers.MLFlowLogger",
        "init_args": {"tracking_uri": f"https://user:{CANARY}@127.0.0.1"},
    }
    Path("secret.yaml").write_text(yaml.safe_dump(recipe))
    Path("spec.yaml").write_text("config: secret.yaml\naxes: {a: {x: {}}}\n")
    said = refusal("fit", "-c", "secret.yaml")
    assert "got some in trainer.logger.init_args.tracking_uri" in said
    Path("spec.yaml").write_text(
        f"config: recipe.yaml\naxes: {{a: {{x: {{data.train.path: 'https://u:{CANARY}@h/a.jsonl'}}}}}}\n"
    )
    refusal("bench", "spec.yaml")
    told = capsys.readouterr()
    assert "data.init_args.train.path" in told.err
    assert CANARY not in said + told.err + told.out
    assert not Path("runs").exists()


SECRETS = ("HF_TOKEN", "WANDB_API_KEY", "COMET_API_KEY", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY", "MY_PASSWORD")


def test_secrets_of_the_environment_are_in_nothing_that_is_said_or_written(recipe, monkeypatch, capfd, log_text):
    for name in SECRETS:
        monkeypatch.setenv(name, CANARY)
    Path("spec.yaml").write_text("config: recipe.yaml\naxes: {a: {x: {}}}\n")
    for command in (["fit", "-c", "recipe.yaml"], ["doctor", "-c", "recipe.yaml"], ["bench", "spec.yaml", "--dry-run"]):
        with contextlib.suppress(SystemExit):
            main(command)
    main(["report", "runs/opd/version_0"])
    said = capfd.readouterr()
    assert CANARY not in said.out + said.err + log_text()
    files = [path for path in Path().rglob("*") if path.is_file()]
    assert {"config.yaml", "report.html", "metrics.csv"} <= {path.name for path in files}
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []


def test_every_threat_names_tests_that_exist():
    page = (ROOT / "docs/security.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("|") and not line.startswith(("|---", "| threat"))]
    assert len(rows) >= 12
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row.rpartition("|")[0].rpartition("|")[2])
        assert named, row
        for path, name in named:
            tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
            assert name in {each.name for each in tree.body if isinstance(each, ast.FunctionDef)}, (path, name)
