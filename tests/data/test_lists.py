"""Lists of `path label` lines and CSV: published ones, large ones, dialects, class names and contradictions."""
import gzip
import os
import time

import pytest
from conftest import write_folders
from PIL import Image

from glmc.data.lists import load_list
from glmc.data.sources import load_training_data
from glmc.errors import InputError


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


@pytest.mark.parametrize('text, names', [
    ('image,label\nx y/1.png,ant\nx y/0.png,bee\n', ['ant', 'bee']), ('x y/1.png,bee\nx y/0.png,ant\n', ['ant', 'bee']),
    ('x y/1.png, 1\nx y/0.png, 0\n', None), ('image,label\nx y/1.png,1.0\n\nx y/0.png,0.0\n', None),
    ('"image","label"\n"x y/1.png","bee, small"\n"x y/0.png","ant"\n', ['ant', 'bee, small']),
    ('\ufefffile;species\r\nx y/1.png;bee\r\n"x y/0.png";"sea lion; brown"\r\n', ['bee', 'sea lion; brown']),
    ('id\tlabel\tfile\n7\tbee\tx y/1.png\n8\tant\tx y/0.png\n', ['ant', 'bee']),
    ('path label\nx y/1.png bee\nx y/0.png ant\n', ['ant', 'bee']), ('x y/1.png bee\nx y/0.png ant\n', ['ant', 'bee'])])
@pytest.mark.parametrize('encoding', ['utf-8', 'utf-16'])
def test_csv(text, names, encoding, tmp_path, caplog):
    caplog.set_level('INFO', 'glmc')
    write_folders(tmp_path, {'x y': 2})
    (tmp_path / 'list.csv').write_text(text.removeprefix('\ufeff' * (encoding == 'utf-16')), encoding=encoding, newline='')
    images = load_list(str(tmp_path / 'list.csv'), str(tmp_path), label_column='species' if 'species' in text else None)
    assert images.names == ['x y/1.png', 'x y/0.png'] and images.image(1).size == (32, 32)
    assert images.numbered == (names is None) and (names is None or images.class_names == names)
    second = text.splitlines()[-1]
    assert images.labels.tolist() == ([1, 0] if 'ant' in second or '0' in second.split(',')[-1][-4:] else [0, 1])
    assert ('id is not' in caplog.text) == text.startswith('id')


@pytest.mark.parametrize('text, expected', [
    ('a.png,0,x\n', 'line 1: found 3 columns, expected path and label, or a header'),
    ('image,label\na.png\n', 'line 2: found 1 column, expected 2 as in the first line'),
    ('image,species\na.png,ant\n', 'which column has the labels? expected --target-key with one of image, species'),
    ('a.png 0 train\nb.png 1 train\n', 'line 1: found a third column, expected `path label`'),
    ('a.png 0\nb.png ant\n', "expected numbers or names as labels, found 0 in line 1 and 'ant' in line 2"),
    ('image,label\na.png,\n', 'line 2: found no label'),
    ('a.png 1000000000\n', 'line 1: expected a label 0…C-1, each with an image, in a list of 1 image, found 1000000000'),
    ('a.png 10000000000000000000000\n', 'line 1: expected a label 0…C-1'), ('a.png -1\n', 'expected a label 0 or more'),
    ('photo,kind\na.png,ant\n', 'line 1: image photo does not exist (paths are relative to --data-dir; columns of a '),
    ('a\0.png 0\n', 'is not a text file'), ('\n\n', 'the list is empty')])
def test_what_is_no_list_is_said(text, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in 'ab':
        Image.new('RGB', (4, 4)).save(f'{name}.png')
    (tmp_path / 'list.txt').write_text(text)
    with pytest.raises(InputError) as caught:
        load_list('list.txt', None)
    assert expected in str(caught.value) and str(caught.value).startswith('list.txt')


def test_a_list_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr('glmc.data.lists.MAX_UNPACKED', 2 ** 20)
    with gzip.open(tmp_path / 'list.txt.gz', 'wb') as file:
        file.write(b'a' * 2 ** 21)
    with pytest.raises(InputError, match='has more than 1 MiB of text'):
        load_list(str(tmp_path / 'list.txt.gz'), None)
    with open(tmp_path / 'sparse.txt', 'wb') as file:
        file.truncate(2 ** 40)
    with pytest.raises(InputError, match='has more than 1024 MiB of text'):
        load_list(str(tmp_path / 'sparse.txt'), None)
    os.mkfifo(tmp_path / 'pipe')
    with pytest.raises(InputError, match='not a regular file'):
        load_list(str(tmp_path / 'pipe'), None)


def test_names_that_are_not_utf8_are_kept(tmp_path):
    os.makedirs(os.fsencode(tmp_path) + b'/ant')
    with open(os.fsencode(tmp_path) + b'/ant/\xff.png', 'wb') as file:
        Image.new('RGB', (4, 4)).save(file, 'PNG')
    (tmp_path / 'list.txt').write_bytes(b'ant/\xff.png 0\n')
    assert load_list(str(tmp_path / 'list.txt'), str(tmp_path)).image(0).size == (4, 4)


@pytest.mark.parametrize('text, line', [
    ('ant/0.png 0\nant/1.png 0\nant/2.png 1\nbee/0.png 1\nbee/1.png 1\n', 'line 3: ant/2.png has label 1'),
    ('ant/0.png bee\nbee/0.png bee\nbee/1.png ant\nbee/2.png bee\n', 'line 1: ant/0.png has label bee')])
def test_labels_that_contradict_the_folders_are_warned_about(text, line, tmp_path, caplog):
    write_folders(tmp_path, {'ant': 3, 'bee': 3})
    (tmp_path / 'list.txt').write_text(text)
    load_list(str(tmp_path / 'list.txt'), str(tmp_path))
    assert 'contradict the folder of the image' in caplog.text and line in caplog.text


def test_folders_that_are_no_classes_are_no_contradiction(tmp_path, caplog):
    write_folders(tmp_path, {'monday': 3, 'tuesday': 3})
    lines = [f'{day}/{number}.png {number % 2}\n' for day in ('monday', 'tuesday') for number in range(3)]
    (tmp_path / 'list.txt').write_text(''.join(lines))
    load_list(str(tmp_path / 'list.txt'), str(tmp_path))
    assert not caplog.text


def test_a_list_in_another_order_than_the_training_data_is_refused(tmp_path):
    for split in ('train', 'validation'):
        write_folders(tmp_path / split, {'ant': 2, 'bee': 2})
    lines = [f'{{}}/{name}/{n}.png {label}\n' for label, name in enumerate(('ant', 'bee')) for n in range(2)]
    (tmp_path / 'train.txt').write_text(''.join(lines).format(*['train'] * 4))
    (tmp_path / 'val.txt').write_text(''.join(lines).format(*['validation'] * 4))
    lists = dict(data_dir=str(tmp_path), train_list=str(tmp_path / 'train.txt'), val_list=str(tmp_path / 'val.txt'))
    assert load_training_data(**lists).validation.class_names == ['ant', 'bee']
    (tmp_path / 'val.txt').write_text('validation/ant/0.png 1\nvalidation/bee/0.png 0\n')
    with pytest.raises(InputError, match="images in folder 'ant' have label 1, which is class 'bee' of the training data, "
                                         'expected 0'):
        load_training_data(**lists)


def test_names_give_the_same_numbers_in_every_split(tmp_path):
    write_folders(tmp_path, {'x': 5})
    (tmp_path / 'train.csv').write_text('image,label\nx/0.png,cat\nx/1.png,ant\nx/2.png,bee\n')
    (tmp_path / 'val.csv').write_text('image,label\nx/3.png,cat\nx/4.png,bee\n')
    lists = dict(data_dir=str(tmp_path), train_list=str(tmp_path / 'train.csv'), val_list=str(tmp_path / 'val.csv'))
    data = load_training_data(**lists)
    assert data.class_names == ['ant', 'bee', 'cat'] and data.validation.labels.tolist() == [2, 1]
    (tmp_path / 'val.csv').write_text('image,label\nx/3.png,dog\n')
    with pytest.raises(InputError, match="class 'dog' is not in the training data"):
        load_training_data(**lists)
