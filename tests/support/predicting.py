"""scripts/predict.py as a user starts it, and what it leaves."""

from pathlib import Path

from scripts import predict


def go(checkpoint: Path, *words: object) -> int:
    """The exit code of scripts/predict.py, on the CPU."""
    return predict.main([str(checkpoint), *map(str, words), "--device", "cpu"])


def results(out: Path) -> list[str]:
    """The files below a folder, relative to it."""
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
