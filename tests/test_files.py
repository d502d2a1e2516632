"""Files are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmsched_env.errors import InputError
from llmsched_env.files import discard_unfinished, require_writable_file, require_writable_folder, writing


def test_the_file_appears_only_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("old")
    with writing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.suffix == ".csv"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("old")
    with pytest.raises(RuntimeError), writing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_named_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    said = f"cannot write {path}: No space left on device"
    with pytest.raises(InputError, match=said), writing(path) as temporary:
        temporary.write_text("half")
        Path("/dev/full").write_text("more than there is room for")
    assert list(tmp_path.iterdir()) == []


def test_what_is_unfinished_can_be_discarded(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    with pytest.raises(InputError, match="cannot write"), writing(path) as temporary:
        temporary.write_text("half")
        discard_unfinished()
        assert list(tmp_path.iterdir()) == []
    (tmp_path / "done.csv").touch()
    discard_unfinished()
    assert list(tmp_path.iterdir()) == [tmp_path / "done.csv"]


def test_a_link_is_kept(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with writing(tmp_path / "link") as temporary:
        temporary.write_text("text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "text"


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path, Path("/dev/null"), tmp_path / "none" / "x.csv", tmp_path / "file" / "x.csv"):
        with pytest.raises(InputError, match=f"cannot write {path}: "):
            require_writable_file(path)
    with pytest.raises(InputError, match="is not a folder"):
        require_writable_folder(tmp_path / "file" / "below")
    with pytest.raises(InputError, match="cannot write /proc/none"):
        require_writable_folder("/proc/none")


def test_checking_makes_nothing(tmp_path: Path) -> None:
    require_writable_file(tmp_path / "x.csv")
    require_writable_folder(tmp_path / "new" / "below")
    assert list(tmp_path.iterdir()) == []
