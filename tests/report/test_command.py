import sys
from pathlib import Path

import pytest

from report.made import collapsing, quiet, write_run
from stable_opd.cli import main


def report(*args):
    main(["report", *map(str, args)])


def test_one_run_gives_a_verdict_a_page_and_pictures_beside_it(tmp_path, capsys):
    out = tmp_path / "deep" / "mine.html"
    report(write_run(tmp_path / "run", collapsing()), "--out", out)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("Collapsed: truncation passed 0.9 at step")
    assert printed[-1] == f"Report written to {out}"
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")
    pictures = sorted(path.name for path in (tmp_path / "deep" / "mine-plots").iterdir())
    assert "truncation-repetition-light.png" in pictures
    assert "truncation-repetition-dark.png" in pictures


def test_several_runs_are_told_of_by_their_names(tmp_path, capsys, monkeypatch):
    write_run(tmp_path / "runs" / "a", collapsing())
    write_run(tmp_path / "runs" / "b", quiet())
    monkeypatch.chdir(tmp_path)
    report("runs")
    printed = capsys.readouterr().out
    assert "\na: Collapsed:" in f"\n{printed}"
    assert "\nb: Stable:" in printed
    assert "Of 2 runs: 1 stable, 1 collapsed." in (tmp_path / "report.html").read_text(encoding="utf-8")


def refusal(capsys, *args):
    with pytest.raises(SystemExit) as refused:
        report(*args)
    assert refused.value.code == 2
    return capsys.readouterr().err


def test_a_folder_without_a_run_is_refused_in_a_few_lines(tmp_path, capsys):
    message = refusal(capsys, tmp_path)
    assert "Expected a folder that `stable-opd fit` left" in message
    assert "Traceback" not in message


def test_without_matplotlib_the_verdict_is_told_and_the_extra_is_named(tmp_path, capsys, monkeypatch):
    for name in [each for each in sys.modules if each.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "stable_opd.report.plots", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Without("matplotlib"), *sys.meta_path])
    monkeypatch.delattr("stable_opd.report.plots", raising=False)
    with pytest.raises(SystemExit) as refused:
        report(write_run(tmp_path / "run", collapsing()), "--out", tmp_path / "r.html")
    assert refused.value.code == 2
    printed = capsys.readouterr()
    assert "Collapsed:" in printed.out
    assert "Expected matplotlib for the plots, but got none" in printed.err
    assert "stable-opd[plot]" in printed.err
    assert not Path(tmp_path / "r.html").exists()


class Without:
    """An import system in which a package is not installed."""

    def __init__(self, package):
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
