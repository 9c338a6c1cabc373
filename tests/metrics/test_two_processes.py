"""Every metric adds up over processes: two of them report what one process with all answers would."""

import pytest
import torch

import stable_opd.metrics
import two_processes


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(two_processes.worker, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def alone():
    return two_processes.run(two_processes.joined)


NAMES = [f"{name}.{way}" for name in stable_opd.metrics.__all__ for way in ("compute", "forward")]


@pytest.mark.parametrize("name", [*NAMES, "collection"])
def test_two_processes_report_what_one_with_all_answers_does(name, merged, alone):
    for record in merged:
        torch.testing.assert_close(record[name], alone[name])


def test_processes_have_something_to_merge(alone):
    """Otherwise the test above could pass on local values."""
    own = two_processes.run(lambda step: two_processes.batch(0, step))
    for name in NAMES:
        with pytest.raises(AssertionError):
            torch.testing.assert_close(own[name], alone[name])
