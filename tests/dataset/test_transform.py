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
    """Same draws, then crop, resize and flip by Pillow: pixels differ by at most 1, labels only at exact ties."""
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
        assert (mask != tensor(labels)).float().mean() < 0.03


def test_labels_come_from_the_pixel_under_the_centre(scene):
    mask = torch.arange(70 * 90, dtype=torch.int32).view(70, 90)
    for seed in range(12):
        torch.manual_seed(seed)
        out = TrainTransform(48)(scene[0], (mask % 251).to(torch.uint8)).mask
        torch.manual_seed(seed)
        top, left, height, width = v1.RandomResizedCrop.get_params(scene[0], [0.5, 2.0], [3 / 4, 4 / 3])
        rows = top + (2 * torch.arange(48) + 1) * height // 96
        columns = left + (2 * torch.arange(48) + 1) * width // 96
        columns = columns.flip(0) if torch.rand(1) < 0.5 else columns
        assert torch.equal(out.int(), mask[rows][:, columns] % 251)


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
