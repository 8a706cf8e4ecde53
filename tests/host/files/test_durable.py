"""Files are there whole or not at all, even when the disk is full."""

import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from umbel_host.files.durable import all_or_nothing, create, make_folder, replace


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Lets no file grow past a kilobyte."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, former[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, former)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_new_file_that_does_not_fit_is_not_there(tmp_path: Path, full_disk: None) -> None:
    with pytest.raises(OSError, match="large"):
        create(tmp_path / "new", b"x" * 5000)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_replaced_stays(tmp_path: Path, full_disk: None) -> None:
    path = tmp_path / "file"
    create(path, b"former")
    with pytest.raises(OSError, match="large"):
        replace(path, b"x" * 5000)
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == {"file": b"former"}


def test_a_file_that_was_closed_to_others_stays_closed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    create(path, b"former", mode=0o600)
    replace(path, b"new")
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"new", 0o600)


def make_and_fail(folder: Path) -> None:
    with all_or_nothing() as made:
        made += make_folder(folder / "a" / "b", 0o750)
        made += make_folder(folder / "there", 0o750)
        create(folder / "a" / "b" / "file", b"x")
        made.append(folder / "a" / "b" / "file")
        raise ZeroDivisionError


def test_a_block_that_fails_leaves_only_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ZeroDivisionError):
        make_and_fail(tmp_path)
    assert os.listdir(tmp_path) == ["there"]


def test_a_block_that_ends_well_leaves_what_it_made(tmp_path: Path) -> None:
    with all_or_nothing() as made:
        made += make_folder(tmp_path / "a" / "b", 0o700)
    assert made == [tmp_path / "a", tmp_path / "a" / "b"]
    assert {path.stat().st_mode & 0o777 for path in made} == {0o700}
