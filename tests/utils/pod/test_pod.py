"""POD: the fast distance equals the embeddings' distance everywhere, and every option does what it says."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.gradients import slopes_agree
from utils.pod import embedding
from utils.pod import terms as pod
from utils.pod.distance import pod_distance
from utils.pod.options import PodOptions, TapOptions


def features(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    return features(*shape), features(*shape, seed=1)


def embedding_distance(teacher: Tensor, student: Tensor, scales, mask: Tensor | None = None) -> Tensor:
    """The definition, with cells cut out one by one."""

    def embed(x: Tensor) -> Tensor:
        x = (x if mask is None else x * mask).square()
        parts = []
        for scale in scales:
            kh, kw = x.shape[-2] // scale, x.shape[-1] // scale
            for i in range(scale):
                for j in range(scale):
                    cell = x[..., i * kh : (i + 1) * kh, j * kw : (j + 1) * kw]
                    parts += [cell.mean(3).flatten(1), cell.mean(2).flatten(1)]
        return torch.cat(parts, 1)

    return (embed(teacher) - embed(student)).norm(dim=1)


class TestDistance:
    @pytest.mark.parametrize(
        "size,scales",
        [
            ((8, 8), (1, 2, 4)),
            ((12, 12), (1, 2, 4)),
            ((8, 12), (1, 2, 4)),
            ((9, 9), (1, 2, 4)),  # 4 does not divide 9: cells of scale 4 lie in no cell of scale 2
            ((10, 7), (1, 2, 4)),
            ((12, 12), (1, 2, 3)),
            ((6, 6), (1, 2, 3, 6)),
            ((6, 6), (3,)),
            ((4, 4), (4, 1)),
        ],
    )
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("masked", [False, True])
    def test_equals_the_embeddings(self, size, scales, layout, masked):
        teacher, student = (x.contiguous(memory_format=layout) for x in pair(2, 3, *size))
        mask = (features(2, 1, *size, seed=2) > 0).double() if masked else None
        expected = embedding_distance(teacher, student.requires_grad_(), scales, mask)
        (expected_grad,) = torch.autograd.grad((expected * torch.tensor([1.0, 3.0])).sum(), student)
        found = pod_distance(teacher, student, scales, mask=mask)
        (grad,) = torch.autograd.grad((found * torch.tensor([1.0, 3.0])).sum(), student)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-10, atol=1e-12)

    def test_equals_local_pod(self):
        teacher, student = pair(2, 5, 8, 8)
        difference = embedding.local_pod(teacher.square()) - embedding.local_pod(student.square())
        torch.testing.assert_close(pod_distance(teacher, student), difference.norm(dim=1))

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("prepro", ["pow", "none", "abs", "relu"])
    @pytest.mark.parametrize("size", [(4, 8), (5, 5)])
    def test_gradient(self, size, prepro, layout):
        teacher, student = (x.contiguous(memory_format=layout) for x in pair(2, 3, *size))
        mask = features(2, 3, *size, seed=2).sigmoid()  # soft masks are squared with the features
        student.requires_grad_()
        assert slopes_agree(lambda b: pod_distance(teacher, b, (1, 2, 4), prepro, mask), student)

    def test_by_hand(self):
        # d = 4 at one of 2×2 pixels: rows (2, 0), columns (2, 0) at scale 1; at scale 2 the pixel itself, twice
        teacher, student = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
        student[0, 0, 0, 0] = 2.0
        assert pod_distance(teacher, student, (1,)).item() == pytest.approx(math.sqrt(8))
        assert pod_distance(teacher, student, (1, 2)).item() == pytest.approx(math.sqrt(8 + 32))

    def test_equal_features_have_a_zero_gradient(self):
        for size in (4, 5):
            teacher = features(2, 3, size, size)
            student = teacher.clone().requires_grad_()
            distance = pod_distance(teacher, student)
            assert not distance.any()
            assert not torch.autograd.grad(distance.sum(), student)[0].any()

    @pytest.mark.parametrize("size", [1, 2, 3])
    def test_maps_smaller_than_a_grid(self, size):
        teacher, student = pair(1, 3, size, size)
        usable = [scale for scale in (1, 2, 4) if scale <= size]
        found = pod_distance(teacher, student.requires_grad_())
        torch.testing.assert_close(found, embedding_distance(teacher, student, usable))
        assert torch.autograd.grad(found.sum(), student)[0].isfinite().all()

    def test_half_precision_does_not_overflow(self):
        teacher, student = (x.half() * 300 for x in pair(1, 64, 8, 8))
        student.requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            distance = pod_distance(teacher, student)
        torch.testing.assert_close(distance, pod_distance(teacher.float(), student.float()))
        assert distance.dtype == torch.float32
        assert torch.autograd.grad(distance.sum() * 1e-3, student)[0].isfinite().all()

    def test_the_inputs_are_not_changed(self):
        teacher, student = pair(1, 2, 4, 4)
        before = teacher.clone(), student.clone()
        torch.autograd.grad(pod_distance(teacher, student.requires_grad_()).sum(), student)
        assert torch.equal(teacher, before[0])
        assert torch.equal(student, before[1])

    def test_a_graph_can_be_walked_twice(self):
        teacher, student = pair(1, 2, 4, 4)
        distance = pod_distance(teacher, student.requires_grad_()).sum()
        first = torch.autograd.grad(distance, student, retain_graph=True)[0]
        assert torch.equal(first, torch.autograd.grad(distance, student)[0])


def test_extra_channels():
    student = torch.arange(5.0).view(1, 5, 1, 1)
    assert pod.fold_extra_channels(student, 3, "sum").flatten().tolist() == [0 + 3 + 4, 1, 2]
    assert pod.fold_extra_channels(student, 3, "trim").flatten().tolist() == [0, 1, 2]
    assert pod.fold_extra_channels(student, 5) is student
    with pytest.raises(ValueError, match="extra_channels='cut'"):
        pod.fold_extra_channels(student, 3, "cut")


def taps(seed: int, last: int) -> list[Tensor]:
    sizes = [(2, 8), (3, 8), (3, 4), (4, 4), (3, 4), (last, 4)]
    return [features(2, c, w, w, seed=10 * seed + index) for index, (c, w) in enumerate(sizes)]


TEACHER, STUDENT = taps(0, 3), taps(1, 5)
LABELS = torch.randint(0, 5, (2, 16, 16), generator=torch.Generator().manual_seed(3))


def terms(options: PodOptions, masks=None) -> list[Tensor | None]:
    return pod.pod_terms(TEACHER, STUDENT, options, masks, LABELS, num_old=3)


class TestTerms:
    def test_default(self):
        options = PodOptions.parse({"switch": {"after": {"factor": 0.5}}}, TapOptions(factor=2.0))
        found = terms(options)
        for index in range(5):
            torch.testing.assert_close(found[index], 2 * pod_distance(TEACHER[index], STUDENT[index]).mean())
        folded = pod.fold_extra_channels(STUDENT[5], 3)
        torch.testing.assert_close(found[5], 0.5 * pod_distance(TEACHER[5], folded).mean())
        torch.testing.assert_close(pod.pod_loss(found, 3.0), 3 * sum(found) / 6)

    def test_masks(self):
        masks = [None, None, *[(x[:, :1] > 0).double() for x in TEACHER[2:]]]
        found = terms(PodOptions(), masks)
        torch.testing.assert_close(found[2], 5 * pod_distance(TEACHER[2], STUDENT[2], mask=masks[2]).mean())
        torch.testing.assert_close(found[1], terms(PodOptions())[1])

    @pytest.mark.parametrize("apply,used", [("all", range(6)), ("backbone", range(4)), ("deeplab", (4, 5))])
    def test_apply(self, apply, used):
        found = terms(PodOptions(apply=apply))
        assert [index for index, term in enumerate(found) if term is not None] == list(used)
        torch.testing.assert_close(pod.pod_loss(found), sum(found[index] for index in used) / len(used))

    def test_extra_channels_trim(self):
        options = PodOptions.parse({"switch": {"after": {"extra_channels": "trim"}}})
        expected = 5 * pod_distance(TEACHER[5], STUDENT[5][:, :3]).mean()
        torch.testing.assert_close(terms(options)[5], expected)

    def test_adaptive_factor_is_the_share_of_old_pixels(self):
        options = PodOptions.parse({"switch": {"before": {"use_adaptative_factor": True}}})
        share = (LABELS < 3).double().mean((1, 2))
        expected = 5 * (pod_distance(TEACHER[0], STUDENT[0]) * share).mean()
        torch.testing.assert_close(terms(options)[0], expected)
        torch.testing.assert_close(terms(options)[5], terms(PodOptions())[5])

    def test_background_mask_downscaled(self):
        options = PodOptions(deeplab_mask=True, deeplab_mask_factor=0.25, deeplab_mask_downscale=True)
        old = F.interpolate((LABELS < 3)[:, None].double(), size=(4, 4))
        folded = pod.fold_extra_channels(STUDENT[5], 3)
        torch.testing.assert_close(terms(options)[5], 0.25 * pod_distance(TEACHER[5], folded, mask=old).mean())
        torch.testing.assert_close(terms(options)[4], terms(PodOptions())[4])

    def test_background_mask_at_label_size(self):
        options = PodOptions(deeplab_mask=True, mask_position="all")
        large = [
            F.interpolate(x.amax(1, keepdim=True), size=(16, 16), mode="bilinear", align_corners=False)
            for x in (TEACHER[3], STUDENT[3])
        ]
        expected = 5 * pod_distance(*large, mask=(LABELS < 3)[:, None].double()).mean()
        torch.testing.assert_close(terms(options)[3], expected)

    def test_a_mask_factor_of_zero_leaves_the_last_tap_out(self):
        found = terms(PodOptions(deeplab_mask=True, deeplab_mask_factor=0.0))
        assert found[5] is None
        assert found[4] is not None

    def test_interpolate_last(self):
        large = [
            F.interpolate(x, size=(16, 16), mode="bilinear", align_corners=False)
            for x in (TEACHER[5], pod.fold_extra_channels(STUDENT[5], 3))
        ]
        torch.testing.assert_close(terms(PodOptions(interpolate_last=True))[5], 5 * pod_distance(*large).mean())

    def test_masks_survive_enlarging(self):
        masks = [None] * 5 + [(TEACHER[5] > 0).double()]
        for options in (PodOptions(interpolate_last=True), PodOptions(deeplab_mask=True)):
            assert terms(options, masks)[5].isfinite()


def distance_of(**changes) -> Tensor:
    return embedding.embedding_distance(TEACHER[2], STUDENT[2], TapOptions(**changes))


class TestEmbeddingOptions:
    def test_spatial_and_global_sum(self):
        d = TEACHER[2].square() - STUDENT[2].square()
        spatial = torch.cat([d.sum(3).flatten(1), d.sum(2).flatten(1)], 1).norm(dim=1)
        torch.testing.assert_close(distance_of(type="spatial"), spatial)
        cells = d.unflatten(3, (2, 2)).unflatten(2, (2, 2)).mean((3, 5))
        pooled = torch.cat([cells.sum(2).flatten(1), cells.sum(3).flatten(1)], 1).norm(dim=1)
        torch.testing.assert_close(distance_of(type="global", spp_scales=(2,)), pooled)

    def test_norm(self):
        a, b = (F.normalize(embedding.local_pod(x.square()), dim=1) for x in (TEACHER[2], STUDENT[2]))
        torch.testing.assert_close(distance_of(norm=True), (a - b).norm(dim=1))

    def test_l1(self):
        difference = embedding.local_pod(TEACHER[2].square()) - embedding.local_pod(STUDENT[2].square())
        torch.testing.assert_close(distance_of(difference_function="l1"), difference.abs().sum(1))

    def test_normalize_per_scale(self):
        one, two, four = (distance_of(spp_scales=(scale,)).square() for scale in (1, 2, 4))
        expected = (one + two / 4**2 + four / 16**2).sqrt()
        torch.testing.assert_close(distance_of(normalize_per_scale=True), expected)
        expected = (one / 4**2 + two / 4**2 + four / 2**2).sqrt()
        torch.testing.assert_close(distance_of(normalize_per_scale="spm"), expected)

    def test_kl_is_a_divergence(self):
        assert (distance_of(difference_function="kl") > 0).all()
        same = embedding.embedding_distance(TEACHER[2], TEACHER[2], TapOptions(difference_function="kl"))
        torch.testing.assert_close(same, torch.zeros_like(same))

    def test_bce_is_least_at_the_teacher(self):
        tap = TapOptions(difference_function="bce")
        assert (
            distance_of(difference_function="bce") > embedding.embedding_distance(TEACHER[2], TEACHER[2], tap)
        ).all()

    @pytest.mark.parametrize("type", ["local", "spatial", "global"])
    @pytest.mark.parametrize("function", ["frobenius", "l1", "kl", "bce"])
    @pytest.mark.parametrize("norm", [False, True])
    def test_gradient(self, type, function, norm):
        teacher, student = pair(2, 2, 4, 4)
        tap = TapOptions(type=type, difference_function=function, norm=norm, prepro="pow")
        mask = (features(2, 1, 4, 4, seed=5) > 0).double()
        assert slopes_agree(lambda b: embedding.embedding_distance(teacher, b, tap, mask), student.requires_grad_())


class TestParsing:
    def test_none_is_the_flags(self):
        tap = TapOptions(type="global", factor=0.1)
        assert PodOptions.parse(None, tap) == PodOptions(tap, tap)

    def test_everything(self):
        switch = {
            "before": {"type": "spatial", "norm": True},
            "after": {"factor": 0.5, "prepro": "abs", "spp_scales": [1, 2]},
            "mask_position": "all",
            "normalize_per_scale": "spm",
        }
        given = {"switch": switch, "difference_function": "l1", "difference_function_all": "bce"}
        options = PodOptions.parse(given, TapOptions(factor=2.0), apply="deeplab")
        before = TapOptions(type="spatial", factor=2.0, norm=True, normalize_per_scale="spm", difference_function="bce")
        after = TapOptions(
            factor=0.5, prepro="abs", spp_scales=(1, 2), normalize_per_scale="spm", difference_function="l1"
        )
        assert options == PodOptions(before, after, apply="deeplab", mask_position="all")

    @pytest.mark.parametrize(
        "given,message",
        [
            ({"swich": {}}, "Unknown key 'swich' in --pod_options; known are .*switch"),
            ({"switch": {"afer": {}}}, "Unknown key 'afer' in \"switch\""),
            ({"switch": {"after": {"fctor": 1}}}, "Unknown key 'fctor' in \"after\".*known are .*factor"),
            ({"switch": {"after": {"type": "loca"}}}, "type='loca' .*use one of 'local'"),
            ({"switch": {"after": {"type": ["local"]}}}, "type=.*unknown"),
            ({"switch": {"after": {"factor": "big"}}}, "factor='big' .*not a number"),
            ({"switch": {"after": {"spp_scales": [0]}}}, r"spp_scales=\[0\]"),
            ({"switch": {"mask_position": "first"}}, "mask_position='first'"),
            ({"difference_function": "l3"}, "difference_function='l3'"),
            ({"switch": []}, "must be a JSON object"),
        ],
    )
    def test_mistakes_are_named(self, given, message):
        with pytest.raises(ValueError, match=message):
            PodOptions.parse(given)

    def test_leaving_no_tap_is_refused(self):
        with pytest.raises(ValueError, match="leaves no tap"):
            PodOptions(deeplab_mask=True, deeplab_mask_factor=0.0, mask_position="all")

    def test_unknown_apply(self):
        with pytest.raises(ValueError, match="--pod_apply 'head'"):
            PodOptions(apply="head")
