"""Unpacking of archives: what is written, what is refused before anything is, and what a second start does."""

import gzip
import hashlib
import io
import stat
import tarfile
import zipfile

import pytest

from dataset import archives
from dataset.archives import Archive
from dataset.verify import unpack_or_check
from utils.errors import UserError

KIND = Archive("set.tgz", "https://example.org/set", ("set/",), most_bytes=1000, most_files=10)
FILES = {"set/a.txt": b"one", "set/deep/b.txt": b"two" * 50, "readme.txt": b"not wanted"}


def tar_of(path, members=FILES, mode="w:gz", specials=()):
    """A tar archive of files by name, and of members that are no files."""
    with tarfile.open(path, mode) as packed:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            packed.addfile(info, io.BytesIO(content))
        for info in specials:
            packed.addfile(info)
    return path


def zip_of(path, members=FILES, specials=()):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members.items():
            packed.writestr(name, content)
        for info, content in specials:
            packed.writestr(info, content)
    return path


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


MAKERS = {
    "set.tar": lambda path, members=FILES: tar_of(path, members, "w"),
    "set.tgz": tar_of,
    "set.zip": zip_of,
}


@pytest.mark.parametrize("name", MAKERS)
def test_the_folders_that_are_wanted_are_unpacked(tmp_path, capsys, name):
    path, out = MAKERS[name](tmp_path / name), tmp_path / "out"
    assert archives.unpack(KIND, path, out) == []
    found = contents(out)
    assert found.pop(archives.RECORD)
    assert found == {"set/a.txt": FILES["set/a.txt"], "set/deep/b.txt": FILES["set/deep/b.txt"]}
    assert f"SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}" in capsys.readouterr().out
    assert archives.unpack(KIND, path, out) == []
    assert "unpacked before" in capsys.readouterr().out


def test_an_interrupted_unpacking_is_continued(tmp_path, monkeypatch):
    path, out = tar_of(tmp_path / "set.tgz"), tmp_path / "out"
    write = archives._write

    def stopped(member, target, source):
        if member.name.endswith("b.txt"):
            raise KeyboardInterrupt
        write(member, target, source)

    monkeypatch.setattr(archives, "_write", stopped)
    with pytest.raises(KeyboardInterrupt):
        archives.unpack(KIND, path, out)
    assert list(contents(out)) == ["set/a.txt"]
    first = (out / "set/a.txt").stat().st_mtime_ns
    (out / "set/deep").mkdir()
    (out / "set/deep/.b.txt.part").write_bytes(b"tw")  # of the file that was being written
    monkeypatch.setattr(archives, "_write", write)
    archives.unpack(KIND, path, out)
    assert (out / "set/a.txt").stat().st_mtime_ns == first
    assert (out / "set/deep/b.txt").read_bytes() == FILES["set/deep/b.txt"]
    assert not list(out.rglob("*.part"))


def test_a_file_of_another_size_is_written_anew(tmp_path):
    path, out = tar_of(tmp_path / "set.tgz"), tmp_path / "out"
    (out / "set").mkdir(parents=True)
    (out / "set/a.txt").write_bytes(b"on")
    archives.unpack(KIND, path, out)
    assert (out / "set/a.txt").read_bytes() == b"one"


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def zip_entry(name, mode):
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, mode << 16
    return info, b"/etc/passwd"


HOSTILE = {
    "parent": (lambda path: tar_of(path, {**FILES, "set/../../evil": b"x"}), r"'\.\.' is not allowed"),
    "absolute": (lambda path: tar_of(path, {**FILES, "/evil": b"x"}), "is an absolute path"),
    "symbolic link": (
        lambda path: tar_of(path, specials=[special("set/link", tarfile.SYMTYPE, "/etc")]), "is a link or a device",
    ),
    "link within": (
        lambda path: tar_of(path, specials=[special("set/link", tarfile.SYMTYPE, "a.txt")]), "is a link or a device",
    ),
    "hard link": (
        lambda path: tar_of(path, specials=[special("set/link", tarfile.LNKTYPE, "../../evil")]), "is a link or a device",
    ),
    "device": (lambda path: tar_of(path, specials=[special("set/null", tarfile.CHRTYPE)]), "is a link or a device"),
    "pipe": (lambda path: tar_of(path, specials=[special("set/pipe", tarfile.FIFOTYPE)]), "is a link or a device"),
    "control character": (lambda path: tar_of(path, {**FILES, "set/a\nb": b"x"}), "has a control character"),
    "backslash": (lambda path: tar_of(path, {**FILES, "set\\evil": b"x"}), "no name of a file on every system"),
    "drive": (lambda path: zip_of(path, {**FILES, "C:evil": b"x"}), "no name of a file on every system"),
    "too many bytes": (lambda path: tar_of(path, {**FILES, "set/c": bytes(1000)}), "unpacks to more than 1000 bytes"),
    "zip bomb": (lambda path: zip_of(path, {**FILES, "set/c": bytes(10**6)}), "unpacks to more than 1000 bytes"),
    "too many files": (
        lambda path: tar_of(path, {**FILES, **{f"set/{n}": b"" for n in range(9)}}), "has more than 10 members",
    ),
    "zip parent": (lambda path: zip_of(path, {**FILES, "set/../../evil": b"x"}), r"'\.\.' is not allowed"),
    "zip absolute": (lambda path: zip_of(path, {**FILES, "/evil": b"x"}), "is an absolute path"),
    "zip link": (
        lambda path: zip_of(path, specials=[zip_entry("set/link", stat.S_IFLNK | 0o777)]), "is a link or a device",
    ),
    "zip device": (
        lambda path: zip_of(path, specials=[zip_entry("set/null", stat.S_IFCHR | 0o666)]), "is a link or a device",
    ),
    "other archive": (lambda path: tar_of(path, {"other/a.txt": b"x"}), "has no file in set/; set.tgz comes from https"),
    "no archive": (lambda path: path.write_bytes(b"<html>not found</html>" * 100) and path, "is no archive"),
    "empty": (lambda path: path.write_bytes(b"") or path, "is no archive"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_and_other_files_are_refused_before_anything_is_written(tmp_path, case):
    make, message = HOSTILE[case]
    home = tmp_path / "home"
    home.mkdir()
    path = make(home / "set.tgz")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=message):
        archives.unpack(KIND, path, home / "out")
    assert contents(tmp_path) == before


def test_a_name_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "set.tar"
    tar_of(path, mode="w")
    with tarfile.open(path, "a") as packed:
        info = tarfile.TarInfo("set/a.txt")
        info.size = 4
        packed.addfile(info, io.BytesIO(b"evil"))
    with pytest.raises(UserError, match=r"has 'set/a\.txt' twice"):
        archives.unpack(KIND, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_link_below_the_folder_is_not_followed(tmp_path):
    path, out, elsewhere = tar_of(tmp_path / "set.tgz"), tmp_path / "out", tmp_path / "elsewhere"
    elsewhere.mkdir()
    out.mkdir()
    (out / "set").symlink_to(elsewhere)
    with pytest.raises(UserError, match=r"out/set is a link out of"):
        archives.unpack(KIND, path, out)
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_truncated_download_is_refused(tmp_path, share):
    content = tar_of(tmp_path / "set.tar", mode="w").read_bytes()
    packed = gzip.compress(content)
    path = tmp_path / "set.tgz"
    path.write_bytes(packed[: int(share * len(packed))])
    with pytest.raises(UserError, match="is no archive, or a damaged one"):
        archives.unpack(KIND, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_zip_is_refused(tmp_path):
    path = zip_of(tmp_path / "set.zip", {"set/a.bin": bytes(range(250))})
    content = bytearray(path.read_bytes())
    content[60] ^= 255
    path.write_bytes(content)
    with pytest.raises(UserError, match="is no archive, or a damaged one"):
        archives.unpack(KIND, path, tmp_path / "out")
    assert "set/a.bin" not in contents(tmp_path / "out")


def test_checksums(tmp_path):
    path, out = tar_of(tmp_path / "set.tgz"), tmp_path / "out"
    known = KIND._replace(md5=hashlib.md5(path.read_bytes()).hexdigest())
    assert unpack_or_check([(known, path)], out, verify_only=True) == []
    assert not out.exists()  # nothing is written
    assert archives.unpack(known, path, out) == []
    (problem,) = unpack_or_check([(KIND._replace(md5="0" * 32), path), (KIND, None)], out, verify_only=True)
    assert "the published set.tgz 000000" in problem and "https://example.org/set" in problem
    tar_of(path, {**FILES, "set/c.txt": b"new"})
    for verify_only in (True, False):
        with pytest.raises(UserError, match=r"has another SHA-256 than the set\.tgz that was unpacked"):
            unpack_or_check([(known, path)], out, verify_only)
    assert "set/c.txt" not in contents(out)


@pytest.mark.parametrize("content", ["{", "[]", '{"set.tgz": 3}'])
def test_a_damaged_record_is_named(tmp_path, content):
    path, out = tar_of(tmp_path / "set.tgz"), tmp_path / "out"
    out.mkdir()
    (out / archives.RECORD).write_text(content)
    with pytest.raises(UserError, match=r"\.cissarchives\.json is damaged; delete it"):
        archives.unpack(KIND, path, out)
