"""dataset/transform.py: the same pixels as torchvision's v2 transforms and as Pillow, which the official one uses."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as v1
from torchvision.transforms import v2

from dataset.transform import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    EvalTransform,
    FullImage,
    TrainTransform,
    denormalise,
    nearest_positions,
    normalise,
)


@pytest.fixture
def scene():
    """A smooth picture 90 x 70 with noise, and a mask of ten bands."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(70.0), torch.arange(90.0), indexing="ij")
    image = torch.stack([rows * 3, columns * 2, rows + columns]) + 20 * torch.rand((3, 70, 90), generator=generator)
    return image.to(torch.uint8), (columns // 9).to(torch.uint8)


def pillow(image, mask):
    return Image.fromarray(image.permute(1, 2, 0).numpy()), Image.fromarray(mask.numpy())


def tensor(picture):
    array = torch.from_numpy(np.array(picture))
    return array.permute(2, 0, 1) if array.ndim == 3 else array


def test_training_transform_is_the_official_one(scene):
    """Same draws, then crop, resize and flip by Pillow: pixels differ by at most 1, labels not at all."""
    for seed in range(12):
        torch.manual_seed(seed)
        image, mask = TrainTransform(48)(*scene)
        torch.manual_seed(seed)
        picture, labels = pillow(*scene)
        top, left, height, width = v1.RandomResizedCrop.get_params(picture, [0.5, 2.0], [3 / 4, 4 / 3])
        box = (left, top, left + width, top + height)
        picture = picture.crop(box).resize((48, 48), Image.Resampling.BILINEAR)
        labels = labels.crop(box).resize((48, 48), Image.Resampling.NEAREST)
        if torch.rand(1) < 0.5:
            picture, labels = (p.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for p in (picture, labels))
        assert (image.int() - tensor(picture).int()).abs().max() <= 1
        assert torch.equal(mask, tensor(labels))


def sizes():
    """(height, width, size of the evaluation): odd and even sides, shrunk and enlarged, with and without exact ties."""
    random = np.random.default_rng(0)
    drawn = [tuple(map(int, random.integers(2, 700, 3))) for _ in range(40)]
    common = [
        (375, 500),
        (333, 500),
        (500, 334),
        (281, 500),
        (500, 335),
        (243, 500),
        (366, 500),
        (4, 7),
        (3, 3),
        (1, 2),
    ]
    return drawn + [(height, width, size) for height, width in common for size in (7, 33, 256, 321, 512, 513)]


@pytest.mark.parametrize(("height", "width", "size"), sizes())
def test_evaluation_masks_are_those_of_pillow_at_every_size(height, width, size):
    """Labels that differ from pixel to pixel: a position that is off by one shows."""
    random = np.random.default_rng(height * 1000 + width)
    mask = random.integers(0, 256, (height, width), dtype=np.uint8)
    out = EvalTransform(size)(torch.zeros(3, height, width, dtype=torch.uint8), torch.from_numpy(mask)).mask
    short = min(height, width)
    whole = (int(size * width / short), int(size * height / short))
    labels = Image.fromarray(mask).resize(whole, Image.Resampling.NEAREST)
    assert torch.equal(out, tensor(v1.functional.center_crop(labels, [size, size])))


@pytest.mark.parametrize("size", [48, 65])
def test_training_masks_are_those_of_pillow(size):
    mask = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (71, 93), dtype=np.uint8))
    image = torch.zeros(3, 71, 93, dtype=torch.uint8)
    for seed in range(40):
        torch.manual_seed(seed)
        out = TrainTransform(size)(image, mask).mask
        torch.manual_seed(seed)
        top, left, height, width = v1.RandomResizedCrop.get_params(image, [0.5, 2.0], [3 / 4, 4 / 3])
        labels = Image.fromarray(mask.numpy()).crop((left, top, left + width, top + height))
        labels = labels.resize((size, size), Image.Resampling.NEAREST)
        labels = labels.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(1) < 0.5 else labels
        assert torch.equal(out, tensor(labels))


def test_positions_add_up_step_by_step_as_in_pillow():
    """At an exact tie the sum of the steps decides: 4 pixels to 7, output 3 lies at 1.9999999999999998, not at 2."""
    assert nearest_positions(4, 7).tolist() == [0, 0, 1, 1, 2, 3, 3]
    for length in (*range(1, 200, 7), 375, 500, 333, 2048):
        for size in (1, 2, 7, 33, 512, 513, 682, 683, 1024):
            row = Image.fromarray(np.arange(length, dtype=np.int32)[None])
            expected = np.asarray(row.resize((size, 1), Image.Resampling.NEAREST))[0]
            np.testing.assert_array_equal(nearest_positions(length, size), expected)


def test_training_transform_draws_as_v2(scene):
    reference = v2.Compose([v2.RandomResizedCrop(48, scale=(0.5, 2.0)), v2.RandomHorizontalFlip()])
    for seed in range(12):
        torch.manual_seed(seed)
        image = TrainTransform(48)(*scene).image
        torch.manual_seed(seed)
        assert torch.equal(image, reference(scene[0]))


@pytest.mark.parametrize("size", [35, 70, 100])
@pytest.mark.parametrize("turned", [False, True])
def test_evaluation_is_resize_and_centre_crop(scene, size, turned):
    image, mask = (t.transpose(-1, -2).contiguous() for t in scene) if turned else scene
    reference = v2.Compose([v2.Resize(size), v2.CenterCrop(size)])
    out = EvalTransform(size)(image, mask)
    assert out.image.shape == (3, size, size)
    assert torch.equal(out.image, reference(image))
    labels = pillow(image, mask)[1]
    whole = tuple(int(size * side / 70) if side == 90 else size for side in labels.size)
    labels = v1.functional.center_crop(labels.resize(whole, Image.Resampling.NEAREST), [size, size])
    assert torch.equal(out.mask, tensor(labels))


def test_full_image_is_untouched(scene):
    out = FullImage()(*scene)
    assert torch.equal(out.image, scene[0])
    assert torch.equal(out.mask, scene[1])


def test_normalise(scene):
    expected = v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)(scene[0] / 255)
    for image in (scene[0], scene[0].permute(1, 2, 0).contiguous().permute(2, 0, 1)):
        out = normalise(image)
        assert out.dtype == torch.float32
        assert out.is_contiguous()
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
    assert torch.equal(denormalise(out), scene[0])
