"""Views cut out of one decoding: timm's own transform, pixel by pixel, where nothing is reordered, and close where it is."""
import io
import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from timm.data import create_transform
from timm.data.auto_augment import augment_and_mix_transform, auto_augment_transform, rand_augment_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision import transforms

from glmc.data.transforms import VIEWS, CroppedViews, Cutout, Views, view_transform

FLIP = dict(hflip=0.5, color_jitter=0.0)
COLOURS = dict(hflip=0.5, vflip=0.3, color_jitter=0.4, color_jitter_prob=0.8, grayscale_prob=0.3)
BLUR = dict(hflip=0.5, color_jitter=0.4, gaussian_blur_prob=0.5)
POLICY = dict(hflip=0.5, auto_augment='rand-m9-mstd0.5')
# Grey levels of 255, about twice what was measured: 0.35 on average, 0.64 in the worst view; 1.7 in the worst draft.
MEAN_DIFFERENCE, WORST_DIFFERENCE, DRAFT_DIFFERENCE = 0.6, 1.2, 3


def photo(width: int, height: int) -> Image.Image:
    """Smooth colours, as a photograph has, with a little noise."""
    y, x = np.mgrid[:height, :width] / max(width, height)
    waves = [np.sin(7 * x + 3 * y), np.cos(5 * y - 2 * x), np.sin(9 * x * y + 1)]
    noise = np.random.default_rng(0).normal(0, 2, (height, width, 3))
    return Image.fromarray((127 + 90 * np.stack(waves, -1) + noise).clip(0, 255).astype(np.uint8))


def as_file(image: Image.Image, form: str = 'JPEG') -> Image.Image:
    """The image as it comes from a file, opened and not decoded."""
    file = io.BytesIO()
    image.save(file, form, quality=95)
    return Image.open(io.BytesIO(file.getvalue()))


def seed(number: int) -> None:
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def both(image: Image.Image, size: int, number: int, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """One view by us and timm's own, from the same random state."""
    seed(number)
    ours, = view_transform((size, size), **options)(image, 'RGB')
    after = random.random(), torch.rand(1).item()
    seed(number)
    theirs = create_transform(size, is_training=True, use_prefetcher=True, **options)(image.convert('RGB'))
    assert after == (random.random(), torch.rand(1).item())  # as many draws
    return ours, theirs


@contextmanager
def counted_drafts(monkeypatch):
    """Sizes that JPEGs were asked for."""
    asked, draft = [], JpegImageFile.draft
    with monkeypatch.context() as patch:
        patch.setattr(JpegImageFile, 'draft', lambda self, mode, size: asked.append(size) or draft(self, mode, size))
        yield asked


@pytest.mark.parametrize('options', [FLIP, COLOURS, BLUR, POLICY, dict(interpolation='bicubic'), dict(
    interpolation='random', train_crop_mode='rrc', scale=(0.2, 0.5), ratio=(0.5, 2.0))])
@pytest.mark.parametrize('size', [(90, 70), (61, 140)])
def test_one_view_is_timms_where_the_crop_is_larger(options, size):
    for number in range(12):
        ours, theirs = both(photo(*size), 12, number, **{'scale': (0.1, 1.0), **options})  # crops of 20 pixels and more
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize('options', [BLUR, POLICY, dict(auto_augment='augmix-m5-w4-d2')])
def test_transforms_that_look_at_neighbours_stay_after_the_resize(options):
    for number in range(8):
        ours, theirs = both(photo(50, 40), 64, number, **options)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize('interpolation', ['bilinear', 'bicubic'])
def test_colours_before_the_resize_differ_little(interpolation):
    differences = []
    for number in range(40):
        ours, theirs = both(photo(50, 40), 64, number, **COLOURS, interpolation=interpolation)
        differences.append((ours.float() - theirs.float()).abs())
    differences = torch.stack(differences)
    assert differences.mean() < MEAN_DIFFERENCE and differences.flatten(1).mean(1).max() < WORST_DIFFERENCE


def test_flips_alone_commute_with_the_resize():
    for number in range(10):
        ours, theirs = both(photo(50, 40), 64, number, **FLIP)
        assert (ours.int() - theirs.int()).abs().max() <= 1


@pytest.mark.parametrize('num_views', [1, 2])
def test_a_jpeg_is_decoded_at_a_smaller_scale_where_every_crop_allows(monkeypatch, num_views):
    image, close, drafted, names = photo(400, 300), [], 0, ('plain',) * num_views
    reference = view_transform((32, 32), **FLIP)
    for number in range(20):
        seed(number)
        boxes = [reference.crop.get_params(image, (0.05, 1.0), reference.crop.ratio) for _ in range(num_views)]
        allowed = max(32 / min(h, w) for _, _, h, w in boxes) <= 0.5
        seed(number)
        with counted_drafts(monkeypatch) as asked:
            views = view_transform((32, 32), names, scale=(0.05, 1.0), **FLIP)(as_file(image), 'RGB')
        assert bool(asked) == allowed
        drafted += bool(asked)
        seed(number)
        full = view_transform((32, 32), names, scale=(0.05, 1.0), **FLIP)(as_file(image).convert('RGB'), 'RGB')
        close += [(view.float() - whole.float()).abs().mean().item() for view, whole in zip(views, full, strict=True)]
    assert drafted >= 10 and max(close) < DRAFT_DIFFERENCE


def test_the_smaller_decoding_has_the_pixels_that_every_crop_needs(monkeypatch):
    sizes = []
    view = CroppedViews._view
    monkeypatch.setattr(CroppedViews, '_view', lambda self, image, box: sizes.append(
        (box[2] - box[0], box[3] - box[1])) or view(self, image, box))
    for number in range(30):
        seed(number)
        view_transform((32, 48), scale=(0.3, 1.0), **FLIP)(as_file(photo(400, 300)), 'RGB')
    assert min(width for width, _ in sizes) >= 48 and min(height for _, height in sizes) >= 32


@pytest.mark.parametrize('form', ['PNG', 'WEBP'])
def test_other_formats_are_decoded_whole(monkeypatch, form):
    with counted_drafts(monkeypatch) as asked:
        view, = view_transform((16, 16), **FLIP)(as_file(photo(300, 300), form), 'RGB')
    assert not asked and view.shape == (3, 16, 16)


@pytest.mark.parametrize('options', [
    dict(no_aug=True), dict(augmentation='cifar'), dict(train_crop_mode='rkrc'), dict(train_crop_mode='rkrr')])
def test_other_crops_decode_whole_and_once(monkeypatch, options):
    make_views = view_transform((16, 16), ('plain',) * 3, **options)
    assert isinstance(make_views, Views)
    with counted_drafts(monkeypatch) as asked:
        views = make_views(as_file(photo(200, 200)), 'RGB')
    assert not asked and len(views) == 3 and all(view.shape == (3, 16, 16) for view in views)


@pytest.mark.parametrize('options', [FLIP, COLOURS, BLUR, dict(augmentation='cifar'), dict(augmentation='imagenet_lt')])
def test_two_views_of_an_image_differ(options):
    seed(0)
    for _ in range(5):
        first, second = view_transform((32, 32), ('global', 'local'), **options)(photo(90, 70), 'RGB')
        assert first.dtype == torch.uint8 and not torch.equal(first, second)


def test_crops_are_drawn_as_timms():
    """Areas, shapes and places of 4,000 boxes against as many of timm's: Kolmogorov-Smirnov, five numbers a box."""
    found, image = [], photo(90, 70)
    make_views = view_transform((8, 8), ('global', 'local'), scale=(0.08, 1.0), **FLIP)
    make_views._view = lambda image, box: found.append(box)
    seed(0)
    for _ in range(2000):
        make_views(image, 'RGB')
    seed(1)
    drawn = [RandomResizedCropAndInterpolation.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)]
    x0, y0, x1, y1 = np.array(found, dtype=float).T
    y, x, h, w = np.array(drawn, dtype=float).T
    pairs = [(x0, x), (y0, y), (x1 - x0, w), (y1 - y0, h), ((x1 - x0) * (y1 - y0), w * h)]
    assert max(kolmogorov_smirnov(*pair) for pair in pairs) < 0.0465  # exceeded once in 3,000 draws of equal samples
    first, second = np.array(found).reshape(2000, 2, 4).transpose(1, 0, 2)
    assert abs(np.corrcoef(first[:, 0], second[:, 0])[0, 1]) < 0.08  # the two views of an image: independent


def kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference of two empirical distribution functions."""
    of_a, of_b = (np.searchsorted(np.sort(sample), np.union1d(a, b), 'right') / len(sample) for sample in (a, b))
    return np.abs(of_a - of_b).max()


@pytest.mark.parametrize('form', ['JPEG', 'PNG'])
def test_grey_mode(form):
    view, other = view_transform((16, 16), ('global', 'local'), **FLIP)(as_file(photo(120, 120), form), 'L')
    assert view.shape == other.shape == (1, 16, 16)


# --- policies on CIFAR's crop, and a view of its own for them ---


def pil(view: torch.Tensor) -> Image.Image:
    return Image.fromarray(view.permute(1, 2, 0).numpy())


POLICIES = ['v0r', 'original-mstd0.5', 'rand-m9-mstd0.5', 'augmix-m5-w4-d2']


@pytest.mark.parametrize('interpolation', ['random', 'bicubic'])
@pytest.mark.parametrize('policy', POLICIES)
def test_a_policy_comes_after_cifars_crop_and_flip(policy, interpolation):
    """The same draws without the policy, then timm's own with what its ImageNet transform gives it."""
    fill, changed = dict(translate_const=14, img_mean=(128, 102, 76)), 0  # 0.45 of 32 pixels, 255 of the mean
    if interpolation == 'bicubic':
        fill['interpolation'] = Image.BICUBIC
    if policy.startswith('augmix'):
        fill['translate_pct'] = 0.3
    create = {'rand': rand_augment_transform, 'augm': augment_and_mix_transform}.get(policy[:4], auto_augment_transform)
    plain = view_transform((32, 32), augmentation='cifar')
    augmented = view_transform((32, 32), augmentation='cifar', auto_augment=policy, mean=(0.5, 0.4, 0.3),
                               interpolation=interpolation)
    for number in range(12):
        seed(number)
        found, = augmented(photo(32, 32), 'RGB')
        seed(number)
        before, = plain(photo(32, 32), 'RGB')
        expected = create(policy, fill)(pil(before))
        assert torch.equal(found, torch.from_numpy(np.array(expected)).permute(2, 0, 1))
        changed += not torch.equal(found, before)
    assert changed > 6


@pytest.mark.parametrize('augmentation', ['cifar', 'timm', 'imagenet_lt'])
def test_each_view_has_the_options_of_its_name(augmentation):
    options = dict(augmentation=augmentation, hflip=0.5, mean=(0.5, 0.4, 0.3))
    make_views = view_transform((32, 32), ('strong', 'plain'), **options)
    in_turn = [view_transform((32, 32), (name,), **options) for name in ('strong', 'plain')]
    for number in range(6):
        seed(number)
        views = make_views(as_file(photo(300, 200)), 'RGB')
        seed(number)
        image = as_file(photo(300, 200)).convert('RGB')
        expected = [transform(image, 'RGB')[0] for transform in in_turn]
        assert all(torch.equal(one, other) for one, other in zip(views, expected, strict=True))


@pytest.mark.parametrize('name', VIEWS)
@pytest.mark.parametrize('augmentation', ['cifar', 'timm', 'imagenet_lt'])
def test_every_view_has_its_size_in_both_modes(augmentation, name):
    for mode in ('RGB', 'L'):
        seed(3)
        for _ in range(8):
            view, = view_transform((32, 24), (name,), augmentation=augmentation)(photo(40, 36), mode)
            assert view.shape == (3 if mode == 'RGB' else 1, 32, 24) and view.dtype == torch.uint8


@pytest.mark.parametrize('name', VIEWS)
def test_no_view_is_augmented_without_augmentation(name):
    views = view_transform((32, 32), (name, 'plain'), augmentation='cifar', no_aug=True)(photo(40, 36), 'RGB')
    assert torch.equal(*views)


def test_the_strong_view_of_cifar_is_torchvisions_policy_and_a_black_box():
    policy, cutout = transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10), Cutout(16)
    strong, plain = (view_transform((32, 32), (name,), augmentation='cifar') for name in ('strong', 'plain'))
    for number in range(10):
        seed(number)
        found, = strong(photo(32, 32), 'RGB')
        seed(number)
        expected = cutout(policy(pil(plain(photo(32, 32), 'RGB')[0])))
        assert torch.equal(found, torch.from_numpy(np.array(expected)).permute(2, 0, 1))


def test_a_black_box_has_its_side_but_at_the_border():
    image, areas = Image.new('L', (32, 32), 255), []
    seed(0)
    for _ in range(200):
        black = np.argwhere(np.array(Cutout(16)(image)) == 0)
        (y0, x0), (y1, x1) = black.min(0), black.max(0) + 1
        areas.append(len(black))
        assert len(black) == (y1 - y0) * (x1 - x0) and 8 <= y1 - y0 <= 16 and 8 <= x1 - x0 <= 16
    assert max(areas) == 256 and np.array(image).min() == 255


@pytest.mark.parametrize('name, last', [('strong', 'RandAugment'), ('stack', 'RandAugment'), ('sim_blur', 'RandomApply')])
def test_policies_come_last_as_in_the_released_code(name, last):
    others = view_transform((32, 32), (name,), augmentation='imagenet_lt').others.transforms
    assert type(others[-1]).__name__ == last
    assert sum(type(other).__name__ == 'RandomGrayscale' for other in others) == (name != 'strong')


@pytest.mark.parametrize('augmentation', ['cifar', 'timm'])
def test_equal_views_share_one_transform(augmentation):
    make_views = view_transform((32, 32), ('global', 'local'), augmentation=augmentation)
    assert type(make_views) is type(view_transform((32, 32), augmentation=augmentation)) and make_views.num_views == 2


def test_a_view_without_a_name_is_an_error():
    with pytest.raises(KeyError, match='sharp'):
        view_transform((32, 32), ('sharp',))
