"""comparison.json: its format is written first, and a newer one is refused."""

import json

import pytest

from comparison.file import FORMAT, read_comparison, write_comparison
from support import ROOT

CONTENT = {"about": {"tasks": {}}, "rows": [{"task": "a"}, {"task": "b"}], "runs": []}


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "comparison.json"
    write_comparison(path, CONTENT)
    assert path.read_text().startswith('{\n"format": 1,\n"about"')
    assert '\n{"task": "a"},\n{"task": "b"}\n' in path.read_text()  # a line for each item
    assert read_comparison(path, "--x") == {"format": 1, **CONTENT}


@pytest.mark.parametrize(
    "given, message", [(2, "--x .*has format 2, .* up to 1: update"), ("1", "no comparison.json")]
)
def test_other_formats_are_refused(tmp_path, given, message):
    path = tmp_path / "comparison.json"
    path.write_text(json.dumps({"format": given, **CONTENT}))
    with pytest.raises(ValueError, match=message):
        read_comparison(path, "--x")


def test_files_from_before_the_number_are_of_format_1(tmp_path):
    path = tmp_path / "comparison.json"
    path.write_text(json.dumps(CONTENT))
    assert read_comparison(path, "--x") == CONTENT


COMMITTED = sorted((ROOT / "model_cards" / "reference").glob("*/comparison.json"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_committed_files_say_their_format(path):
    assert next(iter(read_comparison(path, "--x").items())) == ("format", FORMAT)
