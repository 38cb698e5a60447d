"""Damaged image files of every format that Pillow writes: each is an image or an ImageError, whatever the decoder does."""
import io
import time
import warnings
from functools import partial

import numpy as np
import pytest
from PIL import Image

from glmc.data.datasets import ImageSet
from glmc.data.walk import image_extensions
from glmc.errors import ImageError

FILES = 5000
HEADER = 64  # bytes; half of the changes are there, where they do most


def encoded() -> dict[str, bytes]:
    """Format and mode -> a file of 24 x 20 pixels, for the formats that can be written and read."""
    pixels = np.random.default_rng(0).integers(256, size=(20, 24, 3), dtype=np.uint8)
    readable = {Image.registered_extensions()[extension] for extension in image_extensions()}
    files = {}
    for name in sorted(readable & Image.SAVE.keys()):
        for mode in ('RGB', 'L', 'P', '1'):
            file = io.BytesIO()
            try:
                Image.fromarray(pixels).convert(mode).save(file, name)
                Image.open(io.BytesIO(file.getvalue())).load()
            except Exception:  # a mode that the format lacks
                continue
            files[f'{name} {mode}'] = file.getvalue()
    return files


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """The file with one to eight bytes changed, and often cut, doubled in part, or overwritten by zeros."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 9)):
        place = rng.integers(min(HEADER, len(data)) if rng.random() < 0.5 else len(data))
        data[place] = rng.integers(256)
    start, stop = sorted(rng.integers(len(data), size=2).tolist())
    kind = rng.integers(5)
    if kind == 0:
        del data[start:]
    elif kind == 1:
        data[start:start] = data[start:stop]
    elif kind == 2:
        data[start:stop] = bytes(stop - start)
    return bytes(data)


def read(files: list[bytes], index: int) -> Image.Image:
    return Image.open(io.BytesIO(files[index]))


@pytest.mark.parametrize('number', [pytest.param(300, id='some'), pytest.param(FILES, id='all', marks=pytest.mark.slow)])
def test_a_damaged_file_is_an_image_or_an_image_error(number):
    rng, whole = np.random.default_rng(1), encoded()
    assert len(whole) >= 40
    kinds = [list(whole)[index % len(whole)] for index in range(number)]
    files = [damaged(whole[kind], rng) for kind in kinds]
    images = ImageSet(partial(read, files), np.zeros(number, np.int64), kinds, ['a'], 'x')
    unreadable = 0
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of Pillow, about what it finds in a damaged file
        for index in range(number):
            start = time.perf_counter()
            try:
                assert images.image(index).mode == 'RGB'
            except ImageError as error:
                assert '\n' not in str(error)
                unreadable += 1
            assert time.perf_counter() - start < 5, kinds[index]
    assert number / 10 < unreadable < number
