"""A place for what a command writes is asked for before it works, and left as it was."""

import os
from pathlib import Path

import pytest

from umbel_common.errors import StorageError
from umbel_host.files.output import require_new, require_place


def everything(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


@pytest.mark.parametrize("name", ["new", "a/b/new", "Bank für Köln/neu"])
def test_a_place_is_left_as_it_was(tmp_path: Path, name: str) -> None:
    require_new(tmp_path / name)
    require_place(tmp_path / name)
    assert everything(tmp_path) == []


def test_what_is_there_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("file", "link", "."):
        with pytest.raises(StorageError, match="in the way"):
            require_new(tmp_path / name)
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("place", ["/proc/alone", "/proc/a/b", "/sys/alone", "file/new", "x" * 254])
def test_a_place_that_takes_nothing_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    before = everything(tmp_path)
    with pytest.raises(StorageError, match="nothing can be written") as caught:
        require_new(tmp_path / place)
    assert "Errno" not in str(caught.value)
    assert everything(tmp_path) == before
    assert os.path.isabs(str(tmp_path))
