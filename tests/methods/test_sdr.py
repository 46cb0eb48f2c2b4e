"""methods/sdr.py: numbers by hand, released and mended, the state of the checkpoint, refusals, a kill and a resume."""

import math

import pytest
import torch

from dataset.sampler import FixedBatches
from methods.sdr import SDR, SLIPS, LatentPrototypes, Sparsity
from tests.support import interrupted, thin
from utils import latent_space
from utils.checkpointing.store import read
from utils.errors import UserError
from utils.runtime import gate

TEXT = "--method SDR --task 6-2"
OFFICIAL_STEP0 = "--method FT --unce --loss_de_prototypes 1 --task 6-2"
CHANNELS = thin.ThinResNet.out_channels
#: What step 1 left, for `thin.Step`, which trains step 2 of 3 + 1 + 2 classes.
BEFORE = {
    "prototypes": torch.randn(4, CHANNELS, generator=torch.Generator().manual_seed(3), dtype=torch.float64),
    "count_features": torch.tensor([0, 40, 30, 20]),
}


pytestmark = pytest.mark.usefixtures("small")


def a_step(words="", state=BEFORE):
    checkpoint = {"model_state": {}, "method_state": {"sdr": state} if state else {}, "file": "one.pth"}
    return thin.Step(f"{TEXT} {words}", checkpoint=checkpoint)


def part_of(step, kind=LatentPrototypes):
    return next(part for part in step.method.parts if isinstance(part, kind))


# ------------------------------------------------------------------------- by hand

#: Two images of 1 x 2 positions with two channels; class 1 is at both positions of the first image and at one of the second.
FEATURES = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]], [[[5.0, 7.0]], [[6.0, 8.0]]]])
LABELS = torch.tensor([[[1, 1]], [[1, 3]]])


def test_labels_at_the_size_of_the_features():
    labels = torch.arange(36).view(1, 6, 6)
    assert latent_space.at_size(labels, (4, 2)).tolist() == [[[0, 3], [6, 9], [18, 21], [24, 27]]]


def test_a_class_is_given_its_shape_without_a_transpose_unless_mended():
    chosen = LABELS == 1
    released = [latent_space.rows_of_class(FEATURES, chosen, tall) for tall in (False, True)]
    mended = [latent_space.rows_of_class(FEATURES, chosen, tall, exact=True) for tall in (False, True)]
    assert released[0].tolist() == [[1, 2, 3], [4, 5, 6]] and released[1].tolist() == [[1, 2], [3, 4], [5, 6]]
    assert mended[0].tolist() == [[1, 2, 5], [3, 4, 6]] and mended[1].tolist() == [[1, 3], [2, 4], [5, 6]]
    # A single image: the wide matrix is right
    assert latent_space.rows_of_class(FEATURES[:1], chosen[:1], False).tolist() == [[1, 2], [3, 4]]


def test_running_means_by_hand(counted):
    sums, numbers = latent_space.class_sums(FEATURES, LABELS, 5, exact=True)
    assert sums.tolist() == [[0, 0], [8, 13], [0, 0], [7, 8], [0, 0]] and numbers.tolist() == [0, 3, 0, 1, 0]
    known = torch.tensor([[9.0, 9.0], [2.0, 1.0], [5.0, 5.0], [0.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    counts = torch.tensor([1, 1, 2, 0, 0])
    prototypes, total = latent_space.updated_prototypes(known, counts, sums.double(), numbers, None)
    assert prototypes.tolist() == [[9, 9], [10 / 4, 14 / 4], [5, 5], [7, 8], [0, 0]]
    assert total.tolist() == [1, 4, 2, 1, 0]
    # Class 1 is the smallest of the batch: released, it is taken for the background
    prototypes, total = latent_space.updated_prototypes(known, counts, sums.double(), numbers, "first")
    assert prototypes[1].tolist() == [2, 1] and total.tolist() == [1, 1, 2, 1, 0]
    prototypes, total = latent_space.updated_prototypes(known, counts, sums.double(), numbers, "background")
    assert prototypes[1].tolist() == [2.5, 3.5] and total.tolist() == [1, 4, 2, 1, 0]


@pytest.mark.parametrize("label", [0, 255])
@pytest.mark.parametrize("skip", [None, "first", "background"])
def test_a_batch_without_a_class_changes_nothing(label, skip, counted):
    known, counts = torch.ones(3, 2), torch.tensor([0, 1, 2])
    sums, numbers = latent_space.class_sums(FEATURES, torch.full((2, 1, 2), label), 3)
    prototypes, total = latent_space.updated_prototypes(known, counts, sums, numbers, skip)
    if label == 255 or skip is not None:
        assert torch.equal(prototypes, known) and torch.equal(total, counts)


def test_when_the_background_is_left_out():
    cases = [(0, False, False), (0, True, False), (1, False, False), (1, False, True), (1, True, True)]
    assert [latent_space.leaves_background_out(*case) for case in cases] == [False, True, True, False, True]


def test_attraction_by_hand(counted):
    """Class 1 at distance 2 in every number, class 3 at distance 1."""
    prototypes = torch.zeros(4, 2)
    prototypes[3] = torch.tensor([6.0, 7.0])
    features = torch.where(LABELS[:, None] == 1, torch.tensor(2.0), FEATURES).requires_grad_()
    released = latent_space.attraction(features, LABELS, prototypes)
    assert released.item() == pytest.approx((4 / 2 + 1) / 2)
    assert latent_space.attraction(features, LABELS, prototypes, mean=True).item() == pytest.approx((4 + 1) / 2)
    assert latent_space.attraction(features, LABELS, prototypes, "first").item() == pytest.approx(1)
    assert latent_space.attraction(features, LABELS, prototypes, "background", mean=True).item() == pytest.approx(2.5)
    released.backward()
    assert features.grad[1, :, 0, 1].tolist() == [0.5, 0.5]  # (1/2) · 2 (x − P) / 2


def test_repulsion_by_hand(counted):
    """Means (0, 0), (3, 4) and (0, 0): two pairs at distance 5, and one at 0, which is left out."""
    features = torch.tensor([[0.0, 3.0, 0.0], [0.0, 4.0, 0.0]]).view(1, 2, 1, 3).requires_grad_()
    labels = torch.tensor([[[0, 1, 2]]])
    value = latent_space.repulsion(features, labels)
    assert value.item() == pytest.approx(1 / 5)
    value.backward()
    # d(1/5)/d(mean of class 1) = −(3, 4)/125 for each of the two pairs, over two pairs
    torch.testing.assert_close(features.grad[0, :, 0, 1], torch.tensor([-3.0, -4.0]) / 125)
    assert features.grad.isfinite().all()
    assert latent_space.repulsion(features, labels, "background").item() == pytest.approx(1 / 5)
    assert latent_space.repulsion(features, torch.ones_like(labels)).item() == 0


def test_matching_by_hand(counted):
    prototypes = torch.zeros(3, 2)
    labels = torch.tensor([[[0, 1]], [[2, 1]]])  # class 1 at (2, 4) and (7, 8), class 2 at (5, 6)
    mean, each = (latent_space.prototype_matching(FEATURES, labels, prototypes, s, exact=True) for s in (True, False))
    assert mean.item() == pytest.approx(((4.5**2 + 6**2) / 2 + (5**2 + 6**2) / 2) / 2)
    assert each.item() == pytest.approx((2**2 + 4**2 + 7**2 + 8**2) / 4 + (5**2 + 6**2) / 2)
    # Class 1 as released: the vector (2, 4, 7, 8) in the shape (2, 2), which here is the same
    assert latent_space.prototype_matching(FEATURES, labels, prototypes, True).item() == pytest.approx(mean.item())
    assert latent_space.prototype_matching(FEATURES, torch.zeros_like(labels), prototypes, True).item() == 0


def test_old_labels_by_hand():
    logits = torch.zeros(1, 3, 2, 4)
    logits[0, 2, 0, 0] = logits[0, 1, 0, 2] = logits[0, 2, 1, 2] = 1
    labels = torch.tensor([[[0, 0], [0, 4]]])
    assert latent_space.old_labels(labels, logits).tolist() == [[[2, 1], [0, 0]]]
    labels = torch.tensor([[[0, 2], [255, 4]]])
    assert latent_space.old_labels(labels, logits, sequential=True).tolist() == [[[0, 2], [0, 0]]]


def test_sparsity_by_hand(counted):
    features = torch.tensor([[1.0, 2.0, 5.0], [3.0, 2.0, 5.0]]).view(1, 2, 1, 3).requires_grad_()
    labels = torch.tensor([[[1, 1, 255]]])  # the maximum of class 1 is 3, that of 255 is 5

    def ratio(*values):
        return sum(math.exp(value) for value in values) / sum(values)

    known = [ratio(1 / 3, 1), ratio(2 / 3, 2 / 3)]
    released = latent_space.sparsity(features, labels)
    assert released.item() == pytest.approx(sum([*known, ratio(1, 1)]) / 3)
    assert latent_space.sparsity(features, labels, ignore=True).item() == pytest.approx(sum(known) / 2)
    squared = latent_space.sparsity(features, labels, "max_foreachfeature", "squared")
    assert squared.item() == pytest.approx(((1 / 9 + 1) / (4 / 3) + 1 + 1) / 3)
    released.backward()
    assert features.grad[0, 1, 0, 0] != 0  # through the maximum too
    assert abs(features.grad[0, :, 0, 2].sum()) < 1e-6  # F̄ = 1 there, whatever F is


def test_sparsity_is_0_without_a_class_or_without_a_positive_sum(counted):
    zeros, background = torch.zeros(2, 1, 2, dtype=torch.int64), FEATURES.clone().requires_grad_()
    assert latent_space.sparsity(background, zeros).item() == 0
    ignored = torch.full_like(zeros, 255)
    assert latent_space.sparsity(background, ignored).item() > 0  # released: a class like any other
    assert latent_space.sparsity(background, ignored, ignore=True).item() == 0
    assert latent_space.sparsity(torch.zeros_like(FEATURES), zeros + 1).item() == 0


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_all_classes_at_once_are_the_classes_one_by_one(seed, exact, monkeypatch):
    """Values and gradients; some classes are at many positions, some in one image alone, some nowhere."""
    generator = torch.Generator().manual_seed(seed)
    given = torch.randn(3, 5, 4, 4, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 9, (3, 4, 4), generator=generator)
    labels[labels == 7], labels[1][labels[1] == 2], labels[labels == 8] = 0, 1, 255
    prototypes = torch.randn(8, 5, dtype=torch.float64, generator=generator)

    def every(features):
        yield from latent_space.class_sums(features, labels, 8, exact)
        for skip in (None, "first", "background"):
            yield latent_space.attraction(features, labels, prototypes, skip, exact)
            yield latent_space.attraction(features, labels, prototypes, skip, exact, mean=True)
            yield latent_space.repulsion(features, labels, skip, exact, 8)
        for sum_after in (True, False):
            yield latent_space.prototype_matching(
                features, labels.where(labels != 255, 0), prototypes, sum_after, exact
            )
        for how in latent_space.NORMALISATIONS:
            for shrinking in latent_space.SHRINKINGS:
                yield latent_space.sparsity(features.abs(), labels, how, shrinking)

    found = []
    for devices in (("cuda",), ("cuda", "cpu")):
        monkeypatch.setattr(gate, "ASYNCHRONOUS", devices)
        features = given.clone().requires_grad_()
        values = list(every(features))
        weighted = sum((number + 1) * value.sum() for number, value in enumerate(values) if value.requires_grad)
        found.append([*values, *torch.autograd.grad(weighted, features)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-12)


# -------------------------------------------------------------------------- the part


def test_terms_of_a_batch(counted):
    images, labels = thin.images(2), thin.bands(0, 1, 4, 5, 255)
    step, mib = a_step(), thin.Step("--loss_kd 100 --unce --unkd --task 6-2")
    batch = step.batch(images, labels)
    terms = step.method.terms(batch)
    plain = mib.terms(images, labels)
    torch.testing.assert_close([terms["ce"], terms["kd"]], [plain["ce"], plain["kd"]])
    features = batch.student.body
    small = latent_space.at_size(labels, features.shape[-2:])
    sums = latent_space.class_sums(features.detach(), small, 6)
    before = torch.cat([BEFORE["prototypes"], torch.zeros(2, CHANNELS)]), torch.tensor([0, 40, 30, 20, 0, 0])
    prototypes, counts = latent_space.updated_prototypes(*before, *sums, "first")
    old = latent_space.old_labels(small, batch.teacher.logits)
    assert counts[4] > 0 and counts[0] == 0 and (old > 0).any()
    expected = {
        "attraction": 1e-3 * latent_space.attraction(features, small, prototypes),
        "repulsion": 1e-3 * latent_space.repulsion(features, small),
        "matching": 1e-2 * latent_space.prototype_matching(features, old, prototypes, True),
        "sparsity": 1e-3 * latent_space.sparsity(features, small),
    }
    assert set(terms) == {"ce", "kd", *expected}
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, msg=name)


@pytest.mark.parametrize("slip", SLIPS)
def test_each_slip_is_mended_where_it_is_and_nowhere_else(slip, counted):
    # No background: class 1 is left out in its place
    images, labels = thin.images(2, 64), thin.bands(1, 4, 5, 255, size=64)
    found = {}
    for words in ("", f"--sdr_mend {slip}"):
        step = a_step(f"--lfc_nobgr {words}")
        terms = step.method.terms(step.batch(images, labels))
        found[words] = terms | {"counts": part_of(step).pending[1].sum()}
    released, mended = found.values()
    changed = {name for name in released if not torch.allclose(released[name], mended[name], rtol=1e-6, atol=0)}
    every = {"attraction", "repulsion"}
    assert (
        changed
        == {
            "reshape": every,
            "mean": {"attraction"},
            "background": {*every, "counts"},
            "ignore": {"sparsity"},
        }[slip]
    )


def test_all_slips_at_once_are_the_plain_means(counted):
    images, labels = thin.images(2, 64), thin.bands(1, 4, 5, 255, size=64)
    step = a_step("--sdr_mend reshape mean background ignore")
    terms = step.method.terms(step.batch(images, labels))
    prototypes = part_of(step).pending[0]
    features = step.batch(images, labels).student.body.movedim(1, -1).double()
    small = latent_space.at_size(labels, features.shape[1:3])
    mine = [(features[small == k] - prototypes[k]).square().mean() for k in (1, 4, 5)]
    torch.testing.assert_close(terms["attraction"].double(), 1e-3 * sum(mine) / 3, rtol=1e-5, atol=0)
    torch.testing.assert_close(prototypes[4], features[small == 4].mean(0), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(
        prototypes[1],
        (features[small == 1].sum(0) + 40 * BEFORE["prototypes"][1]) / (40 + (small == 1).sum()),
        rtol=1e-6,
        atol=1e-8,
    )


@pytest.mark.parametrize("values", [(0,), (4,), (255,), (0, 255), (4, 5)])
@pytest.mark.parametrize(
    "method", ["SDR", "LSKD --loss_fc 1 --lfc_sep_clust 1 --loss_de_prototypes 1 --loss_featspars 1"]
)
def test_finite_whatever_a_batch_shows(values, method, counted):
    state = {"model_state": {}, "method_state": {"sdr": BEFORE}, "file": "one.pth"}
    step = thin.Step(f"--method {method} --task 6-2", checkpoint=state)
    images, labels = thin.images(2), thin.bands(*values)
    step.begin(images, labels)
    trainer = step.trainer()
    losses = trainer.train_iteration(images, labels)
    assert {"attraction", "repulsion", "matching", "sparsity"} < set(losses)
    assert all(math.isfinite(value) for value in losses.values())
    assert all(p.isfinite().all() for p in step.model.parameters())
    assert part_of(step).prototypes.isfinite().all()


def test_prototypes_are_kept_only_by_iterations_that_move_the_parameters():
    images, labels = thin.images(2), thin.bands(0, 4, 5)
    step = a_step("--skip_nonfinite 1")
    trainer, part = step.trainer(), part_of(step)
    before = part.prototypes.clone()
    trainer.trial(FixedBatches([(images, labels)]))
    assert torch.equal(part.prototypes, before)
    assert trainer.train_iteration(images * math.nan, labels) == {} and torch.equal(part.prototypes, before)
    assert trainer.train_iteration(images, labels) and (part.prototypes[4] != 0).any()
    assert torch.equal(part.prototypes[0], before[0])  # overlapped: no background


def test_the_validation_changes_no_prototype():
    step = a_step()
    trainer, before = step.trainer(), part_of(step).prototypes.clone()
    trainer.evaluate([(thin.images(2), thin.bands(0, 4))])
    assert torch.equal(part_of(step).prototypes, before)


def test_the_new_classifier_is_not_started_from_the_background():
    assert "init_balanced" not in SDR.preset
    new = a_step().model.cls[-1].weight
    assert 0.9 / thin.FEATURES**0.5 < float(new.detach().abs().max()) <= 1 / thin.FEATURES**0.5


# ------------------------------------------------------------------ the command line


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdr")
    with thin.program():
        assert thin.launch(folder, f"{TEXT} --step 0 1 --crop_size 64") == 0
        assert thin.launch(folder / "official", f"{OFFICIAL_STEP0} --step 0") == 0
        assert thin.launch(folder / "plain", "--method FT --task 6-2 --step 0") == 0
    return folder


def state_of(folder, step):
    return read(thin.checkpoint(folder, step))["method_state"]["sdr"]


def test_prototypes_and_counts_are_in_the_checkpoint(finished):
    first, second = state_of(finished, 0), state_of(finished, 1)
    assert set(first) == {"prototypes", "count_features"}
    assert first["prototypes"].shape == (7, CHANNELS) and second["prototypes"].shape == (9, CHANNELS)
    assert first["count_features"][0] == 0 and not first["prototypes"][0].any()  # overlapped
    assert (second["count_features"][:7] == first["count_features"]).all()  # step 1 has labels of its own classes only
    assert second["count_features"][7:].sum() > 0


def test_step_0_of_the_official_script_serves_and_one_without_prototypes_is_refused(finished, tmp_path, capsys):
    words = f"{TEXT} --step 1 --step_ckpt"
    assert thin.launch(tmp_path / "ok", f"{words} '{thin.checkpoint(finished / 'official', 0)}'") == 0
    losses = thin.document(finished / "official")["steps"]["0"]["epochs"][0]["losses"]
    assert set(losses) == {"ce", "loss"}
    plain = thin.checkpoint(finished / "plain", 0)
    assert thin.launch(tmp_path / "refused", f"{words} '{plain}'") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"need the class prototypes of step 0, but {plain} has none" in error
    assert "--method SDR" in error and not list((tmp_path / "refused").rglob("*.pth"))


@pytest.mark.parametrize(
    "spoilt",
    [
        {"prototypes": torch.zeros(4, 3, dtype=torch.float64)},
        {"prototypes": torch.full((4, CHANNELS), math.inf)},
        {"prototypes": "x"},
        {"count_features": torch.tensor([1, 2, 3, -1])},
        {"count_features": torch.zeros(4)},
    ],
)
def test_prototypes_that_do_not_fit_are_refused(spoilt):
    with pytest.raises(UserError, match=r"the prototypes in one\.pth are not 4 rows of 12 finite numbers"):
        a_step(state=BEFORE | spoilt)


@pytest.mark.parametrize("state", [[1], "x", torch.ones(2), {"prototypes": BEFORE["prototypes"]}])
def test_a_state_of_step_t_1_that_is_no_dictionary_of_prototypes_is_refused(state):
    checkpoint = {"model_state": {}, "method_state": {"sdr": state}, "file": "one.pth"}
    with pytest.raises(UserError, match=r"prototypes of step 1, but one\.pth has none"):
        thin.Step(TEXT, checkpoint=checkpoint)


@pytest.mark.parametrize("state", [{"prototypes": torch.zeros(2, 2)}, BEFORE, "x"])
def test_a_crafted_state_is_refused_by_a_resume(state):
    with pytest.raises(UserError, match="--resume: state/method/sdr"):
        part_of(a_step()).load_state_dict(state)


def test_domains_are_refused(tmp_path, capsys):
    words = f"--dataset cityscapes_domain --data_root '{tmp_path}' --task 11-5 --step 0"
    assert thin.launch(tmp_path, f"{words} --loss_featspars 0.1") == 2
    assert "--loss_featspars 0.1 cannot work on cityscapes_domain" in capsys.readouterr().err


def test_sparsity_stands_alone(tmp_path):
    assert thin.launch(tmp_path, "--loss_featspars 0.1 --task 6-2 --step 0") == 0
    assert not read(thin.checkpoint(tmp_path, 0))["method_state"]
    assert isinstance(part_of(thin.Step("--loss_featspars 0.1 --task 6-2"), Sparsity), Sparsity)


@pytest.mark.parametrize("at", [0, 3])
def test_killed_and_resumed_to_the_bit(tmp_path, at):
    whole, parts = interrupted.run_twice(tmp_path, f"{TEXT} --epochs 1 --shapes_train 24", 1, at)
    interrupted.assert_equal_to_the_bit(whole, parts)
    assert set(parts["method_state"]) == {"sdr"}
