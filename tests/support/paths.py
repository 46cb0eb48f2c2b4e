"""Folders that tests read from."""

from pathlib import Path

#: The project.
ROOT = Path(__file__).resolve().parents[2]
#: Numbers of the official programs that are no golden case: flags, tasks, parameter names.
FACTS = ROOT / "tests" / "facts"
#: Golden cases of the project's own choice.
GOLDEN = ROOT / "tests" / "golden"
