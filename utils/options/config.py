"""Options in a file, YAML or JSON: the names of the command line, with their values.

dataset: shapes
task: 6-2
overlap: true          # a switch that is given
lr: [0.05, 0.01]       # an option of several values
pod_options: {switch: {after: {factor: 0.0005}}}
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from utils.errors import UserError

#: Largest file that is read, in bytes.
LARGEST = 1 << 20


class _Loader(yaml.SafeLoader):
    """Loads plain values only. Aliases are refused, because a few lines of nested aliases expand to gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a node of the document; refuses aliases."""
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("an alias (*name) is not supported")
        return super().compose_node(parent, index)


def load(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML or JSON file.

    Args:
        path: of the file.

    Raises:
        UserError: the file cannot be read, or does not contain a mapping with text as keys.
    """
    try:
        if not path.is_file():
            raise UserError(f"{path} is not a file; name a YAML or JSON file")
        if path.stat().st_size > LARGEST:
            raise UserError(f"{path} is larger than {LARGEST} bytes; is it another file?")
        document = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())[:300]}") from error
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise UserError(f"{path} holds no mapping of names to values; see docs/command-line.md")
    return document


def words(options: Mapping[str, Any], parser: argparse.ArgumentParser, place: str) -> list[str]:
    """Convert options to the words of a command line.

    Args:
        options: by name, as on the command line, with or without the dashes. A switch is true (given) or false (left out); None leaves
            an option out.
        parser: knows the options.
        place: file and entry, for messages.

    Raises:
        UserError: an unknown option, or a value that it cannot have; names the option and the place.
    """
    known = {flag.lstrip("-"): action for action in parser._actions for flag in action.option_strings}
    found: list[str] = []
    for name, value in options.items():
        action = known.get(name.lstrip("-"))
        if action is None:
            like = get_close_matches(name.lstrip("-"), known, 1)
            raise UserError(f"{place}: {name!r} is not an option" + (f"; did you mean {like[0]!r}?" if like else ""))
        flag = next(flag for flag in action.option_strings if flag.lstrip("-") == name.lstrip("-"))
        if value is None:
            continue
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise UserError(f"{place}: {name!r} is a switch; give true or false instead of {value!r}")
            found += [flag] * value
        elif isinstance(value, list):
            if action.nargs is None or not value:
                raise UserError(f"{place}: {name!r} takes one value, not the list {value}")
            found += [flag, *map(_text, value)]
        else:
            found.append(f"{flag}={_text(value)}")
    return found


def _text(value: Any) -> str:
    """A value as a word of the command line."""
    return json.dumps(value) if isinstance(value, dict) else str(value)


def dump(opts: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """The options that the user gave as YAML text; `--config` with it repeats the run.

    Args:
        opts: parsed; "explicit" has the dests that the user gave. Options of a preset are not written; the method sets them again.
        parser: knows the options.
    """
    given: dict[str, Any] = {}
    for action in parser._actions:
        if action.dest in opts.explicit and action.dest not in ("config", "preset"):
            value = getattr(opts, action.dest)
            if isinstance(value, tuple):
                value = ",".join(value)  # such as --tap_schemes
            given[action.option_strings[0].lstrip("-")] = True if action.nargs == 0 else value
    return yaml.safe_dump(given, sort_keys=False, allow_unicode=True)


def keep(results: Path, opts: argparse.Namespace, parser: argparse.ArgumentParser, say: Callable[[str], None]) -> None:
    """Write the options of a run beside its results, as a file for `--config`; the name says which steps the run trained.

    Args:
        results: file of the results.
        opts, parser: as in `dump`.
        say: takes the note that the file could not be written: the scores are recorded, so this is no reason to end a run.
    """
    steps = "-".join(map(str, opts.step))
    path = results.with_name(f"{results.stem}_steps-{steps}.yaml")
    aside = path.with_suffix(".writing")
    try:
        aside.write_text(dump(opts, parser), encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        say(f"note: the options of this run are not kept in a file: {error}")
