"""Scores in a folder: whole or not there, whatever happens to processes and files."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap

import pytest
import torch

from stable_opd.teachers.store import Store


def entry(seed, tokens=3, k=2):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(tokens, generator=generator),
        torch.randint(100, (tokens, k), generator=generator, dtype=torch.int32),
        torch.randn(tokens, k, generator=generator),
    )


def assert_equal(found, expected):
    assert found is not None
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def opened(folder):
    store = Store(str(folder))
    store.open()
    return store


@pytest.mark.parametrize(("tokens", "k"), [(1, 0), (0, 2), (5, 3)])
def test_rows_come_back_as_they_were_put(tmp_path, tokens, k):
    store = Store(str(tmp_path / "scores"))
    store.put({b"row": entry(1, tokens, k)})
    for each in (store, opened(tmp_path / "scores")):
        assert_equal(each.get(b"row", tokens, k), entry(1, tokens, k))
        assert each.get(b"other", tokens, k) is None


def test_folder_is_made_by_the_first_row_and_its_size_is_known(tmp_path):
    store = opened(tmp_path / "scores")
    assert not (tmp_path / "scores").exists()
    assert str(store) == "0 rows, 0.0 MiB"
    store.put({bytes([number]): entry(number, 8192, 16) for number in range(2)})
    (file,) = (tmp_path / "scores").iterdir()
    assert store.size == file.stat().st_size
    assert str(store) == "2 rows, 2.1 MiB"  # 132 bytes a token


def test_notes_are_kept_and_written_once(tmp_path):
    store = opened(tmp_path)
    assert store.fact(b"teacher") is None
    store.note(b"teacher", {"stop_ids": [1, 2]})
    other = opened(tmp_path)
    assert other.fact(b"teacher") == {"stop_ids": [1, 2]}
    other.note(b"teacher", {"stop_ids": [1, 2]})
    assert len(list(tmp_path.iterdir())) == 1


WRITER = """
    import sys
    from teachers.test_store import entry
    from stable_opd.teachers.store import Store
    store = Store(sys.argv[1])
    for number in range(10**6):
        store.put({number.to_bytes(4, "little"): entry(number, 300)})
        print(number, flush=True)
"""


def start(folder):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_processes_write_side_by_side_and_one_is_killed(tmp_path):
    """Every row that was put is there, and there is no other."""
    own, victim = Store(str(tmp_path)), start(tmp_path)
    for number in range(5):
        assert victim.stdout.readline()
        own.put({b"own" + bytes([number]): entry(number)})
    os.kill(victim.pid, signal.SIGKILL)
    said = victim.communicate()[0].split("\n")[:-1]  # what follows the last line break was cut
    last = int(said[-1]) if said else 4
    store = opened(tmp_path)
    for number in range(5):
        assert_equal(store.get(b"own" + bytes([number]), 3, 2), entry(number))
    for number in range(last + 1):
        assert_equal(store.get(number.to_bytes(4, "little"), 300, 2), entry(number, 300))
    beyond = (last + 2).to_bytes(4, "little")  # the one after the last may have been put and not said
    assert store.get(beyond, 300, 2) is None


def test_row_that_was_half_written_is_rolled_back(tmp_path):
    """The files of a process that is killed in the middle of a transaction, when part of it is in them."""
    store = Store(str(tmp_path / "live"))
    store.put({b"whole": entry(1)})
    connection = store._writing()
    connection.execute("PRAGMA cache_size = 1")  # so that it spills
    for number in range(50):
        connection.execute("INSERT INTO rows VALUES (?, ?, ?)", (bytes([number]), b"half" * 4096, b""))
    shutil.copytree(tmp_path / "live", tmp_path / "dead")
    assert list((tmp_path / "dead").glob("*-journal"))
    found = opened(tmp_path / "dead")
    assert_equal(found.get(b"whole", 3, 2), entry(1))
    assert all(found.get(bytes([number]), 3, 2) is None for number in range(50))


def test_row_that_is_damaged_is_passed_over_and_can_be_put_again(tmp_path):
    store = Store(str(tmp_path))
    store.put({b"one": entry(1), b"two": entry(2)})
    (file,) = tmp_path.iterdir()
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE rows SET value = zeroblob(length(value)) WHERE key = ?", (b"one",))
    store = opened(tmp_path)
    with pytest.warns(UserWarning, match="is damaged and passed over"):
        assert store.get(b"one", 3, 2) is None
    assert_equal(store.get(b"two", 3, 2), entry(2))
    store.put({b"one": entry(1)})
    assert_equal(store.get(b"one", 3, 2), entry(1))
    again = opened(tmp_path)  # which looks into the newer file first
    assert_equal(again.get(b"one", 3, 2), entry(1))


def look(folder, keys):
    store = opened(folder)
    return store, [store.get(key, 900, 2) for key in keys]


@pytest.mark.parametrize("damage", [lambda data: b"no database" * 400, lambda data: data[: len(data) // 3]])
def test_file_that_is_damaged_is_passed_over(tmp_path, damage):
    keys = [number.to_bytes(1, "little") for number in range(9)]
    Store(str(tmp_path)).put({key: entry(number, 900) for number, key in enumerate(keys)})
    (file,) = tmp_path.iterdir()
    Store(str(tmp_path)).put({b"other": entry(99)})
    file.write_bytes(damage(file.read_bytes()))
    with pytest.warns(UserWarning, match=f"{file.name} is damaged and passed over"):
        store, found = look(tmp_path, keys)
    assert found == [None] * 9
    assert_equal(store.get(b"other", 3, 2), entry(99))
