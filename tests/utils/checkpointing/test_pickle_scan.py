"""Checkpoints that would exhaust, stop or change the program that reads them are refused before anything of them is built."""

import collections
import io
import pickle
import struct
import tarfile
import zipfile

import pytest
import torch

from tests.support.paths import ROOT
from utils.checkpointing import checkpoint_files, pickle_scan

#: Pickles of protocol 2 by hand: the beginning, the key under which the hostile part stands, the end.
BEGIN, KEY, END = b"\x80\x02}", b"X\x01\x00\x00\x00a", b"s."


def text(value):
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def number(value):
    raw = pickle.encode_long(value)
    return b"\x8a" + bytes([len(raw)]) + raw


def call(function, *arguments):
    """Instructions that call a function, its arguments given as instructions."""
    module, _, name = function.rpartition(".")
    return b"c" + f"{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"tR"


def dictionary(*keys):
    return b"}(" + b"".join(key + b"N" for key in keys) + b"u"


def storage(elements, key="0", kind="FloatStorage", label="storage", view=b""):
    return b"(" + text(label) + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + number(elements) + view + b"tQ"


#: The end of a tensor's arguments: it needs no gradient and has no hooks.
NO_HOOKS = b"\x89" + call("collections.OrderedDict")


def tensor(of, shape, strides, offset=0, rest=NO_HOOKS):
    def sizes(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    return call("torch._utils._rebuild_tensor_v2", of, number(offset), sizes(shape), sizes(strides), rest)


def write(path, value, legacy=False):
    """A file with {"a": value}, the value given as instructions, and the four numbers of a storage beside its pickle."""
    hostile = BEGIN + KEY + value + END
    if legacy:  # five pickles and the storages
        keys = ["0"] if b"Storage" in value else []
        before = [pickle.dumps(part, protocol=2) for part in (torch.serialization.MAGIC_NUMBER, 1001, {})]
        numbers = struct.pack("<q4f", 4, 0, 1, 2, 3) if keys else b""
        path.write_bytes(b"".join(before) + hostile + pickle.dumps(keys, protocol=2) + numbers)
        return path
    torch.save({"a": torch.arange(4.0)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, hostile if name.endswith("data.pkl") else content)
    return path


def refusal(path):
    with pytest.raises(ValueError, match="checkpoint") as caught:
        checkpoint_files.load(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


NESTED_KEY = b"N" + b"\x85" * 100_000
HALF = b"N" * 200_000
GOOD = storage(4)

HOSTILE = {
    "bytes by the gigabyte": (call("__builtin__.bytearray", number(1 << 32)), "could run code"),
    "a nested key": (dictionary(NESTED_KEY), "nested too deeply"),
    "a slow encoding": (call("_codecs.encode", text("ä" * 1000), text("punycode")), "unknown encoding"),
    "keys of one hash": (dictionary(*(number(k * (2**61 - 1)) for k in range(100))), "keys"),
    "keys that are not printed": (dictionary(text("a\x1b[2J")), "keys"),
    "a long key": (dictionary(text("a" * 1001)), "keys"),
    "a boolean as key": (dictionary(b"\x88"), "keys"),
    "a number as key": (dictionary(b"G" + struct.pack(">d", 0.5)), "keys"),
    "a large integer": (number(1 << 200), "128 bits"),
    "a class": (b"ccollections\nOrderedDict\n", "something else"),
    "a tuple of a class": (b"ccollections\nOrderedDict\n\x85", "something else"),
    "a storage": (GOOD, "something else"),
    "bytes": (call("_codecs.encode", text("x"), text("latin1")), "something else"),
    "a set": (b"\x8f", "EMPTY_SET"),
    "an object": (b"ctorch.nn.parameter\nParameter\n)\x81", "could run code"),
    "attributes": (call("collections.OrderedDict") + dictionary(text("pop")) + b"b", "attributes"),
    "attributes beside versions": (
        call("collections.OrderedDict") + dictionary(text("_metadata"), text("pop")) + b"b",
        "attributes",
    ),
    "a call of a result": (call("collections.OrderedDict") + b")R", "not a function"),
    "a call without arguments": (call("torch._utils._rebuild_tensor_v2"), "unexpected arguments"),
    "a storage of another size": (tensor(storage(5), [4], [1]), "another size than its record"),
    "a storage without record": (tensor(storage(4, "1"), [4], [1]), "another size than its record"),
    "a storage with a view": (tensor(storage(4, view=b"K\x01"), [4], [1]), "unknown type"),
    "a storage of another type": (tensor(storage(4, kind="ComplexFloatStorage"), [4], [1]), "could run code"),
    "a module's source": (tensor(storage(4, label="module"), [4], [1]), "unknown type"),
    "a larger tensor": (tensor(GOOD, [1 << 40], [1]), "larger than its storage"),
    "an offset": (tensor(GOOD, [4], [1], offset=1), "larger than its storage"),
    "strides": (tensor(GOOD, [2, 2], [4, 1]), "larger than its storage"),
    "repeated numbers": (tensor(GOOD, [1 << 30], [0]), "larger than the file"),
    "negative sizes": (tensor(GOOD, [-1], [1]), "invalid dimensions"),
    "too many sizes": (tensor(GOOD, [1] * 17, [1] * 17), "invalid dimensions"),
    "hooks": (
        tensor(GOOD, [4], [1], rest=NO_HOOKS + KEY + b"Ns"),
        "hooks",
    ),
    "a conjugated tensor": (
        tensor(GOOD, [4], [1], rest=NO_HOOKS + b"}" + text("conj") + b"\x88s"),
        "unexpected arguments",
    ),
    "a large number": (call("numpy.dtype", text("V1000000000"), b"\x89", b"\x88"), "unknown type"),
    "a number of many parts": (call("numpy.dtype", text("f8," * 1000), b"\x89", b"\x88"), "unknown type"),
    "a number of many bytes": (
        call("numpy._core.multiarray.scalar", call("numpy.dtype", text("f8"), b"\x89", b"\x88"),
             call("_codecs.encode", text("x" * 9), text("latin1"))),
        "unknown type",
    ),
    "a number with fields": (call("numpy.dtype", text("f8"), b"\x89", b"\x88") + b"(K\x03" + b"N" * 7 + b"tb", "attributes"),
    "a list in itself": (b"]q\x05h\x05a", "contains itself"),
    "a dictionary in itself": (b"}q\x05" + KEY + b"h\x05s", "contains itself"),
    "a finished list": (b"]q\x05\x85q\x06h\x05Na\x86", "contains itself"),
    "lists of lists": (b"]q\x00" + b"".join(b"](" + b"h" + bytes([k]) + (b"h" + bytes([k])) * 9 + b"eq" + bytes([k + 1])
                                              for k in range(40)), "nested too deeply"),
    "deep lists": (b"]" * 51 + b"a" * 50, "nested too deeply"),
    "text again and again": (text("x" * 10_000) + b"q\x00" + b"(" + b"h\x00" * 1000 + b"t\x86", "larger than the file"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_content_is_refused_before_it_is_built(tmp_path, name, monkeypatch):
    value, said = HOSTILE[name]
    monkeypatch.setattr(torch, "load", None)
    assert said in refusal(write(tmp_path / "a.pth", value))


@pytest.mark.parametrize("name", [name for name in HOSTILE if "record" not in HOSTILE[name][1]])
def test_hostile_content_in_the_old_format_is_refused_before_it_is_built(tmp_path, name, monkeypatch):
    value, said = HOSTILE[name]
    monkeypatch.setattr(torch, "load", None)
    assert said in refusal(write(tmp_path / "a.pth", value, legacy=True))


def accepted(legacy):
    """What the hostile parts are made of, as torch writes it, and what it becomes."""
    kind = (
        call("numpy.dtype", text("f8"), b"\x89", b"\x88") + b"(K\x03" + text("<") + b"NNN" + number(-1) * 2 + b"K\x00tb"
    )
    score = (
        call(f"numpy.{core}.multiarray.scalar", kind, call("_codecs.encode", text("\0" * 8), text("latin1")))
        for core in ("core", "_core")
    )
    four = storage(4, view=b"N" if legacy else b"")
    parameter = call(
        "torch._utils._rebuild_parameter", tensor(four, [4], [1]), b"\x88", call("collections.OrderedDict")
    )
    yield from ((value, 0.0) for value in score)
    yield tensor(four, [2, 2], [1, 0], offset=1), torch.tensor([[1.0, 1], [2, 2]])
    yield parameter, torch.nn.Parameter(torch.arange(4.0))
    yield dictionary(text("a" * 1000), text("é"), number(2**47)), dict.fromkeys(["a" * 1000, "é", 2**47])
    yield call("collections.OrderedDict") + dictionary(text("_metadata")) + b"b", {}
    yield call("collections.OrderedDict", b"](](" + KEY + b"K\x01ee"), {"a": 1}  # as Python 2 wrote it
    yield call("torch.Size", b"K\x02K\x03\x86"), torch.Size([2, 3])
    yield number((1 << 128) - 1), (1 << 128) - 1
    yield b"]" * 3 + b"a" * 2, [[[]]]
    yield b"]q\x05](h\x05h\x05e\x86", ([], [[], []])


@pytest.mark.parametrize("legacy", [False, True])
def test_what_the_hostile_parts_are_made_of_is_accepted(tmp_path, legacy):
    """What is refused above is refused for the one thing that is wrong with it."""
    for value, expected in accepted(legacy):
        loaded = checkpoint_files.load(write(tmp_path / "a.pth", value, legacy))["a"]
        assert type(loaded) is type(expected) or (expected, loaded) in ((0.0, 0.0), ({}, {}), ({"a": 1}, {"a": 1}))
        assert torch.equal(loaded, expected) if isinstance(expected, torch.Tensor) else loaded == expected


def test_the_instructions_are_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(pickle_scan, "MOST_INSTRUCTIONS", 1000)
    checkpoint_files.load(write(tmp_path / "a.pth", b"(" + b"N" * 900 + b"t"))
    assert "more than 1000 instructions" in refusal(write(tmp_path / "a.pth", b"(" + b"N" * 1000 + b"t"))


def test_items_are_counted_as_often_as_they_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(pickle_scan, "MOST_ITEMS", 1000)
    for times, fits in ((9, True), (11, False)):
        path = write(tmp_path / "a.pth", b"(" + b"N" * 99 + b"tq\x05(" + b"h\x05" * (times - 1) + b"t\x86")
        if fits:
            checkpoint_files.load(path)
        else:
            assert "nested too deeply" in refusal(path)


def test_tensors_that_torch_can_write_and_no_training_does(tmp_path):
    for value in (
        torch.eye(3).to_sparse(),
        torch.empty(3, device="meta"),
        torch.ones(3, dtype=torch.complex64).conj(),
        torch._neg_view(torch.ones(3)),
        torch.ones(3).to(torch.float8_e4m3fn),
        torch.zeros(1).expand(10**12),
    ):
        torch.save({"a": value}, tmp_path / "a.pth")
        assert "is refused: it holds" in refusal(tmp_path / "a.pth")


# ---------------------------------------------------------------- the containers


def test_a_tar_archive_is_not_unpacked(tmp_path):
    """Torch takes any file that tarfile opens for its oldest format, and unpacks parts of it: this one begins as another format."""
    start = write(tmp_path / "a.pth", b"N", legacy=True).read_bytes()
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    header = bytearray(raw.getvalue()[:512])
    header[: len(start)] = start
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:512]))
    path = tmp_path / "a.pth"
    path.write_bytes(bytes(header) + raw.getvalue()[512:])
    assert tarfile.is_tarfile(path)
    assert checkpoint_files.load(path) == {"a": None}


def test_a_plain_tar_archive_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.pth", "w") as archive:
        archive.add(ROOT / "README.md", "storages")
    assert "no checkpoint at all" in refusal(tmp_path / "a.pth")


def test_an_archive_with_two_pickles_is_refused(tmp_path):
    path = write(tmp_path / "a.pth", b"N")
    with zipfile.ZipFile(path, "a") as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        archive.writestr(name.upper(), BEGIN + KEY + HOSTILE["a set"][0] + END)
    assert "no checkpoint at all" in refusal(path)


def test_a_pickle_beyond_measure_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_files, "LARGEST_PICKLE", 100)
    assert "strange records" in refusal(write(tmp_path / "a.pth", text("x" * 100)))


def test_state_dicts_of_modules_load(tmp_path):
    """With the versions that `torch.save` writes for modules, and with the momenta of an optimiser."""
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    network(torch.ones(1, 3, 2, 2)).sum().backward()
    optimizer.step()
    content = {"model_state": network.state_dict(), "optimizer_state": optimizer.state_dict()}
    for legacy in (False, True):
        torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
        loaded = checkpoint_files.load(tmp_path / "a.pth")
        assert checkpoint_files.digest(loaded) == checkpoint_files.digest(content)
        assert isinstance(loaded["model_state"], collections.OrderedDict)
