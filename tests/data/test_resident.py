"""Images on the device: the draws, crops and flips of the worker loader, by a plain loop over PIL."""
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from timm.data import IterableImageDataset

from glmc.data import resident
from glmc.data.datasets import ImageSet
from glmc.data.loaders import create_eval_loader, create_train_loader
from glmc.data.resident import create_resident_eval_loader, create_resident_train_loader, is_resident
from glmc.errors import InputError

CPU = torch.device('cpu')
CONFIG = dict(input_size=(3, 12, 20), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), interpolation='bilinear', crop_pct=1.0)
CIFAR = dict(augmentation='cifar', no_aug=False, hflip=0.5)
NO_AUG = dict(augmentation='timm', no_aug=True, hflip=0.5)
FLIPPED = 2


def image_set(number: int = 23, size: tuple[int, int] = (12, 20)) -> ImageSet:
    """Random pictures, none of whose pixels is black: that is the padding."""
    pixels = np.random.default_rng(0).integers(1, 256, (number, *size, 3)).astype(np.uint8)
    labels = np.sort(np.arange(number) ** 2 % 3)
    return ImageSet(lambda index: Image.fromarray(pixels[index]), labels, [str(i) for i in range(number)],
                    ['a', 'b', 'c'], 'pictures')


def train_loader(images: ImageSet, augmentation: dict = CIFAR, create=create_resident_train_loader, **changes):
    options = dict(views=('global', 'local'), batch_size=6, resample_power=1.0, data_config=CONFIG, device=CPU, seed=1,
                   workers=0)
    return create(images, augmentation, **{**options, **changes})


def epoch_of(loader, epoch: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(views.flatten(1, 2), labels) for views, labels, _ in loader.epoch(epoch)]


def crop_by_pil(image: Image.Image, y: int, x: int, flip: bool) -> torch.Tensor:
    """RandomCrop with padding 4 and RandomHorizontalFlip, for given draws."""
    padded = ImageOps.expand(image, border=4, fill=0)
    view = padded.crop((x, y, x + image.width, y + image.height))
    view = ImageOps.mirror(view) if flip else view
    return torch.from_numpy(np.array(view)).permute(2, 0, 1)


def test_views_are_pils_crops_and_flips_pixel_by_pixel():
    images, rng = image_set(), np.random.default_rng(0)
    loader = train_loader(images)
    index = rng.integers(len(images), size=(40, 2))
    y, x, flip = rng.integers(9, size=(40, 2, 3)), rng.integers(9, size=(40, 2, 3)), rng.random((40, 2, 3)) < 0.5
    views = loader.views(*map(torch.from_numpy, (index, y, x, flip)))
    assert views.shape == (40, 2, 3, 3, 12, 20) and views.dtype == torch.uint8
    for row, member, view in np.ndindex(40, 2, 3):
        expected = crop_by_pil(images.image(index[row, member]), *(int(a[row, member, view]) for a in (y, x, flip)))
        assert torch.equal(views[row, member, view], expected)


def crop_of(view: torch.Tensor, image: Image.Image) -> tuple[int, int, bool]:
    """Which crop and flip of the image a view is, found by trying all."""
    found = [(y, x, flip) for y in range(9) for x in range(9) for flip in (False, True)
             if torch.equal(crop_by_pil(image, y, x, flip), view)]
    assert len(found) == 1
    return found[0]


def test_an_epoch_is_crops_of_the_images_that_the_sampler_drew():
    images = image_set(12)
    loader = train_loader(images, batch_size=5)
    loader.sampler.set_epoch(3)
    _, first, second = loader.sampler.sample_epoch(loader.sampler.epoch)
    batches = epoch_of(loader, 3)
    assert [len(labels) for _, labels in batches] == [5, 5, 2]
    views = torch.cat([views for views, _ in batches])
    for row, pair in enumerate(zip(first, second, strict=True)):
        crops = [crop_of(views[row, place], images.image(pair[place // 2])) for place in range(4)]
        assert len(set(crops)) > 1  # each view has a crop of its own


def test_draws_are_those_of_the_worker_loader():
    images = image_set()
    loaders = [train_loader(images, NO_AUG, create) for create in (create_train_loader, create_resident_train_loader)]
    for epoch in (0, 1):
        for (views, labels), (same_views, same_labels) in zip(*(epoch_of(loader, epoch) for loader in loaders), strict=True):
            assert torch.equal(views, same_views) and torch.equal(labels, same_labels)
    loaders = [train_loader(images, CIFAR, create) for create in (create_train_loader, create_resident_train_loader)]
    labels = [torch.cat([labels for _, labels in epoch_of(loader, 5)]) for loader in loaders]
    assert torch.equal(*labels)


class Recorder:
    """Record of the arguments of `views`."""

    def __init__(self, loader):
        self.calls, self.views, loader.views = [], loader.views, self

    def __call__(self, index, y, x, flip):
        self.calls.append((y, x, flip))
        return self.views(index, y, x, flip)

    def columns(self) -> np.ndarray:
        """(draws, members, views, 3)."""
        return torch.stack([torch.cat([column.long() for column in columns]) for columns in zip(*self.calls, strict=True)],
                           -1).numpy()


@pytest.fixture(scope='module')
def crops() -> np.ndarray:
    """(48000, 3): y, x and flip of all views of 12,000 pairs."""
    loader = train_loader(image_set(400), batch_size=100)
    recorder = Recorder(loader)
    for epoch in range(30):
        epoch_of(loader, epoch)
    return recorder.columns().reshape(12000, 4, 3)


def chi_square(counts: np.ndarray) -> float:
    expected = counts.sum() / counts.size
    return ((counts - expected) ** 2 / expected).sum()


def test_all_offsets_and_both_flips_are_alike_likely(crops):
    y, x, flip = crops.reshape(-1, 3).T
    assert chi_square(np.bincount((9 * y + x) * 2 + flip, minlength=162)) < 230  # 161 degrees of freedom: once in 3,000


@pytest.mark.parametrize('one, other', [(0, 1), (2, 3), (0, 2), (1, 3)])
@pytest.mark.parametrize('column, values, limit', [(0, 9, 129), (1, 9, 129), (FLIPPED, 2, 17.8)])
def test_views_are_independent(crops, one, other, column, values, limit):
    pairs = crops[:, one, column] * values + crops[:, other, column]
    assert chi_square(np.bincount(pairs, minlength=values ** 2)) < limit  # 80 or 3 degrees of freedom: once in 2,000


def test_successive_epochs_and_images_are_independent(crops):
    flips = crops[:, 0, FLIPPED]
    for lag in (1, 100, 400):  # the next image, batch, epoch
        assert chi_square(np.bincount(2 * flips[:-lag] + flips[lag:], minlength=4)) < 17.8


@pytest.mark.parametrize('hflip', [0.0, 0.2, 1.0])
def test_flip_probability(hflip):
    loader = train_loader(image_set(500), {**CIFAR, 'hflip': hflip}, batch_size=100)
    recorder = Recorder(loader)
    epoch_of(loader)
    flips = recorder.columns()[..., FLIPPED]
    assert abs(flips.mean() - hflip) < 4 * (hflip * (1 - hflip) / flips.size) ** 0.5 + 1e-9


@pytest.mark.parametrize('number', [23, 24, 25])
@pytest.mark.parametrize('resample_power', [None, 0.5])
def test_two_processes_together_are_one(number, resample_power):
    images = image_set(number)
    options = dict(resample_power=resample_power)
    whole = epoch_of(train_loader(images, batch_size=6, **options), 2)
    ranks = [epoch_of(train_loader(images, batch_size=3, rank=rank, world_size=2, **options), 2) for rank in (0, 1)]
    assert len(whole) == len(ranks[0]) == len(ranks[1])
    for (views, labels), *shares in zip(whole, *ranks, strict=True):
        for rank, (share, share_labels) in enumerate(shares):
            assert torch.equal(views[rank::2], share) and torch.equal(labels[rank::2], share_labels)


def test_an_epoch_is_a_function_of_seed_and_epoch():
    def views(seed: int, epoch: int) -> torch.Tensor:
        return torch.cat([views for views, _ in epoch_of(train_loader(image_set(), seed=seed), epoch)])
    torch.manual_seed(0)
    first = views(1, 0)
    torch.manual_seed(1)
    np.random.seed(1)
    assert torch.equal(views(1, 0), first)
    assert not torch.equal(views(1, 1), first) and not torch.equal(views(2, 0), first)


@pytest.mark.parametrize('size', [(12, 20), (18, 25)])
@pytest.mark.parametrize('world_size', [1, 3])
def test_evaluation_is_the_worker_loaders_over_all_processes(size, world_size):
    images, seen = image_set(size=size), 0
    for rank in range(world_size):
        options = dict(batch_size=4, data_config=CONFIG, device=CPU, workers=0, rank=rank, world_size=world_size)
        theirs, ours = create_eval_loader(images, **options), create_resident_eval_loader(images, **options)
        assert len(theirs) == len(ours)
        for (pixels, labels), (same_pixels, same_labels) in zip(theirs, ours, strict=True):
            assert torch.equal(theirs.normalize(pixels), ours.normalize(same_pixels)) and torch.equal(labels, same_labels)
            seen += len(labels)
    assert seen == len(images)


def test_views_lie_in_channels_last():
    views, _ = epoch_of(train_loader(image_set()))[0]
    assert views.permute(0, 1, 3, 4, 2).is_contiguous()


@pytest.mark.parametrize('choice, augmentation, max_bytes, expected', [
    ('auto', CIFAR, 23 * 720, True), ('auto', CIFAR, 23 * 720 - 1, False), ('on', CIFAR, 1, True),
    ('off', CIFAR, 2 ** 30, False), ('auto', {**CIFAR, 'auto_augment': 'v0'}, 2 ** 30, False),
    ('on', {**NO_AUG, 'auto_augment': 'v0'}, 1, True), ('auto', NO_AUG, 2 ** 30, True), ('on', NO_AUG, 1, True),
    ('auto', {**CIFAR, 'augmentation': 'timm'}, 2 ** 30, False), ('off', {**CIFAR, 'augmentation': 'timm'}, 2 ** 30, False)])
def test_when_images_stay_on_the_device(monkeypatch, choice, augmentation, max_bytes, expected):
    monkeypatch.setattr(resident, 'MAX_BYTES', max_bytes)
    assert is_resident(choice, image_set(), augmentation, CONFIG['input_size']) is expected


@pytest.mark.parametrize('augmentation, views, expected', [
    (CIFAR, ('plain', 'global'), True), (CIFAR, ('strong', 'sim'), False), (NO_AUG, ('strong', 'sim'), True)])
def test_views_with_an_augmentation_of_their_own_need_workers(augmentation, views, expected):
    assert is_resident('auto', image_set(), augmentation, CONFIG['input_size'], views) is expected
    if not expected:
        with pytest.raises(InputError, match='--view-augmentation plain'):
            is_resident('on', image_set(), augmentation, CONFIG['input_size'], views)


@pytest.mark.parametrize('images, augmentation', [
    (image_set(), {**CIFAR, 'augmentation': 'imagenet_lt'}), (image_set(), {**CIFAR, 'auto_augment': 'v0'}),
    (IterableImageDataset.__new__(IterableImageDataset), CIFAR)])
def test_on_is_an_error_where_it_cannot_be(images, augmentation):
    with pytest.raises(InputError, match='--resident on: needs an indexable source and --augmentation cifar or --no-aug'):
        is_resident('on', images, augmentation, CONFIG['input_size'])
    assert not is_resident('auto', images, augmentation, CONFIG['input_size'])
