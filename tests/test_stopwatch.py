import time

import torch

from stable_opd.stopwatch import Stopwatch


def test_times_add_up_by_name(monkeypatch):
    clock = iter([0.0, 2.0, 10.0, 11.0, 20.0, 23.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    watch = Stopwatch(torch.device("cpu"))
    for name in ("score", "update", "score"):
        with watch(name):
            pass
    assert watch.seconds == {"score": 5.0, "update": 1.0}
