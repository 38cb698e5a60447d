"""ImageSet: labels and names without decoding, any image mode, subsets, long tails and held-out images."""
import io
import os
import struct
from functools import partial

import numpy as np
import pytest
from PIL import Image

from glmc.data.datasets import ImageSet, folder_of, long_tailed, open_file, split_holdout, stem_of
from glmc.errors import ImageError, InputError


class Encoded:
    """Reader of images from encoded bytes, decoded as files are."""

    def __init__(self, *images: tuple[Image.Image, str]):
        self.files = []
        for image, suffix in images:
            file = io.BytesIO()
            image.save(file, suffix)
            self.files.append(file.getvalue())

    def __call__(self, index: int) -> Image.Image:
        return Image.open(io.BytesIO(self.files[index]))


def image_set(labels, read=None, class_names=None) -> ImageSet:
    labels = np.array(labels)
    class_names = class_names or [f'c{c}' for c in range(labels.max() + 1)]
    names = [f'{class_names[label]}/{index}.png' for index, label in enumerate(labels)]
    return ImageSet(read, labels, names, class_names, 'test set')


GREY = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))


@pytest.mark.parametrize('image, suffix', [
    (GREY, 'PNG'), (GREY.convert('RGBA'), 'PNG'), (GREY.convert('LA'), 'PNG'), (GREY.convert('P'), 'PNG'),
    (GREY.convert('RGB'), 'PNG'), (GREY.convert('CMYK'), 'TIFF'),
    (Image.fromarray(np.arange(256, dtype=np.uint16).reshape(16, 16) * 256 + 77), 'PNG'),
    (Image.fromarray(np.arange(256, dtype=np.int32).reshape(16, 16) * 256 + 77), 'TIFF')])
@pytest.mark.parametrize('mode', ['RGB', 'L'])
def test_any_mode_becomes_the_same_eight_bits(image, suffix, mode):
    pixels = np.asarray(image_set([0], Encoded((image, suffix))).image(0, mode))
    expected = np.asarray(GREY.convert(mode))
    assert pixels.shape == expected.shape and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - expected).max() <= 1  # CMYK rounds


def test_bilevel_image():
    image = GREY.point(lambda value: 255 * (value > 99)).convert('1')
    assert (np.asarray(image_set([0], Encoded((image, 'PNG'))).image(0)) == np.asarray(image.convert('RGB'))).all()


def test_broken_image_is_named():
    read = Encoded((GREY, 'PNG'), (GREY, 'PNG'))
    read.files[1] = read.files[1][:50]
    images = image_set([0, 1], read)
    images.image(0)
    with pytest.raises(ImageError, match=r'test set: cannot decode image c1/1\.png'):
        images.image(1)


def test_decoding_error_is_one_line():
    def read(index):
        raise OSError('broken data stream\nwhen reading image file')
    with pytest.raises(ImageError, match=r'^test set: cannot decode image c0/0\.png: broken data stream$') as error:
        image_set([0], read).image(0)
    assert '\n' not in str(error.value)


def test_subset_of_a_subset_reads_the_right_images():
    images = image_set([0, 1, 2, 3], Encoded(*((Image.new('L', (2, 2), 10 * c), 'PNG') for c in range(4))))
    part = images.subset([3, 1, 2]).subset([2, 0])
    assert part.labels.tolist() == [2, 3] and part.names == ['c2/2.png', 'c3/3.png']
    assert [part.image(index, 'L').getpixel((0, 0)) for index in range(2)] == [20, 30]
    assert part.num_classes == 4 and part.counts().tolist() == [0, 0, 1, 1]


def test_classes_are_matched_by_name():
    images = image_set([0, 1, 1], class_names=['bee', 'cat'])
    assert images.with_classes(['ant', 'bee', 'cat']).labels.tolist() == [1, 2, 2]
    assert images.with_classes(['cat', 'bee']).labels.tolist() == [1, 0, 0]
    with pytest.raises(InputError, match="test set: class 'cat' is not in the training data, which has 1 class$"):
        images.with_classes(['bee'])


def test_class_without_images_need_not_be_known():
    images = image_set([0, 0], class_names=['bee', 'cat'])
    assert images.with_classes(['bee']).labels.tolist() == [0, 0]


def test_identity_is_class_and_file():
    images = image_set([0, 1], class_names=['bee', 'cat'])
    outer = ImageSet(None, images.labels, ['train/bee/0.webp', '1.jpeg'], images.class_names, '')
    assert images.identities() == outer.identities() == ['bee/0', 'cat/1']


def test_long_tail_starts_at_the_smallest_class():
    images = image_set(np.repeat([0, 1, 2], [50, 40, 60]))
    cut = long_tailed(images, 4, 'exp', 'cao', 0)
    assert cut.counts().tolist() == [40, 20, 10]
    assert cut.names == long_tailed(images, 4, 'exp', 'cao', 7).names  # a seed is for `random` only
    assert cut.names != long_tailed(images, 4, 'exp', 'random', 7).names
    assert long_tailed(images, 4, 'exp', 'first', 0).names[:2] == images.names[:2]


def test_long_tail_without_images_is_an_error():
    with pytest.raises(InputError, match='--imbalance-factor 100: '):
        long_tailed(image_set(np.repeat([0, 1], [50, 50])), 100, 'exp', 'cao', 0)


@pytest.mark.parametrize('holdout, taken', [(2, [2, 2]), (0.25, [5, 1]), (0.01, [1, 1])])
def test_holdout_is_disjoint_and_complete(holdout, taken):
    images = image_set(np.repeat([0, 1], [20, 4]))
    train, held = split_holdout(images, holdout, seed=3)
    assert held.counts().tolist() == taken
    assert sorted([*train.names, *held.names]) == sorted(images.names)
    assert held.names == split_holdout(images, holdout, seed=3)[1].names
    assert held.names != split_holdout(images, holdout, seed=4)[1].names


@pytest.mark.parametrize('holdout, held', [(4, [4, 0, 0]), (9.0, [9, 0, 0]), (0.1, [2, 1, 0])])
def test_classes_without_images_to_spare_are_only_trained_on(holdout, held):
    train, aside = split_holdout(image_set(np.repeat([0, 1, 2], [20, 4, 1])), holdout, seed=0)
    assert aside.counts().tolist() == held and (train.counts() + aside.counts()).tolist() == [20, 4, 1]


def test_holdout_must_leave_an_image():
    with pytest.raises(InputError, match='^--holdout 20: no class has enough images, the largest has 20'):
        split_holdout(image_set(np.repeat([0, 1], [20, 4])), 20, seed=0)


def test_whatever_pillow_raises_is_an_unreadable_image(tmp_path):
    for error in (RuntimeError, NotImplementedError, MemoryError, TypeError, struct.error):
        def read(index, error=error):
            raise error('damaged')
        images = ImageSet(read, np.zeros(1, np.int64), ['a.avif'], ['a'], 'x')
        with pytest.raises(ImageError, match='x: cannot decode image a.avif: damaged'):
            images.image(0)


def test_an_error_of_the_caller_is_not_one_of_the_image():
    images = ImageSet(Encoded((Image.new('RGB', (4, 4)), 'PNG')), np.zeros(1, np.int64), ['a.png'], ['a'], 'x')
    with pytest.raises(ZeroDivisionError), images.opened(0):
        _ = 1 / 0


def test_a_pipe_is_an_unreadable_image(tmp_path):
    os.mkfifo(tmp_path / 'a.png')
    images = ImageSet(partial(open_file, str(tmp_path), ['a.png']), np.zeros(1, np.int64), ['a.png'], ['a'], 'x')
    with pytest.raises(ImageError, match='not a regular file'):
        images.image(0)


@pytest.mark.parametrize('name', [
    'a/b.png', 'b.png', 'a/b', 'a/.png', 'a/..png', 'a/b.c.png', 'a.b/c', 'a/b.', 'a//b.png', '/b.png', '', 'a/',
    '/a/b/c.d', 'a///b'])
def test_folder_and_stem_are_those_of_os_path(name):
    assert stem_of(name) == os.path.splitext(os.path.basename(name))[0]
    assert folder_of(name) == os.path.basename(os.path.dirname(name))
