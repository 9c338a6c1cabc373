"""Models and data that many tests share; everything is made here, nothing is downloaded."""

import os
import shutil
import tempfile

# Both are read on import: a test that reaches for the network must fail, and none leaves a cache behind.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="stable-opd-tests-")

import logging

import pytest
import torch
from torch.distributed import destroy_process_group, is_initialized

from helpers import problems, save, tiny_model, write_jsonl
from stable_opd import streaming


def pytest_configure():
    torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU"))
        if item.get_closest_marker("vllm") and "STABLE_OPD_VLLM" not in os.environ:
            item.add_marker(pytest.mark.skip(reason="no vLLM"))


def pytest_unconfigure():
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def _process_of_its_own(monkeypatch):
    """What a run leaves in its process: variables of the environment (seed, ports), arguments, a group of processes."""
    before = dict(os.environ)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setattr("sys.argv", ["stable-opd"])
    yield
    if is_initialized():
        destroy_process_group()
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


@pytest.fixture
def log_text(caplog):
    """A function that returns what Lightning's rank-zero logger has said; it does not propagate by itself."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(caplog.handler)
    with caplog.at_level(logging.INFO, logger=logger.name):
        yield lambda: caplog.text
    logger.removeHandler(caplog.handler)


@pytest.fixture(scope="session")
def student_path(tmp_path_factory) -> str:
    return save(tiny_model(1), tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="session")
def teacher_path(tmp_path_factory) -> str:
    return save(tiny_model(2), tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def train_path(tmp_path_factory) -> str:
    return write_jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", problems(24))


@pytest.fixture(scope="session")
def validation_path(tmp_path_factory) -> str:
    return write_jsonl(tmp_path_factory.mktemp("data") / "validation.jsonl", problems(6, seed=1))


@pytest.fixture(params=[1, 5, 10_000], ids=["tiles of 1", "tiles of 5", "one tile"])
def tile(request, monkeypatch) -> int:
    """How many positions the streamed loss looks at together; nothing may depend on it."""
    monkeypatch.setattr(streaming, "tile_size", lambda *_: request.param)
    return request.param
