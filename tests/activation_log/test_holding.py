"""The lock of a reader, on file systems that keep locks and on those that don't."""

import errno
import fcntl
import os

import pytest

from headrace_log.holding import HOLD_NAME, Hold, nobody_holds


@pytest.fixture
def folder(tmp_path):
    (tmp_path / HOLD_NAME).touch()
    return tmp_path


def test_a_reader_holds_a_set_until_it_lets_go(folder):
    hold = Hold(folder)
    with nobody_holds(folder) as free:
        held = not free
    hold.close()

    assert held
    with nobody_holds(folder) as free:
        assert free


def test_an_exclusive_lock_is_asked_for_on_a_descriptor_for_writing(folder, monkeypatch):
    """As NFS demands, which answers EBADF otherwise."""
    flock = fcntl.flock

    def of_nfs(fd, operation):
        mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        if operation & fcntl.LOCK_EX and mode == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", of_nfs)

    with nobody_holds(folder) as free:
        assert free


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EBADF])
def test_where_it_can_not_be_told_a_set_counts_as_held_and_the_log_says_so(folder, monkeypatch, caplog, number):
    def no_locks(*_):
        raise OSError(number, "no locks here")

    monkeypatch.setattr(fcntl, "flock", no_locks)

    with nobody_holds(folder) as free:
        assert not free
    assert "no locks here" in caplog.text


def test_a_set_without_the_lock_file_is_held_by_nobody(tmp_path):
    with nobody_holds(tmp_path) as free:
        assert free
