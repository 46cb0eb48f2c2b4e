"""The flags that change a loss: for each of them the term it changes, and what that term must then be."""

import math
from functools import partial

import torch
import torch.nn.functional as F

from tests.support import thin
from utils import distillation, loss, masks
from utils.pod import terms as pod
from utils.pod.distance import pod_distance
from utils.pod.options import PodOptions, TapOptions

#: Classes before step 2, in it, after it.
OLD, NEW, ALL = 4, 2, 6
#: Thresholds low enough that some pixels are sure and others are not.
PSEUDO = "--pseudo entropy --threshold 0.001"


class Scene:
    """A batch of step 2 with every kind of pixel, and the method's terms of it."""

    def __init__(self, words):
        self.step = thin.Step(words, dtype=torch.float64)
        images, self.truth = thin.images(2, dtype=torch.float64), thin.bands(0, 1, 3, 4, 5, 255)
        self.step.begin(images, self.truth)
        self.batch = self.step.batch(images, self.truth)
        self.terms = {name: value.detach() for name, value in self.step.method.terms(self.batch).items()}
        self.y = self.batch.labels
        self.opts = self.step.opts
        self.teacher = self.batch.teacher if self.batch.teacher is not None else self.step.teacher(images)
        self.student = self.batch.student
        self.S, self.T = self.student.logits, self.teacher.logits
        self.thresholds = next(
            (part.thresholds for part in self.step.method.parts if hasattr(part, "thresholds")), None
        )

    def pod(self, before=None, after=None, features=None, schedule=True, **rest):
        """POD of the taps, its options built by hand."""
        before = before or TapOptions()
        options = PodOptions(before, after or before, **rest)
        taps = features or (lambda taps: (*taps.attentions, taps.pre_logits))
        distances = pod.pod_terms(taps(self.teacher), taps(self.student), options, None, self.y, OLD)
        return pod.pod_loss(distances, math.sqrt(ALL / NEW) if schedule else 1.0)

    def mask(self, index, rule, distance):
        """LSKD's mask of a tap."""
        views = [view[index] for view in self.batch.teacher_views.values()]
        return masks.tap_mask(self.teacher.features[index], views, self.y, OLD, rule, distance)

    def context(self, groups):
        """LSKD's context distance of pre_logits."""
        mask = self.mask(4, "whc", "cos")
        return loss.context_distillation(self.teacher.pre_logits, self.student.pre_logits, groups, mask)

    def masked(self, rule, distance):
        """LSKD's distance of stage 3."""
        mask = self.mask(2, rule, distance)
        return 0.01 * pod_distance(self.teacher.features[2], self.student.features[2], mask=mask).mean()

    def chosen(self):
        """Old pixels of which the teacher is sure, and all others, as two label maps."""
        sure = self.batch.pseudo_mask
        return self.T.argmax(1).where(sure, torch.tensor(255)), self.truth.masked_fill(sure, 255)


def kd(s, student=None, teacher=None, **rest):
    return distillation.knowledge_distillation(
        s.S if student is None else student, s.T if teacher is None else teacher, **rest
    )


def semi_old(s):
    """Classes learned in step 1 at temperature 2."""
    divisor = torch.tensor([1.0, 1, 1, 2, 1, 1], dtype=torch.float64)[:, None, None]
    return distillation.excluded_knowledge_distillation(s.S / divisor, s.T / divisor[:OLD], s.y, "sum")


def softened(s, pixels):
    """Logits of some pixels at temperature 2."""
    return kd(s, *(torch.where(pixels[:, None], logits / 2, logits) for logits in (s.S, s.T)))


def soft(s, factor):
    """--pseudo_soft soft_certain: hard labels on new classes alone."""
    return (loss.soft_cross_entropy(s.S, s.truth, s.T, s.truth >= OLD, factor)).mean()


def on_pseudo(s):
    hard, rest = s.chosen()
    return (loss.cross_entropy(s.S, hard) + loss.unbiased_cross_entropy(s.S, rest, OLD)).mean()


def adaptive(s, minimum=0.0):
    """Cross entropy times the share of old pixels whose pseudo-label is trusted."""
    old = (s.truth < OLD).sum((1, 2), keepdim=True)
    share = (s.batch.pseudo_mask.sum((1, 2), keepdim=True) / (old.double() + 1e-6)).clamp(min=minimum)
    return (loss.cross_entropy(s.S, s.y) * share).mean()


def weighted_new(s):
    return (loss.cross_entropy(s.S, s.y) * torch.where((s.y >= OLD) & (s.y != 255), 3.0, 1.0)).mean()


def plain(s):
    return loss.cross_entropy(s.S, s.y).mean()


def ablated(s):
    """Pseudo-labels that the annotation contradicts are dropped."""
    labels = s.truth.masked_fill((s.truth < OLD) & ~s.batch.pseudo_mask, 255)
    wrong = s.batch.pseudo_mask & (s.T.argmax(1) != s.truth)
    return loss.cross_entropy(s.S, labels.masked_fill(wrong, 255)).mean()


six = [lambda taps: taps.features, lambda taps: (*taps.attentions, taps.pre_logits, taps.logits)]
local = partial(TapOptions, "local")
#: Flag → words before it, the flag, the term that it changes, and what that term must then be.
LOSSES = {
    "bce": ("", "--bce", "ce", lambda s: loss.binary_cross_entropy(s.S, s.y).mean()),
    "unce": ("", "--unce", "ce", lambda s: loss.unbiased_cross_entropy(s.S, s.y, OLD).mean()),
    "focal_loss": ("", "--focal_loss", "ce", lambda s: loss.focal(s.S, s.y, 2).mean()),
    "focal_loss_new": ("", "--focal_loss_new", "ce", lambda s: loss.unbiased_focal(s.S, s.y, OLD, 2).mean()),
    "focal_loss_gamma": ("--focal_loss", "--focal_loss_gamma 3", "ce", lambda s: loss.focal(s.S, s.y, 3).mean()),
    "nca": ("--cosine", "--nca", "ce", lambda s: loss.nca(s.S, s.y).mean()),
    "nca_margin": ("--cosine --nca", "--nca_margin 0.5", "ce", lambda s: loss.nca(s.S, s.y, margin=0.5).mean()),
    "ce_on_new": ("", "--ce_on_new", "ce", lambda s: loss.cross_entropy(s.S, s.y.masked_fill(s.y == 0, 255)).mean()),
    "sample_weights_new": ("", "--sample_weights_new 3", "ce", weighted_new),
    "ppp": ("", "--ppp 3", "ce", lambda s: 3 * plain(s)),
    "entropy_min": ("", "--entropy_min 2", "entropy", lambda s: 2 * loss.entropy_minimisation(s.S, s.y)),
    "entropy_min_mean_pixels": (
        "--entropy_min 2", "--entropy_min_mean_pixels", "entropy",
        lambda s: 2 * loss.entropy_minimisation(s.S, s.y, True),
    ),
    "loss_de": ("", "--loss_de 3", "body", lambda s: 3 * F.mse_loss(s.student.body, s.teacher.body)),
    "loss_kd": ("", "--loss_kd 2", "kd", lambda s: 2 * kd(s)),
    "alpha": ("--loss_kd 1", "--alpha 3", "kd", lambda s: kd(s, alpha=3)),
    "unkd": ("--loss_kd 1", "--unkd", "kd", lambda s: distillation.unbiased_knowledge_distillation(s.S, s.T)),
    "kd_new": ("--loss_kd 1", "--kd_new", "kd", lambda s: kd(s, reduction="none")[s.y == 0].mean()),
    "kd_mask": ("--loss_kd 1", "--kd_mask new", "kd", lambda s: kd(s, mask=(s.y >= OLD) & (s.y != 255))),
    "kd_mask_adaptative_factor": (
        "--loss_kd 1 --kd_mask oldbackground", "--kd_mask_adaptative_factor", "kd",
        lambda s: (s.y < OLD).double().mean() * kd(s, mask=s.y < OLD),
    ),
    "kd_scheduling": ("--loss_kd 1", "--kd_scheduling", "kd", lambda s: math.sqrt(ALL / NEW) * kd(s)),
    "temperature": (
        "--loss_kd 1 --temperature_apply all", "--temperature 2", "kd", lambda s: softened(s, s.y < 256)
    ),
    "temperature_apply": (
        "--loss_kd 1 --temperature 2", "--temperature_apply old", "kd", lambda s: softened(s, s.y < OLD)
    ),
    "temperature_semiold": ("--loss_kd 1 --exkd_sum", "--temperature_semiold 2", "kd", semi_old),
    "kd_bce_sig": ("--loss_kd 1", "--kd_bce_sig", "kd", lambda s: distillation.sigmoid_distillation(s.S, s.T, 1, "trim")),
    "kd_bce_sig_shape": (
        "--loss_kd 1 --kd_bce_sig", "--kd_bce_sig_shape sum", "kd",
        lambda s: distillation.sigmoid_distillation(s.S, s.T, 1, "sum"),
    ),
    "exkd_gt": (
        "--loss_kd 1", "--exkd_gt", "kd", lambda s: distillation.excluded_knowledge_distillation(s.S, s.T, s.y, "gt")
    ),
    "exkd_sum": (
        "--loss_kd 1", "--exkd_sum", "kd", lambda s: distillation.excluded_knowledge_distillation(s.S, s.T, s.y, "sum")
    ),
    "icarl": ("", "--icarl", "icarl", lambda s: distillation.icarl_combined(s.S, s.T)),
    "icarl_importance": ("--icarl", "--icarl_importance 3", "icarl", lambda s: 3 * distillation.icarl_combined(s.S, s.T)),
    "icarl_disjoint": ("--icarl", "--icarl_disjoint", "icarl", lambda s: distillation.icarl_disjoint(s.S, s.y, s.T)),
    "icarl_bkg": (
        "--icarl --icarl_disjoint", "--icarl_bkg", "icarl", lambda s: distillation.icarl_disjoint(s.S, s.y, s.T, True)
    ),
    "classif_adaptive_factor": (PSEUDO, "--classif_adaptive_factor", "ce", adaptive),
    "classif_adaptive_min_factor": (
        f"{PSEUDO} --classif_adaptive_factor", "--classif_adaptive_min_factor 0.9", "ce",
        lambda s: adaptive(s, 0.9),
    ),
    "ce_on_pseudo": (f"{PSEUDO} --unce", "--ce_on_pseudo", "ce", on_pseudo),
    "pseudo_soft": (
        PSEUDO, "--pseudo_soft soft_certain", "ce", lambda s: soft(s, 1.0)
    ),
    "pseudo_soft_factor": (
        f"{PSEUDO} --pseudo_soft soft_certain", "--pseudo_soft_factor 0.5", "ce",
        lambda s: soft(s, 0.5),
    ),
    "pseudo_ablation": (
        f"{PSEUDO} --data_masking current+old", "--pseudo_ablation removed_errors", "ce",
        ablated,
    ),
    "pod": ("", "--pod spatial", "pod", lambda s: s.pod(TapOptions("spatial"))),
    "pod_factor": ("--pod local", "--pod_factor 0.1", "pod", lambda s: s.pod(local(0.1))),
    "pod_options": (
        "--pod local", """--pod_options '{"switch": {"after": {"factor": 0.5}}}'""", "pod",
        lambda s: s.pod(after=local(0.5)),
    ),
    "pod_prepro": ("--pod local", "--pod_prepro abs", "pod", lambda s: s.pod(local(prepro="abs"))),
    "no_pod_schedule": ("--pod local", "--no_pod_schedule", "pod", lambda s: s.pod(schedule=False)),
    "pod_apply": ("--pod local", "--pod_apply backbone", "pod", lambda s: s.pod(apply="backbone")),
    "pod_deeplab_mask": ("--pod local", "--pod_deeplab_mask", "pod", lambda s: s.pod(deeplab_mask=True)),
    "pod_deeplab_mask_factor": (
        "--pod local --pod_deeplab_mask", "--pod_deeplab_mask_factor 0.1", "pod",
        lambda s: s.pod(deeplab_mask=True, deeplab_mask_factor=0.1),
    ),
    "deeplab_mask_downscale": (
        "--pod local --pod_deeplab_mask", "--deeplab_mask_downscale", "pod",
        lambda s: s.pod(deeplab_mask=True, deeplab_mask_downscale=True),
    ),
    "pod_interpolate_last": ("--pod local", "--pod_interpolate_last", "pod", lambda s: s.pod(interpolate_last=True)),
    "pod_logits": ("--pod local", "--pod_logits", "pod", lambda s: s.pod(features=six[0])),
    "pod_large_logits": ("--pod local", "--pod_large_logits", "pod", lambda s: s.pod(features=six[1])),
    "spp_scales": ("--pod local", "--spp_scales 1 2", "pod", lambda s: s.pod(local(spp_scales=(1, 2)))),
    "aaaaaa": ("--method LSKD", "--aaaaaa 0.5", "mcd", lambda s: 0.5 * s.context(20)),
    "mmm": ("--method LSKD", "--mmm 3", "mcd", lambda s: 0.005 * s.context(3)),
    "dis": ("--method LSKD", "--dis L2", "md/stage3", lambda s: s.masked("whc", "L2")),
    "sigmoid": ("--method LSKD", "--sigmoid old", "md/stage3", lambda s: s.masked("old", "cos")),
}  # fmt: skip
