"""Make a small data set of a large one: the images of VOC 2012 that show one of some classes, at a smaller size.

    python scripts/make_subset.py --data_root DATA --classes cat cow dog horse sheep --short_side 160 --out SMALL

DATA is what `--dataset voc` reads, or any folder of that layout. SMALL/PascalVOC12 gets the same layout, so that
`--dataset voc --data_root SMALL` reads it. An image belongs to it if its mask still shows one of the classes at the new size. The masks
keep all their values, those of other classes too. Images are reduced with antialiasing and stored as JPEG, masks take the nearest pixel.
An image whose short side has at most `--short_side` pixels is copied as it is, with its mask. The same input gives the same files.
"""

from __future__ import annotations

import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.cache import first_few
from dataset.files import open_mask, read_pair
from dataset.layout import read_lines
from dataset.source import FileSource
from dataset.voc import Voc
from utils.errors import UserError
from utils.options.spelling import Parser, suggestion

FOLDER = "PascalVOC12"
#: Of the images that are reduced.
JPEG_QUALITY = 80


def class_ids(names: Sequence[str]) -> list[int]:
    """Ids of the named classes of VOC; UserError for a name that VOC does not have."""
    for name in names:
        if name not in Voc.classes:
            raise UserError(f"--classes {name!r:.80} is no class of voc{suggestion(name, Voc.classes)}")
    return [Voc.classes.index(name) for name in names]


def check_folders(source: Path, out: Path) -> None:
    """Refuse a folder below the source, and one that has a data set already.

    Raises:
        UserError: names the folder.
    """
    inner, outer = os.path.realpath(out), os.path.realpath(source)
    if os.path.commonpath([inner, outer]) == outer:
        raise UserError(f"--out {out} lies in --data_root {source}, where nothing is written; name another folder")
    if os.path.lexists(out / FOLDER):
        raise UserError(f"{out / FOLDER} exists; name another folder with --out, or delete it")


def reduced_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    """Width and height with the given short side and the same proportions; those of a smaller image stay."""
    shorter = min(size)
    if shorter <= short_side:
        return size
    width, height = (max(short_side, round(side * short_side / shorter)) for side in size)
    return width, height


def write_pair(files: tuple[str, str], targets: tuple[Path, Path], ids: Sequence[int], short_side: int) -> bool:
    """Write an image and its mask at the smaller size, if the small mask shows one of the classes.

    Args:
        files: paths of the image and the mask.
        targets: paths of the new ones.
        ids: of the classes.
        short_side: in pixels.

    Returns:
        Whether they were written.

    Raises:
        UserError: a file cannot be read; names it.
    """
    mask = open_mask(files[1])
    size = reduced_size(mask.size, short_side)
    small = mask.resize(size, Image.Resampling.NEAREST)
    histogram = small.histogram()
    if not any(histogram[class_id] for class_id in ids):
        return False
    image, _ = read_pair(*files)
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
    if size == mask.size:
        for file, target in zip(files, targets):
            shutil.copyfile(file, target)
        return True
    form = "JPEG" if targets[0].suffix.lower() in (".jpg", ".jpeg") else "PNG"
    Image.fromarray(image).resize(size, Image.Resampling.LANCZOS).save(targets[0], format=form, quality=JPEG_QUALITY)
    small.save(targets[1], format="PNG", optimize=True)
    return True


def write_split(opts: Namespace, train: bool, ids: Sequence[int], folder: Path) -> None:
    """Write the images, masks and the split file of the training or the validation split into the folder.

    Raises:
        UserError: the split has files that cannot be used, or none of its images shows one of the classes.
    """
    source = FileSource(Voc(), opts.data_root, train)
    shown, problems = source.inspect(np.arange(len(source)))
    if any(problems):
        raise UserError(first_few([problem for problem in problems if problem]))
    candidates = np.flatnonzero(shown[:, ids].any(axis=1))
    base, kept = opts.data_root / FOLDER, []
    for index in tqdm(candidates, desc=source.split):
        files = source.files(int(index))
        places = [os.path.relpath(file, base) for file in files]
        if write_pair(files, (folder / places[0], folder / places[1]), ids, opts.short_side):
            image = os.path.relpath(places[0], Path("VOCdevkit", "VOC2012"))
            kept.append(f"/{Path(image).as_posix()} /{Path(places[1]).as_posix()}")
    if not kept:
        raise UserError(f"no image of the {source.title} shows one of the classes {', '.join(opts.classes)}")
    write_lines(folder / "splits" / f"{source.split}.txt", kept)
    print(f"{source.title}: {len(kept)} of {len(source)} images")


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """Write a split file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def make(opts: Namespace) -> None:
    """Write the whole subset; it appears complete or not at all.

    Raises:
        UserError: the options, the folders or a file of the data set cannot be used.
    """
    ids = class_ids(opts.classes)
    if opts.short_side < 1:
        raise UserError(f"--short_side {opts.short_side} is no size; give a number of pixels above 0")
    check_folders(opts.data_root, opts.out)
    aside = opts.out / f".{FOLDER}.writing"
    shutil.rmtree(aside, ignore_errors=True)  # of a start that was interrupted
    try:
        for train in (True, False):
            write_split(opts, train, ids, aside)
        original = opts.data_root / FOLDER / "splits" / "train.txt"
        if original.exists():  # VOC's own training images, a part of train_aug
            kept = set(read_lines(aside / "splits" / "train_aug.txt", Voc.hint))
            own = [" ".join(line.split()) for line in read_lines(original, Voc.hint)]
            write_lines(aside / "splits" / "train.txt", [line for line in own if line in kept])
        os.replace(aside, opts.out / FOLDER)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def parse(argv: Sequence[str] | None) -> Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data_root", type=Path, required=True, help=f"folder that contains {FOLDER}; only read")
    parser.add_argument("--classes", nargs="+", required=True, metavar="NAME", help="an image shows one of them")
    parser.add_argument("--short_side", type=int, required=True, help="of the new images, in pixels")
    parser.add_argument("--out", type=Path, required=True, help=f"folder in which {FOLDER} is made")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    opts = parse(argv)
    try:
        make(opts)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{opts.out / FOLDER} is complete")
    return 0


if __name__ == "__main__":
    sys.exit(main())
