"""Reading of the command line: names in upper or lower case, suggestions for misspelt names, defaults in the help."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NoReturn

#: Text that run.py prints if it is started without arguments.
USAGE = """\
Train, test or describe steps of a class-incremental segmentation task:

    python run.py --dataset shapes --task 6-2 --overlap --step 0 1 2 --method PLOP \\
        --backbone resnet18 --no_pretrained --crop_size 64 --lr 0.05 0.01 0.01

    python run.py --help           all options, with their defaults
    python run.py --list_methods   the methods and what their presets set
    bash scripts/quickstart.sh     trains three methods on the embedded data set and prints a table

The data set shapes is drawn by the program and needs no files. docs/command-line.md has examples for the others."""


def given(argv: Sequence[str] | None) -> list[str]:
    """The arguments of the program.

    Args:
        argv: the arguments, or None for those of this process.

    Raises:
        SystemExit: 2, after `USAGE`, if there are none.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        print(USAGE)
        raise SystemExit(2)
    return words


class AnyCase(Collection[str]):
    """Choices of an option whose case the command line may change.

    Args:
        names: as the program spells them.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = {name.lower(): name for name in names}

    def __contains__(self, word: object) -> bool:
        return isinstance(word, str) and word.lower() in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names.values())

    def __len__(self) -> int:
        return len(self._names)

    def spelled(self, word: str) -> str:
        """The name as the program spells it."""
        return self._names[word.lower()]


class Parser(argparse.ArgumentParser):
    """The standard parser, with suggestions for misspelt options and choices. It refuses `--` as a value.

    Python 3.11 reads `--option=--` as an option with an empty list of values, whatever the option takes.
    """

    def parse_args(  # type: ignore[override]  # one signature for the three of the standard parser
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """Parse as the standard parser does, and refuse `--` as a value."""
        words = list(sys.argv[1:] if args is None else args)
        takes_names_alone = any(not action.option_strings for action in self._actions)
        for word in words:
            if word.startswith("-") and word.endswith("=--"):
                self.error(f"argument {word.removesuffix('=--')}: '--' is no value; give one, or leave the option out")
            if word == "--" and not takes_names_alone:
                self.error("'--' stands alone; every word of this command line is an option or the value of one")
        parsed, unknown = self.parse_known_args(words, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._meant(unknown)}")
        for action in self._actions:
            if isinstance(action.choices, AnyCase) and getattr(parsed, action.dest, None) in action.choices:
                setattr(parsed, action.dest, action.choices.spelled(getattr(parsed, action.dest)))
        return parsed

    def _meant(self, unknown: Sequence[str]) -> str:
        """The suggestion for the first unknown word that resembles an option."""
        flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
        for word in unknown:
            if word[:1] in "-–—" and (meant := suggestion(word.partition("=")[0], flags)):
                return meant
        return ""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(
                action,
                f"{str(value)[:80]!r} is unknown; choose one of {', '.join(known)}{suggestion(str(value), known)}",
            )

    def error(self, message: str) -> NoReturn:
        """Print the usage and the message, with unprintable characters escaped, and exit with code 2."""
        super().error(message.encode(errors="backslashreplace").decode())


def suggestion(word: str, known: Collection[str]) -> str:
    """A suggestion for a misspelt word, as the end of a message.

    Args:
        word: the given word.
        known: the valid words.

    Returns:
        "; did you mean NAME?" with the most similar name, in any case, or "" if none resembles the word.
    """
    names = {name.lower(): name for name in known}
    found = difflib.get_close_matches(word[:80].lower().replace("—", "--").replace("–", "--"), names, n=1, cutoff=0.6)
    return f"; did you mean {names[found[0]]}?" if found else ""


def show_defaults(parser: argparse.ArgumentParser) -> None:
    """Add the default of each option that has one to its help.

    The help of switches, of options without effect and of those whose default is "not given" is not changed.
    """
    for action in parser._actions:
        value = action.default
        if action.nargs == 0 or value in (None, "") or not action.help or action.help.startswith("no effect"):
            continue
        words: dict[type, str] = {list: " ", tuple: ","}
        shown = words[type(value)].join(map(str, value)) if type(value) in words else str(value)
        action.help += f" (default: {shown.replace('%', '%%')})"
