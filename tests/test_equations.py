"""The functions of the methods that came later, beside their equations in NumPy, where golden/ has no case: other shapes and values.

The program's side is that of the golden cases (tests/support/golden_methods); gradients are compared with differences of the equations.
"""

import numpy as np
import pytest
import torch

from tests.support import equations, golden_methods

OPS = golden_methods.collect("OPS")
#: Batch, classes before and in the step, size of the labels and of the features: one image, odd sizes, no divisor, one old class.
SHAPES = [
    (1, 3, 1, (7, 9), (3, 4)),
    (2, 1, 2, (12, 8), (3, 2)),
    (3, 5, 2, (10, 11), (5, 5)),
    (2, 4, 1, (6, 6), (6, 6)),
    (1, 2, 3, (9, 5), (1, 2)),
]


class Scene:
    """Random maps and labels of a shape; labels have blocks, 255 among them, and not every class."""

    def __init__(self, seed: int, channels: int = 6):
        self.batch, self.old, self.new, self.size, self.small = SHAPES[seed % len(SHAPES)]
        self.random = np.random.default_rng(seed)
        self.total, self.channels = self.old + self.new, channels
        choice = [0, 255, *range(self.old, self.total)][: 2 + self.new - (seed % 2 and self.new > 1)]
        rows, columns = (-(-side // 2) for side in self.size)
        coarse = self.random.choice(choice, (self.batch, rows, columns))
        coarse[0, 0, 0], coarse[0, -1, -1] = 0, self.old
        labels = coarse.repeat(2, axis=1).repeat(2, axis=2)
        self.labels = labels[:, : self.size[0], : self.size[1]].astype(np.int64)
        self.meta = {"old_classes": self.old, "new_classes": self.new}

    def maps(self, channels: int | None = None, full: bool = False, scale: float = 1.0) -> np.ndarray:
        """(B, c, h, w) of noise."""
        size = self.size if full else self.small
        return scale * self.random.normal(size=(self.batch, channels or self.channels, *size))

    def rows(self, count: int) -> np.ndarray:
        """(count, D) of noise."""
        return self.random.normal(size=(count, self.channels))


def outputs(op, meta, dtype=torch.float64, **arrays):
    """What the program computes, as NumPy arrays."""
    given = {f"in_{name}": torch.from_numpy(np.array(value)) for name, value in arrays.items()}
    given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in given.items()}
    return {name: value.double().numpy() for name, value in OPS[op](given, meta).items()}


def close(mine, theirs, tolerance=1e-9):
    np.testing.assert_allclose(mine, theirs, rtol=tolerance, atol=tolerance)


def check_gradient(gradient, value, at, seed=0):
    """Along a random direction the difference of the equation's values is the gradient's part."""
    direction, step = np.random.default_rng(seed).normal(size=at.shape), 1e-6
    difference = (value(at + step * direction) - value(at - step * direction)) / (2 * step)
    np.testing.assert_allclose((gradient * direction).sum(), difference, rtol=2e-5, atol=1e-7)


SEEDS = range(len(SHAPES))


@pytest.mark.parametrize("delta", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_reminder(seed, delta):
    scene, tau = Scene(seed), 1.0 + seed
    student, teacher = scene.maps(scene.total, full=True), scene.maps(scene.old, full=True)
    features, prototypes = scene.maps(), scene.rows(scene.old)
    prototypes[0] = 0
    means = equations.class_means(features, scene.labels, scene.total)
    means[: scene.old] = 0
    meta = scene.meta | {"delta": delta, "temperature": tau}
    given = {"teacher_logits": teacher, "pre_logits": features, "labels": scene.labels, "prototypes": prototypes}
    found = outputs("reminder_csw_kd", meta, student_logits=student, **given)
    close(found["out_batch_prototypes"], means)

    def value(z):
        return equations.csw(z, teacher, scene.labels, means, prototypes, delta, tau)

    close(found["out_value"], value(student))
    check_gradient(found["out_grad_student"], value, student)
    single = outputs("reminder_csw_kd", meta, torch.float32, student_logits=student, **given)
    close(single["out_value"], value(student), 1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_prototypes_of_reminder(seed):
    scenes = [Scene(seed), Scene(seed + len(SHAPES))]
    first, arrays, seen = scenes[0], {}, {}
    for i, scene in enumerate(scenes):
        arrays |= {f"pre_logits_{i}": scene.maps(), f"labels_{i}": scene.labels}
        means = equations.class_means(arrays[f"pre_logits_{i}"], scene.labels, scene.total)
        for k in set(scene.labels.ravel().tolist()) & set(range(scene.old, scene.total)):
            seen.setdefault(k, []).append(means[k])
    before = first.rows(first.old)
    expected = np.concatenate([before, np.zeros((first.new, first.channels))])
    for k, found in seen.items():
        expected[k] = np.mean(found, axis=0)
    close(outputs("reminder_prototypes", first.meta, prototypes=before, **arrays)["out_prototypes"], expected)


def sdr(seed):
    """A scene, its labels at the size of the features, features and prototypes."""
    scene = Scene(seed)
    return scene, equations.nearest(scene.labels, scene.small), scene.maps(), scene.rows(scene.total)


@pytest.mark.parametrize(
    ("step", "overlap", "sequential"), [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0), (1, 0, 1), (1, 1, 1)]
)
@pytest.mark.parametrize("seed", SEEDS)
def test_prototypes_of_sdr(seed, step, overlap, sequential):
    scene, small, features, known = sdr(seed)
    counts = scene.random.integers(0, 9, scene.total)
    drop = bool(overlap or (step and not sequential))
    expected = equations.sdr_prototypes(features, small, known, counts, drop)
    meta = {"step": step, "overlap": bool(overlap), "sequential": bool(sequential)}
    found = outputs("sdr_prototypes", meta, features=features, labels=scene.labels, prototypes=known, counts=counts)
    close(found["out_prototypes"], expected[0])
    close(found["out_counts"], expected[1])


@pytest.mark.parametrize("nobgr", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_attraction_and_repulsion(seed, nobgr):
    scene, small, features, known = sdr(seed)
    found = outputs("sdr_contrastive", {"nobgr": nobgr}, features=features, labels=scene.labels, prototypes=known)
    for i, name in enumerate(("attraction", "repulsion")):

        def value(f, i=i):
            return equations.sdr_contrastive(f, small, known, nobgr)[i]

        close(found[f"out_{name}"], value(features))
        check_gradient(found[f"out_grad_{name}"], value, features)


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("sum_after", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_matching(seed, sum_after, sequential):
    scene, small, features, known = sdr(seed)
    teacher = scene.maps(scene.old, full=True)
    meta = {"sumafter": sum_after, "sequential": sequential}
    given = {"labels": scene.labels, "prototypes": known, "teacher_logits": teacher}
    found = outputs("sdr_prototype_matching", meta, features=features, **given)

    def value(f):
        return equations.sdr_matching(f, small, known, teacher, sum_after, sequential)

    close(found["out_value"], value(features))
    check_gradient(found["out_grad_student"], value, features)


@pytest.mark.parametrize("normalization", ["max_maskedforclass", "max_foreachfeature"])
@pytest.mark.parametrize("shrinking", ["exponential", "squared"])
@pytest.mark.parametrize("seed", SEEDS)
def test_sparsity(seed, shrinking, normalization):
    scene, small, features, _ = sdr(seed)
    features = np.abs(features)
    meta = {"loss": "ratio", "normalization": normalization, "shrinking": shrinking}
    found = outputs("sdr_sparsity", meta, features=features, labels=scene.labels)

    def value(f):
        return equations.sdr_sparsity(f, small, normalization == "max_foreachfeature", shrinking == "squared")

    close(found["out_value"], value(features))
    check_gradient(found["out_grad_student"], value, features)


@pytest.mark.parametrize("tau", [0.07, 0.5, 2.0])
@pytest.mark.parametrize("seed", [0, 2, 3])
def test_ucd(seed, tau):
    scene = Scene(seed)
    student, teacher, logits = scene.maps(), scene.maps(), scene.maps(scene.old)
    labels = np.where(scene.labels == 255, 0, scene.labels)
    given = {"teacher_pre_logits": teacher, "teacher_small_logits": logits, "labels": labels}
    found = outputs("ucd_contrastive", {"temperature": tau}, pre_logits=student, **given)
    close(found["out_value"], equations.ucd(student, teacher, logits, labels, tau))
    single = outputs("ucd_contrastive", {"temperature": tau}, torch.float32, pre_logits=student, **given)
    close(single["out_value"], found["out_value"], 1e-4)


@pytest.mark.parametrize("dataset", ["voc", "ade", "cityscapes_domain"])
@pytest.mark.parametrize("seed", SEEDS)
def test_pooled_cubes(seed, dataset):
    scene = Scene(seed)
    channels = [2, 3, 4, 5, 3]
    teacher, student = ([scene.maps(c) for c in (*channels, last)] for last in (scene.old, scene.total))
    factors = {"voc": (0.01, 5e-4, 0.01, 5e-4), "ade": (5e-6, 5e-7, 5e-6, 5e-7)}.get(dataset, (5e-4, 1e-4, 1e-4, 0.0))
    arrays = {
        f"{name}_{i}": tap for name, taps in (("teacher", teacher), ("student", student)) for i, tap in enumerate(taps)
    }
    found = outputs("rcil_feature_distillation", scene.meta | {"dataset": dataset}, **arrays)
    expected = equations.pooled_cubes(teacher, student, scene.old, scene.new, factors)
    np.testing.assert_allclose([found["out_spatial"], found["out_channel"]], expected, rtol=1e-9)

    def value(tap):
        return sum(equations.pooled_cubes(teacher, [*student[:5], tap], scene.old, scene.new, factors))

    check_gradient(found["out_grad_student_5"] / factors[1], lambda tap: value(tap) / factors[1], student[5])


@pytest.mark.parametrize("seed", [0, 2])
def test_similarity_of_nest(seed):
    scene = Scene(seed)
    arrays, series = {}, ([], [], [])
    weights = scene.rows(scene.old)
    for i in range(2):
        image = scene.maps(scene.old, full=True)[:1], scene.maps()[:1], scene.labels[:1].copy()
        image[2][0, i] = (
            range(scene.old, scene.old + 1) if scene.new == 1 else scene.old + scene.random.integers(0, scene.new)
        )
        image[2][0, -1, : scene.new] = range(scene.old, scene.total)
        for values, name, value in zip(series, ("teacher_logits", "pre_logits", "labels"), image):
            values.append(value)
            arrays[f"{name}_{i}"] = value
    split = max(1, scene.old - 1)
    arrays |= {
        f"cls_{i}_weight": w[:, :, None, None] for i, w in enumerate((weights[:split], weights[split:])) if len(w)
    }
    found = outputs("nest_similarity", scene.meta, **arrays)
    a, v = equations.nest_similarity(*series, weights, scene.new)
    close(found["out_weight_old"], a)
    close(found["out_weight_new"], v)


@pytest.mark.parametrize("seed", range(3))
def test_chosen_weights_are_fused(seed):
    random = np.random.default_rng(seed)
    shapes = {"body.weight": (4, 3), "body.running_var": (5,), "cls.0.bias": (seed + 2,)}
    before, after = ({name: random.normal(size=shape) for name, shape in shapes.items()} for _ in range(2))
    meta = {"old_classes": 3 + seed, "new_classes": 2, "threshold_choice": True}
    arrays = {f"{kind}_{name}": v for kind, state in (("old", before), ("new", after)) for name, v in state.items()}
    found = outputs("ewf_fusion", meta, **arrays)
    for name, value in equations.ewf_chosen(before, after, 3 + seed, 2).items():
        close(found[f"out_{name}"], value)


@pytest.mark.parametrize(("ali", "kd"), [(1.0, 1.0), (0.0, 20.0), (5.0, 0.0)])
@pytest.mark.parametrize("seed", SEEDS)
def test_stage_1_of_alife(seed, ali, kd):
    scene = Scene(seed)
    student, teacher = scene.maps(scene.total, full=True, scale=3), scene.maps(scene.old, full=True, scale=3)
    meta = scene.meta | {"weight_ali": ali, "weight_kd": kd}
    found = outputs("alife_step1", meta, student_logits=student, teacher_logits=teacher, labels=scene.labels)
    expected = equations.alife_step1(student, teacher, scene.labels)
    for name, factor, value in zip(("ali", "kd", "ce"), (ali, kd, 1), expected):
        close(found[f"out_{name}"], factor * value)
    factors = np.array([ali, kd, 1])
    check_gradient(
        found["out_grad_student"], lambda z: factors @ equations.alife_step1(z, teacher, scene.labels), student
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_stage_3_of_alife(seed):
    scene, size = Scene(seed), 3
    student, teacher = scene.maps(scene.total, full=True), scene.maps(scene.old, full=True)
    memory = scene.random.normal(size=(scene.old, size, scene.channels))
    weight, bias = scene.rows(scene.total), scene.random.normal(size=scene.total)
    meta = scene.meta | {"weight_ali": 2.0, "weight_memory": 0.5}
    given = {
        "teacher_logits": teacher,
        "labels": scene.labels,
        "memory": memory,
        "cls_weight": weight,
        "cls_bias": bias,
    }
    found = outputs("alife_step3", meta, student_logits=student, **given)
    close(found["out_ali"], 2 * equations.alife_step1(student, teacher, scene.labels)[0])
    close(found["out_ce"], equations.alife_focal(student, teacher, scene.labels))
    each = [-np.log(equations.softmax(weight @ vector + bias)[c]) for c in range(scene.old) for vector in memory[c]]
    close(found["out_memory"], 0.5 * np.mean(each))


@pytest.mark.parametrize(("tau", "share"), [(10.0, 0.99), (1.0, 0.0), (3.0, 1.0)])
@pytest.mark.parametrize("seed", SEEDS)
def test_rotations_of_alife(seed, tau, share):
    scene = Scene(seed, channels=4)
    before, after = scene.maps(), scene.maps()
    memory = scene.random.normal(size=(scene.old, 3, 4))
    weight, bias = scene.rows(scene.total), scene.random.normal(size=scene.total)
    params = scene.random.normal(size=(scene.old, 6))
    meta = scene.meta | {"temperature": tau, "lambda": share}
    given = {"memory": memory, "cls_weight": weight, "cls_bias": bias, "params": params}
    found = outputs("alife_rotation", meta, features_prev=before, features_curr=after, **given)
    matrices, p, p_after, mean = equations.alife_rotation(before, after, memory, params, tau)
    close(found["out_matrices"], matrices)
    close(found["out_rep_prev"], p)
    close(found["out_rep_curr"], p_after)
    close(found["out_updated_memory"], np.einsum("cde,cme->cmd", matrices, memory))
    assert np.isfinite(found["out_grad_params"]).all()
    rotated = np.einsum("cde,ce->cd", matrices, p)
    each = [-np.log(equations.softmax(weight @ (r + mean) + bias)[c]) for c, r in enumerate(rotated)]
    close(found["out_ce"], (1 - share) * np.mean(each))
    lengths = np.linalg.norm(rotated, axis=1) * np.linalg.norm(p_after, axis=1)
    if scene.old > 1:  # a single class is its own mean: nothing is left of it
        close(found["out_cosine"], share * np.mean(1 - (rotated * p_after).sum(1) / lengths))
