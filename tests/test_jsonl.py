import pytest

from stable_opd.jsonl import read_records, write_records


def test_records_are_appended_without_touching_those_before(tmp_path):
    path = tmp_path / "records.jsonl"
    write_records(path, 1, [{"step": 1, "text": "é\n"}])
    first, file = path.read_bytes(), path.stat().st_ino
    write_records(path, 2, [{"step": 2}, {"step": 2}])
    assert path.stat().st_ino == file
    assert path.read_bytes().startswith(first)
    assert [each["step"] for each in read_records(path)] == [1, 2, 2]


@pytest.mark.parametrize("left", ['{"step": 3}\n', '{"step": 2}\n{"st', '{"step": 1}', "no object\n", "[1]\n", ""])
def test_what_an_earlier_attempt_left_is_replaced(left, tmp_path):
    """Records of the step and of later ones, and lines that were cut."""
    path = tmp_path / "records.jsonl"
    path.write_text('{"step": 1, "old": true}\n' + left)
    write_records(path, 2, [{"step": 2, "new": True}])
    found = [each for each in read_records(path) if len(each) == 2]
    assert found == [{"step": 1, "old": True}, {"step": 2, "new": True}]
    assert all(each["step"] < 2 or "new" in each for each in read_records(path))
