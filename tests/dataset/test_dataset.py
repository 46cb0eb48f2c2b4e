"""dataset/: selection against the official counts, the cached scan, samples, and the official layouts."""

import gzip
import json
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import dataset
from dataset import cache, files, tasks
from dataset.base import select
from dataset.transform import FullImage, denormalise
from tests.support.paths import FACTS
from tests.support.tiny_folder import build, labels, options, save_image, save_mask, write_folder
from utils.errors import UserError


@pytest.fixture
def root(tmp_path):
    return write_folder(tmp_path)


# ---- selection


@pytest.fixture(scope="module")
def voc_presence():
    with gzip.open(FACTS / "voc_classes.json.gz", "rt") as stream:
        splits = json.load(stream)
    tables = {}
    for split, images in splits.items():
        tables[split] = np.zeros((len(images), 256), dtype=bool)
        for row, ids in zip(tables[split], images.values()):
            row[ids] = True
    return tables


@pytest.mark.parametrize("setting", json.loads((FACTS / "voc_counts.json").read_text()).items())
def test_official_counts(voc_presence, setting):
    (name, overlap), expected = setting[0].split(), setting[1]
    for step, (train, seen) in enumerate(zip(expected["train_aug"], expected["val_seen"])):
        task = tasks.load("voc", name, step)
        allowed = None if overlap == "overlap" else [0, *task.order]
        assert len(select(voc_presence["train_aug"], [c for c in task.new if c], allowed)) == train
        assert len(select(voc_presence["val"], [c for c in task.seen if c])) == seen


def test_select_by_hand():
    presence = np.zeros((4, 256), dtype=bool)
    for row, ids in zip(presence, ([0, 1, 255], [0, 1, 2], [2, 3], [0, 255])):
        row[ids] = True
    assert select(presence, [1]).tolist() == [0, 1]
    assert select(presence, [1, 3]).tolist() == [0, 1, 2]
    assert select(presence, [1], allowed=[0, 1]).tolist() == [0]
    assert select(presence, [2], allowed=[0, 1, 2]).tolist() == [1]
    assert select(presence, [1, 2], excluded=[3]).tolist() == [0, 1]
    assert select(presence, [2], allowed=[0, 1, 2], excluded=[1]).tolist() == []


# ---- labels, splits and samples


@pytest.mark.parametrize(
    ("step", "overlap", "train", "val", "test"),
    [
        (0, True, [0, 1, 2, 3, 5, 7, 8, 9], [0, 1], [0, 1]),
        (0, False, [0, 1, 2, 8, 9], [0, 1], [0, 1]),
        (1, True, [6, 7], [3], [0, 1, 3]),
        (2, True, [3, 4, 5], [1, 2], [0, 1, 2, 3]),
        (2, False, [3, 4, 5], [1, 2], [0, 1, 2, 3]),
    ],
)
def test_images_of_a_step(root, step, overlap, train, val, test):
    splits = build(root, step, overlap=overlap)
    assert [data.indices.tolist() for data in splits] == [train, val, test]


@pytest.mark.parametrize(
    ("step", "overlap", "train"), [(0, True, [0, 1, 2, 3, 5, 7, 8, 9]), (1, True, [6]), (2, False, [4])]
)
def test_no_training_image_shows_an_old_class(root, step, overlap, train):
    splits, with_old = build(root, step, overlap=overlap, exclude_old=True), build(root, step, overlap=overlap)
    assert splits.train.indices.tolist() == train
    assert splits.val.indices.tolist() == with_old.val.indices.tolist()
    assert splits.test.indices.tolist() == with_old.test.indices.tolist()
    examined, _ = dataset.examined(
        options(root, overlap=overlap, exclude_old=True), dataset.load_task(options(root), step), train=True
    )
    assert examined.indices.tolist() == train


def test_a_step_whose_images_all_show_an_old_class_is_refused(root):
    (root / "order.json").write_text('{"name": "3-1", "steps": [[0, 1, 2, 4], [3]]}')
    split = root / "splits" / "train.txt"
    split.write_text("".join(f"{name}\n" for name in split.read_text().split() if name != "train4"))
    with pytest.raises(UserError, match=r"one of the classes \[3\] and no class of an earlier step \(--exclude_old\)"):
        build(root, 1, exclude_old=True, task_file=str(root / "order.json"))


def test_labels_of_a_step(root):
    splits = build(root, 1, crop_val=False)  # classes in learning order: 0, 2, 1 | 4 | 3
    assert labels(splits.train) <= {0, 3, 255}
    assert labels(splits.val) == {0, 3, 255}
    assert labels(splits.test) == {0, 1, 2, 3, 255}
    image, mask = splits.test[1]  # val1 shows 0 2 3 255 in bands of three columns; 3 is a class of the future
    assert image.shape == (3, 20, 24)
    assert image.dtype == torch.float32
    assert mask.dtype == torch.uint8
    assert mask[0].tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0, 255, 255, 255] * 2
    stored = np.asarray(Image.open(root / "images" / "val1.png"))
    assert np.array_equal(denormalise(image).permute(1, 2, 0).numpy(), stored)


def test_masking_options(root):
    assert labels(build(root, 1, crop_val=False, no_mask=True).val) == {0, 3, 255}
    seen = build(root, 2, crop_val=False, no_mask=True).val
    assert labels(seen) == labels(build(root, 2, crop_val=False, data_masking="current+old").val) == {0, 1, 4, 255}
    assert labels(build(root, 2, crop_val=False, data_masking="new").val) == {0, 4, 255}
    assert labels(build(root, 2, crop_val=False, disable_background=True).val) == {4, 255}
    assert labels(build(root, 2, crop_val=False, ignore_test_bg=True).test) == {1, 2, 3, 4, 255}
    with pytest.raises(ValueError, match="--data_masking 'all'"):
        build(root, 1, data_masking="all")


@pytest.mark.parametrize(
    ("masking", "expected"),
    # learning order at step 1: 0, 2, 1 | 4, then 3: the mask of train7 shows background, 1, 4 and 255
    [("current", [0, 0, 3, 255]), ("current+old", [0, 2, 3, 255]), ("new", [0, 255, 3, 255])],
)
def test_data_masking_on_a_mask(root, masking, expected):
    train = build(root, 1, data_masking=masking).train
    train.transform = FullImage()
    position = train.indices.tolist().index(7)
    assert train[position][1][0, ::3][:4].tolist() == expected


def test_validation_choices(root):
    crossed = build(root, 0, cross_val=True)
    assert len(crossed.train) == 6
    assert len(crossed.val) == 2
    assert sorted([*crossed.train.indices, *crossed.val.indices]) == [0, 1, 2, 3, 5, 7, 8, 9]
    assert torch.equal(crossed.val[0][0], crossed.val[0][0])
    assert crossed.val.transform.__class__.__name__ == "EvalTransform"
    again = build(root, 0, cross_val=True)
    assert np.array_equal(again.val.indices, crossed.val.indices)
    assert build(root, 1, val_on_trainset=True).test.indices.tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9]


def test_test_on_val_keeps_four_fifths_to_train_and_a_fifth_to_evaluate(root):
    """Each list is shuffled by RandomState(1), whatever the seed; the first 80 % train, the last 20 % are evaluated."""
    whole = build(root, 0)
    expected = []
    for part, first in ((whole.train, True), (whole.val, False), (whole.test, False)):
        images = part.indices.tolist()
        np.random.RandomState(1).shuffle(images)
        cut = int(0.8 * len(images))
        expected.append(images[:cut] if first else images[cut:])
    for seed in (42, 7):
        splits = build(root, 0, test_on_val=True, random_seed=seed)
        assert [part.indices.tolist() for part in splits] == expected
    assert [len(part) for part in splits] == [6, 1, 1]
    trained_on = build(root, 1, test_on_val=True, val_on_trainset=True).test.indices.tolist()
    seen = build(root, 1, val_on_trainset=True).test.indices.tolist()
    np.random.RandomState(1).shuffle(seen)
    assert trained_on == seen[: int(0.8 * len(seen))]  # training images, of which the first 80 %
    crossed = build(root, 0, test_on_val=True, cross_val=True)
    assert sorted([*crossed.train.indices, *crossed.val.indices]) == sorted(expected[0])


def test_test_on_val_names_a_set_that_is_too_small(root):
    (root / "splits" / "train.txt").write_text("train0\n")
    with pytest.raises(ValueError, match=r"--test_on_val.* 80 % of 1 image\(s\) of the split train"):
        build(root, 0, test_on_val=True)


def test_offline_and_names(root):
    opts = options(root, task="offline", task_file=None)
    assert dataset.load_task(opts, 0).num_total == 5
    assert dataset.class_names(opts) == ("background", "cat", "dog", "cow", "horse")
    splits = dataset.build(opts, dataset.load_task(opts, 0))
    assert len(splits.train) == 10
    assert splits.train.files(3) == (str(root / "images" / "train3.png"), str(root / "masks" / "train3.png"))


def test_samples_do_not_depend_on_workers(root):
    train = build(root, 0).train
    train.set_epoch(3)
    alone = [train[i] for i in range(len(train))]
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert all(torch.equal(a, b) for i in (4, 1) for a, b in zip(train[i], alone[i]))
    assert torch.equal(torch.get_rng_state(), before)

    loader = DataLoader(train, batch_size=2, num_workers=2, persistent_workers=True)
    for epoch in (3, 4, 3):
        train.set_epoch(epoch)
        images = torch.cat([batch[0] for batch in loader])
        assert torch.equal(images, torch.stack([image for image, _ in alone])) == (epoch == 3)
    other_seed = build(root, 0, random_seed=43).train
    other_seed.set_epoch(3)
    assert not torch.equal(other_seed[0][0], alone[0][0])


def test_crops_differ_by_step_epoch_and_purpose(root):
    """Of one image, which both steps show; each stream gives the same crop whenever it is chosen again."""
    first, second = (build(root, step).train for step in (0, 1))
    (index, *_) = sorted(set(first.indices) & set(second.indices))

    def crop(data, *stream):
        data.set_epoch(*stream)
        return data[data.indices.tolist().index(index)][0]

    streams = [(0,), (1,), (0, "thresholds"), (1, "thresholds"), (0, "initialisation")]
    crops = [crop(data, *stream) for data in (first, second) for stream in streams]
    assert not any(torch.equal(a, b) for i, a in enumerate(crops) for b in crops[:i])
    again = [crop(data, *stream) for data in (first, second) for stream in streams]
    assert all(torch.equal(a, b) for a, b in zip(crops, again, strict=True))
    assert torch.equal(crop(first, 0, "training"), crops[0])
    assert torch.equal(build(root, 0).train[first.indices.tolist().index(index)][0], crops[0])  # epoch 0 is the default


# ---- the scan


def count_scans(monkeypatch):
    calls = []
    inspect = files.inspect
    monkeypatch.setattr("dataset.source.inspect", lambda *args, **kw: calls.append(1) or inspect(*args, **kw))
    return calls


def test_scan_is_cached_and_sees_changes(root, monkeypatch):
    calls = count_scans(monkeypatch)
    assert len(build(root, 1).train) == 2
    assert len(calls) == 2
    assert {path.suffix for path in (root / cache.FOLDER).iterdir()} <= {".scan", ".lock"}
    for step in range(3):
        build(root, step)
    assert len(calls) == 2

    save_mask(root / "masks" / "train0.png", [4])  # another class
    assert len(build(root, 1).train) == 3
    assert len(calls) == 3
    (root / "splits" / "train.txt").write_text("train6\ntrain0.png\n")
    assert build(root, 1).train.indices.tolist() == [0, 1]
    with (root / "classes.txt").open("a") as stream:  # more values are allowed: what was found may differ
        stream.write("sheep\n")
    build(root, 1)
    assert len(calls) == 6


#: Fingerprint, its digest and table of a cache file, each of which is spoilt in some ways.
DAMAGES = {
    "empty": lambda raw: b"",
    "cut": lambda raw: raw[:-1],
    "cut to its line": lambda raw: raw[: raw.index(b"\n") + 1],
    "a byte more": lambda raw: raw + b"x",
    "one bit": lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]),
    "another fingerprint": lambda raw: b"x" + raw[1:],
    "no line": lambda raw: b"x" * (1 << 20),
    "a row less": lambda raw: cache._header(raw.split()[0].decode(), raw[-32:]) + raw[-32:],
    "a pickle": lambda raw: pickle.dumps({"key": 1}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_cache_is_replaced(root, monkeypatch, damage):
    build(root)
    for path in (root / cache.FOLDER).glob("*.scan"):
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
    calls = count_scans(monkeypatch)
    assert len(build(root).train) == 8
    assert len(calls) == 2
    build(root)
    assert len(calls) == 2


def test_cache_beside_read_only_data(root, tmp_path_factory, monkeypatch):
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    root.chmod(0o555)
    try:
        build(root)
        assert not (root / cache.FOLDER).exists()
        assert list((home / "cisscache").glob("folder-train-*.scan"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(root / "classes.txt"))  # nowhere to write: scan every time
        assert len(build(root).train) == 8
    finally:
        root.chmod(0o755)


def test_two_jobs_scan_once(tmp_path):
    scans, found = [], []

    def compute():
        scans.append(1)
        return np.eye(3, 256, dtype=bool)

    jobs = [
        threading.Thread(target=lambda: found.append(cache.cached(tmp_path, "x", "key", 3, compute))) for _ in range(8)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert len(scans) == 1
    assert all(np.array_equal(table, np.eye(3, 256, dtype=bool)) for table in found)


def test_processes_find_what_one_finds(root):
    pairs = [(str(root / "images" / f"train{n}.png"), str(root / "masks" / f"train{n}.png")) for n in range(10)]
    (root / "masks" / "train4.png").unlink()
    valid = frozenset([0, 1, 2, 3, 255])
    alone = files.inspect(pairs, valid, processes=1)
    assert alone[3] == ([0, 2, 3, 255], "")
    assert "train4.png does not exist" in alone[4][1]
    assert "value 4" in alone[6][1]
    assert files.inspect(pairs, valid, processes=3) == alone
    assert files.inspect(pairs, valid, decode=True, processes=2) == alone


def test_the_scan_process_is_light():
    code = f"import importlib.util as u, sys; s = u.spec_from_file_location('f', {files.__file__!r}); "
    code += "m = u.module_from_spec(s); s.loader.exec_module(m); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="nothing says when a process ignores signals")
def test_the_scan_process_leaves_stop_requests_to_the_main_process(root):
    worker = subprocess.Popen(
        [sys.executable, files.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    ignored = 0
    while worker.poll() is None and not (ignored >> (signal.SIGINT - 1) & ignored >> (signal.SIGTERM - 1) & 1):
        status = Path(f"/proc/{worker.pid}/status").read_text()
        ignored = int(status.split("SigIgn:")[1].split()[0], 16)
        time.sleep(0.01)
    worker.send_signal(signal.SIGINT)
    worker.send_signal(signal.SIGTERM)
    pair = [str(root / "images" / "train0.png"), str(root / "masks" / "train0.png")]
    answer, said = worker.communicate(json.dumps({"pairs": [pair], "valid": [0, 1, 255], "decode": True}), timeout=60)
    assert (worker.returncode, json.loads(answer), said) == (0, [[[0, 1, 255], ""]], "")


def test_a_scan_process_that_dies_is_reported(root, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    pairs = [(str(root / "images" / "train0.png"), str(root / "masks" / "train0.png"))] * 4
    with pytest.raises(OSError, match="died"):
        files.inspect(pairs, frozenset(range(256)), processes=2)


# ---- official layouts


def test_voc_layout(tmp_path):
    base = tmp_path / "PascalVOC12"
    for folder in ("SegmentationClassAug", "splits", "VOCdevkit/VOC2012/JPEGImages"):
        (base / folder).mkdir(parents=True)
    for name, ids in (("a", [1]), ("b", [20]), ("c", [1, 20])):
        save_image(base / "VOCdevkit/VOC2012/JPEGImages" / f"{name}.jpg", 0)
        save_mask(base / "SegmentationClassAug" / f"{name}.png", ids)
    line = "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png\n"
    (base / "splits/train_aug.txt").write_text(line.format("a") + line.format("b") + line.format("c"))
    (base / "splits/val.txt").write_text(line.format("b"))
    opts = options(tmp_path, dataset="voc", task="19-1", task_file=None)
    splits = dataset.build(opts, dataset.load_task(opts, 1))
    assert [len(data) for data in splits] == [2, 1, 1]
    assert labels(splits.val) == {0, 20, 255}
    assert len(dataset.class_names(opts)) == 21
    for bad, message in (("/JPEGImages/a.jpg", "path of its mask"), ("/../x /SegmentationClassAug/a.png", "'..'")):
        (base / "splits/val.txt").write_text(bad)
        with pytest.raises(ValueError, match=message):
            dataset.build(opts, dataset.load_task(opts, 1))


def test_ade_layout(tmp_path):
    base = tmp_path / "ADEChallengeData2016"
    for split, shown in (("training", [[1], [101]]), ("validation", [[150]])):
        (base / "images" / split).mkdir(parents=True)
        (base / "annotations" / split).mkdir(parents=True)
        for number, ids in enumerate(shown):
            save_image(base / "images" / split / f"{number}.jpg", number)
            save_mask(base / "annotations" / split / f"{number}.png", ids)
    opts = options(tmp_path, dataset="ade", task="100-50", task_file=None)
    splits = dataset.build(opts, dataset.load_task(opts, 1))
    assert [len(data) for data in splits] == [1, 1, 1]
    assert labels(splits.test) == {0, 150, 255}
    assert len(dataset.class_names(opts)) == 151


def test_cityscapes_layout(tmp_path):
    layout = dataset.DATASETS["cityscapes_domain"]
    for domain, city in enumerate(layout.domains):
        part = f"{'train' if domain < 18 else 'val'}/{city}"
        for kind in ("leftImg8bit", "gtFine"):
            (tmp_path / kind / part).mkdir(parents=True)
        for number in range(5):
            save_image(tmp_path / "leftImg8bit" / part / f"{city}_{number}_leftImg8bit.png", number)
            save_mask(tmp_path / "gtFine" / part / f"{city}_{number}_gtFine_labelIds.png", [7, 33, 3, 26])
    opts = options(tmp_path, dataset="cityscapes_domain", task="11-1", task_file=None, overlap=False)
    first = dataset.build(opts, dataset.load_task(opts, 0))
    assert [len(data) for data in first] == [44, 11, 11]
    last = dataset.build(opts, dataset.load_task(opts, 10))
    assert [len(data) for data in last] == [4, 1, 21]
    assert all("munster" in path for path in last.train.files(0))
    assert not {data.files(i) for data in (first.train, last.train) for i in range(len(data))} & {
        last.test.files(i) for i in range(len(last.test))
    }
    assert labels(last.test) == {0, 13, 18, 255}  # road, car, bicycle; label ids 0 and 3 are ignored
    assert dataset.class_names(opts)[18] == "bicycle"
    assert dataset.check_data(opts, dataset.load_task(opts, 10)) == []
    for city in (
        "munster",
        "aachen",
        "aachen",
    ):  # one of each that is left; aachen is not of this step, but all masks are read
        next((tmp_path / "gtFine").rglob(f"{city}_*.png")).unlink()
    problems = dataset.check_data(opts, dataset.load_task(opts, 10))
    assert len(problems) == 3 and all("does not exist" in problem for problem in problems)


def test_unknown_dataset(root):
    with pytest.raises(ValueError, match="--dataset 'coco' is not one of voc"):
        build(root, dataset="coco")
