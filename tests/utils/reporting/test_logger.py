"""TensorBoard files read back event by event, and the terminal."""

import errno
import struct
import sys
import time

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import SessionLog

from tests.support import thin
from tests.support.events import curves, pictures, read_events, scalars
from utils.reporting.logger import Logger


def test_scalars_and_pictures_come_back(tmp_path):
    log = Logger(progress=False)
    log.open(tmp_path / "deep" / "logs", 0)
    log.scalars({"loss/ce": 1.5, "loss/pod/stage1": 0.25}, 10)
    log.scalars({}, 11)
    log.image("test/confusion", np.zeros((4, 6, 3), dtype=np.uint8), 12)
    log.close()
    log.close()
    assert scalars(tmp_path) == {("loss/ce", 10): 1.5, ("loss/pod/stage1", 10): 0.25}
    assert pictures(tmp_path) == {"test/confusion": (4, 6)}


def test_a_later_run_supersedes_what_it_repeats(tmp_path):
    for first in (0, 5, None):
        log = Logger(progress=False)
        log.open(tmp_path, first)
        log.scalars({"x": 1.0}, 7)
        log.close()
    assert len(list(tmp_path.iterdir())) == 3  # also within one second
    starts = [event.step for event in read_events(tmp_path) if event.session_log.status == SessionLog.START]
    assert starts == [0, 5]


def test_the_last_iteration_that_is_not_repeated_stays(tmp_path):
    log = Logger(progress=False)
    log.open(tmp_path, 0)
    for iteration in (4, 5, 6):
        log.scalars({"loss/ce": float(iteration), "loss/kd": 0.5}, iteration)
    log.scalars({"val/mIoU": 0.5}, 5)
    log.image("x", np.zeros((4, 6, 3), dtype=np.uint8), 5)
    log.close()
    (first,) = tmp_path.iterdir()
    (tmp_path / "events.out.tfevents.9").write_bytes(first.read_bytes()[:-5])  # what a killed process left
    (tmp_path / "events.out.tfevents.99").write_bytes(b"not events at all" * 9)
    (tmp_path / "events.out.tfevents.999").write_bytes(struct.pack("<Q", 3) + bytes(4) + b"\xff\xff\xff" + bytes(4))
    log.open(tmp_path, 5)
    log.scalars({"val/mIoU": 0.25}, 5)
    log.close()
    for path in tmp_path.glob("events.out.tfevents.9*"):
        if len(path.name) < len(first.name):
            path.unlink()
    assert curves(tmp_path) == {
        "loss/ce": [(4, 4.0), (5, 5.0)],
        "loss/kd": [(4, 0.5), (5, 0.5)],
        "val/mIoU": [(5, 0.25)],
    }
    log.open(tmp_path, 5)  # again at the same place, and then anew
    log.close()
    assert curves(tmp_path)["loss/ce"] == [(4, 4.0), (5, 5.0)]
    log.open(tmp_path, 0)
    log.close()
    assert not any(curves(tmp_path).values())


def test_without_a_file_nothing_happens(tmp_path):
    log = Logger(progress=False)
    log.scalars({"x": 1.0}, 1)
    log.image("y", np.zeros((1, 1, 3), dtype=np.uint8), 1)
    log.close()


@pytest.mark.parametrize("when", ["write", "flush", "close"])
def test_a_full_disk_ends_the_log_not_the_training(tmp_path, monkeypatch, capsys, when):
    log = Logger(progress=False)
    log.open(tmp_path, 0)
    monkeypatch.setattr("utils.reporting.logger.FLUSH_SECONDS", -1.0)

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(log.writer, {"write": "write_event", "flush": "flush", "close": "close"}[when], fail)
    for iteration in range(3):
        log.scalars({"x": 1.0}, iteration)
    log.close()
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "note: --logdir cannot be written any more (No space left on device); no TensorBoard for the rest of this step"
    ]


def test_without_tensorboardx_a_run_goes_through_and_says_it_once(tmp_path, monkeypatch, capsys):
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorboardX"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)  # as if it were not installed
    monkeypatch.setattr(Logger, "missing_said", False)
    with thin.program():
        assert thin.launch(tmp_path, "--task 6-2 --step 0 1 --method FT") == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "tensorboardX" in line]
    assert said == [
        "note: tensorboardX is not installed, so no TensorBoard files are written; pip install tensorboardX"
    ]
    assert len(thin.rows(tmp_path)) == 2 and not list((tmp_path / "logs").rglob("events*"))


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--logdir: .*file/logs cannot be written \(.+\); name another folder"):
        Logger(progress=False).open(tmp_path / "file" / "logs")


def test_lines_go_to_stdout_and_bars_are_drawn_on_request(capsys):
    log = Logger(progress=False)
    log.info("a line")
    assert list(log.bar([1, 2], "title")) == [1, 2]
    out, err = capsys.readouterr()
    assert (out, err) == ("a line\n", "")
    bar = Logger(progress=True).bar([1, 2], "title", initial=1)
    bar.set_postfix({"ce": "0.5"})
    assert list(bar) == [1, 2]
    assert "title" in capsys.readouterr().err


def test_files_are_in_order_also_when_the_clock_is_set_back(tmp_path, monkeypatch):
    """A reader takes them by their names; the point of the later start then stands, and nothing is lost."""
    (tmp_path / "events.out.tfevents.1000000000.host.7.8").write_bytes(b"")  # a name of an earlier version
    for now, first, value in ((2e9, 0, 1.0), (1e9, 2, 2.0), (1.5e9, 4, 3.0)):
        monkeypatch.setattr(time, "time", lambda now=now: now)
        log = Logger(progress=False)
        log.open(tmp_path, first)
        for iteration in range(first + 1, 6):
            log.scalars({"x": value}, iteration)
        log.close()
    assert curves(tmp_path)["x"] == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 3.0)]


def test_what_is_flushed_is_on_the_disk(tmp_path):
    log = Logger(progress=False)
    log.flush()
    log.open(tmp_path, 0)
    log.scalars({"x": 1.0}, 1)
    log.flush()
    assert curves(tmp_path)["x"] == [(1, 1.0)]
    log.close()
