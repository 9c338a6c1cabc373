import json
from importlib import util

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from helpers import EOS, TOKENIZER, make_rollout, save, tiny_model
from stable_opd import LocalTeacher, logprob_error
from stable_opd.models import load_model
from stable_opd.testbed import PLACES

CPU = torch.device("cpu")


def test_scores_are_those_of_the_model_in_the_folder(teacher_path):
    teacher = LocalTeacher(teacher_path)
    teacher.setup("student", TOKENIZER, CPU)
    rollout = make_rollout([[1, 2, 3]], [[4, 5]])
    with torch.no_grad():
        expected = tiny_model(2)(torch.tensor([[4, 5, 1, 2, 3]])).logits[0, 1:4].log_softmax(-1)
    scored = teacher.score(rollout)
    torch.testing.assert_close(scored.head.logits(scored.states).log_softmax(-1), expected, rtol=1e-4, atol=1e-5)


def test_model_is_frozen_in_evaluation_mode_and_scores_carry_no_gradient(teacher_path):
    teacher = LocalTeacher(teacher_path)
    teacher.setup("student", TOKENIZER, CPU)
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert not teacher.score(make_rollout([[1, 2, 3]])).states.requires_grad


def test_second_setup_keeps_the_loaded_model(teacher_path):
    """The module calls it again when the device is known."""
    teacher = LocalTeacher(teacher_path)
    teacher.setup("student", TOKENIZER, CPU)
    model = teacher.model
    teacher.setup("student", TOKENIZER, CPU)
    assert teacher.model is model


def test_scores_before_setup_are_an_error_that_says_so(teacher_path):
    with pytest.raises(RuntimeError, match="before its `setup`"):
        LocalTeacher(teacher_path).score(make_rollout([[1]]))


def test_context_length_is_the_models(teacher_path):
    teacher = LocalTeacher(teacher_path)
    teacher.setup("student", TOKENIZER, CPU)
    assert teacher.context_length == 96


def test_other_vocabulary_is_refused_by_name(teacher_path):
    words = {"&" if word == "#" else word: number for word, number in TOKENIZER.get_vocab().items()}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")))
    with pytest.raises(ValueError, match=r"student only.*'&'.*teacher only.*'#'"):
        LocalTeacher(teacher_path).setup("the-pupil", tokenizer, CPU)


def test_a_model_padded_to_a_larger_vocabulary_is_cut_to_the_shared_one(tmp_path):
    path = save(tiny_model(5, vocab_size=len(TOKENIZER) + 9), tmp_path)
    teacher = LocalTeacher(path)
    teacher.setup("student", TOKENIZER, CPU)
    scored = teacher.score(make_rollout([[1, 2]]))
    assert scored.head.logits(scored.states).shape == (2, len(TOKENIZER))


@pytest.fixture(scope="module")
def golden():
    """Problems of the testbed with their golden solutions."""
    rows = [json.loads(line) for line in PLACES["validation"].read_text(encoding="utf-8").splitlines()[:64]]
    completions = [[*TOKENIZER.encode(row["golden"]), EOS] for row in rows]
    return make_rollout(completions, [TOKENIZER.encode(row["prompt"]) for row in rows])


#: Measured with bitsandbytes 0.50.2 on a CPU: nats at the written token, mean and largest. In 4 bits are the layers
#: with multiples of 64 inputs, which in this small teacher are the last of each MLP.
ERRORS = {"int8": (0.0016, 0.044), "nf4": (0.0063, 0.107)}


@pytest.mark.parametrize("quantization", ERRORS)
def test_quantised_teacher_scores_with_an_error_that_is_measured(quantization, golden):
    pytest.importorskip("bitsandbytes")
    teacher = LocalTeacher("testbed:teacher", quantization=quantization)
    teacher.setup("student", TOKENIZER, CPU)
    full = load_model("testbed:teacher").eval()
    mean, largest = logprob_error(full, teacher.model, golden)
    print(f"{quantization}: mean {mean:.4f}, largest {largest:.3f} nats over {len(golden.completion)} tokens")
    expected_mean, expected_largest = ERRORS[quantization]
    assert expected_mean / 2 < mean < 2 * expected_mean
    assert expected_largest / 2 < largest < 2 * expected_largest
    scored = teacher.score(golden)
    logprobs = scored.head.logits(scored.states).log_softmax(-1).gather(-1, golden.completion[:, None]).squeeze(-1)
    whole = LocalTeacher("testbed:teacher")
    whole.setup("student", TOKENIZER, CPU)
    theirs = whole.score(golden)
    exact = theirs.head.logits(theirs.states).log_softmax(-1).gather(-1, golden.completion[:, None]).squeeze(-1)
    # Which columns int8 leaves out depends on all tokens that are read together.
    assert (logprobs - exact).abs().mean().item() == pytest.approx(mean, rel=0.2)


@pytest.mark.parametrize(("quantization", "share", "block"), [("int8", 1 / 4, 1), ("nf4", 1 / 8, 64)])
def test_quantised_teacher_is_as_small_as_its_layers_and_keeps_its_head(quantization, share, block):
    pytest.importorskip("bitsandbytes")
    teacher = LocalTeacher("testbed:teacher", quantization=quantization)
    teacher.setup("student", TOKENIZER, CPU)
    full = load_model("testbed:teacher")
    matrices = [each for each in full.base_model.layers.parameters() if each.dim() == 2]
    layers = sum(each.nbytes for each in matrices if each.shape[1] % block == 0)
    whole = sum(each.nbytes for each in full.parameters())
    assert teacher.footprint == whole - layers + layers * share
    head = teacher.score(make_rollout([[1, 2]])).head.weight
    assert torch.equal(head, full.get_output_embeddings().weight)
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


def test_quantisation_without_bitsandbytes_says_how_to_install_it(teacher_path, monkeypatch):
    found = util.find_spec
    monkeypatch.setattr("stable_opd.models.find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    with pytest.raises(ValueError, match=r"pip install 'stable-opd\[bitsandbytes\]'"):
        LocalTeacher(teacher_path, quantization="nf4").setup("student", TOKENIZER, CPU)
