"""Command lines and task files that users did not mean: every one must be taken rightly or refused with a sentence.

Part of tests/stress/fault_injection.py. Each input is a good one, spoilt in one of many ways. Some ways make it certainly wrong: a
success is then a wrong success. The others may leave it right: a success is then compared with what the input says.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import argparser  # noqa: E402  (the project is run from its folder, not installed)
import run  # noqa: E402

#: Closed ranges of options, and groups of options that exclude each other.
RANGES = {dest: bounds for rules in argparser.all_rules() for dest, bounds in rules.ranges.items()}
ONE_OF = [dests for rules in argparser.all_rules() for dests, _ in rules.one_of]

#: Seconds after which an input counts as hanging.
PATIENCE = 120.0

GOOD = shlex.split(
    "--dataset shapes --task 6-2 --overlap --method PLOP --backbone resnet18 --no_pretrained --crop_size 32 --batch_size 2 "
    "--shapes_train 24 --shapes_val 8 --num_workers 0 --device cpu --threads 1 --lr 0.01 0.001 --epochs 2 --step 0 1 2 "
    "--pod_factor 0.01 --threshold 0.5 --name n --date d --val_interval 2 --dry_run"
)

CLASSES = 11


class Hang(BaseException):
    """An input that takes longer than `PATIENCE`."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise `Hang` after so many seconds."""

    def expire(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def execute(argv: list[str]) -> tuple[int | None, str, str]:
    """run.py in this process.

    Returns:
        Exit code (None for an uncaught exception or a hang), what it printed, and what it printed to stderr or the traceback.
    """
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace"))
    code, fault = None, ""
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), limited(PATIENCE):
            code = run.main(argv)
    except SystemExit as end:
        code = end.code
    except Hang:
        fault = "hangs"
    except BaseException:
        fault = traceback.format_exc()
    out.flush(), err.flush()
    printed, said = (stream.buffer.getvalue().decode(errors="replace") for stream in (out, err))
    return code, printed, fault or said


def judge(argv: list[str], spoilt: bool, expected: list[dict] | None = None) -> str:
    """Run one input.

    Args:
        argv: the command line.
        spoilt: it is certainly wrong.
        expected: what a success must print about each step, as far as it is known.

    Returns:
        What was wrong about the program's answer, "" if nothing.
    """
    code, printed, said = execute(argv)
    if code not in (0, 2):
        return f"exit code {code}: {said[-2000:]}"
    if code == 2:
        return "" if "error: " in said and "Traceback" not in said else f"refused without a sentence: {said[-1000:]}"
    if spoilt:
        return f"wrong success: {printed[-500:]}"
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    if expected is not None and [{key: line[key] for key in expected[0]} for line in lines] != expected:
        return f"wrong success: printed {lines}, expected {expected}"
    return ""


# --------------------------------------------------------------- command lines


def _replace(argv: list[str], rng: random.Random, *new: str) -> list[str]:
    """The command line with other words at its end, where they win."""
    return [*argv, *new]


def _out_of_range(argv: list[str], rng: random.Random) -> list[str]:
    dest = rng.choice(sorted(RANGES))
    low, high = RANGES[dest]
    value = rng.choice([low - 1, low - 10**6, high * 2 + 1, high + 10**12])
    return [*argv, f"{_flag(dest)}={value:.0f}"]


def _flag(dest: str) -> str:
    """The flag of a dest."""
    action = next(action for action in argparser.build_parser()._actions if action.dest == dest)
    return action.option_strings[-1]


def _not_a_number(argv: list[str], rng: random.Random) -> list[str]:
    value = rng.choice(
        ["nan", "inf", "-inf", "", " ", "abc", "1e", "0x10", "1,5", "1_", "--", "½", "None", "1e400", "\0", "[1]"]
    )
    return [*argv, f"{_flag(rng.choice(sorted(RANGES)))}={value}"]


def _unknown_choice(argv: list[str], rng: random.Random) -> list[str]:
    actions = [action for action in argparser.build_parser()._actions if action.choices]
    value = rng.choice(["", "x", "VOC ", "resnet", "O4", "\udcff", "O0\n", "../voc", "é" * 300])
    return [*argv, f"{rng.choice(actions).option_strings[-1]}={value}"]


def _unknown_flag(argv: list[str], rng: random.Random) -> list[str]:
    flag = rng.choice([word for word in argv if word.startswith("--")])
    wrong = rng.choice([flag[:-1], flag + "s", flag.upper(), "-" + flag[2:], "--" + flag, flag.replace("--", "—")])
    return [*argv, wrong, rng.choice(["1", "x", "0.5"])]


def _missing_value(argv: list[str], rng: random.Random) -> list[str]:
    return [*argv, rng.choice(["--task", "--name", "--lr", "--step", "--method", "--pod_options", "--checkpoint"])]


def _bad_path(argv: list[str], rng: random.Random) -> list[str]:
    dest = rng.choice(["ckpt", "step_ckpt", "task_file"])
    return [
        *argv,
        "--step=1",
        f"--{dest}=" + rng.choice(["", "nowhere", "/", ".", "a\0b", "a\nb", "/dev/null/x", "x" * 5000, "~"]),
    ]


def _bad_folder(argv: list[str], rng: random.Random) -> list[str]:
    dest = rng.choice(["checkpoint", "results", "logdir"])
    return [
        *argv,
        f"--{dest}="
        + rng.choice(["", "/dev/null", "/dev/null/x", __file__, f"{__file__}/x", "a\0b", "a\tb", "\udcff"]),
    ]


def _bad_data(argv: list[str], rng: random.Random) -> list[str]:
    root = rng.choice(["nowhere", "", "/dev/null", __file__, "a\0b", str(ROOT / "dataset")])
    return [*argv, f"--dataset={rng.choice(['voc', 'ade', 'folder', 'cityscapes_domain'])}", f"--data_root={root}"]


def _excluding(argv: list[str], rng: random.Random) -> list[str]:
    return [*argv, *(f"--{dest}" for dest in rng.sample(rng.choice(ONE_OF), 2))]


def _bad_task(argv: list[str], rng: random.Random) -> list[str]:
    name = rng.choice(["", "6-3", "15-5", "6-2s ", "6−2", "../6-2", "6-2\0", "\udcff", "task.json", "6-2" * 1000])
    return [*argv, f"--task={name}"]


def _bad_steps(argv: list[str], rng: random.Random) -> list[str]:
    return [
        *argv,
        "--step",
        *rng.choice([["0", "0"], ["3"], ["0", "99"], ["-1"], ["1.5"], ["2", "1", "2"], ["9" * 400], ["0,1"]]),
    ]


def _bad_name(argv: list[str], rng: random.Random) -> list[str]:
    value = rng.choice(
        ["", ".", "..", "../x", "a/b", "a\\b", "a\0", "a\n", "é", "x" * 200, "\udcff", "a:b", "*", ".hidden"]
    )
    return [*argv, f"--{rng.choice(['name', 'date'])}={value}"] if value else [*argv, "--name="]


def _bad_json(argv: list[str], rng: random.Random) -> list[str]:
    value = rng.choice([
        "", "{", "[]", "1", '"x"', "{'switch': {}}", '{"switch": 1}', '{"swich": {}}', '{"switch": {"after": {"factor": -1}}}',
        '{"switch": {"after": {"factor": NaN}}}', '{"switch": {"after": {"factor": "x"}}}', '{"switch": {"after": {"type": "x"}}}',
        '{"switch": {"after": {"extra_channels": 3}}}', '{"switch": {"later": {}}}', "{" * 5000, "[" * 50, '{"a": 1}}', "\udcff",
    ])  # fmt: skip
    return [*argv, f"--pod_options={value}"]


def _stray(argv: list[str], rng: random.Random) -> list[str]:
    return [rng.choice(["run.py", "x", "", "0", "\udcff", "é"]), *argv]


def _lose_a_word(argv: list[str], rng: random.Random) -> list[str]:
    place = rng.randrange(len(argv) - 1)  # --dry_run stays
    return argv[:place] + argv[place + 1 :]


def _swap_words(argv: list[str], rng: random.Random) -> list[str]:
    argv, (a, b) = list(argv), rng.sample(range(len(argv) - 1), 2)
    argv[a], argv[b] = argv[b], argv[a]
    return argv


def _noise(argv: list[str], rng: random.Random) -> list[str]:
    argv, place = list(argv), rng.randrange(len(argv) - 1)
    word = argv[place] or "x"
    at = rng.randrange(len(word))
    argv[place] = word[:at] + rng.choice("-=0 9.e\t\n/é\udc80,x'\"") + word[at + rng.randrange(2) :]
    return argv


def _repeat(argv: list[str], rng: random.Random) -> list[str]:
    place = rng.randrange(len(argv))
    return argv[:place] + argv[place : place + 1] * rng.randint(2, 50) + argv[place + 1 :]


def _harmless(argv: list[str], rng: random.Random) -> list[str]:
    more = rng.choice(
        [
            "--random_seed 7",
            "--epochs 3",
            "--no_progress",
            "--resume",
            "--yess 3",
            "--ckpt_minutes 0.5",
            "--trial_batch",
        ]
    )
    return [*argv, *more.split()]


SPOILING: tuple[Callable, ...] = (
    _out_of_range, _not_a_number, _unknown_choice, _unknown_flag, _missing_value, _bad_path, _bad_folder, _bad_data,
    _excluding, _bad_task, _bad_steps, _bad_name, _bad_json, _stray,
)  # fmt: skip
SHAKING: tuple[Callable, ...] = (_lose_a_word, _swap_words, _noise, _repeat, _harmless)


def command_line(folder: Path, rng: random.Random) -> tuple[list[str], bool, str]:
    """A mutated command line, whether it is certainly wrong, and how it was mutated."""
    folders = [f"--{kind}={folder / kind}" for kind in ("checkpoint", "results", "logdir")]
    way = rng.choice([*SPOILING, *SHAKING, *SHAKING])
    return way([*folders, *GOOD], rng), way in SPOILING, way.__name__.strip("_")


def meant(argv: list[str]) -> list[dict] | None:
    """What a dry run of a command line must print of each step, by the parser's word; None where it prints something else."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            opts = argparser.parse(argv)
        except SystemExit:
            return None
    return [{"step": step} for step in opts.step] if opts.dry_run and not opts.list_methods else None


# ------------------------------------------------------------------- task files


def _partition(rng: random.Random) -> list[list[int]]:
    """A good order of classes: background first, two to four steps."""
    ids = rng.sample(range(1, CLASSES), rng.randint(4, CLASSES - 1))
    cuts = sorted(rng.sample(range(1, len(ids)), rng.randint(1, 3)))
    return [[0, *ids[: cuts[0]]], *(ids[a:b] for a, b in zip(cuts, [*cuts[1:], len(ids)]))]


def _spoil_steps(steps: list, rng: random.Random) -> Any:
    """Steps that are certainly wrong."""
    steps = [list(step) for step in steps]
    number = rng.randrange(len(steps))
    foreign = rng.choice([CLASSES, -1, 255, 10**30, 1.0, 0.5, True, None, "1", [1], {}, float("nan"), float("inf")])
    ways: list[Callable[[], Any]] = [
        lambda: [*steps, [steps[number][-1]]],
        lambda: [*steps[:number], [*steps[number], foreign], *steps[number + 1 :]],
        lambda: [*steps, []],
        lambda: [*steps, rng.choice([None, 3, "1", {}])],
        lambda: [steps[0][1:], *steps[1:]],
        lambda: [[0], *steps[1:]],
        lambda: [steps[0][::-1], *steps[1:]],
        lambda: rng.choice([[], {}, None, 0, "steps", True, 1.5]),
        lambda: {str(k + 1): step for k, step in enumerate(steps)},
        lambda: {"0": steps[0], "00": steps[-1]},
        lambda: {"0": steps[0], "2": steps[-1]},
        lambda: {"steps": {"steps": steps}},
    ]
    return rng.choice(ways)()


def _spoil_document(document: dict, rng: random.Random) -> Any:
    """A document around good steps that is certainly wrong."""
    official, unsafe = (
        ["6-2", "offline", "15-5s"],
        ["../x", "", "a b", "a/b", "x" * 65, ".x", "é", 3, None, ["x"], "a\n", "-x"],
    )
    return rng.choice([
        lambda: {**document, rng.choice(["order", "Name", "", "step"]): 1},
        lambda: {**document, "name": rng.choice(official)},
        lambda: {**document, "name": rng.choice(unsafe)},
    ])()  # fmt: skip


def _spoil_bytes(text: str, rng: random.Random) -> bytes:
    """Bytes that are certainly no task file."""
    raw = text.encode()
    return rng.choice([
        lambda: raw[: rng.randrange(len(raw) - 1)],
        lambda: raw + b"}",
        lambda: b"",
        lambda: b"\xff" + raw,
        lambda: text.encode("utf-16"),
        lambda: raw + b" " * (1 << 20),
        lambda: b"[" * 100_000,
        lambda: b'{"steps": ' * 2000,
        lambda: b"9" * 10_000,
        lambda: raw.replace(b'"steps"', b'"steps": [[0, 1], [2]], "steps"'),
        lambda: raw.replace(b"[", b"(", 1),
        lambda: bytes(rng.randrange(256) for _ in range(300)),
        lambda: rng.choice(BOMBS)(),
    ])()  # fmt: skip


#: Files of at most 1 MiB that stand for much: steps, classes, keys, digits, text, levels.
BOMBS: tuple[Callable[[], bytes], ...] = (
    lambda: b"[[0, 1]" + b", [2]" * 200_000 + b"]",
    lambda: b"[[0, 1" + b", 2" * 300_000 + b"]]",
    lambda: b"[[0, 1], [" + b"[], " * 200_000 + b"2]]",
    lambda: json.dumps({str(k): [k] for k in range(45_000)}).encode(),
    lambda: json.dumps({f"x{k}": 0 for k in range(45_000)}).encode(),
    lambda: b'{"name": "' + b"x" * 1_000_000 + b'", "steps": [[0, 1], [2]]}',
    lambda: b'{"name": "' + b"\\u0000" * 100_000 + b'", "steps": [[0, 1], [2]]}',
    lambda: b"[[0, 1], [" + b"2" * 4000 + b"]]",
    lambda: b"[[0, 1], [1e999999]]",
    lambda: b'{"steps": ' * 900 + b"[[0, 1], [2]]" + b"}" * 900,
    lambda: b"[[0, 1], [2]]" + b"\n" * 500_000 + b"x",
)


def task_file(path: Path, rng: random.Random) -> tuple[list[dict] | None, str]:
    """Write a mutated task file.

    Returns:
        What a dry run must print of its steps, or None if it must be refused; and how it was mutated.
    """
    steps = _partition(rng)
    document: Any = {"name": f"own{rng.randrange(1000)}", "steps": steps}
    way = rng.choice(["good", "good", "steps", "steps", "steps", "document", "bytes", "bytes"])
    if way == "good":
        plain = rng.choice([steps, {str(k): step for k, step in enumerate(steps)}])
        path.write_text(json.dumps(rng.choice([plain, {**document, "steps": plain}])))
        sizes = [len(step) for step in steps]
        return [
            {"step": k, "classes": {"old": sum(sizes[:k]), "new": sizes[k], "total": sum(sizes[: k + 1])}}
            for k in range(len(steps))
        ], way
    if way == "steps":
        document["steps"] = _spoil_steps(steps, rng)
    elif way == "document":
        document = _spoil_document(document, rng)
    path.write_bytes(_spoil_bytes(json.dumps(document), rng) if way == "bytes" else json.dumps(document).encode())
    return None, way


def study(folder: Path, inputs: int, seed: int) -> list[dict[str, Any]]:
    """Try command lines and task files.

    Args:
        folder: for their outputs.
        inputs: how many of each.
        seed: of the mutations.

    Returns:
        One entry an input: what it was, how it was mutated, what was wrong ("" if nothing).
    """
    folder.mkdir(parents=True, exist_ok=True)
    cases = []
    for number in range(inputs):
        argv, spoilt, way = command_line(folder, random.Random(f"{seed} line {number}"))
        wrong = judge(argv, spoilt, meant(argv))
        cases.append({"input": argv, "way": way, "wrong": wrong})
    for number in range(inputs):
        path = folder / f"task{number}.json"
        expected, way = task_file(path, random.Random(f"{seed} file {number}"))
        steps = ["--step", *(str(entry["step"]) for entry in expected or [{"step": 0}])]
        argv = [*GOOD, f"--checkpoint={folder}", f"--results={folder}", f"--logdir={folder}", "--overlap", *steps]
        wrong = judge([*argv, f"--task_file={path}"], expected is None, expected)
        cases.append({"input": str(path), "way": f"task file: {way}", "wrong": wrong})
    return cases
