"""Reading of images and masks, with messages for those that cannot be read. As a program, a worker of the parallel scan:

    python dataset/files.py < job.json > answer.json

The scan runs in processes (Pillow decodes under Python's global lock), which are started with this file as
their program. It imports only utils/errors.py of the program, and not torch, so that a process starts in a tenth of a second.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile

if __name__ == "__main__":  # started as a program, from any folder
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from utils.errors import UserError

#: Files per process of the scan; with fewer files a second process takes more time than it saves.
_FILES_PER_PROCESS = 500
_MAX_PROCESSES = 16

#: Formats that Pillow may read, whatever the name of the file. Some of its other readers start programs (EPS: Ghostscript).
_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF", "PPM")

#: Formats that keep every value of a mask, and the ways to pack a TIFF that do not.
_LOSSLESS = ("PNG", "BMP", "TIFF", "GIF", "PPM")
_LOSSY_TIFF = ("jpeg", "tiff_jpeg", "webp")

#: Modes of images with at most 8 bits a channel, and of grey images with 16. The range of values in other modes is not known.
_MODES_OF_8_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB")
_MODES_OF_16_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
_BITS_PER_SAMPLE = 258  # tag of a TIFF

_TOO_LARGE = "there is a limit of {} pixels: make it smaller, or cut it into parts"


class MaskColours(NamedTuple):
    """The mask values that colours stand for.

    Attributes:
        values: mask value by colour, packed as red · 65536 + green · 256 + blue.
        origin: file that gives them, for messages.
    """

    values: dict[int, int]
    origin: str


def _open(path: str, what: str) -> Image.Image:
    """The opened, not yet decoded image; UserError that names the file where that fails."""
    try:
        if stat.S_IFMT(os.stat(path).st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
            raise OSError("it is no regular file")  # reading a pipe might never end
        image = Image.open(path, formats=_FORMATS)
    except FileNotFoundError:
        raise UserError(f"{what} {path} does not exist") from None
    except Image.DecompressionBombError:
        raise UserError(f"{what} {path} has too many pixels; {_TOO_LARGE.format(Image.MAX_IMAGE_PIXELS)}") from None
    except Exception as error:  # decoders raise a dozen types on damaged files
        raise UserError(f"{what} {path} cannot be read: {_reason(error, path)}") from None
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and image.width * image.height > limit:
        raise UserError(f"{what} {path} has {image.width} x {image.height} pixels; {_TOO_LARGE.format(limit)}")
    return image


def _reason(error: Exception, path: str) -> str:
    """The message of the decoder without the path, which the caller's message contains."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.replace(repr(path), "the file")


def _decode(image: Image.Image, path: str, what: str) -> None:
    try:
        image.load()
    except Exception as error:  # as above
        raise UserError(f"{what} {path} is damaged: {_reason(error, path)}") from None


def open_mask(path: str, colours: MaskColours | None = None) -> Image.Image:
    """The decoded mask at `path`: 8 bits, one channel, palette or grey, each value a class id.

    Args:
        path: of the file.
        colours: of the classes; the mask may then be RGB, RGBA without transparency, or have a palette, and its colours count.
    """
    mask = _open(path, "mask")
    packing = str(mask.info.get("compression", "")) if mask.format == "TIFF" else ""
    if mask.format not in _LOSSLESS or packing in _LOSSY_TIFF:
        shown = f"{mask.format} ({packing})" if packing else mask.format
        raise UserError(
            f"mask {path} is stored as {shown}, which changes class ids; save it anew from its source as PNG"
        )
    if mask.mode not in ("P", "L") and (colours is None or mask.mode not in ("RGB", "RGBA")):
        remedy = "; masks of colours need the colours of the classes" if mask.mode in ("RGB", "RGBA") else ""
        raise UserError(
            f"mask {path} has the mode {mask.mode!r}: a mask is an 8-bit image of one channel (palette or grey) "
            f"whose values are class ids{remedy}"
        )
    _decode(mask, path, "mask")
    return mask if colours is None or mask.mode == "L" else _by_colour(mask, path, colours)


def _by_colour(mask: Image.Image, path: str, colours: MaskColours) -> Image.Image:
    """The grey mask of class ids that a mask of colours stands for; UserError names the first colour without a class."""
    if mask.mode == "RGBA" and mask.getchannel("A").histogram()[255] < mask.width * mask.height:
        raise UserError(f"mask {path} has transparent pixels, which have no class; save it without transparency")
    pixels = np.asarray(mask.convert("RGB"), dtype=np.int32)
    packed = pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]  # H×W
    known = np.array(sorted(colours.values), dtype=np.int32)
    position = np.searchsorted(known, packed).clip(max=len(known) - 1)
    foreign = known[position] != packed
    if foreign.any():
        row, column = np.unravel_index(int(foreign.argmax()), foreign.shape)
        shown = tuple(pixels[row, column].tolist())
        raise UserError(
            f"mask {path} has the colour {shown} at column {column}, row {row} (and {int(foreign.sum()) - 1} more pixels of "
            f"unknown colours), which is the colour of no class in {colours.origin}"
        )
    values = np.array([colours.values[colour] for colour in known.tolist()], dtype=np.uint8)
    return Image.fromarray(values[position])


def open_image(path: str, size: tuple[int, int] | None) -> Image.Image:
    """The image at `path`, not yet decoded, if its size (width, height) is that of its mask (None: not known).

    Masks belong to the pixels as they are stored, and the official program ignores the EXIF orientation. This program ignores it
    too, unless only the rotated image has the size of the mask; then the image is rotated.
    """
    image = _open(path, "image")
    _check_mode(image, path)
    if size is None or image.size == size:
        return image
    stored = image.size
    if stored == size[::-1]:
        _decode(image, path, "image")
        image = ImageOps.exif_transpose(image)
    if image.size != size:
        raise UserError(
            f"image {path} has {stored[0]} x {stored[1]} pixels, its mask {size[0]} x {size[1]}: they must be equal"
        )
    return image


def _check_mode(image: Image.Image, path: str) -> None:
    """UserError for an image whose values have no known range: converted, they would all be black or white."""
    if image.mode not in _MODES_OF_8_BITS + _MODES_OF_16_BITS:
        raise UserError(
            f"image {path} has the mode {image.mode!r}, whose values have no known range; save it with 8 or 16 bits a channel"
        )
    bits = image.tag_v2.get(_BITS_PER_SAMPLE, (16,)) if isinstance(image, TiffImageFile) else (16,)
    if image.mode in _MODES_OF_16_BITS and bits[0] != 16:
        raise UserError(f"image {path} has {bits[0]} bits a channel; save it with 8 or 16")


def _colours(image: Image.Image, path: str) -> np.ndarray:
    """(H, W, 3) uint8 of an opened image. Of 16 bits of grey the high byte is kept, as Pillow does with 16 bits of colour."""
    _decode(image, path, "image")
    if image.mode in _MODES_OF_16_BITS:
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)  # H×W → H×W×3
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def read_pair(image_path: str, mask_path: str, colours: MaskColours | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Image (H, W, 3) and mask (H, W), uint8; UserError that names the file for one that cannot be used."""
    mask = open_mask(mask_path, colours)
    image = open_image(image_path, mask.size)
    return _colours(image, image_path), np.array(mask)


def read_picture(path: str) -> np.ndarray:
    """A picture without a mask, upright as its EXIF orientation says: (H, W, 3) uint8; UserError that names the file."""
    image = open_image(path, None)
    _decode(image, path, "image")
    return _colours(ImageOps.exif_transpose(image), path)


def inspect_pair(
    image_path: str, mask_path: str, valid: frozenset[int], decode: bool, colours: MaskColours | None = None
) -> tuple[list[int], str]:
    """The ids in a mask, and the problem of the mask or its image ("" if there is none).

    Args:
        valid: values that a mask may have.
        decode: read the whole image, not only its header, and read it even if the mask is bad; a line for each bad file then.
        colours: of the classes, for masks that are stored as colours.
    """
    shown, size, problems = [], None, []
    try:
        mask = open_mask(mask_path, colours)
        size = mask.size
        shown = [value for value, count in enumerate(mask.histogram()) if count]
        foreign = [value for value in shown if value not in valid]
        if foreign:
            raise UserError(f"mask {mask_path} has the value {foreign[0]}, which is not a class of the data set")
    except UserError as error:
        problems.append(str(error))
    if decode or not problems:
        try:
            image = open_image(image_path, size)
            if decode:
                _decode(image, image_path, "image")
        except UserError as error:
            problems.append(str(error))
    return ([], "\n".join(problems)) if problems else (shown, "")


def inspect(
    pairs: list[tuple[str, str]],
    valid: frozenset[int],
    decode: bool = False,
    processes: int | None = None,
    colours: MaskColours | None = None,
) -> list[tuple[list[int], str]]:
    """`inspect_pair` of every pair, in order, by as many processes as the machine and the work allow."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = processes or max(1, min(cores, _MAX_PROCESSES, len(pairs) // _FILES_PER_PROCESS))
    if processes == 1:
        return [inspect_pair(*pair, valid, decode, colours) for pair in pairs]
    shared = {"valid": sorted(valid), "decode": decode, "colours": colours and [*colours.values.items()]}
    shared["origin"] = colours.origin if colours else ""
    jobs = [{"pairs": pairs[k::processes], **shared} for k in range(processes)]
    command = [sys.executable, os.path.abspath(__file__)]
    workers = [
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C reaches only the main process, which then ends them
        )
        for _ in jobs
    ]
    found: list = [None] * len(pairs)
    try:
        for worker, job in zip(workers, jobs):
            assert worker.stdin is not None
            json.dump(job, worker.stdin)
            worker.stdin.close()
        for k, worker in enumerate(workers):
            assert worker.stdout is not None
            found[k::processes] = json.load(worker.stdout)
    except (BrokenPipeError, ValueError):
        raise OSError("a process that reads the masks died: is the memory full?") from None
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
            if worker.stdout is not None:
                worker.stdout.close()
    return [(shown, problem) for shown, problem in found]


def main() -> None:
    """Read a job from stdin and write its result to stdout. Stop requests are ignored; the process ends with the main process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent, job, found = os.getppid(), json.load(sys.stdin), []
    valid = frozenset(job["valid"])
    colours = MaskColours(dict(job["colours"]), job["origin"]) if job.get("colours") else None
    for image_path, mask_path in job["pairs"]:
        if os.getppid() != parent:
            return
        found.append(inspect_pair(image_path, mask_path, valid, job["decode"], colours))
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
