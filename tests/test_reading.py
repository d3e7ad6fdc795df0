"""Files of others: what is read, what is refused, and with which kind of error."""

import json
import os

import pytest

from laser_dist.reading import decode_json, is_file_name, read_file, read_json, read_object


def test_what_json_loads_reads_is_read_alike(tmp_path):
    value = {"a": [1, 2.5, None, True, "ü\u2028"], "b": {"c": {}}, "": -1e-300}
    (tmp_path / "a.json").write_text(json.dumps(value))
    assert read_json(tmp_path / "a.json") == read_object(tmp_path / "a.json") == value
    assert decode_json(json.dumps(value, ensure_ascii=False).encode()) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' appears twice"),
        ("[NaN]", "NaN is no number"),
        ("[-Infinity]", "-Infinity is no number"),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5000, "more than 4300 digits"),
        ("[" + "[]," * 1_000_000 + "[]]", "more than 1,000,000"),
        (b"\xff", "utf-8"),
        ("", "Expecting value"),
    ],
)
def test_what_is_refused_is_a_value_error(text, words):
    with pytest.raises(ValueError, match=words):
        decode_json(text)


def test_files_are_bounded_plain_and_never_waited_for(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"x" * 10)
    assert read_file(path, 10) == b"x" * 10
    with pytest.raises(OSError, match="10 bytes, but at most 9 are read"):
        read_file(path, 9)
    os.truncate(path, 2**40)  # holes: nothing is on disk, and nothing may come into memory
    with pytest.raises(OSError, match="1,099,511,627,776 bytes"):
        read_file(path)
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(OSError, match="no plain file"):
            read_file(other)
    with pytest.raises(IsADirectoryError):
        read_file(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "no")


def test_an_object_is_asked_for(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ValueError, match="expected an object, got list"):
        read_object(tmp_path / "a.json")


def test_file_names():
    assert all(map(is_file_name, ("a", "a.b", "...", "ü")))
    assert not any(map(is_file_name, ("", ".", "..", "a/b", "/", "a\0", None, 5)))
