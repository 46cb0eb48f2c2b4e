"""Checkpoints: what is saved comes back, and no damage is taken for content."""

import errno
import io
import os
import pickle
import random
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from tests.support.paths import ROOT
from utils.checkpointing import checkpoint_files


def content():
    torch.manual_seed(0)
    return {
        "epoch": 3,
        "model_state": OrderedDict(
            (f"module.layer{i}.{kind}", torch.randn(7, 5)) for i in range(3) for kind in ("weight", "bias")
        ),
        "optimizer_state": {
            "state": {0: {"momentum_buffer": torch.randn(4)}},
            "param_groups": [{"lr": 0.1, "params": [0]}],
        },
        "nothing": None,
        "half": torch.randn(3).bfloat16(),
        "counts": torch.arange(4),
        "empty": torch.empty(0, 2),
        "mixed": [1, 2.5, "text", True, (1, 2)],
        "nan": float("nan"),
    }


@pytest.fixture
def saved(tmp_path):
    checkpoint_files.save(tmp_path / "deep" / "a.pth", content())
    return tmp_path / "deep" / "a.pth"


def refused(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a damaged file must not leave warnings of torch and numpy behind either
        with pytest.raises(ValueError, match="checkpoint") as caught:
            checkpoint_files.load(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


# ----------------------------------------------------------------- round trips


def test_what_is_saved_comes_back(saved):
    loaded = checkpoint_files.load(saved)
    assert checkpoint_files.digest(loaded) == checkpoint_files.digest(content())
    assert list(loaded) == list(content())  # no checksum, no mark
    assert torch.equal(loaded["half"], content()["half"])
    assert [path.name for path in saved.parent.iterdir()] == ["a.pth"]


def test_saving_twice_replaces_and_does_not_change_what_it_is_given(saved):
    state = {"epoch": 4}
    checkpoint_files.save(saved, state)
    assert state == {"epoch": 4}
    assert checkpoint_files.load(saved) == {"epoch": 4}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.ones(2), torch.ones(2, 1)),
        (torch.ones(2), torch.ones(2).double()),
        (torch.zeros(2), torch.tensor([0.0, -0.0])),
        ({"a": 1}, {"a": 2}),
        ({"a": 1}, {"b": 1}),
        ([1, [2]], [[1], 2]),
        (1, "1"),
        (1, True),
        (None, 0),
    ],
)
def test_digest_tells_apart(one, other):
    assert checkpoint_files.digest({"x": one}) != checkpoint_files.digest({"x": other})
    assert checkpoint_files.digest({"x": one}) == checkpoint_files.digest({"x": one})


def test_digest_does_not_see_the_order_of_keys_or_strides():
    square = torch.arange(6.0).reshape(2, 3)
    assert checkpoint_files.digest({"a": 1, "b": 2}) == checkpoint_files.digest({"b": 2, "a": 1})
    assert checkpoint_files.digest(square.t()) == checkpoint_files.digest(square.t().contiguous())


def test_prefixes():
    assert checkpoint_files.with_prefix({"cls.0.weight": 1}) == {"module.cls.0.weight": 1}
    assert checkpoint_files.without_prefix({"module.a": 1, "b.module.c": 2}) == {"a": 1, "b.module.c": 2}


# ---------------------------------------------------------------- damaged files


def test_truncated_files_are_recognised(saved, tmp_path):
    whole = saved.read_bytes()
    for tenth in range(10):
        cut = tmp_path / f"cut{tenth}.pth"
        cut.write_bytes(whole[: len(whole) * tenth // 10])
        assert "truncated or damaged" in refused(cut)
    cut.write_bytes(whole[:-1])
    refused(cut)


def test_flipped_bits_are_recognised_or_harmless(saved, tmp_path):
    """A flip is accepted only where the content is none the less the same: in the padding between records, say."""
    whole, digest = saved.read_bytes(), checkpoint_files.digest(content())
    generator = random.Random(0)
    found = {"refused": 0, "same": 0}
    damaged = tmp_path / "damaged.pth"
    for _ in range(400):
        flipped = bytearray(whole)
        for _ in range(generator.choice((1, 1, 1, 8, 64))):
            flipped[generator.randrange(len(whole))] ^= 1 << generator.randrange(8)
        damaged.write_bytes(flipped)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                assert checkpoint_files.digest(checkpoint_files.load(damaged)) == digest
                found["same"] += 1
            except ValueError as error:
                assert str(damaged) in str(error)
                found["refused"] += 1
    assert found["refused"] > 100, found


def test_every_flip_in_the_pickle_is_recognised_or_harmless(saved, tmp_path):
    """The structure lies in one record of a few hundred bytes, where random flips are rare."""
    whole, digest = saved.read_bytes(), checkpoint_files.digest(content())
    start = whole.index(b"data.pkl")
    damaged = tmp_path / "damaged.pth"
    for position in range(start, start + 1200, 3):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        damaged.write_bytes(flipped)
        try:
            assert checkpoint_files.digest(checkpoint_files.load(damaged)) == digest
        except ValueError as error:
            assert str(damaged) in str(error)


def test_a_lost_checksum_is_missed(tmp_path):
    torch.save({"epoch": 3, checkpoint_files.FORMAT: checkpoint_files.FORMAT_VERSION}, tmp_path / "a.pth")
    assert "checksum" in refused(tmp_path / "a.pth")
    torch.save({"epoch": 3, checkpoint_files.CHECKSUM: "0" * 64}, tmp_path / "a.pth")
    assert "checksum" in refused(tmp_path / "a.pth")
    for key in ("options", "task", "state"):  # which official files do not have: both marks were lost
        torch.save({"epoch": 3, key: {}}, tmp_path / "a.pth")
        assert "checksum" in refused(tmp_path / "a.pth")


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "a.pth"
    refused(path)
    for raw in (b"", b"\x80", b"PK\x03\x04", b"hello" * 1000, bytes(5000), os.urandom(3000)):
        path.write_bytes(raw)
        refused(path)
    path.unlink()
    path.mkdir()
    refused(path)
    for value in (torch.ones(3), [1, 2], "text", 7):
        torch.save(value, tmp_path / "b.pth")
        assert "not a dictionary" in refused(tmp_path / "b.pth")


# ---------------------------------------------------------------------- trust


class Malicious:
    def __reduce__(self):
        return os.mkdir, (os.environ["CISS_TEST_TARGET"],)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_is_not_run(tmp_path, monkeypatch, legacy):
    monkeypatch.setenv("CISS_TEST_TARGET", str(tmp_path / "owned"))
    torch.save({"model_state": Malicious()}, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    assert "could run code" in refused(tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps({"model_state": Malicious()}))
    refused(tmp_path / "b.pth")
    assert not (tmp_path / "owned").exists()


def test_objects_are_refused(tmp_path):
    torch.save({"model": torch.nn.Linear(1, 1)}, tmp_path / "a.pth")
    assert "Python objects" in refused(tmp_path / "a.pth")


def test_a_packed_bomb_is_refused_unread(tmp_path, monkeypatch):
    torch.save({"model_state": {"a": torch.zeros(1_000_000)}}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for record in plain.namelist():
            bomb.writestr(record, plain.read(record))
    assert (tmp_path / "bomb.pth").stat().st_size < 10_000
    monkeypatch.setattr(torch, "load", None)
    assert "unpack to more than its size" in refused(tmp_path / "bomb.pth")


@pytest.mark.parametrize("legacy", [False, True])
def test_official_files_load(tmp_path, legacy):
    """Plain tensors, no checksum, the score a numpy number; older torch wrote another container."""
    official = {
        "epoch": 30,
        "model_state": {"module.a": torch.ones(2)},
        "best_score": np.float64(0.5),
        "scores": np.float32(1),
    }
    torch.save(official, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
    loaded = checkpoint_files.load(tmp_path / "a.pth")
    assert loaded["best_score"] == 0.5 and torch.equal(loaded["model_state"]["module.a"], torch.ones(2))


def test_numpy_1_wrote_another_module_name(tmp_path):
    """In both directions: files of numpy 1 under numpy 2 and the reverse."""
    torch.save({"best_score": np.float64(0.25)}, tmp_path / "a.pth", _use_new_zipfile_serialization=False)
    raw = (tmp_path / "a.pth").read_bytes()
    mine, other = (b"numpy._core.", b"numpy.core.") if b"numpy._core." in raw else (b"numpy.core.", b"numpy._core.")
    assert mine in raw
    (tmp_path / "a.pth").write_bytes(raw.replace(mine, other))
    assert checkpoint_files.load(tmp_path / "a.pth")["best_score"] == 0.25


def test_no_warning_is_raised_with_warnings_as_errors(saved):
    code = f"from utils.checkpointing import checkpoint_files; checkpoint_files.load({str(saved)!r})"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --------------------------------------------------------------------- disks


class FullDisk(io.RawIOBase):
    """A file on a disk that takes so many bytes and no more."""

    def __init__(self, file, room, code):
        self.file, self.room, self.code = file, room, code

    def writable(self):
        return True

    def write(self, data):
        if len(data) > self.room:
            raise OSError(self.code, os.strerror(self.code))
        self.room -= len(data)
        return self.file.write(data)

    def fileno(self):
        return self.file.fileno()

    def flush(self):
        self.file.flush()

    def close(self):
        super().close()
        self.file.close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("room", [0, 100, 3000])
def test_a_failing_disk_keeps_the_last_good_file(saved, monkeypatch, code, room):
    before = saved.read_bytes()
    real_open = open
    monkeypatch.setattr("builtins.open", lambda *args: FullDisk(real_open(*args), room, code))
    with pytest.raises(OSError, match=os.strerror(code)) as caught:
        checkpoint_files.save(saved, content())
    monkeypatch.undo()
    assert caught.value.errno == code
    assert str(saved) in str(caught.value)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["a.pth"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_at_the_end_keeps_the_last_good_file(saved, monkeypatch, call):
    before = saved.read_bytes()

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="Input/output error"):
        checkpoint_files.save(saved, {"epoch": 5})
    monkeypatch.undo()
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["a.pth"]


def test_a_file_that_cannot_be_read_back_does_not_replace_a_good_one(saved, monkeypatch):
    before = saved.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda descriptor: os.truncate(descriptor, 500))  # the disk lost the end
    with pytest.raises(OSError, match="is damaged when it is read back"):
        checkpoint_files.save(saved, content())
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == ["a.pth"]


def test_what_a_killed_process_left_is_written_over_and_discarded(saved):
    aside = saved.with_name(".a.pth.writing")
    aside.write_bytes(b"half a file")
    checkpoint_files.save(saved, {"epoch": 5})
    assert checkpoint_files.load(saved) == {"epoch": 5}
    assert not aside.exists()
    aside.write_bytes(b"half a file")
    checkpoint_files.discard(saved)
    checkpoint_files.discard(saved)
    assert list(saved.parent.iterdir()) == []


def test_room_is_required(tmp_path, monkeypatch):
    checkpoint_files.require_space(tmp_path / "not" / "yet", 10)
    with pytest.raises(ValueError, match=r"MB free, the checkpoints need 1000000000000 MB; free some space"):
        checkpoint_files.require_space(tmp_path / "not" / "yet", 10**18)
    assert not (tmp_path / "not").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="not a folder"):
        checkpoint_files.require_space(tmp_path / "file" / "below", 1)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match="that can be written"):
        checkpoint_files.require_space(tmp_path, 1)
