"""scripts/copy_results.py: what is copied, and what stays."""

import json

from scripts import copy_results


def test_figures_and_tables_are_copied_and_pictures_are_not(tmp_path, capsys):
    out, target = tmp_path / "a b", tmp_path / "docs" / "x"
    (out / "results" / "run_pictures").mkdir(parents=True)
    for name in (
        "table.md",
        "table.csv",
        "miou_by_step.png",
        "miou_by_step0.png",
        "report.html",
        "masks.png",
        "masks.csv",
    ):
        (out / name).write_text(name)
    (out / "results" / "run_pictures" / "1.png").write_text("x")
    options = {
        "pretrained": "/home/me/w.pth",
        "task_file": "../../tasks/t.json",
        "name": "a/b",
        "lr": [0.1],
        "data": "~/x",
    }
    (out / "study.json").write_text(json.dumps({"options": options, "seeds": [1]}))
    assert copy_results.main([str(out), str(target)]) == 0
    assert sorted(path.name for path in target.iterdir()) == [
        "masks.csv", "miou_by_step.png", "miou_by_step0.png", "study.json", "table.csv", "table.md",
    ]  # fmt: skip
    kept = {"pretrained": "w.pth", "task_file": "t.json", "name": "a/b", "lr": [0.1], "data": "x"}
    assert json.loads((target / "study.json").read_text()) == {"options": kept, "seeds": [1]}
    assert (target / "table.md").read_text() == "table.md"


def test_a_folder_without_results_is_refused(tmp_path, capsys):
    assert copy_results.main([str(tmp_path), str(tmp_path / "x")]) == 2
    assert "holds no results" in capsys.readouterr().err and not (tmp_path / "x").exists()
