"""What the program refuses, in one sentence and before it writes anything; and the checkpoints of others that it takes."""

import json
import shlex
import shutil

import numpy as np
import pytest
import torch

import argparser
import run
from tests.support import thin
from utils.checkpointing import checkpoint_files
from utils.runtime import memory

BASE = "6-2-shapes_n_0.pth"


pytestmark = pytest.mark.usefixtures("small")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two steps: FT, then PLOP."""
    folder = tmp_path_factory.mktemp("trained")
    with thin.program():
        for text in ("--step 0 --method FT", "--step 1 --method PLOP"):
            assert thin.launch(folder, f"--task 6-2 {text}") == 0
    return folder


def written(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and "lock" not in path.name}


def refusal(capsys, folder, text):
    """The one sentence that a refused command line says; nothing is written by it."""
    capsys.readouterr()
    before = contents(folder)
    assert thin.launch(folder, text) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    assert "mIoU" not in out
    assert contents(folder) == before
    return err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("--step 3", "3"),
        ("--step 1 --name new", "6-2-shapes_new_0.pth does not exist"),
        ("--step 1 2 --name new", "6-2-shapes_new_0.pth does not exist"),
        ("--step 1 --task 6-1 --shapes_val 20", "6-1-shapes_n_0.pth does not exist"),
        ("--step 2 --step_ckpt {base}", "is step 0 of 6-2 on shapes, not step 1"),
        ("--step 1 --backbone resnet34", "was trained with --backbone resnet18"),
        ("--step 1 --output_stride 8", "was trained with --output_stride 16"),
        ("--step 1 --task_file {order} --step_ckpt {base}", "learned the classes"),
        ("--step 1 --step_ckpt {order}", "damaged"),
        ("--step 1 --ckpt {order}", "damaged"),
        ("--step 0 --shapes_train 1", "fewer than one batch of 2 x 1 process(es); lower --batch_size"),
        ("--step 0 --dry_run --shapes_train 1", "fewer than one batch"),
        ("--step 0 --device cuda", "torch sees no CUDA device"),
        ("--step 0 --epochs 0", "--epochs 0"),
    ],
)
def test_refusals_are_one_sentence(copy, tmp_path, capsys, text, said):
    if "cuda" in text and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    order = tmp_path / "order.json"
    order.write_text('{"name": "mine", "steps": [[0, 2, 1, 3, 4, 5, 6], [7, 8], [9, 10]]}')
    text = text.format(base=shlex.quote(str(copy / "checkpoints" / BASE)), order=shlex.quote(str(order)))
    assert said in refusal(capsys, copy, f"--task 6-2 {text}")


def test_a_forgotten_overlap_is_refused(copy, capsys):
    words = [word for word in thin.words(copy, "--task 6-2 --step 1 --shapes_train 60") if word != "--overlap"]
    assert run.main(words) == 2
    assert "was trained with --overlap True, this run has False" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["--method Unknown", "--no_such_flag", "--step x", "--backbone resnet19"])
def test_command_lines_that_cannot_be_read_exit_with_2(tmp_path, capsys, text):
    with pytest.raises(SystemExit) as ended:
        thin.launch(tmp_path, text)
    assert ended.value.code == 2
    assert text.split()[0] in capsys.readouterr().err
    assert written(tmp_path) == []


def test_what_a_later_step_would_stumble_over_is_said_first(tmp_path, capsys):
    (tmp_path / "task.json").write_text(json.dumps({"name": "rare", "steps": [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [10]]}))
    text = refusal(capsys, tmp_path, f"--task_file '{tmp_path}/task.json' --step 0 1 --shapes_train 6 --batch_size 3")
    assert "step 1 of rare has" in text or "step 1 of task rare" in text
    assert "6-2-shapes_n_0.pth does not exist" in refusal(capsys, tmp_path, "--task 6-2 --step 1 2")


def test_results_that_cannot_be_continued_are_refused_before_training(copy, capsys):
    (copy / "results" / "d_shapes_6-2_n.json").write_text("{")
    assert "d_shapes_6-2_n.json" in refusal(capsys, copy, "--task 6-2 --step 0")


@pytest.mark.parametrize(
    "place",
    [
        "checkpoints/6-2-shapes_o_0.pth",
        "checkpoints/.6-2-shapes_o_0.pth.writing",
        "checkpoints/6-2-shapes_o_0.resume.pth",
        "checkpoints/6-2-shapes_o_0.resume.before.pth",
        "checkpoints/.6-2-shapes_o_0.lock",
        "results/d_shapes_6-2_o.csv",
        "results/.d_shapes_6-2_o.json.writing",
    ],
)
def test_a_folder_in_the_place_of_a_file_is_refused_before_training(copy, capsys, place):
    (copy / place).mkdir()
    assert f"{copy / place} is not a file" in refusal(capsys, copy, "--task 6-2 --step 0 --name o --resume")


def test_a_full_disk_is_refused_before_training(copy, capsys, monkeypatch):
    monkeypatch.setattr(checkpoint_files.shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10, 9, 1))
    assert "free some space or name another folder with --checkpoint" in refusal(capsys, copy, "--task 6-2 --step 0")


@pytest.mark.parametrize("method", ["FT", "RW", "LSKD"])
def test_the_room_asked_for_is_that_of_the_files(copy, monkeypatch, method):
    """Also where a method keeps as much per weight as the optimiser does, several times."""
    asked, written, save = [], [], checkpoint_files.save
    monkeypatch.setattr(checkpoint_files, "require_space", lambda folder, needed: asked.append(needed))

    def saving(path, state, *more):
        save(path, state, *more)
        written.append(path.stat().st_size)

    monkeypatch.setattr(checkpoint_files, "save", saving)
    text = f"--task 6-2 --method {method} --epochs 2 --reg_iterations 2"
    assert thin.launch(copy, f"{text} --step 1 --name n --date later") == 0
    (needed,), largest = asked, max(written)
    assert 0.9 * largest < needed / 3 < 1.15 * largest, (
        needed / 3,
        largest,
    )  # some kilobytes weigh in a network this small


def test_the_room_for_later_steps_is_asked_for_first(copy, monkeypatch):
    asked = []
    monkeypatch.setattr(checkpoint_files, "require_space", lambda folder, needed: asked.append(needed))
    assert thin.launch(copy, "--task 6-2 --step 0 1 2 --method FT --name o") == 0
    ratios = [needed / asked[-1] for needed in asked]  # the last step needs its three states only
    assert ratios == pytest.approx([5 / 3, 4 / 3, 1], rel=0.05)
    for repeated, expected in enumerate(([5 / 3, 4 / 3, 1], [2 / 3] * 3), 1):  # what is replaced is kept once
        assert thin.launch(copy, "--task 6-2 --step 0 1 2 --method FT --name o") == 0
        ratios = [needed / asked[2] for needed in asked[3 * repeated : 3 * repeated + 3]]
        assert ratios == pytest.approx(expected, rel=0.2)


def test_a_disk_that_fills_up_ends_in_a_sentence(copy, capsys, monkeypatch):
    before = (copy / "checkpoints" / BASE).read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(
        checkpoint_files,
        "_serialise",
        lambda state, file: fail() if "model_state" in state else torch.save(state, file),
    )
    assert thin.launch(copy, "--task 6-2 --step 0 --epochs 2 --date later") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and "No space left on device" in err and err.count("\n") == 1
    assert (copy / "checkpoints" / BASE).read_bytes() == before
    monkeypatch.undo()
    assert thin.launch(copy, "--task 6-2 --step 0 --epochs 2 --date later --resume") == 0


@pytest.mark.parametrize(
    "said",
    [
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "",
    ],
)
def test_a_trial_batch_that_does_not_fit_is_said_as_such(tmp_path, capsys, monkeypatch, said):
    def fail(*_):
        raise RuntimeError(said) if said else MemoryError

    monkeypatch.setattr(run.methods.Method, "terms", fail)
    assert thin.launch(tmp_path, "--task 6-2 --step 0 --trial_batch") == 2
    err = capsys.readouterr().err
    assert err.startswith(
        "error: --trial_batch: a batch of 2 at 32 px does not fit into the memory; lower --batch_size"
    )
    assert err.count("\n") == 1
    with pytest.raises(RuntimeError, match="a bug"), memory.trial(2, 32):
        raise RuntimeError("a bug")


def test_debug_says_where(tmp_path, capsys):
    assert thin.launch(tmp_path, "--task 6-2 --step 1 --debug") == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_is_not_called_a_users_error(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "run", lambda opts: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        thin.launch(tmp_path, "--task 6-2")


def test_a_checkpoint_of_another_step_or_network_is_not_tested(copy, capsys):
    base = copy / "checkpoints" / BASE
    assert "is step 0 of 6-2 on shapes, not step 1" in refusal(
        capsys, copy, f"--task 6-2 --step 1 --test --ckpt '{base}'"
    )
    text = refusal(capsys, copy, "--task 6-2 --step 1 --test --backbone resnet34")
    assert "--backbone resnet18, this run has resnet34" in text
    assert "does not exist" in refusal(capsys, copy, "--task 6-2 --step 2 --test")


def test_dry_run_looks_at_the_previous_step_where_there_is_one(trained, capsys):
    assert thin.launch(trained, "--task 6-2 --step 1 --dry_run") == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert "--backbone" in refusal(capsys, trained, "--task 6-2 --step 1 --dry_run --backbone resnet34")


def test_the_parser_is_asked_quietly_by_other_processes(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as ended:
        run.main(["--no_such_flag"])
    assert ended.value.code == 2 and capsys.readouterr() == ("", "")
    assert run.main(["--list_methods"]) == 0
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(SystemExit):
        run.main(["--no_such_flag"])
    assert "--no_such_flag" in capsys.readouterr().err
    assert argparser.parse([]).local_rank == 0


# -------------------------------------------------------- checkpoints of others


def official(folder, target, **changed):
    """The checkpoint of step 0 as the official programs wrote it: no options, no order, the score a numpy number."""
    state = checkpoint_files.load(folder / "checkpoints" / BASE)
    state = {key: value for key, value in state.items() if key not in ("options", "task", "history")}
    torch.save(state | {"best_score": np.float64(0.5), "trainer_state": {"regularizer": None}} | changed, target)


def test_official_checkpoints_are_built_upon(copy, tmp_path, capsys):
    official(copy, tmp_path / "official.pth")
    assert thin.launch(copy, f"--task 6-2 --step 1 --method PLOP --name o --step_ckpt '{tmp_path}/official.pth'") == 0
    assert thin.launch(copy, "--task 6-2 --step 1 --method PLOP --name n --date e") == 0
    rows = [(copy / "results" / name).read_text() for name in ("d_shapes_6-2_o.csv", "e_shapes_6-2_n.csv")]
    assert rows[0] == rows[1]


def test_tasks_share_a_base(copy):
    """15-5 and 15-5s do so in every paper: what counts is that the classes so far are the same, in the same order."""
    base = copy / "checkpoints" / BASE
    assert thin.launch(copy, f"--task 6-1 --step 1 --method FT --shapes_val 20 --step_ckpt '{base}'") == 0


def test_official_checkpoints_are_tested(copy, tmp_path):
    official(copy, tmp_path / "official.pth")
    assert thin.launch(copy, f"--task 6-2 --step 0 --test --name o --ckpt '{tmp_path}/official.pth'") == 0
    mine, theirs = ((copy / "results" / f"d_shapes_6-2_{name}.csv").read_text().splitlines()[0] for name in "no")
    assert mine == theirs


def test_names_of_weights_are_strict_unless_the_user_says_otherwise(copy, tmp_path, capsys):
    weights = checkpoint_files.load(copy / "checkpoints" / BASE)["model_state"]
    lost = {name: value for name, value in weights.items() if name != "module.head.red_bn.bias"}
    official(copy, tmp_path / "lost.pth", model_state=lost)
    text = f"--task 6-2 --step 1 --name o --step_ckpt '{tmp_path}/lost.pth'"
    assert "head.red_bn.bias and 0 more are missing" in refusal(capsys, copy, text)
    official(copy, tmp_path / "more.pth", model_state=weights | {"module.extra": torch.ones(1)})
    more = f"--task 6-2 --step 1 --name o --step_ckpt '{tmp_path}/more.pth'"
    assert "extra and 0 more are unexpected" in refusal(capsys, copy, more)
    official(copy, tmp_path / "shape.pth", model_state=weights | {"module.cls.0.bias": torch.ones(3)})
    shape = f"--task 6-2 --step 1 --name o --step_ckpt '{tmp_path}/shape.pth' --strict_weights"
    assert "cls.0.bias and 0 more are of another shape or type" in refusal(capsys, copy, shape)
    spoilt = weights | {"module.cls.0.bias": torch.full((7,), float("nan"))}
    official(copy, tmp_path / "nan.pth", model_state=spoilt)
    said = refusal(capsys, copy, f"--task 6-2 --step 1 --name o --step_ckpt '{tmp_path}/nan.pth'")
    assert "nan.pth is the checkpoint of a training that diverged: cls.0.bias and 0 more" in said
    official(copy, tmp_path / "kind.pth", model_state=weights | {"module.cls.0.bias": torch.ones(7, dtype=torch.int64)})
    said = refusal(capsys, copy, f"--task 6-2 --step 1 --name o --step_ckpt '{tmp_path}/kind.pth'")
    assert "cls.0.bias and 0 more are of another shape or type" in said
    assert thin.launch(copy, text + " --strict_weights") == 0
    assert thin.launch(copy, more + " --strict_weights --date later") == 0


def test_ckpt_starts_the_student(copy):
    """One epoch at a rate that moves nothing: the weights are those that the student was given."""
    base = copy / "checkpoints" / BASE
    still = f"--task 6-2 --method FT --lr 1e-30 --weight_decay 0 --fix_bn --step 0 --name c --ckpt '{base}'"
    assert thin.launch(copy, still) == 0
    given, kept = (
        checkpoint_files.load(path)["model_state"]["module.body.mod2.block1.convs.conv1.weight"]
        for path in (base, copy / "checkpoints" / "6-2-shapes_c_0.pth")
    )
    assert torch.equal(given, kept)
