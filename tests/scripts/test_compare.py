"""scripts/compare_methods.py: one step 0 for all that can share it, the table by hand, and a comparison from end to end."""

import json
import shlex

import pytest

from scripts import compare_methods as compare

TINY = shlex.split(
    "--dataset shapes --task 6-4 --overlap --backbone resnet18 --no_pretrained --crop_size 32 --batch_size 4 --shapes_train 12 "
    "--shapes_val 4 --num_workers 0 --device cpu --norm_act iabn --no_progress --threads 1 --lr 0.01"
)


def test_methods_share_step_0_unless_it_differs():
    arguments = compare.parse(["--methods", "FT", "--", *TINY])
    names = {
        name: compare.first_run(arguments, name)[0] for name in ("FT", "PLOP", "LSKD", "MiB", "EWC", "LWF-MC", "Joint")
    }
    assert names == {
        "FT": "base", "PLOP": "base", "LSKD": "base", "MiB": "base", "EWC": "EWC", "LWF-MC": "LWF-MC", "Joint": "Joint"
    }  # fmt: skip


def test_words_for_one_method():
    arguments = compare.parse(["--only", "EWC=--reg_importance 10", "FT=--cosine --lr_old 0.1", "--", *TINY])
    assert compare.of_method(arguments, "EWC") == ["--method", "EWC", "--reg_importance", "10"]
    assert compare.of_method(arguments, "FT") == ["--method", "FT", "--cosine", "--lr_old", "0.1"]
    assert compare.of_method(arguments, "PLOP") == ["--method", "PLOP"]
    assert compare.first_run(arguments, "FT")[0] == "FT"  # a cosine classifier is one from step 0 on


def test_learning_rates_are_those_of_the_whole_task():
    """Steps 0 and later are two runs, but `--lr` means the places of all steps."""
    words = [*TINY, "--task", "6-2"]
    for given, expected in (
        (["0.5"], [[], []]),
        (["0.5", "0.25"], [["--lr", "0.5"], ["--lr", "0.25", "0.25"]]),
        (["0.5", "0.25", "0.125"], [["--lr", "0.5"], ["--lr", "0.25", "0.125"]]),
    ):
        arguments = compare.parse(["--", *words, "--lr", *given])
        assert [compare.rates(arguments, [], steps) for steps in ([0], [1, 2])] == expected
    assert compare.rates(arguments, ["--lr", "1", "2"], [1, 2]) == ["--lr", "2.0", "2.0"]


@pytest.mark.parametrize("text", ["EWC", "ewc=--lr 1", "=--lr 1"])
def test_words_for_no_method_are_refused(text, capsys):
    with pytest.raises(SystemExit) as stop:
        compare.parse(["--only", text])
    assert stop.value.code == 2 and "METHOD=WORDS" in capsys.readouterr().err


def test_table_by_hand():
    def step(old, new, every, average=None):
        return {"old": old, "new": new, "all": every, "average_over_steps": average or every}

    text = compare.table(
        {
            "A": [[step(80, None, 80), step(50, 10, 40, 60)], [step(60, None, 60), step(70, 30, 60, 60)]],
            "Joint": [[step(50, None, 50)], [step(50, None, 50)]],
        }
    )
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]
    # sample standard deviations: of 50 and 70, 10 and 30, 40 and 60 it is 14.1; the averages are both 60
    assert rows[0] == ["A", "60.0 ± 14.1", "20.0 ± 14.1", "50.0 ± 14.1", "60.0 ± 0.0"]
    assert rows[1] == ["Joint", "50.0 ± 0.0", "-", "50.0 ± 0.0", "50.0 ± 0.0"]


def test_a_comparison_from_end_to_end(tmp_path, capfd):
    words = ["--methods", "FT", "EWC", "--jobs", "2", "--out", str(tmp_path / "a b"), "--epochs_step0", "1"]
    words += ["--epochs_later", "1", "--only", "EWC=--reg_importance 3", "--", *TINY, "--lr", "0.01", "0.002"]
    assert compare.main(words) == 0
    out = tmp_path / "a b"
    assert "| FT " in (out / "table.md").read_text() and (out / "miou_by_step.png").stat().st_size > 1000
    stored = {path.stem: json.loads(path.read_text()) for path in (out / "results").glob("*.json")}
    assert sorted(stored) == [f"all_shapes_6-4_{name}-seed42" for name in ("EWC", "FT", "base")]
    assert sorted(stored["all_shapes_6-4_EWC-seed42"]["steps"]) == ["0", "1"]
    assert stored["all_shapes_6-4_EWC-seed42"]["options"]["reg_importance"] == 3
    rates = {name.split("_")[-1]: document["options"]["lr_of_step"] for name, document in stored.items()}
    assert rates == {"base-seed42": 0.01, "EWC-seed42": 0.002, "FT-seed42": 0.002}
    shared, later = (stored[f"all_shapes_6-4_{name}-seed42"]["steps"] for name in ("base", "FT"))
    assert later["0"] == shared["0"]
    assert later["1"]["average_over_steps"] == pytest.approx((later["0"]["all"] + later["1"]["all"]) / 2)
    assert f"| {later['1']['average_over_steps']:.1f} " in (out / "table.md").read_text()
    first = capfd.readouterr().out
    assert compare.main(words) == 0  # nothing is trained twice
    again = capfd.readouterr().out
    assert "is finished" in again and again[again.index("| method") :] == first[first.index("| method") :]


def test_a_failed_run_is_said(tmp_path, capfd):
    words = ["--methods", "FT", "--out", str(tmp_path), "--", *TINY, "--pooling", "-1"]
    assert compare.main(words) == 1
    said = capfd.readouterr().err
    assert "ended with exit code 2" in said and "--pooling" in said
