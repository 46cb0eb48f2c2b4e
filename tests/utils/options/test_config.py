"""utils/options/config.py and --config: options in a file are those of the command line, and a run writes a file that repeats it."""

import json

import pytest
import yaml

import argparser
import run
from tests.support import thin
from utils.errors import UserError
from utils.options import config

PARSER = argparser.build_parser()


def parsed(tmp_path, text, *words):
    path = tmp_path / "options.yaml"
    path.write_text(text)
    return argparser.parse(["--config", str(path), *words])


def test_names_are_those_of_the_command_line(tmp_path):
    text = (
        "dataset: shapes\noverlap: true\nfreeze: false\nlr: [0.05, 1.0e-2]\nmmm: 10\nmcd_factor: 0.5\nckpt:\n"
        "pod_options: {switch: {after: {factor: 0.0005}}}\n--fusion-mode: max\nmethod: plop\n"
    )
    opts = parsed(tmp_path, text, "--batch_size", "3")
    assert (opts.dataset, opts.overlap, opts.freeze, opts.lr, opts.mcd_groups) == (
        "shapes",
        True,
        False,
        [0.05, 0.01],
        10,
    )
    assert (opts.mcd_factor, opts.pod_options, opts.fusion_mode, opts.batch_size) == (
        0.5, {"switch": {"after": {"factor": 0.0005}}}, "max", 3
    )  # fmt: skip
    assert opts.method == "PLOP" and opts.pod == "local"  # its preset applies
    assert {"dataset", "overlap", "lr", "mcd_factor"} <= opts.explicit and "freeze" not in opts.explicit


def test_the_command_line_wins(tmp_path):
    opts = parsed(tmp_path, "lr: [0.5]\nepochs: 3\n", "--lr", "0.25", "0.125")
    assert (opts.lr, opts.epochs) == ([0.25, 0.125], 3)


def test_a_preset_loses_against_a_config_and_the_command_line_and_wins_over_the_method(tmp_path):
    """Its options are those of the run: they are kept in the file that repeats it, and the names of both files are not."""
    config_file, preset = tmp_path / "options.yaml", tmp_path / "preset.json"
    preset.write_text(json.dumps({"method": "LSKD", "mcd_factor": 0.5, "mcd_groups": 7, "epochs": 9, "lr": [0.5]}))
    config_file.write_text(f"epochs: 3\nmcd_groups: 5\npreset: '{preset}'\n")
    opts = argparser.parse(["--mcd_groups", "4", "--config", str(config_file)])
    assert (opts.method, opts.mcd_factor, opts.mcd_groups, opts.epochs, opts.lr) == ("LSKD", 0.5, 4, 3, [0.5])
    assert opts.loss_kd == 10 and opts.rge_alpha == 10  # of the method's preset, which the file does not change
    again = yaml.safe_load(config.dump(opts, PARSER))
    assert again == {"aaaaaa": 0.5, "mmm": 4, "epochs": 3, "lr": [0.5], "method": "LSKD"}
    assert argparser.parse(["--preset", str(preset), "--method", "PLOP"]).method == "PLOP"


def test_a_fault_of_a_preset_is_said_with_its_place(tmp_path, capsys):
    path = tmp_path / "preset.yaml"
    faults = {
        "batch_sise: 3": "did you mean 'batch_size'?",
        "config: x": "'config' names a further file",
        "- a": "no mapping",
    }
    for text, said in faults.items():
        path.write_text(text)
        with pytest.raises(SystemExit) as stop:
            argparser.parse(["--preset", str(path)])
        line = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code == 2 and said in line and str(path) in line
    with pytest.raises(SystemExit):
        argparser.parse(["--preset", str(tmp_path / "none.yaml")])
    assert "is not a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("batch_sise: 3", "'batch_sise' is not an option; did you mean 'batch_size'?"),
        ("overlap: 1", "'overlap' is a switch; give true or false instead of 1"),
        ("batch_size: [1, 2]", "'batch_size' takes one value"),
        ("lr: []", "'lr' takes one value"),
        ("batch_size: x", "--batch_size"),
        ("- a", "holds no mapping"),
        ("1: 2", "holds no mapping"),
        ("a: [1", "is not valid YAML"),
        ("a: &x 1\nb: *x", "an alias"),
        ("!!python/object/apply:os.system [echo]", "is not valid YAML"),
    ],
)
def test_a_fault_is_said_with_its_place(tmp_path, capsys, text, said):
    with pytest.raises(SystemExit) as stop:
        parsed(tmp_path, text)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and said in err.splitlines()[-1] and "Traceback" not in err


def test_a_file_that_is_none_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none.yaml"):
        with pytest.raises(UserError, match="is not a file"):
            config.load(path)
    (tmp_path / "big.yaml").write_bytes(b"#" * (config.LARGEST + 1))
    with pytest.raises(UserError, match="larger than"):
        config.load(tmp_path / "big.yaml")


def test_what_a_run_writes_repeats_it(tmp_path):
    words = "--task 6-2 --step 0 --method LSKD --tap_schemes none,none,md,md,md,md --pod_options '{\"switch\": {}}' --pictures 1"
    with thin.program():
        assert thin.launch(tmp_path / "a", words) == 0
        (written,) = (tmp_path / "a" / "results").glob("*_steps-0.yaml")
        known = yaml.safe_load(written.read_text())
        assert known["tap_schemes"] == "none,none,md,md,md,md" and known["overlap"] is True
        again = argparser.parse(["--config", str(written)])
        given = argparser.parse(thin.words(tmp_path / "a", words))
        left_out = {"config", "explicit"}
        assert {k: v for k, v in vars(again).items() if k not in left_out} == {
            k: v for k, v in vars(given).items() if k not in left_out
        }
        places = [
            word for kind in ("checkpoint", "results", "logdir") for word in (f"--{kind}", str(tmp_path / "b" / kind))
        ]
        assert run.main(["--config", str(written), *places]) == 0
    (first,), (second,) = ((tmp_path / name / "results").glob("*.json") for name in "ab")
    entries = [json.loads(path.read_text())["steps"]["0"] for path in (first, second)]
    for key in ("weights_sha256", "class_iou", "epochs"):
        assert entries[0][key] == entries[1][key]
