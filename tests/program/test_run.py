"""The whole program through its command line: what a run writes, what it refuses, and how it ends."""

import json
import os
import shutil
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

import dataset
import methods
import run
from dataset import shapes
from tests.support import events, thin, tiny_folder
from tests.support.paths import ROOT
from utils.checkpointing import checkpoint_files
from utils.reporting import pictures

BASE = "6-2-shapes_n_0.pth"
#: Keys of a checkpoint that the official programs do not know.
OWN = {"options", "task", "history", "iterations", "iterations_before", "method_state", "previous_sha256"}


pytestmark = pytest.mark.usefixtures("small")


def start(folder, text):
    """As `thin.launch`, with pictures: exit code."""
    return run.main([word for word in thin.words(folder, text) if word != "--visualize"])


def written(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "lock" not in path.name}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two steps: FT, then PLOP with pictures."""
    folder = tmp_path_factory.mktemp("trained")
    with thin.program():
        assert start(folder, "--task 6-2 --step 0 --method FT --print_interval 1") == 0
        assert start(folder, "--task 6-2 --step 1 --method PLOP --print_interval 1 --sample_num 2") == 0
    return folder


# ------------------------------------------------------------------ what it writes


def test_files_of_a_run(trained):
    names = [name for name in written(trained) if not name.startswith("logs")]
    shown = [name for name in names if "/." not in name and "_pictures/" not in name]
    assert shown == [
        "checkpoints/6-2-shapes_n_0.pth",
        "checkpoints/6-2-shapes_n_1.pth",
        "results/d_shapes_6-2_n.csv",
        "results/d_shapes_6-2_n.json",
        "results/d_shapes_6-2_n_steps-0.yaml",
        "results/d_shapes_6-2_n_steps-1.yaml",
    ]
    assert all(name.endswith(".lock") for name in set(names) - set(shown) if "_pictures/" not in name)


def test_checkpoint_has_the_official_keys(trained):
    state = checkpoint_files.load(trained / "checkpoints" / "6-2-shapes_n_1.pth")
    official = {"epoch", "model_state", "optimizer_state", "scheduler_state", "best_score", "trainer_state"}
    assert official | OWN == set(state)
    assert state["epoch"] == 0
    assert all(name.startswith("module.") for name in state["model_state"])
    assert "module.head.lossweights" not in state["model_state"]
    assert state["model_state"]["module.cls.0.weight"].shape[0] == 7
    assert state["model_state"]["module.cls.1.weight"].shape[0] == 2
    assert state["scheduler_state"]["last_epoch"] > 0
    assert state["optimizer_state"]["state"][0]["momentum_buffer"].shape == (8, 3, 7, 7)
    assert state["task"] == {"dataset": "shapes", "name": "6-2", "step": 1, "steps": [[0, 1, 2, 3, 4, 5, 6], [7, 8]]}
    assert state["options"]["method"] == "PLOP" and state["options"]["overlap"] is True
    assert 0 <= state["best_score"] <= 1


def test_csv_has_the_official_columns(trained):
    first, second = thin.rows(trained)
    assert len(first) == len(second) == 1 + 11 + 1
    assert (first[0], second[0]) == ("0", "1")
    assert first[8:12] == ["x"] * 4 and second[10:12] == ["x"] * 2
    for row in (first, second):
        known = [float(value) for value in row[1:-1] if value != "x"]
        assert float(row[-1]) == pytest.approx(np.mean(known))


def test_json_has_what_the_csv_has_no_column_for(trained):
    found = thin.document(trained)
    assert set(found["steps"]) == {"0", "1"}
    for step, row in zip("01", thin.rows(trained)):
        entry = found["steps"][step]
        assert entry["all"] == pytest.approx(100 * float(row[-1]))
        known = row[1 : 1 + len(entry["class_iou"])]
        assert list(entry["class_iou"].values()) == [100 * float(iou) if iou != "x" else None for iou in known]
        assert entry["epochs"][0]["losses"]["ce"] > 0 and "validation_miou" in entry["epochs"][0]
    assert found["steps"]["0"]["new"] is None and found["steps"]["1"]["new"] is not None
    means = [found["steps"][step]["all"] for step in "01"]
    assert found["average_over_steps"] == pytest.approx(sum(means) / 2)
    assert found["class_order"] == [[0, 1, 2, 3, 4, 5, 6], [7, 8], [9, 10]]
    assert found["options"]["pod"] == "local" and found["versions"]["torch"] == torch.__version__
    assert "commit" in found


def test_lambda_is_logged_by_term_and_kept_in_the_checkpoint(copy):
    forget(copy)
    assert thin.launch(copy, "--task 6-2 --step 1 --method LSKD --print_interval 1 --epochs 2") == 0
    logged = events.scalars(copy / "logs" / "6-2-shapes" / "n" / "step-1")
    kinds = {"ce", "mcd", "kd", "pod/stage1", "pod/stage2", "md/stage3", "md/stage4", "md/pre_logits", "md/logits"}
    for kind in ("weights/lambda/", "weights/gradient/", "weights/rho/", "loss/"):
        assert {name.removeprefix(kind) for name, _ in logged if name.startswith(kind)} >= kinds
    weights = checkpoint_files.load(copy / "checkpoints" / "6-2-shapes_n_1.pth")["model_state"][
        "module.head.lossweights"
    ]
    assert weights.shape == (9,) and float(weights.sum()) == pytest.approx(9, abs=1e-4)
    assert not torch.equal(weights, torch.ones(9))
    assert thin.launch(copy, "--task 6-2 --step 2 --method FT") == 0  # which has no λ, and hands it on
    kept = checkpoint_files.load(copy / "checkpoints" / "6-2-shapes_n_2.pth")["loss_weights"]
    assert set(kept["names"]) == kinds and torch.equal(kept["values"], weights)


def test_a_step_run_again_replaces_its_row(copy):
    before = thin.rows(copy)
    state = checkpoint_files.load(copy / "checkpoints" / "6-2-shapes_n_0.pth")
    state["model_state"]["module.cls.0.bias"][1] += 0.5
    checkpoint_files.save(copy / "checkpoints" / "6-2-shapes_n_0.pth", state)
    assert thin.launch(copy, "--task 6-2 --step 1 --method PLOP") == 0
    after = thin.rows(copy)
    assert [row[0] for row in after] == ["0", "1"]
    assert after[0] == before[0] and after[1] != before[1]


@pytest.mark.parametrize("text", ["--method FT", "--method PLOP --lr 0.5", "--method PLOP --checkpoint '{}/other'"])
def test_a_step_of_another_run_does_not_replace_a_row(copy, text, capsys):
    """It is refused before it is trained."""
    shutil.copytree(copy / "checkpoints", copy / "other")
    before = contents(copy)
    assert thin.launch(copy, f"--task 6-2 --step 1 {text}".format(copy)) == 2
    assert "has the test of step 1 by another run (" in (said := capsys.readouterr()).err and "epoch" not in said.out
    assert contents(copy) == before
    assert thin.launch(copy, f"--task 6-2 --step 1 {text} --date later".format(copy)) == 0


def test_a_test_of_another_kind_does_not_replace_a_row(copy, capsys):
    before = contents(copy / "results")
    assert thin.launch(copy, "--task 6-2 --step 1 --test --test_on_val") == 2
    assert "another run (test_on_val was False, is True)" in capsys.readouterr().err
    assert contents(copy / "results") == before
    shutil.copy(copy / "checkpoints" / "6-2-shapes_n_1.pth", copy / "same.pth")
    assert thin.launch(copy, f"--task 6-2 --step 1 --test --ckpt '{copy}/same.pth'") == 0
    assert thin.launch(copy, "--task 6-2 --step 1 --test --test_on_val --date later") == 0


def forget(folder, step="1"):
    """Take the test of a step out of the results, so that another run can record its own."""
    (path,) = (folder / "results").glob("*.json")
    found = thin.document(folder)
    del found["steps"][step]
    path.write_text(json.dumps(found))


def test_several_steps_at_once_equal_one_by_one(trained, tmp_path):
    text = "--task 6-2 --method PLOP --lr 0.01 0.002"
    assert thin.launch(tmp_path / "once", f"{text} --step 0 1 2") == 0
    for step in range(3):
        assert thin.launch(tmp_path / "each", f"{text} --step {step}") == 0
    assert thin.rows(tmp_path / "once") == thin.rows(tmp_path / "each")
    assert thin.document(tmp_path / "once")["steps"] == thin.document(tmp_path / "each")["steps"]
    state = checkpoint_files.load(tmp_path / "once" / "checkpoints" / "6-2-shapes_n_2.pth")
    assert state["options"]["lr_of_step"] == 0.002


def test_no_stream_of_crops_is_used_twice(tmp_path, monkeypatch):
    """Not in two epochs or two steps, and not for the thresholds, the background modes and the training."""
    seeds, streams, choose, crop = [], [], dataset.SegmentationSet.set_epoch, dataset.TrainTransform.__call__

    def chosen(data, epoch, purpose="training"):
        streams.append((purpose, data.step, epoch))
        choose(data, epoch, purpose)

    def cropped(*args):
        seeds.append((torch.initial_seed(), streams[-1]))
        return crop(*args)

    monkeypatch.setattr(dataset.SegmentationSet, "set_epoch", chosen)
    monkeypatch.setattr(dataset.TrainTransform, "__call__", cropped)
    text = "--task 6-2 --step 0 1 2 --epochs 2 --pseudo entropy --nb_background_modes 2 --init_multimodal max"
    assert thin.launch(tmp_path, text) == 0
    assert len({seed for seed, _ in seeds}) == len(seeds)
    assert {stream for _, stream in seeds} == {
        *(("training", step, epoch) for step in (0, 1, 2) for epoch in (0, 1)),
        *((purpose, step, 0) for purpose in ("thresholds", "initialisation") for step in (1, 2)),
    }


def test_a_step_leaves_no_memory_to_the_next(tmp_path, monkeypatch):
    alive, steps = [], []
    train = run.StepRun._train

    def remember(self, trainer, *more):
        steps.append([reference() is not None for reference in alive])
        alive.append(weakref.ref(trainer.network))
        alive.append(weakref.ref(trainer.optimizer))
        return train(self, trainer, *more)

    monkeypatch.setattr(run.StepRun, "_train", remember)
    assert thin.launch(tmp_path, "--task 6-2 --step 0 1 --method LSKD --num_workers 1") == 0
    assert steps == [[], [False, False]]


# ------------------------------------------------------------------- evaluation


def test_scores_are_percentages_and_say_their_labels(copy, capsys):
    """The validation of a step counts the labels of its training, the test those of all classes."""
    forget(copy)
    assert thin.launch(copy, "--task 6-2 --step 1 --method FT --test_on_val") == 0
    lines = capsys.readouterr().out.splitlines()
    entry = thin.document(copy)["steps"]["1"]
    score, labels = entry["all"], "labels of step 1 alone, all other pixels background"
    validated = entry["epochs"][0]["validation_miou"]
    assert 1 < validated <= 100  # per cent
    assert f"step 1 epoch 1/1: validation mIoU {validated:.2f} % ({labels})" in lines
    assert f"all {score:.2f}, average over steps" in lines[-1]
    assert "(%, labels of all classes learned so far) -> " in lines[-1]
    logged = events.scalars(copy / "logs" / "6-2-shapes" / "n" / "step-1")
    assert [v for (name, _), v in logged.items() if name == "val/mIoU_training_labels"] == [pytest.approx(validated)]
    forget(copy)
    assert thin.launch(copy, "--task 6-2 --step 1 --method FT --no_mask") == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("validation mIoU" in line and "(labels of all classes learned so far)" in line for line in lines)
    assert "(%, labels of all classes learned so far) -> " in lines[-1]


def test_a_test_gives_the_score_of_the_training_run(copy):
    before = thin.rows(copy), thin.document(copy)["steps"]
    assert start(copy, "--task 6-2 --step 1 --method PLOP --test --sample_num 1 --name n") == 0
    assert (thin.rows(copy), thin.document(copy)["steps"]) == before
    # of a file named by the user, under another name
    ckpt = copy / "checkpoints" / "6-2-shapes_n_1.pth"
    assert thin.launch(copy, f"--task 6-2 --step 1 --test --name other --ckpt '{ckpt}'") == 0
    assert (copy / "results" / "d_shapes_6-2_other.csv").read_text().split(",")[1:] == ",".join(before[0][1]).split(
        ","
    )[1:-1] + [before[0][1][-1] + "\n"]


@pytest.mark.parametrize("full_images", ["", "--crop_val"])
def test_every_image_counts_once(copy, full_images):
    forget(copy)
    assert thin.launch(copy, f"--task 6-2 --step 1 --method FT --test --shapes_val 5 {full_images}") == 0
    opts = thin.options(f"--shapes_val 5 {full_images}")
    test = dataset.build(opts, dataset.load_task(opts, 1)).test
    truth = torch.cat([test[index][1].flatten() for index in range(len(test))]).long()
    expected = torch.bincount(truth[truth != 255], minlength=9)
    assert np.array(thin.document(copy)["steps"]["1"]["confusion_matrix"]).sum(1).tolist() == expected.tolist()


# -------------------------------------------------------------------- dry runs


def test_dry_run_prints_a_line_of_json_a_step(tmp_path, capsys):
    assert thin.launch(tmp_path, "--task 6-2 --step 0 1 2 --method LSKD --dry_run") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2]
    for line in lines:
        assert list(line) == ["task", "step", "classes", "images", "parameters", "steps_per_epoch"]
        assert line["task"] == "6-2"
        assert line["images"].keys() == {"train", "val", "test"}
        assert line["steps_per_epoch"] == line["images"]["train"] // 2
    assert [tuple(line["classes"].values()) for line in lines] == [(0, 7, 7), (7, 2, 9), (9, 2, 11)]
    assert list(lines[0]["classes"]) == ["old", "new", "total"]
    model = thin.network(thin.options(), [7, 2, 2])
    assert lines[2]["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert written(tmp_path) == []


def test_list_methods(capsys):
    assert run.main(["--list_methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(methods.METHODS)
    assert all(str(method.year) in line for line, method in zip(lines, methods.METHODS.values()))


# ------------------------------------------------------------------ determinism


def weights_of(folder, step=0):
    return checkpoint_files.load(thin.checkpoint(folder, step))["model_state"]


def test_same_seed_same_bits_whatever_the_workers(trained, tmp_path):
    first = weights_of(trained)
    for name, text in (("again", ""), ("workers", "--num_workers 2"), ("trial", "--trial_batch")):
        assert thin.launch(tmp_path / name, f"--task 6-2 --step 0 --method FT {text}") == 0
        assert checkpoint_files.digest(weights_of(tmp_path / name)) == checkpoint_files.digest(first), name
    assert thin.launch(tmp_path / "seed", "--task 6-2 --step 0 --method FT --random_seed 7") == 0
    assert checkpoint_files.digest(weights_of(tmp_path / "seed")) != checkpoint_files.digest(first)


# -------------------------------------------------------------- non-finite losses


def test_a_non_finite_loss_ends_with_names_and_a_state_for_study(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dataset.shapes.draw", poisoned_draw(dataset.shapes.draw))
    monkeypatch.setattr("dataset.base.normalise", lambda image: (image.float() - 128) / (image.float().amax() - 255))
    assert thin.launch(tmp_path, "--task 6-2 --step 0") == 3
    out, err = capsys.readouterr()
    assert err.startswith("error: non-finite loss at step 0, epoch 1, iteration ") and err.count("\n") == 1
    assert "ce nan" in err or "ce inf" in err
    assert "batch: shapes/train/" in err
    aside = tmp_path / "checkpoints" / "6-2-shapes_n_0.nonfinite.pth"
    assert str(aside) in out
    state = checkpoint_files.load(aside)["state"]["model"]
    assert all(value.isfinite().all() for value in state.values())  # the statistics of the norms, too
    assert not (tmp_path / "checkpoints" / BASE).exists() and not (tmp_path / "results" / "d_shapes_6-2_n.csv").exists()
    capsys.readouterr()
    assert thin.launch(tmp_path, "--task 6-2 --step 0 --skip_nonfinite 100") == 0
    assert "skipped a non-finite loss (1 of 100) at step 0" in capsys.readouterr().out
    assert all(value.isfinite().all() for value in weights_of(tmp_path).values())


def poisoned_draw(draw):
    """Every picture that reaches full white divides by zero in the patched normalisation; only scene 3 does."""

    def drawn(seed, index, size):
        image, mask = draw(seed, index, size)
        return (np.maximum(image, 255) if index == 3 and seed == 1 else np.minimum(image, 250)), mask

    return drawn


# ------------------------------------------------------------------- real files


def test_a_folder_of_pictures_through_all_steps(tmp_path, capsys):
    (tmp_path / "my data").mkdir()
    data = tiny_folder.write_folder(tmp_path / "my data")
    text = f"--dataset folder --data_root '{data}' --task_file '{data}/task.json' --crop_size 24 --name f"
    assert thin.launch(tmp_path, f"{text} --step 0 1 2 --method PLOP --num_workers 1 --crop_val --trial_batch") == 0
    rows = thin.rows(tmp_path)
    assert [row[0] for row in rows] == ["0", "1", "2"] and len(rows[0]) == 7
    assert list(thin.document(tmp_path)["steps"]["2"]["class_iou"]) == ["background", "dog", "cat", "horse", "cow"]
    capsys.readouterr()
    assert thin.launch(tmp_path, f"{text} --step 0 --check_data") == 0
    assert "every image and mask can be read" in capsys.readouterr().out
    image = data / "images" / "train1.png"
    image.write_bytes(image.read_bytes()[:-300])
    later = data / "images" / "train6.png"  # shows a class of step 1 only
    sound = later.read_bytes()
    later.write_bytes(sound[:-300])
    assert thin.launch(tmp_path, f"{text} --step 0 1 --check_data") == 2
    first, *listed = capsys.readouterr().err.splitlines()
    assert first == "error: --check_data found 2 faults; correct or remove these:"
    assert [str(path) in line for path, line in zip((image, later), listed, strict=True)] == [True, True]
    later.write_bytes(sound)
    for workers in (0, 1):
        before = contents(tmp_path / "results")
        assert thin.launch(tmp_path, f"{text} --step 0 --method PLOP --crop_val --num_workers {workers}") == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and str(image) in err and "Traceback" not in err
        assert contents(tmp_path / "results") == before


# --------------------------------------------------------------- the real thing


def test_the_real_network_in_a_process_of_its_own(tmp_path):
    """`python run.py` with resnet18; the output and the exit code as a user sees them."""
    words = thin.words(tmp_path, "--task 6-2 --step 0 --method PLOP --shapes_train 4 --num_workers 1")
    done = subprocess.run(
        [sys.executable, "run.py", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("--method PLOP: pod=local, pod_factor=0.01")
    assert "precision: float32 (O0); device cpu, 1 process(es)" in lines
    assert "mIoU old" in lines[-1]
    state = checkpoint_files.load(tmp_path / "checkpoints" / BASE)
    assert state["model_state"]["module.body.mod5.block2.convs.conv2.weight"].shape == (512, 512, 3, 3)
    assert done.stderr == ""
    shutil.rmtree(tmp_path / "checkpoints")  # 120 MB


# ------------------------------------------------------------------ pictures


def test_the_same_test_images_are_kept_after_every_step(trained):
    shown = pictures.read(trained / "results" / "d_shapes_6-2_n.json")
    assert shown.steps == [0, 1] and len(shown.rows) == 4
    assert all(path is not None for row in shown.rows for path in row)
    truth, prediction = (np.asarray(Image.open(path)) for path in (shown.rows[0][1], shown.rows[0][3]))
    assert truth.shape == prediction.shape == (32, 32) and set(shown.legend) <= set(shapes.CLASSES)
    assert max(np.asarray(Image.open(row[1])).max() for row in shown.rows) >= 6  # a class of a later step is shown
    panels = sorted((trained / "results" / "d_shapes_6-2_n_pictures").glob("*_panel.png"))
    assert len(panels) == 8 and all(
        Image.open(path).height > 32 for path in panels
    )  # a title and a legend are around the pictures


def test_no_pictures_on_request(tmp_path):
    assert start(tmp_path, "--task 6-2 --step 0 --method FT --pictures 0 --shapes_train 4") == 0
    assert not (tmp_path / "results" / "d_shapes_6-2_n_pictures").exists()


def test_pictures_that_cannot_be_written_do_not_end_a_run(tmp_path, capfd):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "d_shapes_6-2_n_pictures").write_text("a file stands in the folder's place")
    assert start(tmp_path, "--task 6-2 --step 0 --method FT --shapes_train 4") == 0
    assert "note: the pictures of step 0 are not kept" in capfd.readouterr().out
    assert list(thin.document(tmp_path)["steps"]) == ["0"]
