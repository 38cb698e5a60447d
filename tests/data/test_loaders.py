"""Loaders: what arrives is what a plain loop over timm's transforms would give, whoever does the work."""
import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.random_erasing import RandomErasing
from torchvision import transforms

from glmc.data.datasets import ImageSet
from glmc.data.loaders import Normalize, create_eval_loader, create_train_loader, prefetched, seeded
from glmc.data.resident import create_resident_eval_loader, create_resident_train_loader
from glmc.data.transforms import view_transform

CONFIG = dict(input_size=(3, 32, 32), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), interpolation='bilinear', crop_pct=1.0)
CPU = torch.device('cpu')
CIFAR = dict(augmentation='cifar', no_aug=False, hflip=0.5)
PLAIN = dict(augmentation='timm', no_aug=True, hflip=0.5)
TIMM = dict(augmentation='timm', no_aug=False, hflip=0.5, color_jitter=0.4, interpolation='random')
LOADERS = [(create_train_loader, create_eval_loader), (create_resident_train_loader, create_resident_eval_loader)]


class Pictures:
    """Random 32x32 pictures that count how often each is read."""

    def __init__(self, number: int, size: tuple[int, int] = (32, 32)):
        rng = np.random.default_rng(0)
        self.pixels = rng.integers(0, 256, (number, *size, 3)).astype(np.uint8)
        self.reads = Counter()

    def __call__(self, index: int) -> Image.Image:
        self.reads[index] += 1
        return Image.fromarray(self.pixels[index])


def image_set(number: int = 21, size: tuple[int, int] = (32, 32)) -> ImageSet:
    labels = np.arange(number) % 3
    return ImageSet(Pictures(number, size), labels, [str(i) for i in range(number)], ['a', 'b', 'c'], 'pictures')


def train_loader(images, augmentation=CIFAR, create=create_train_loader, **changes):
    options = dict(views=('global', 'local'), batch_size=6, resample_power=0.0, data_config=CONFIG, device=CPU, seed=1,
                   workers=0)
    return create(images, augmentation, **{**options, **changes})


def epoch_of(loader, epoch: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, images · views, c, H, W) and (N, images) of an epoch."""
    views, labels, _ = zip(*loader.epoch(epoch), strict=True)
    return torch.cat(views).flatten(1, 2), torch.cat(labels)


@pytest.mark.parametrize('resample_power, members', [(0.0, 2), (None, 1)])
def test_each_member_of_a_pair_is_decoded_once(resample_power, members):
    images = image_set()
    loader = train_loader(images, resample_power=resample_power)
    views, labels, fractions = zip(*loader.epoch(0), strict=True)
    views, labels = torch.cat(views), torch.cat(labels)
    assert views.shape == (21, members, 2, 3, 32, 32) and views.dtype == torch.uint8 and labels.shape == (21, members)
    assert fractions == (1.0,) * len(loader)
    assert sum(images.read.reads.values()) == 21 * members
    assert len(images.read.reads) == 21  # every image is the first of a pair once


@pytest.mark.parametrize('create, _', LOADERS)
def test_views_and_epochs_differ(create, _):
    loader = train_loader(image_set(), create=create)
    views, _ = epoch_of(loader)
    assert (views[:, 0] != views[:, 1]).flatten(1).any(1).sum() >= 19 and (views[:, 2] != views[:, 3]).any()
    assert not torch.equal(views, epoch_of(loader, 1)[0])
    assert torch.equal(views, epoch_of(loader, 0)[0])
    assert not torch.equal(views, epoch_of(train_loader(image_set(), create=create, seed=2))[0])


@pytest.mark.parametrize('augmentation', [CIFAR, TIMM, {**TIMM, 'auto_augment': 'rand-m9-mstd0.5'}])
def test_workers_change_nothing(augmentation):
    alone = [epoch_of(train_loader(image_set(), augmentation), epoch) for epoch in (0, 1)]
    loader = train_loader(image_set(), augmentation, workers=2)
    for epoch, (views, labels) in enumerate(alone):
        with_workers = epoch_of(loader, epoch)
        assert torch.equal(views, with_workers[0]) and torch.equal(labels, with_workers[1])


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('create, create_eval', LOADERS)
def test_global_generators_are_left_alone(create, create_eval, workers):
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    epoch_of(train_loader(image_set(), CIFAR, create, workers=workers))
    list(create_eval(image_set(), batch_size=4, data_config=CONFIG, device=CPU, workers=workers))
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


@pytest.mark.parametrize('create, _', LOADERS)
def test_processes_share_one_stream(create, _):
    whole = epoch_of(train_loader(image_set(), create=create, batch_size=6))
    shares = [epoch_of(train_loader(image_set(), create=create, batch_size=3, rank=rank, world_size=2)) for rank in (0, 1)]
    for column in (0, 1):
        dealt = torch.empty_like(whole[column])
        dealt[0::2], dealt[1::2] = shares[0][column], shares[1][column]
        assert torch.equal(dealt, whole[column])


@pytest.mark.parametrize('create, _', LOADERS)
def test_labels_and_pixels_without_augmentation(create, _):
    images = image_set()
    views, labels = epoch_of(train_loader(images, PLAIN, create))
    pixels = {picture.tobytes(): index for index, picture in enumerate(images.read.pixels)}
    for draw, pair in zip(views.permute(0, 1, 3, 4, 2).contiguous().numpy(), labels.tolist(), strict=True):
        i, i_again, j, j_again = (pixels[view.tobytes()] for view in draw)
        assert (i, j) == (i_again, j_again) and pair == [images.labels[i], images.labels[j]]


@pytest.mark.parametrize('create', [create for _, create in LOADERS])
@pytest.mark.parametrize('size', [(32, 32), (40, 52)])
def test_evaluation_is_timms(create, size):
    images = image_set(size=size)
    loader = create(images, batch_size=4, data_config=CONFIG, device=CPU, workers=0)
    found = torch.cat([loader.normalize(batch) for batch, _ in loader])
    plain = create_transform(**CONFIG, is_training=False)
    expected = torch.stack([plain(images.image(index)) for index in range(len(images))])
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.cat([labels for _, labels in loader]).tolist() == images.labels.tolist()


@pytest.mark.parametrize('create', [create for _, create in LOADERS])
@pytest.mark.parametrize('world_size', [1, 2, 4])
def test_evaluation_sees_each_image_once(create, world_size):
    seen = Counter()
    for rank in range(world_size):
        options = dict(batch_size=4, data_config=CONFIG, device=CPU, workers=0, rank=rank, world_size=world_size)
        for batch, _ in create(image_set(), **options):
            seen.update(image.numpy().tobytes() for image in batch.contiguous())
    assert len(seen) == 21 and set(seen.values()) == {1}


def marked_image_set(number: int) -> ImageSet:
    """Pictures whose every pixel tells where it is: red the row, green the column, blue 255."""
    rows, columns = np.mgrid[1:33, 1:33]
    picture = np.stack([rows, columns, np.full((32, 32), 255)], -1).astype(np.uint8)
    return ImageSet(lambda index: Image.fromarray(picture), np.arange(number) % 2, [''] * number, ['a', 'b'], 'marked')


@pytest.mark.parametrize('create, _', LOADERS)
def test_cifar_crops_and_flips_are_uniform(create, _):
    loader = train_loader(marked_image_set(500), CIFAR, create, batch_size=250)
    seen = Counter()
    for epoch in range(2):
        for view in epoch_of(loader, epoch)[0].flatten(0, 1).numpy():
            middle, right = view[:2, 16, 16].astype(int), view[1, 16, 17].astype(int)
            flipped = right < middle[1]
            seen[(middle[0] - 17, middle[1] - (16 if flipped else 17), flipped)] += 1
            assert (view[:, view[2] == 0] == 0).all()  # what is not the picture is black
    offsets = range(-4, 5)
    assert set(seen) == {(y, x, flip) for y in offsets for x in offsets for flip in (False, True)}
    expected = sum(seen.values()) / 162
    chi_square = sum((count - expected) ** 2 / expected for count in seen.values())
    assert chi_square < 230  # 161 degrees of freedom: exceeded once in 3,000


@pytest.mark.parametrize('hflip, flips', [(0.0, {False}), (1.0, {True})])
def test_flip_probability_holds_for_cifar(hflip, flips):
    views, _ = epoch_of(train_loader(marked_image_set(40), {**CIFAR, 'hflip': hflip}))
    assert set((views[:, :, 1, 16, 17] < views[:, :, 1, 16, 16]).flatten().tolist()) == flips


def test_other_sizes_are_resized_for_cifar():
    transform = view_transform((32, 32), augmentation='cifar').transform
    assert transform(Image.new('RGB', (50, 41))).shape == (3, 32, 32)


def test_imagenet_lt_is_the_published_augmentation():
    make_views = view_transform((224, 224), augmentation='imagenet_lt')
    parts = {type(part).__name__: part for part in make_views.others.transforms}
    assert make_views.crop.scale == (0.08, 1.0)
    jitter = parts['ColorJitter']
    assert (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) == ((0.6, 1.4),) * 3 + (None,)
    assert parts['RandomGrayscale'].p == 0.2 and parts['RandomHorizontalFlip'].p == 0.5
    blur, = (part for part in parts.values() if isinstance(part, transforms.RandomApply))
    assert blur.p == 0.5 and blur.transforms[0].sigma == (0.1, 2.0)


def test_imagenet_lt_makes_a_fifth_grey():
    make_views = view_transform((16, 16), ('plain',) * 400, augmentation='imagenet_lt')
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3)).astype(np.uint8))
    torch.manual_seed(0)
    random.seed(0)
    grey = sum((view[0] == view[1]).all().item() for view in make_views(picture, 'RGB'))
    assert 48 < grey < 112  # 80 expected, four deviations either way


@pytest.mark.parametrize('create, create_eval', LOADERS)
def test_one_channel(create, create_eval):
    config = dict(input_size=(1, 32, 32), mean=(0.5,), std=(0.2,))
    views, _ = epoch_of(train_loader(image_set(), CIFAR, create, data_config=config))
    assert views.shape == (21, 4, 1, 32, 32)
    loader = create_eval(image_set(), batch_size=4, data_config=config, device=CPU, workers=0)
    assert next(iter(loader))[0].shape == (4, 1, 32, 32)


NORMALIZE = Normalize(CONFIG['mean'], CONFIG['std'])


def erased_and_plain(create, augmentation, erasing) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised views of an epoch with erasing and without."""
    loaders = (train_loader(image_set(), augmentation, create, **options) for options in (dict(erasing=erasing), {}))
    return tuple(NORMALIZE(epoch_of(loader)[0].float()) for loader in loaders)


def test_erasing_fills_with_values_of_normalised_images():
    erased, expected = erased_and_plain(create_train_loader, PLAIN, RandomErasing(1.0, mode='const', device='cpu'))
    changed = (erased - expected).abs() > 1e-5
    assert changed.flatten(2).any(2).all() and erased[changed].abs().max() < 1e-5 and changed.float().mean() < 0.5


@pytest.mark.parametrize('create', [create for create, _ in LOADERS])
def test_a_cutout_of_16_pixels(create):
    erasing = RandomErasing(1.0, 0.25, 0.25, 1.0, mode='const', device='cpu')
    erased, expected = erased_and_plain(create, CIFAR, erasing)
    for number, view in np.ndindex(21, 4):
        box = (erased[number, view].abs() < 1e-5).all(0)
        rows, columns = box.nonzero().T
        assert box.sum() == 256 and rows.max() - rows.min() == columns.max() - columns.min() == 15
        torch.testing.assert_close(erased[number, view][:, ~box], expected[number, view][:, ~box], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('create', [create for create, _ in LOADERS])
def test_erasing_is_timms_on_the_flat_batch(create):
    random.seed(0)
    erasing = RandomErasing(0.5, device='cpu')
    found = [views for views, _, _ in train_loader(image_set(), CIFAR, create, erasing=erasing).epoch(0)]
    random.seed(0)
    for views, (images, _, _) in zip(found, train_loader(image_set(), CIFAR, create).epoch(0), strict=True):
        expected = erasing(NORMALIZE(images).flatten(0, 2)).view_as(images)
        torch.testing.assert_close(NORMALIZE(views), expected, atol=1e-5, rtol=1e-5)


def test_seeds_of_a_sample_leave_cuda_alone(monkeypatch):
    seeds = []
    monkeypatch.setattr(torch.cuda, 'manual_seed_all', seeds.append)
    with seeded(7):
        first = torch.rand(1), random.random(), np.random.rand()
    with seeded(7):
        assert (torch.rand(1), random.random(), np.random.rand()) == first
    assert not seeds


def test_batches_come_in_their_order():
    batches = [(torch.full((2,), k), torch.full((1,), -k)) for k in range(4)]
    found = list(prefetched(iter(batches), CPU))
    assert [(views.tolist(), labels.tolist()) for views, labels in found] == [([k, k], [-k]) for k in range(4)]


@pytest.mark.parametrize('create, _', LOADERS)
def test_batch_larger_than_the_set(create, _):
    with pytest.raises(ValueError, match='a batch of 22 is larger than the set of 21 images'):
        train_loader(image_set(), create=create, batch_size=22)
