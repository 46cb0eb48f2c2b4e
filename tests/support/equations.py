"""The equations of REMINDER, SDR, UCD, RCIL, NeST, EWF and ALIFE in loops over NumPy arrays, independent of the program."""

from __future__ import annotations

import numpy as np
from numpy import ndarray as Array


def softmax(z: Array, axis: int = 0) -> Array:
    """exp(z) over its sum."""
    e = np.exp(z - z.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def linear(small: int, large: int, corners: bool) -> Array:
    """(large, small) matrix of a linear interpolation; with or without aligned corners."""
    matrix = np.zeros((large, small))
    for i in range(large):
        if corners:
            x = i * (small - 1) / (large - 1) if large > 1 else 0.0
        else:
            x = max((i + 0.5) * small / large - 0.5, 0.0)
        low = min(int(x), small - 1)
        matrix[i, low] += 1 - (x - low)
        matrix[i, min(low + 1, small - 1)] += x - low
    return matrix


def resize(maps: Array, size: tuple[int, int], corners: bool) -> Array:
    """(…, h, w) maps brought to a size, bilinear."""
    return linear(maps.shape[-2], size[0], corners) @ maps @ linear(maps.shape[-1], size[1], corners).T


def nearest(labels: Array, size: tuple[int, int]) -> Array:
    """(…, H, W) -> (…, h, w), row ⌊iH/h⌋ and column ⌊jW/w⌋."""
    height, width = labels.shape[-2:]
    rows = [i * height // size[0] for i in range(size[0])]
    columns = [j * width // size[1] for j in range(size[1])]
    return labels[..., rows, :][..., columns]


def pixels(labels: Array) -> list[tuple[int, int, int]]:
    """(image, row, column) of every pixel, in row-major order."""
    return [tuple(int(i) for i in index) for index in np.ndindex(*labels.shape)]


# ------------------------------------------------------------------- REMINDER


def class_means(features: Array, labels: Array, classes: int) -> Array:
    """(C, D) means of the enlarged features over the pixels of each class, 0 where there is none."""
    large, found = resize(features, labels.shape[1:], corners=True), np.zeros((classes, features.shape[1]))
    for k in range(classes):
        rows = [large[b, :, i, j] for b, i, j in pixels(labels) if labels[b, i, j] == k]
        if rows:
            found[k] = np.mean(rows, axis=0)
    return found


def csw(student: Array, teacher: Array, labels: Array, means: Array, prototypes: Array, delta: float, tau: float):
    """CSW-KD."""
    old, total, count = teacher.shape[1], 0.0, 0
    for b, i, j in pixels(labels):
        y = labels[b, i, j]
        if not old <= y < 255:
            continue
        s = np.zeros(old)
        for c in range(old):
            length = np.linalg.norm(means[y]) * np.linalg.norm(prototypes[c])
            s[c] = means[y] @ prototypes[c] / length if length else 0.0
        r = softmax(s)
        r[r < delta / old] = 0
        w = softmax(teacher[b, :, i, j] / tau) * r + 1e-7
        total -= (w * np.log(softmax(student[b, :old, i, j] / tau))).sum()
        count += 1
    return tau**2 * total / count if count else 0.0


# ------------------------------------------------------------------------ SDR


def flat_features(features: Array, chosen: Array) -> list[float]:
    """Image by image, channel by channel, position by position."""
    return [float(v) for b in range(len(features)) for channel in features[b] for v in channel[chosen[b]]]


def wide(features: Array, chosen: Array) -> Array:
    """(D, N) as released."""
    return np.array(flat_features(features, chosen)).reshape(features.shape[1], -1)


def tall(features: Array, chosen: Array) -> Array:
    """(N, D) as released."""
    return np.array(flat_features(features, chosen)).reshape(-1, features.shape[1])


def sdr_prototypes(features: Array, labels: Array, prototypes: Array, counts: Array, drop_first: bool):
    """Prototypes and counts after a batch; labels at the size of the features."""
    prototypes, counts = prototypes.copy(), counts.copy()
    present = sorted(set(labels.ravel().tolist()))[1 if drop_first else 0 :]
    for c in (c for c in present if c != 255):
        x = wide(features, labels == c)
        prototypes[c] = (x.sum(1) + counts[c] * prototypes[c]) / (counts[c] + x.shape[1])
        counts[c] += x.shape[1]
    return prototypes, counts


def sdr_contrastive(features: Array, labels: Array, prototypes: Array, nobgr: bool) -> tuple[float, float]:
    """Attraction and repulsion."""
    present = [c for c in sorted(set(labels.ravel().tolist())) if c != 255][1 if nobgr else 0 :]
    attraction, centres = 0.0, []
    for c in present:
        x = wide(features, labels == c)
        attraction = (attraction + ((x - prototypes[c][:, None]) ** 2).mean()) / len(present)
        centres.append(x.mean(1))
    pairs = [1 / np.linalg.norm(a - b) for i, a in enumerate(centres) for j, b in enumerate(centres) if i != j]
    return attraction, float(np.mean(pairs)) if pairs else 0.0


def sdr_matching(features, labels, prototypes, teacher, sum_after: bool, sequential: bool) -> float:
    """Prototype matching; teacher has full-size logits."""
    if sequential:
        old = np.where(labels < teacher.shape[1], labels, 0)
    else:
        old = np.where(labels == 0, nearest(teacher.argmax(1), labels.shape[1:]), 0)
    present, total = [c for c in sorted(set(old.ravel().tolist())) if c], 0.0
    for c in present:
        y = tall(features, old == c)
        each = [((row - prototypes[c]) ** 2).mean() for row in y]
        total += ((y.mean(0) - prototypes[c]) ** 2).mean() / len(present) if sum_after else sum(each) / len(y)
    return total


def sdr_sparsity(features: Array, labels: Array, by_position: bool, squared: bool) -> float:
    """Sparsity, the ratio."""
    normalised = np.zeros_like(features)
    if by_position:
        normalised = features / (features.max(axis=1, keepdims=True) + 1e-15)
    elif labels.max() > 0:
        for c in set(labels.ravel().tolist()):
            chosen = np.broadcast_to((labels == c)[:, None], features.shape)
            normalised[chosen] = features[chosen] / (features[chosen].max() + 1e-15)
    if normalised.sum() <= 0:
        return 0.0
    shrunk = normalised**2 if squared else np.exp(normalised)
    return float((shrunk.sum(1) / (normalised.sum(1) + 1e-15)).mean())


# ------------------------------------------------------------------------ UCD


def ucd(student: Array, teacher: Array, logits: Array, labels: Array, tau: float) -> float:
    """The contrastive loss, as released."""
    u = np.floor(resize(labels.astype(float), student.shape[2:], corners=False) + 1e-6).astype(int)
    u[u > 20] = 0
    given = u > 0
    if not given.any():
        return 0.0
    m = u[given].min()
    u = np.where(given, u, logits.argmax(1))
    unit = lambda f: f / max(np.linalg.norm(f), 1e-12)  # noqa: E731
    kept = [p for p in pixels(u) if u[p]]
    at = lambda maps, p: maps[p[0], :, p[1], p[2]]  # noqa: E731
    anchors = [unit(at(student, p)) for p in kept]
    twins = [p for p in kept if not given[p]]
    contrasts, places = anchors + [unit(at(teacher, p)) for p in twins], kept + twins
    found = []
    for i, p in enumerate(kept):
        s = np.array([anchors[i] @ c / tau for c in contrasts])
        negative = sum(np.exp(s[j]) for j, q in enumerate(places) if u[q] != u[p])
        terms = []
        for j, q in enumerate(places):
            if u[q] == u[p] and j != i:
                joint = 1.0 if min(u[p], u[q]) >= m else softmax(at(logits, p)) @ softmax(at(logits, q))
                shifted = s[j] - s.max()
                terms.append(joint * (shifted - np.log(np.exp(shifted) + negative)))
        if terms:
            found.append(-np.mean(terms))
    return float(np.mean(found)) if found else 0.0


# ----------------------------------------------------------------------- RCIL


def pooled_cubes(teacher: list[Array], student: list[Array], old: int, new: int, factors: tuple[float, ...]):
    """Spatial and channel term of six taps; factors φ, φ of logits, ψ, ψ of pre_logits."""
    folded = student[5][:, :old].copy()
    folded[:, 0] += student[5][:, old:].sum(1)
    growth, spatial, channel = ((old + new) / new) ** 0.5, [], []
    for tap, (a, b) in enumerate(zip(teacher, [*student[:5], folded])):
        d = a**2 - b**2
        height, width = d.shape[2:]
        sides = []
        for k in (4, 8, 12, 16, 20, 24):
            padded = np.pad(d, ((0, 0), (0, 0), (k // 2, k // 2), (k // 2, k // 2)))
            cells = [
                padded[:, :, i : i + k, j : j + k].sum((2, 3)) / k**2
                for i in range(height + 1)
                for j in range(width + 1)
            ]
            sides.append(np.mean(np.sqrt((np.array(cells) ** 2).sum((0, 2)))))
        spatial.append(growth * factors[1 if tap == 5 else 0] * np.mean(sides))
        if tap < 5:
            padded = np.pad(d, ((0, 0), (1, 1), (0, 0), (0, 0)))
            three = (padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]) / 3
            channel.append(growth * factors[3 if tap == 4 else 2] * np.mean(np.sqrt((three**2).sum((1, 2, 3)))))
    return np.mean(spatial), np.mean(channel)


# ----------------------------------------------------------------------- NeST


def nest_similarity(logits: list[Array], features: list[Array], labels: list[Array], weights: Array, new: int):
    """A (C_new, C_old, D) and v (C_new, C_old) of images one by one."""
    old, sums, counts = len(weights), np.zeros((new, *weights.shape)), np.zeros(new)
    for z, f, y in zip(logits, features, labels):
        small = nearest(y, (128, 128))
        p = softmax(resize(z, (128, 128), corners=False), axis=1)
        f = resize(f, (128, 128), corners=False)
        for c in range(new):
            chosen = small == old + c
            share, feature = p.transpose(0, 2, 3, 1)[chosen], f.transpose(0, 2, 3, 1)[chosen]  # (N, C_old), (N, D)
            for k in range(old):
                sums[c, k] += (share[:, k, None] * (feature * weights[k] > 0)).sum(0)
            counts[c] += chosen.sum()
    a = sums / counts[:, None, None]
    return a, softmax(a.sum(2), axis=1)


# ------------------------------------------------------------------------ EWF


def ewf_chosen(before: dict[str, Array], after: dict[str, Array], old: int, new: int) -> dict[str, Array]:
    """The fusion of the 45 % that moved furthest."""
    factor = (new / (old + new)) ** 0.5
    moved = sorted((float(d) for name in before for d in np.abs(before[name] - after[name]).ravel()), reverse=True)
    least = moved[int(0.45 * len(moved)) - 1]
    return {
        name: np.where(np.abs(b - after[name]) < least, after[name], (1 - factor) * b + factor * after[name])
        for name, b in before.items()
    }


# ---------------------------------------------------------------------- ALIFE


def alife_step1(student: Array, teacher: Array, labels: Array) -> tuple[float, float, float]:
    """ali, kd and ce without their factors."""
    old, ali, kd, ce = teacher.shape[1], [], [], 0.0
    for b, i, j in pixels(labels):
        z, q, y = student[b, :, i, j], softmax(teacher[b, :, i, j]), labels[b, i, j]
        if y == 0:
            ali.append(np.log(np.exp(z).sum()) - q @ z[:old])
        else:
            kd.append(-(q * np.log(softmax(z[:old]))).sum() / old)
        if y not in (0, 255):
            ce -= np.log(softmax(z)[y])
    return float(np.mean(ali)) if ali else 0.0, float(np.mean(kd)) if kd else 0.0, ce / labels.size


def alife_focal(student: Array, teacher: Array, labels: Array) -> float:
    """The focal term of stage 3."""
    total = 0.0
    for b, i, j in pixels(labels):
        y = labels[b, i, j] or int(teacher[b, :, i, j].argmax())
        if y != 255:
            p = softmax(student[b, :, i, j])[y]
            total -= (1 - p) ** 2 * np.log(p)
    return total / labels.size


def alife_rotation(before: Array, after: Array, memory: Array, parameters: Array, tau: float):
    """Rotations, p̃, p̃' and o'."""
    classes, size = len(memory), before.shape[1]
    f, g = (maps.transpose(0, 2, 3, 1).reshape(-1, size) for maps in (before, after))
    unit = lambda v: v / max(np.linalg.norm(v), 1e-12)  # noqa: E731
    matrices, p, p_after = [], [], []
    for c in range(classes):
        upper = np.zeros((size, size))
        upper[np.triu_indices(size, 1)] = parameters[c]
        skew = (upper - upper.T) / 2
        matrices.append((np.eye(size) - skew) @ np.linalg.inv(np.eye(size) + skew))
        a = np.array([sum(max(0.0, unit(m) @ unit(x)) for m in memory[c]) for x in f])
        weights = softmax(tau * a)
        p.append(weights @ f)
        p_after.append(weights @ g)
    p, p_after = np.array(p), np.array(p_after)
    return np.array(matrices), p - p.mean(0), p_after - p_after.mean(0), p_after.mean(0)
