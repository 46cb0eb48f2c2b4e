"""Copy what a study or a search found to docs/results: tables, scores and figures, but no picture of an image and no checkpoint.

    python scripts/copy_results.py runs/shapes docs/results/shapes

Copies table.md, table.csv, scores.json and study.json of scripts/study.py, trials.csv and preset.yaml of scripts/tune.py, masks.csv
and pseudo_labels.csv of scripts/masks.py, and the figures that show curves. What shows pixels of images (report.html, the pictures in
results/, masks.png) stays where it is. Names of folders of the machine are cut off. Files of an earlier copy are replaced, others are
left alone.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from utils.errors import UserError  # noqa: E402  (the project is run from its folder, not installed)

#: Files that are copied, if they are there: text, and figures of curves alone.
FILES = (
    "table.md",
    "table.csv",
    "scores.json",
    "study.json",
    "trials.csv",
    "preset.yaml",
    "masks.csv",
    "pseudo_labels.csv",
)
FIGURES = ("miou_*.png", "trials.png")
#: A path that says where something is on a machine: absolute, or above the current folder.
_PLACE = re.compile(r"(?:/|\.\./|~)[^\0]*")


def without_places(value: Any) -> Any:
    """A document of JSON in which each text that is a path of a machine is the name of the file alone."""
    if isinstance(value, dict):
        return {key: without_places(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_places(item) for item in value]
    return Path(value).name if isinstance(value, str) and _PLACE.fullmatch(value) else value


def copy(source: Path, target: Path) -> list[str]:
    """Copy the results of a study or a search.

    Args:
        source: the folder that `--out` named.
        target: where the copies go; it is made.

    Returns:
        Names of the files.

    Raises:
        UserError: the folder has no results.
        OSError: a file cannot be read or written.
    """
    found = [source / name for name in FILES if (source / name).is_file()]
    found += [path for pattern in FIGURES for path in sorted(source.glob(pattern))]
    if not found:
        raise UserError(f"{source} holds no results; name the folder that --out of study.py, tune.py or masks.py named")
    target.mkdir(parents=True, exist_ok=True)
    for path in found:
        if path.suffix == ".json":
            document = without_places(json.loads(path.read_text(encoding="utf-8")))
            (target / path.name).write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        else:
            shutil.copyfile(path, target / path.name)
    return [path.name for path in found]


def main(argv: Sequence[str] | None = None) -> int:
    """Copy; exit code 2 for a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of a study or a search")
    parser.add_argument("target", type=Path, help="where the copies go, such as docs/results/shapes")
    arguments = parser.parse_args(argv)
    try:
        names = copy(arguments.source, arguments.target)
    except (UserError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{', '.join(names)} -> {arguments.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
