import os
import stat
from pathlib import Path

import pytest

from graphopt.errors import OutputError
from graphopt.files import atomic_path, write_text_atomically


def test_the_target_appears_when_the_block_ends(tmp_path):
    target = tmp_path / "model.onnx"
    with atomic_path(target) as temporary:
        temporary.write_bytes(b"weights")
        assert not target.exists()
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".onnx"
    assert target.read_bytes() == b"weights"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("failure", [RuntimeError("stop"), KeyboardInterrupt()])
def test_a_failing_block_leaves_the_old_file_and_no_temporary_one(tmp_path, failure):
    target = tmp_path / "ranges.json"
    target.write_text("old")
    with pytest.raises(type(failure)), atomic_path(target) as temporary:
        temporary.write_text("half of the n")
        raise failure
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_is_an_output_error_that_names_the_target(tmp_path):
    target = tmp_path / "ranges.json"
    with pytest.raises(OutputError, match=r"cannot write .*ranges\.json: No space left"), atomic_path(target):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(OutputError, match=r"there is no folder .*nowhere; create it first"):
        write_text_atomically(tmp_path / "nowhere" / "ranges.json", "{}")


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(OutputError, match="it is a folder"):
        write_text_atomically(tmp_path, "{}")


@pytest.mark.skipif(os.name == "nt", reason="needs a device file")
def test_a_device_is_refused_and_stays():
    with pytest.raises(OutputError, match="not a regular file"):
        write_text_atomically(os.devnull, "{}")
    assert Path(os.devnull).is_char_device()


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX permissions")
def test_a_replaced_file_keeps_its_permissions_and_a_new_one_follows_the_umask(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("")
    old.chmod(0o640)
    write_text_atomically(old, "text")
    assert stat.S_IMODE(old.stat().st_mode) == 0o640
    previous = os.umask(0o027)
    try:
        write_text_atomically(new, "text")
    finally:
        os.umask(previous)
    assert stat.S_IMODE(new.stat().st_mode) == 0o640


@pytest.mark.skipif(os.name == "nt", reason="needs symbolic links")
def test_a_link_stays_a_link_and_its_target_is_written(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old")
    link.symlink_to(target)
    write_text_atomically(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_text_is_utf8_with_unix_line_ends(tmp_path):
    write_text_atomically(tmp_path / "text", "größer\n")
    assert (tmp_path / "text").read_bytes() == "größer\n".encode()
