"""The helpers of the speed benchmark; and its smoke run, which needs no other library than ours."""

import json
import logging
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from benchmarks.speed.__main__ import main, parse
from benchmarks.speed.gate import Frozen, cosine, ends, greedy_rows_that_differ, our_step
from benchmarks.speed.losses import LOSSES, LossCell, bare, make_inputs
from benchmarks.speed.ours import Settings
from benchmarks.speed.report import markdown, table
from benchmarks.speed.roofline import decode_roofline
from benchmarks.speed.stats import fit, rate, ratio, spread, summary, typical
from benchmarks.speed.workload import (
    EOS,
    GRIDS,
    PAIRS,
    Cell,
    Pair,
    Shape,
    Workshop,
    expected_length,
    expected_longest,
    make_model,
    make_prompts,
    silence,
    stop_tokens,
)

from stable_opd.models import load_model, load_tokenizer, stop_ids

ROOT = Path(__file__).parent.parent.parent
SMALL = Shape(layers=2, width=32, inner=48, heads=2, kv_heads=1, head_dim=16)
TINY = Pair(SMALL, SMALL, vocabulary=64, context=96, dtype="float32")
QWEN = replace(PAIRS["qwen"], student=SMALL, teacher=replace(SMALL, tied=False), vocabulary=64, context=96)


def steps(*seconds, tokens=10.0):
    return [{"seconds": each, "tokens": tokens, "rollout": each / 2} for each in seconds]


def test_spread_is_median_and_quartiles():
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0]) == (3.0, 2.0, 4.0)
    assert spread([7.0]) == (7.0, 7.0, 7.0)


def test_rate_counts_tokens_of_all_steps_together():
    ragged = [{"seconds": 1.0, "tokens": 10.0, "rollout": 0.5}, {"seconds": 3.0, "tokens": 50.0, "rollout": 1.0}]
    assert rate(ragged) == 15.0
    assert rate(ragged, "rollout") == 40.0
    assert typical(ragged) == 2.0


def test_ratio_without_noise_has_no_width():
    ours, theirs = [steps(1.0, 1.0)] * 5, [steps(3.0, 3.0)] * 5
    found = ratio(ours, theirs, rate)
    assert (found.value, found.low, found.high) == pytest.approx((3.0, 3.0, 3.0))


def test_a_slow_machine_slows_both_sides_of_a_round():
    machine = [1.0, 5.0, 2.0, 9.0, 3.0]
    found = ratio([steps(x) for x in machine], [steps(2 * x) for x in machine], rate)
    assert (found.low, found.high) == pytest.approx((2.0, 2.0))


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = random.Random(0)

    def noisy(middle):
        return [steps(*(middle * rng.lognormvariate(0, 0.2) for _ in range(4))) for _ in range(20)]

    covered = 0
    for _ in range(100):
        found = ratio(noisy(1.0), noisy(2.0), rate, samples=200)
        covered += found.low <= 2.0 <= found.high
    assert covered >= 85


def test_fit_finds_the_coefficients():
    causes = [(1.0, 10.0), (2.0, 5.0), (7.0, 100.0), (3.0, 1000.0)]
    coefficients, error = fit(causes, [3 * a + 0.5 * b for a, b in causes])
    assert coefficients == pytest.approx([3.0, 0.5])
    assert error == pytest.approx(0, abs=1e-9)


def test_overhead_is_what_no_phase_accounts_for():
    step = {"seconds": 1.0, "tokens": 8.0, "rollout": 0.5, "score": 0.25, "update": 0.125}
    found = summary([[step, step]])
    assert found["overhead_ms"] == pytest.approx(125)
    assert found["overhead_share"] == pytest.approx(0.125)
    assert "overhead_ms" not in summary([steps(1.0)])


def test_stop_tokens_give_the_mean():
    cell = Cell(16, 100_000, 48)
    stop = stop_tokens(cell, 4096)
    assert len(set(stop)) == len(stop) == 85
    assert EOS in stop
    assert max(stop) < 4096
    assert expected_length(cell, 4096) == pytest.approx(4096 / 85)
    drawn = random.Random(0)
    lengths = [min(128, 1 + int(math.log(1 - drawn.random()) / math.log(1 - 85 / 4096))) for _ in range(20_000)]
    assert expected_length(Cell(16, 128, 48), 4096) == pytest.approx(sum(lengths) / len(lengths), rel=0.03)
    longest = [max(lengths[start : start + 16]) for start in range(0, len(lengths), 16)]
    assert expected_longest(Cell(16, 128, 48), 4096) == pytest.approx(sum(longest) / len(longest), rel=0.03)


def test_prompts_hold_no_stop_token():
    texts = [each["prompt"] + " " + each["golden"] for each in make_prompts(50, (3, 5), 4096)]
    words = {int(word[1:]) for text in texts for word in text.split()}
    cells = [cell for cell in GRIDS["tiny"].steps if cell.mean]
    assert words.isdisjoint({token for cell in cells for token in stop_tokens(cell, 4096)})
    assert {len(each["prompt"].split()) for each in make_prompts(50, (3, 5), 4096)} == {3, 4, 5}


@pytest.mark.parametrize("pair", [TINY, QWEN], ids=["tiny", "qwen"])
def test_silenced_token_cannot_win_anywhere(pair):
    model = make_model(pair, pair.student, seed=0)
    silence(model, EOS)
    with torch.no_grad():
        logits = model(torch.randint(1, 64, (4, 40))).logits.float()
    assert logits.softmax(-1)[..., EOS].max() == 0
    rest = logits[..., 1:].softmax(-1)
    assert rest.max() < 0.5  # the other tokens stay what they were: a nearly uniform crowd


def test_workshop_writes_what_both_sides_read(tmp_path):
    shop = Workshop(tmp_path, QWEN)
    cell = Cell(4, 32, 8)
    student, tokenizer = load_model(str(shop.student(cell))), load_tokenizer(str(shop.student(cell)))
    assert stop_ids(student, tokenizer) == sorted(stop_tokens(cell, 64))
    assert student.dtype == torch.bfloat16
    assert len(tokenizer) == student.config.vocab_size
    lines = shop.prompts(cell).read_text().splitlines()
    assert set(json.loads(lines[0])) == {"prompt", "golden"}


def test_parameters_are_counted_as_they_are():
    model = make_model(TINY, SMALL, seed=0)
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    assert SMALL.body_parameters == matrices
    assert PAIRS["qwen"].student.body_parameters == pytest.approx(1.31e9, rel=0.01)
    assert PAIRS["qwen"].student.cache_entries * 2 == 28_672  # bytes in bfloat16


def test_roofline_of_one_row_is_bandwidth_over_weights():
    pair, cell = PAIRS["qwen"], Cell(1, 2)
    weights = 2 * (pair.student.body_parameters + pair.vocabulary * pair.student.width)
    assert decode_roofline(pair, cell, bandwidth=weights, size=2) == pytest.approx(1.0, rel=1e-3)


def test_losses_of_our_side_have_gradients():
    for name in ("ours", "sampled"):
        inputs = make_inputs(LossCell(12, 30, 8, 6), "cpu")
        LOSSES[name](inputs)
        assert inputs.student.grad is not None
        assert inputs.student_head.grad is not None
        assert inputs.teacher_head.grad is None
    bare(make_inputs(LossCell(12, 30, 8, 6), "cpu"))


def test_unknown_cell_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit):
        parse(["--cells", "ragged128-b17"])
    assert "ragged128-b16" in capsys.readouterr().err
    assert [cell.name for cell in parse(["--cells", "fixed64-b4"]).cells] == ["fixed64-b4"]


def test_command_for_a_gpu_takes_the_large_pair():
    options = parse(["--device", "cuda", "--shapes", "qwen"])
    assert options.precision == "bf16-true"
    assert [cell.name for cell in options.cells] == ["fixed512-b16", "fixed512-b64", "ragged2048-b16", "ragged2048-b64"]
    longest = max(cell.limit for cell in GRIDS["qwen"].steps)
    assert longest < PAIRS["qwen"].context


def test_table():
    assert table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_gate_sees_what_our_side_does(tmp_path):
    shop, cell = Workshop(tmp_path, TINY), Cell(4, 24, 24)
    paths = {"student": str(shop.peaked("student")), "teacher": str(shop.peaked("teacher"))}
    settings = Settings(**paths, prompts=str(shop.prompts(cell)), rows=4, samples=2, limit=24, precision="32-true")
    assert greedy_rows_that_differ(settings, "cpu") == 0
    engine = Frozen()
    loss, gradient = our_step(settings, "cpu", engine)
    assert loss > 0
    assert cosine(gradient, gradient) == pytest.approx(1)
    assert max(len(completion) for _, completion in engine.rows) == 24
    assert engine.rows[0][0] == engine.rows[1][0]  # two answers to one prompt


def test_an_answer_ends_at_its_first_stop_token():
    assert ends([5, 6, 0], [0], 4)
    assert ends([5, 6, 7, 8], [0], 4)
    assert not ends([5, 0, 7], [0], 4)
    assert not ends([5, 6], [0], 4)


@pytest.fixture
def loggers():
    """What lightning says at the end as at the beginning; the benchmark silences it."""
    levels = {name: logging.getLogger(name).level for name in ("lightning.pytorch", "lightning.fabric")}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.mark.slow
@pytest.mark.usefixtures("loggers")
def test_smoke(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    main(["--smoke", "--threads", "1", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "speed.json").read_text())
    assert results["smoke"]["rollout"]["value"] > 0
    assert "Our engines" in capsys.readouterr().out
    assert (tmp_path / "speed.md").read_text() == markdown(results)
