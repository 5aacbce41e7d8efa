import os
import resource
import subprocess
import zipfile
from contextlib import contextmanager

import pytest
import torch

from r2kit.checkpoint import first_whole, is_whole, read_checkpoint, write_checkpoint
from r2kit.errors import RunError

STATE = {"weights": torch.arange(100_000), "facts": {"epoch": 3}}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    return tmp_path / "run" / "checkpoints"


def test_a_checkpoint_is_an_ordinary_file_of_torch_with_a_checksum(folder):
    write_checkpoint(STATE, folder / "last.ckpt")
    plain = torch.load(folder / "last.ckpt", weights_only=True)
    assert torch.equal(plain["weights"], STATE["weights"])
    assert zipfile.ZipFile(folder / "last.ckpt").comment.startswith(b"r2kit sha256 ")
    assert read_checkpoint(folder / "last.ckpt")["facts"] == {"epoch": 3}
    assert os.listdir(folder) == ["last.ckpt"]


def test_any_flipped_bit_and_any_missing_end_is_seen(folder):
    path = folder / "last.ckpt"
    write_checkpoint({"weights": torch.arange(50)}, path)
    whole = path.read_bytes()
    assert is_whole(path)
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        assert not is_whole(path), position
    for length in [0, 1, 50, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert not is_whole(path), length
    with pytest.raises(RunError, match="damaged: it does not match its checksum"):
        read_checkpoint(path)
    torch.save({"weights": torch.arange(50)}, path)  # whole, and not one of ours
    assert not is_whole(path)
    assert not is_whole(folder / "none.ckpt")
    with pytest.raises(RunError, match="no such checkpoint"):
        read_checkpoint(folder / "none.ckpt")


def test_the_one_before_is_kept_and_the_newest_whole_one_is_found(folder):
    last, previous, best = folder / "last.ckpt", folder / "previous.ckpt", folder / "best.ckpt"
    assert first_whole([last, previous]) == (None, [])
    write_checkpoint({"n": 1}, last, previous=previous, also=best)
    write_checkpoint({"n": 2}, last, previous=previous)
    assert [read_checkpoint(path)["n"] for path in (last, previous, best)] == [2, 1, 1]
    last.write_bytes(last.read_bytes()[:-10])
    assert first_whole([last, previous]) == (previous, [last])
    last.unlink()  # a kill between the two renames
    assert first_whole([last, previous]) == (previous, [])


def test_a_file_system_without_second_names_gets_a_copy(folder, monkeypatch):
    def refuse(source, target):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    write_checkpoint(STATE, folder / "last.ckpt", also=folder / "best.ckpt")
    assert is_whole(folder / "best.ckpt")


@contextmanager
def largest_file(size):
    """The operating system refuses to write more, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_that_cannot_be_written_leaves_those_of_before(folder):
    last, previous = folder / "last.ckpt", folder / "previous.ckpt"
    write_checkpoint({"n": 1}, last, previous=previous)
    write_checkpoint({"n": 2}, last, previous=previous)
    with (
        largest_file(100_000),
        pytest.raises(RunError, match="File too large; those of before are untouched") as caught,
    ):
        write_checkpoint(STATE, last, previous=previous, also=folder / "best.ckpt")
    assert f"r2kit resume {folder.parent}" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert [read_checkpoint(path)["n"] for path in (last, previous)] == [2, 1]
    assert sorted(os.listdir(folder)) == ["last.ckpt", "previous.ckpt"]  # the half-written one gave its room back


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a disk of 2 MB")
def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        path = disk / "last.ckpt"
        write_checkpoint({"n": 1}, path)
        with pytest.raises(RunError, match="No space left on device"):
            write_checkpoint({"weights": torch.zeros(1_000_000)}, path)
        assert read_checkpoint(path)["n"] == 1
        write_checkpoint({"n": 2}, path)
        assert read_checkpoint(path)["n"] == 2
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_mistake_in_the_contents_is_not_called_a_full_disk(folder):
    with pytest.raises(Exception, match=r"pickle|lambda"):
        write_checkpoint({"no": lambda: 0}, folder / "last.ckpt")
