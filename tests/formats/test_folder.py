"""Folders for other libraries are written whole or not at all."""
from __future__ import annotations

import pytest

from minipeft.formats.folder import whole


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_a_folder_whose_writing_fails_is_not_there_and_nothing_is_left_beside_it(error, tmp_path):
    with pytest.raises(error), whole(tmp_path / "a") as beside:
        (beside / "one").write_text("half")
        assert not (tmp_path / "a").exists(), "it is put in place at the end"
        raise error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("empty", [False, True])
def test_a_new_or_empty_folder_is_written_and_a_full_one_is_left_as_it_is(empty, tmp_path):
    if empty:
        (tmp_path / "a").mkdir()
    with whole(tmp_path / "a") as beside:
        (beside / "one").write_text("1")
    with pytest.raises(ValueError, match="a is not an empty folder"), whole(tmp_path / "a") as beside:
        (beside / "one").write_text("2")
    assert (tmp_path / "a" / "one").read_text() == "1" and [path.name for path in tmp_path.iterdir()] == ["a"]
