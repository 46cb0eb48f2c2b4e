"""utils/contrastive.py: labels by hand, the loss against its formula written out, blocks, and cases without pairs."""

import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from utils import contrastive

OLD, TOTAL = 3, 5


def a_batch(seed=0, images=2, size=4):
    """Features of student and teacher, small logits, and labels at the size of the features with every kind of position."""
    generator = torch.Generator().manual_seed(seed)

    def draw(channels):
        return torch.randn(images, channels, size, size, dtype=torch.float64, generator=generator)

    given = torch.randint(0, TOTAL, (images, size, size), generator=generator)
    given[given == 1] = 0
    return draw(6).requires_grad_(), draw(6), 2 * draw(OLD), given


def by_formula(student, teacher, logits, given, temperature, mended):
    """The loss, pair by pair."""
    positions = [(b, i, j) for b in range(len(given)) for i in range(given.shape[1]) for j in range(given.shape[2])]
    labels = {p: int(given[p]) or int(logits[p[0], :, p[1], p[2]].argmax()) for p in positions}
    kept = [p for p in positions if labels[p] > 0]
    twins = [p for p in kept if int(given[p]) == 0]
    first_new = min(int(given[p]) for p in positions if int(given[p]) > 0)

    def unit(maps, p):
        return F.normalize(maps[p[0], :, p[1], p[2]], dim=0)

    contrasts = [(unit(student, p).detach(), p) for p in kept] + [(unit(teacher, p), p) for p in twins]
    values = []
    for index, anchor in enumerate(kept):
        s = torch.stack([unit(student, anchor) @ c for c, _ in contrasts]) / temperature
        largest = s.max().detach()
        positives = [j for j, (_, p) in enumerate(contrasts) if labels[p] == labels[anchor] and j != index]
        negatives = [j for j, (_, p) in enumerate(contrasts) if labels[p] != labels[anchor]]
        if not positives:
            continue
        total = sum((torch.exp(s[k] - (largest if mended else 0)) for k in negatives), torch.zeros(()))
        terms = []
        for j in positives:
            p, q = (logits[place[0], :, place[1], place[2]].softmax(0) for place in (anchor, contrasts[j][1]))
            joint = 1.0 if min(labels[anchor], labels[contrasts[j][1]]) >= first_new else p @ q
            terms.append(joint * (s[j] - largest - torch.log(torch.exp(s[j] - largest) + total)))
        values.append(-sum(terms) / len(terms))
    return sum(values) / len(values)


@pytest.mark.parametrize("mended", [False, True])
@pytest.mark.parametrize("images", [1, 2])
def test_value_and_gradient_are_those_of_the_formula(mended, images, counted):
    student, teacher, logits, given = a_batch(images=images, size=3)
    pairs = contrastive.make_pairs(student, teacher, logits, given)
    value = contrastive.contrastive_distillation(pairs, 0.2, mended)
    expected = by_formula(student, teacher, logits, given, 0.2, mended)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(total, student)[0] for total in (value, expected)]
    assert grads[1].abs().max() > 0
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-14)


def test_labels_by_hand():
    labels = torch.tensor([[[3, 3, 255, 1], [4, 5, 1, 1]], [[0, 0, 9, 9], [0, 0, 9, 9]]])
    size = torch.Size([1, 2])
    # Averages 3.75, 64.5, 0 and 9; 64 is no class of VOC
    assert contrastive.given_labels(labels, size).tolist() == [[[3, 0]], [[0, 9]]]
    assert contrastive.given_labels(labels, size, last=100).tolist() == [[[3, 64]], [[0, 9]]]
    assert contrastive.given_labels(labels, size, nearest=True).tolist() == [[[3, 0]], [[0, 9]]]
    assert contrastive.given_labels(labels[:1, :, 1:], size, nearest=True).tolist() == [[[3, 0]]]


@pytest.mark.parametrize("size", [3, 5, 7, 11])
def test_equal_labels_stay_what_they_are(size):
    """Weights such as 1/3 and 2/3 leave an average of equal labels below them."""
    for label in (1, 5, 7, 19):
        labels = torch.full((1, 32, 32), label)
        assert contrastive.given_labels(labels, torch.Size([size, size])).unique().tolist() == [label]


@pytest.mark.parametrize("block", [1, 7, 100, 10**6])
def test_the_size_of_the_blocks_changes_nothing(block, counted):
    student, *rest = a_batch(3)
    whole = contrastive.contrastive_distillation(contrastive.make_pairs(student, *rest))
    value = contrastive.contrastive_distillation(contrastive.make_pairs(student, *rest), block=block)
    torch.testing.assert_close(value, whole, rtol=1e-13, atol=0)
    grads = [torch.autograd.grad(total, student)[0] for total in (value, whole)]
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-15)


class Memory(TorchDispatchMode):
    """Counts the elements of the results of operations that are alive together, and those of the largest."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.largest = [], 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        found = [value for value in tree_leaves(result) if isinstance(value, torch.Tensor)]
        self.alive = [reference for reference in self.alive if reference() is not None]
        self.alive += [weakref.ref(value) for value in found]
        storages = {value.data_ptr(): value.numel() for reference in self.alive if (value := reference()) is not None}
        self.peak = max(self.peak, sum(storages.values()))
        self.largest = max([self.largest, *(value.numel() for value in found)])
        return result


def test_memory_is_that_of_blocks_and_of_the_formula():
    """n·m pairs are more than 100 000; they are compared in blocks of 5000, or at once."""
    student, teacher, logits, given = a_batch(images=2, size=16)
    for block in (5000, 10**9):
        with Memory() as memory:
            pairs = contrastive.make_pairs(student, teacher, logits, given)
            contrastive.contrastive_distillation(pairs, block=block).backward()
        n, m = len(pairs.anchors), len(pairs.contrasts)
        assert n * m > 100_000
        most = min(block, n * m)
        assert 0.9 * most < memory.largest <= most
        formula = contrastive.memory(n, m, student.shape[1], OLD, block)
        assert 0.6 * formula < memory.peak <= formula, (memory.peak, formula)


def test_cases_without_pairs_are_0(counted):
    student, teacher, logits, given = a_batch()
    nothing = torch.zeros_like(given)
    pairs = contrastive.make_pairs(student, teacher, logits, nothing)
    assert (pairs is None) == counted
    assert contrastive.contrastive_distillation(pairs) == 0
    alone = nothing.clone()
    alone[0, 0, 0] = 4  # the only anchor: the teacher sees background everywhere
    logits = torch.zeros_like(logits)
    pairs = contrastive.make_pairs(student, teacher, logits, alone)
    assert (pairs.labels > 0).sum() == 1 and (not counted or len(pairs.anchors) == len(pairs.contrasts) == 1)
    value = contrastive.contrastive_distillation(pairs)
    assert value.item() == 0 and torch.autograd.grad(value, student)[0].abs().max() == 0


@pytest.mark.parametrize("mended", [False, True])
@pytest.mark.parametrize("temperature", [1e-3, 0.07, 100.0])
@pytest.mark.parametrize("labels", ["equal", "different", "mixed"])
def test_finite_in_float32_at_any_temperature(mended, temperature, labels, counted):
    student, teacher, logits, given = (value.float() if value.is_floating_point() else value for value in a_batch())
    student = student.detach().requires_grad_()
    if labels != "mixed":
        given = torch.full_like(given, 4)
    if labels == "different":
        given[0] = torch.arange(1, 17).view(4, 4)
    pairs = contrastive.make_pairs(student, teacher, logits, given)
    value = contrastive.contrastive_distillation(pairs, temperature, mended)
    (grad,) = torch.autograd.grad(value, student)
    assert value.isfinite() and grad.isfinite().all()
    if labels == "equal":
        assert value.item() == pytest.approx(0, abs=1e-6)  # no negative


def test_the_joint_probability_by_hand():
    """Two positions: one annotated with the new class 2, one that the teacher takes for class 1."""
    logits = torch.tensor([[0.0, 0.0], [math.log(3), math.log(3)], [0.0, 0.0]]).T.reshape(1, 2, 3).movedim(2, 1)
    features, given = torch.ones(1, 2, 1, 2), torch.tensor([[[2, 0]]])
    pairs = contrastive.make_pairs(features, features, logits.reshape(1, 3, 1, 2), given)
    assert pairs.labels.tolist() == [2, 1, 1] and pairs.first_new == 2
    product = 0.2**2 + 0.6**2 + 0.2**2
    expected = torch.tensor([[1, product, product], [product, product, product]])
    torch.testing.assert_close(contrastive.joint_probability(pairs, slice(0, 2)), expected)
