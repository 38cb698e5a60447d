"""Lists of `path label` lines: published ones, large ones, dialects and class names."""
import time

import pytest
from conftest import write_folders
from PIL import Image

from glmc.data.lists import load_list


@pytest.fixture
def no_decoding(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError('an image was opened')
    monkeypatch.setattr(Image, 'open', refuse)


@pytest.mark.data
@pytest.mark.parametrize('name, images, classes, largest, smallest', [
    ('Places_LT_train', 62500, 365, 4980, 5), ('Places_LT_val', 7300, 365, 20, 20),
    ('ImageNet_LT_test', 50000, 1000, 50, 50), ('ImageNet_100_LT_train', 12205, 100, 1280, 6),
    ('iNaturalist18_val', 24426, 8142, 3, 3)])
def test_published_lists(name, images, classes, largest, smallest, pack, monkeypatch, no_decoding):
    monkeypatch.setattr('glmc.data.lists._require_files', lambda *args: None)  # the images are not here
    start = time.perf_counter()
    counts = load_list(str(pack('lists') / f'{name}.txt.gz'), '/images').counts()
    assert (counts.sum(), len(counts), counts.max(), counts.min()) == (images, classes, largest, smallest)
    assert time.perf_counter() - start < 10


def test_100_000_lines_take_seconds(tmp_path, no_decoding):
    for folder in range(10):
        (tmp_path / str(folder)).mkdir()
        for number in range(100):
            (tmp_path / str(folder) / f'{number}.jpg').touch()
    lines = [f'{index % 10}/{index // 10 % 100}.jpg {index % 10}' for index in range(100_000)]
    (tmp_path / 'list.txt').write_text('\n'.join(lines))
    start = time.perf_counter()
    assert load_list(str(tmp_path / 'list.txt'), str(tmp_path)).counts().tolist() == [10_000] * 10
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize('text', ['a b/1.png 0\na b/2.png 1\n', '\ufeffa b/1.png 0\r\n\r\na b/2.png\t1'])
def test_list_dialects(text, tmp_path):
    write_folders(tmp_path, {'a b': 3})
    (tmp_path / 'list.txt').write_text(text, encoding='utf-8', newline='')
    images = load_list(str(tmp_path / 'list.txt'), str(tmp_path))
    assert images.names == ['a b/1.png', 'a b/2.png'] and images.labels.tolist() == [0, 1]
    assert images.image(1).size == (32, 32)


def test_list_classes_have_the_names_of_their_folders(folders, tmp_path):
    (tmp_path / 'list.txt').write_text('train/bee/0.png 1\ntrain/ant/0.png 0\ntrain/cat/0.png 2\n')
    assert load_list(str(tmp_path / 'list.txt'), str(folders)).class_names == ['ant', 'bee', 'cat']
    (tmp_path / 'mixed.txt').write_text('train/ant/0.png 0\ntrain/bee/0.png 0\ntrain/cat/0.png 1\n')
    assert load_list(str(tmp_path / 'mixed.txt'), str(folders)).class_names == ['0', 'cat']
