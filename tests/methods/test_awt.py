"""AWT: attributions by hand and by integrated gradients, channels, transfer, combinations, and runs through the command line."""

import os
import signal
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F

import methods
from dataset.sampler import FixedBatches
from dataset.tasks import Task
from methods import awt
from modules.classifier import Classifiers
from modules.upsample import upsample, upsampling_mass
from tests.support import interrupted, thin
from tests.support.command_lines import parse, refusal
from utils.checkpointing import checkpoint_files
from utils.checkpointing.store import read
from utils.runtime import distributed

CPU = torch.device("cpu")
NO_PIXEL = (0, 0, 0, 0)


pytestmark = pytest.mark.usefixtures("small")


class Features(torch.nn.Module):
    """A teacher whose features are the images."""

    def forward(self, images, full_size=True):
        return Namespace(pre_logits=images)


def part_of(words, channels=4, new=(2,), weight=(1.0, -2.0, 3.0, 0.5)):
    """The part, and the classifiers of two old classes and new ones; the background has this weight, all else is 0."""
    opts = thin.options(f"--method MiB+AWT {words}", step=1)
    task = Task("shapes", "thin", 1, ((0, 1), tuple(new)))
    cls = awt_classifiers(channels, len(new), weight)
    (part,) = (p for p in methods.build(opts, task).parts if isinstance(p, awt.AttributionTransfer))
    return part, Namespace(cls=cls)


def awt_classifiers(channels, new, weight):
    cls = Classifiers(channels, [2, new])
    for parameter in cls.parameters():
        parameter.data.zero_()
    cls[0].weight.data[0, :, 0, 0] = torch.as_tensor(weight)
    cls[0].bias.data[0] = 0.25
    return cls


def images_of(*rows):
    """One image a row, 2×2, each channel of one value."""
    return torch.tensor(rows, dtype=torch.float32)[:, :, None, None].expand(-1, -1, 2, 2)


def labels_of(*rows):
    return torch.tensor(rows).view(-1, 2, 2)


def initialise(part, model, images, labels, batch=1):
    loader = FixedBatches(list(zip(images.split(batch), labels.split(batch))))
    part.init_classifier(model, Features(), loader, CPU)


# ---------------------------------------------------------------------- by hand


def test_attribution_by_hand():
    features, baseline = torch.tensor([3.0, 5.0]).view(1, 2, 1, 1), torch.tensor([1.0, 7.0]).view(1, 2, 1, 1)
    found = awt.attributions(features, baseline, torch.tensor([0.5, 2.0]), (4, 4))  # one position stands for 16 pixels
    assert found.flatten().tolist() == [0.5 * 16 * 2.0, 2.0 * 16 * -2.0]


@pytest.mark.parametrize("size", [(6, 10), (7, 8)])
def test_closed_form_is_that_of_integrated_gradients(size):
    generator = torch.Generator().manual_seed(0)
    features, baseline = torch.randn(2, 1, 3, 3, 5, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, generator=generator, dtype=torch.float64)
    gradients = []
    for share in torch.linspace(0.1, 0.9, 5):
        point = (baseline + share * (features - baseline)).requires_grad_()
        logit = F.interpolate(torch.einsum("bchw,c->bhw", point, weight)[:, None], size=size, mode="bilinear")
        gradients.append(torch.autograd.grad((logit + 0.7).sum(), point)[0])
    expected = (features - baseline) * torch.stack(gradients).mean(0)
    torch.testing.assert_close(awt.attributions(features, baseline, weight, size), expected)


@pytest.mark.parametrize("size", [(6, 12), (5, 3), (7, 31)])
def test_mass_of_the_upsampling_is_its_gradient(size):
    small = torch.zeros(1, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(upsample(small, size).sum(), small)
    torch.testing.assert_close(upsampling_mass((3, 4), size, small), expected[0, 0])
    assert torch.equal(upsampling_mass((3, 4), (6, 8), small), torch.full((3, 4), 4.0, dtype=torch.float64))


def test_labels_at_the_size_of_the_features():
    labels = torch.arange(25).view(1, 5, 5)
    assert awt.pixels_of(labels, (2, 3)).tolist() == [[[0, 1, 3], [10, 11, 13]]]


def test_one_set_of_channels_by_hand():
    """Two images show the new class, the third does not count; the maximum over positions of the mean map is signed."""
    part, model = part_of("--att 50")
    images = images_of([1, 1, 1, 1], [3, 1, -1, 1], [100, 100, 100, 100])
    initialise(part, model, images, labels_of((2, 0, 0, 0), (2, 2, 0, 0), NO_PIXEL))
    # w·x of the two at position 0: (1, −2, 3, 0.5) and (3, −2, −3, 0.5); elsewhere the second alone at position 1, halved, and 0
    assert part.scores.tolist() == [[2.0, 0.0, 0.0, 0.5]]
    assert part.selected.tolist() == [[True, False, False, True]]
    assert model.cls[1].weight.flatten().tolist() == [1.0, 0.0, 0.0, 0.5]
    assert model.cls[0].weight[0].flatten().tolist() == [1.0, -2.0, 3.0, 0.5]
    assert model.cls[0].bias.tolist() == [0.25, 0.0] and model.cls[1].bias.tolist() == [0.0]


@pytest.mark.parametrize(
    ("reduce", "scores"),
    [
        ("mean_after_max", [2.0, 0.0, 1.5, 0.5]),
        ("mean_after_avg", [7 / 8, -6 / 8, -3 / 8, 1.5 / 8]),
        ("avg_after_mean", [7 / 8, -6 / 8, -3 / 8, 1.5 / 8]),
    ],
)
def test_other_reductions_by_hand(reduce, scores):
    part, model = part_of(f"--awt_reduce {reduce}")
    images = images_of([1, 1, 1, 1], [3, 1, -1, 1])
    initialise(part, model, images, labels_of((2, 0, 0, 0), (2, 2, 0, 0)), batch=2)
    torch.testing.assert_close(part.scores, torch.tensor([scores], dtype=torch.float64))


@pytest.mark.parametrize(("mean", "second"), [("released", [2.0, 0.0, 0.0, 0.5]), ("mended", [3.0, 0.0, 0.0, 0.5])])
def test_one_set_for_each_class_by_hand(mean, second):
    """As released the mean of the second class runs over the map of the first one too."""
    part, model = part_of(f"--awt_channels per_class --awt_class_mean {mean} --att 25", new=(2, 3))
    images = images_of([1, 1, 1, 1], [3, 1, -1, 1])
    initialise(part, model, images, labels_of((2, 0, 0, 0), (3, 3, 0, 0)))
    assert part.scores.tolist() == [[1.0, 0.0, 3.0, 0.5], second]
    assert part.selected.tolist() == [[False, False, True, False], [True, False, False, False]]
    assert model.cls[1].weight.flatten(1).tolist() == [[0.0, 0.0, 3.0, 0.0], [1.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("mean", ["released", "mended"])
def test_a_class_without_a_pixel_keeps_its_random_start(mean, capsys):
    """The release divides by no map, or takes the maps of the classes before."""
    part, model = part_of(f"--awt_channels per_class --awt_class_mean {mean}", new=(2, 3))
    initialise(part, model, images_of([1, 1, 1, 1]), labels_of((3, 3, 0, 0)))
    assert part.scores.isfinite().all() and not part.selected[0].any() and part.selected[1].sum() == 1
    assert not model.cls[1].weight[0].any() and model.cls[1].weight.isfinite().all()
    assert "on a pixel of the classes 2 of step 1; their classifiers keep their random start" in capsys.readouterr().out


def test_no_new_pixel_at_all_transfers_nothing(capsys):
    part, model = part_of("", new=(2, 3))
    initialise(part, model, images_of([1, 1, 1, 1]), labels_of(NO_PIXEL))
    assert not part.selected.any() and not model.cls[1].weight.any()
    assert "on a pixel of the classes 2, 3 of step 1" in capsys.readouterr().out


def test_the_pass_ends_with_the_first_contributing_image_after_the_limit():
    part, model = part_of("--awt_images 1")
    images = images_of([1, 0, 0, 0], [50, 0, 0, 0], [3, 0, 0, 0], [100, 0, 0, 0])
    labels = labels_of((2, 0, 0, 0), NO_PIXEL, (2, 0, 0, 0), (2, 0, 0, 0))
    for batch in (1, 4):
        initialise(part, model, images, labels, batch)
        assert part.scores[0, 0] == (1 + 3) / 2


@pytest.mark.parametrize(("percent", "count"), [(10, 26), (25, 64), (50, 128), (75, 192)])
def test_number_of_channels(percent, count):
    part, model = part_of(f"--att {percent}", 256, weight=torch.arange(256.0))
    initialise(part, model, torch.ones(1, 256, 2, 2), labels_of((2, 0, 0, 0)))
    assert part.selected[0].nonzero().flatten().tolist() == list(range(256 - count, 256))


@pytest.mark.parametrize(
    ("words", "weights", "biases"),
    [
        ("--copy", [1.0, 7.0, 7.0, 0.5], [0.25, 0.0, 7.0]),
        ("--copy_bias", [8.0, 7.0, 7.0, 7.5], [0.25 - 0.6931471806, 0.0, 0.25 - 0.6931471806]),
    ],
)
def test_copies_by_hand(words, weights, biases):
    part, model = part_of(f"--att 50 {words}")
    for parameter in model.cls[1].parameters():
        parameter.data.fill_(7.0)
    initialise(part, model, images_of([3, 1, -1, 1]), labels_of((2, 2, 0, 0)))
    assert model.cls[1].weight.flatten().tolist() == weights
    found = torch.cat([model.cls[0].bias, model.cls[1].bias]).detach()
    torch.testing.assert_close(found, torch.tensor(biases))


def test_random_channels_need_no_image_and_follow_the_seed():
    drawn = []
    for seed in (1, 1, 2):
        part, model = part_of(f"--random_channels --rand 20 --random_seed {seed}", 40, weight=torch.ones(40))
        part.init_classifier(model, None, FixedBatches([]), CPU)
        assert model.cls[1].weight.sum() == 20
        drawn.append(part.selected)
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("images", [0, 2])
def test_processes_deal_out_the_images(images, monkeypatch):
    """Two processes hold the images of even and odd positions; their sums are those of one process."""
    generator = torch.Generator().manual_seed(0)
    maps, masks = torch.randn(7, 3, 2, 2, generator=generator), torch.rand(2, 7, 2, 2, generator=generator) < 0.3
    whole = awt.MeanAttributions(2, "max_after_mean", images)
    whole.add(maps, masks)
    shares = [awt.MeanAttributions(2, "max_after_mean", images) for _ in range(2)]
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for rank, share in enumerate(shares):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        share.add(maps[rank::2], masks[:, rank::2])
    lasts = [[share.last[number] and share.last[number][0] for share in shares] for number in range(2)]
    monkeypatch.setattr(distributed, "sum_", lambda tensor: tensor)
    for share in shares:
        answers = iter(lasts)
        monkeypatch.setattr(distributed, "gather_objects", lambda mine, answers=answers: next(answers))
        share.scores(cumulative=False)
    monkeypatch.undo()
    whole.scores(cumulative=False)
    torch.testing.assert_close(shares[0].sums + shares[1].sums, whole.sums)
    assert torch.equal(shares[0].counts + shares[1].counts, whole.counts)


# ------------------------------------------------------------------ command line


def parts_of(words):
    return {type(part).__name__ for part in thin.Step(words).method.parts}


@pytest.mark.parametrize("words", ["--method MiB --att 25 --mask_att", "--method LSKD --init_awt", "--method MiB+AWT"])
def test_the_balanced_initialisation_is_not_done(words):
    found = parts_of(words)
    assert "AttributionTransfer" in found and "BalancedInitialisation" not in found


def test_starts_of_the_release_that_are_not_awt():
    assert "BalancedInitialisation" in parts_of("--method MiB --orig_init")
    assert not parts_of("--method MiB --no_att") & {"AttributionTransfer", "BalancedInitialisation"}
    assert not parts_of("--method MiB --att 0 --no_att") & {"AttributionTransfer", "BalancedInitialisation"}


@pytest.mark.parametrize(
    ("task", "images", "channels"),
    [
        ("100-5", 2000, "shared"),
        ("100-10", 2000, "per_class"),
        ("100-50", 2000, "per_class"),
        ("50", 5000, "per_class"),
    ],
)
def test_programs_of_the_release_on_ade(task, images, channels):
    opts = parse(f"--method MiB+AWT --dataset ade --task {task}")
    assert (opts.awt_images, opts.awt_channels, opts.loss_kd) == (images, channels, 10)
    assert (parse("--method MiB+AWT").awt_images, parse("--method MiB+AWT").awt_channels) == (0, "shared")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("--att 25", ["--att 25 needs --mask_att"]),
        ("--init_awt --init_balanced", ["--init_awt (--att) and --init_balanced", "exclude each other"]),
        ("--init_awt --no_att", ["--no_att", "exclude each other"]),
        ("--method MiB+AWT --att 0", ["--att 0", "--init_awt, which --method MiB+AWT sets", "exclude each other"]),
        ("--init_awt --cosine", ["--cosine", "exclude each other"]),
        ("--init_awt --nb_background_modes 3", ["--nb_background_modes 3", "exclude each other"]),
        ("--random_channels", ["--random_channels needs --init_awt"]),
        ("--init_awt --rand 0", ["--rand 0"]),
    ],
)
def test_refusals(words, parts):
    message = refusal(f"{words} --step 1")
    assert all(part in message for part in parts)


def test_domains_have_no_new_classifier(tmp_path):
    words = f"--data_root '{tmp_path}' --dataset cityscapes_domain --task 11-5 --method MiB+AWT --step 1"
    assert thin.launch(tmp_path, words) == 2


def test_new_classifier_of_a_run_is_its_random_start_and_the_background_in_some_channels(tmp_path):
    """Step 1 with a learning rate of 0 in effect: what the run starts from is what its checkpoint has."""
    words = "--task 6-2 --lr 0.01 1e-30 --momentum 0 --weight_decay 0 --shapes_train 30 --crop_size 64"
    assert thin.launch(tmp_path, f"{words} --method MiB+AWT --step 0 1") == 0
    plain = f"--step_ckpt '{tmp_path}/checkpoints/6-2-shapes_n_0.pth' --name plain"
    assert thin.launch(tmp_path, f"{words} --method MiB --no_att --step 1 {plain}") == 0
    first, started, random = (
        read(tmp_path / "checkpoints" / f"6-2-shapes_{name}.pth")["model_state"] for name in ("n_0", "n_1", "plain_1")
    )
    background = first["cls.0.weight"][0].flatten()
    moved = (started["cls.1.weight"] - random["cls.1.weight"]).flatten(1)
    chosen = moved[0] != 0
    assert chosen.sum() == 11  # a quarter of 42 channels
    torch.testing.assert_close(moved, (background * chosen).expand_as(moved), atol=1e-6, rtol=0)
    for name in ("cls.0.weight", "cls.0.bias"):
        assert torch.equal(started[name], first[name])
    assert torch.equal(started["cls.1.bias"], random["cls.1.bias"])


@pytest.mark.parametrize("method", ["LSKD", "PLOP"])
def test_on_top_of_other_methods(method, tmp_path):
    words = f"--task 6-2 --method {method} --init_awt --awt_channels per_class --step 0 1"
    assert thin.launch(tmp_path, words) == 0
    assert "kd" in thin.document(tmp_path)["steps"]["1"]["epochs"][0]["losses"] or method == "PLOP"


def test_a_resume_continues_to_the_bit(tmp_path):
    interrupted.assert_equal_to_the_bit(
        *interrupted.run_twice(tmp_path, "--task 6-2 --method MiB+AWT --epochs 2", step=1, at=1)
    )


def test_a_stop_during_the_attribution_ends_the_run_and_a_resume_starts_the_step_anew(tmp_path, monkeypatch):
    words = "--task 6-2 --method MiB+AWT --crop_size 64"
    assert thin.launch(tmp_path / "whole", f"{words} --step 0 1") == 0
    base = f"--step 1 --step_ckpt '{tmp_path}/whole/checkpoints/6-2-shapes_n_0.pth'"
    seen = []
    add = awt.MeanAttributions.add

    def stop(*args):
        seen.append(args)
        os.kill(os.getpid(), signal.SIGTERM)
        return add(*args)

    with monkeypatch.context() as patch:
        patch.setattr(awt.MeanAttributions, "add", stop)
        assert thin.launch(tmp_path / "parts", f"{words} {base}") == 128 + signal.SIGTERM
    assert len(seen) == 1
    assert thin.launch(tmp_path / "parts", f"{words} {base} --resume") == 0
    first, second = (read(tmp_path / name / "checkpoints" / "6-2-shapes_n_1.pth") for name in ("whole", "parts"))
    assert checkpoint_files.digest(first["model_state"]) == checkpoint_files.digest(second["model_state"])
