"""Sources: equal sets from every format, labels without decoding, counts in advance."""
import gzip
import io
import json
import subprocess
import sys
import tarfile

import datasets
import numpy as np
import pytest
from conftest import COUNTS, PACKS, VALIDATION, coloured, write_folders, write_shards
from PIL import Image

from glmc.data.sources import load_training_data
from glmc.errors import ImageError, InputError


@pytest.fixture(autouse=True)
def hub_cache(tmp_path, monkeypatch):
    """Write Arrow copies to a folder of the test."""
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'hub')


@pytest.fixture
def no_decoding(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError('an image was opened')
    monkeypatch.setattr(Image, 'open', refuse)


def tars(folders, root):
    for split in ('train', 'validation'):
        with tarfile.open(root / f'{split}.tar', 'w') as tar:
            tar.add(folders / split, arcname=split)
    return dict(data_dir=str(root), train_split='train.tar', val_split='validation.tar')


def lists(folders, root):
    for split, suffix in (('train', '.txt'), ('validation', '.txt.gz')):
        paths = sorted((folders / split).rglob('*.png'))
        lines = [f"{path.relative_to(folders)} {list(COUNTS).index(path.parent.name)}\n" for path in paths]
        opener = gzip.open if suffix.endswith('.gz') else open
        with opener(root / (split + suffix), 'wt') as file:
            file.writelines(lines)
    return dict(data_dir=str(folders), train_list=str(root / 'train.txt'), val_list=str(root / 'validation.txt.gz'))


def parquet(folders, root):
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(COUNTS)))
    for split in ('train', 'validation'):
        paths = sorted((folders / split).rglob('*.png'))
        rows = {'image': [{'bytes': path.read_bytes(), 'path': path.name} for path in paths],
                'label': [path.parent.name for path in paths]}
        (root / 'data').mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(root / 'data' / f'{split}-00000-of-00001.parquet')
    return dict(dataset=f'hfds/{root}')


SOURCES = {
    'folders': lambda folders, root: dict(data_dir=str(folders)),
    'folders/': lambda folders, root: dict(data_dir=f'{folders}/'),
    'torch': lambda folders, root: dict(data_dir=str(folders), dataset='torch/image_folder'),
    'tars': tars,
    'lists': lists,
    'parquet': parquet,
}


@pytest.mark.parametrize('name', SOURCES)
def test_all_formats_give_one_set(name, folders, tmp_path, no_decoding):
    data = load_training_data(**SOURCES[name](folders, tmp_path))
    assert list(data.class_names) == list(COUNTS)
    assert data.profile.counts == tuple(COUNTS.values())
    assert data.validation.counts().tolist() == list(VALIDATION.values())
    assert data.profile.fingerprint == load_training_data(data_dir=str(folders)).profile.fingerprint


@pytest.mark.parametrize('name', SOURCES)
def test_pixels_belong_to_their_label(name, folders, tmp_path):
    data = load_training_data(**SOURCES[name](folders, tmp_path))
    for images in (data.train, data.validation):
        colours = [np.asarray(images.image(index)).mean((0, 1)).argmax() for index in range(len(images))]
        assert colours == images.labels.tolist()


def test_validation_that_lacks_a_class_matches_by_name(tmp_path):
    write_folders(tmp_path / 'train', COUNTS)
    write_folders(tmp_path / 'val', {'cat': 2})
    data = load_training_data(data_dir=str(tmp_path))
    assert data.validation.labels.tolist() == [2, 2] and data.validation.class_names == data.class_names


def test_nested_folders(tmp_path):
    write_folders(tmp_path / 'train' / 'animals', COUNTS)
    write_folders(tmp_path / 'train' / 'things', {'door': 3})
    write_folders(tmp_path / 'val' / 'things', {'door': 2})
    data = load_training_data(data_dir=str(tmp_path))
    assert list(data.class_names) == [*COUNTS, 'door'] and data.profile.counts == (*COUNTS.values(), 3)
    assert data.validation.labels.tolist() == [3, 3]


def test_digits_long_tailed():
    data = load_training_data(imbalance_factor=20)
    assert data.profile.counts[::9] == (124, 6) and data.validation.counts().tolist() == [50] * 10
    assert data.train.image(0).size == (8, 8)


def test_torchvision_format(tmp_path, no_decoding):
    for prefix, count in (('train', 40), ('t10k', 20)):
        images = np.zeros((count, 28, 28), np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        folder = tmp_path / 'MNIST' / 'raw'
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f'{prefix}-images-idx3-ubyte').write_bytes(
            b'\0\0\x08\x03' + np.array(images.shape, '>i4').tobytes() + images.tobytes())
        (folder / f'{prefix}-labels-idx1-ubyte').write_bytes(
            b'\0\0\x08\x01' + np.array(labels.shape, '>i4').tobytes() + labels.tobytes())
    data = load_training_data(dataset='torch/mnist', data_dir=str(tmp_path))
    assert data.profile.counts == (4,) * 10 and data.class_names[0] == '0 - zero'
    assert len(data.validation) == 20 and data.train.image(0).mode == 'RGB'


# --- long tails of real sets ---


@pytest.mark.data
def test_cifar100_long_tail(pack, no_decoding):
    def opened():
        return load_training_data(dataset=f"hfds/{pack('cifar100')}", val_split='test', imbalance_factor=100).profile
    profile = opened()
    assert profile.num_images == 10847 and profile.counts[::99] == (500, 5)
    assert profile.as_dict()['shot_classes'] == {'many': 35, 'medium': 34, 'few': 31}
    assert profile == opened()


@pytest.mark.data
@pytest.mark.slow
def test_cifar100_from_folders_is_the_same_long_tail(pack, tmp_path):
    subprocess.run([sys.executable, PACKS / 'unpack.py', 'folder', pack('cifar100'), tmp_path], check=True)
    options = dict(val_split='test', imbalance_factor=100)
    folders = load_training_data(data_dir=str(tmp_path), **options)
    parquet = load_training_data(dataset=f"hfds/{pack('cifar100')}", **options)
    assert folders.profile == parquet.profile and len(folders.validation) == 10000
    assert (np.asarray(folders.train.image(5)) == np.asarray(parquet.train.image(5))).all()


@pytest.mark.data
def test_caltech_has_a_natural_tail(pack, no_decoding):
    data = load_training_data(dataset=f"hfds/{pack('caltech99')}")
    expected = json.loads((pack('caltech99') / 'counts.json').read_text())['train_counts']
    assert dict(zip(data.class_names, data.profile.counts, strict=True)) == expected
    assert data.profile.num_images == 5827 and len(data.validation) == 1980


# --- sources without an index ---


@pytest.fixture(scope='module')
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp('shards'), shard_size=4)


@pytest.mark.parametrize('batch_size', [8, 25])
def test_shards_are_counted_exactly(batch_size, shards):
    data = load_training_data(dataset='wds/x', data_dir=str(shards), batch_size=batch_size)
    assert data.profile.counts == tuple(COUNTS.values()) and data.profile.fingerprint is None
    assert len(list(data.validation)) == len(data.validation) == 13


@pytest.mark.parametrize('text', [
    '[14, 7, 4]', '14\n7\n4\n', '{"train_counts": [14, 7, 4]}', '{"class_counts": [14, 7, 4]}'])
def test_counts_from_a_file_need_no_pass(text, shards, tmp_path, no_decoding):
    (tmp_path / 'counts').write_text(text)
    data = load_training_data(dataset='wds/x', data_dir=str(shards), class_counts=str(tmp_path / 'counts'))
    assert data.profile.counts == (14, 7, 4)


@pytest.mark.parametrize('text', ['', '[]', '14 seven', '{"x": 1}', '[1.5, 2]', '[-1, 2]', '{'])
def test_invalid_counts_are_errors(text, shards, tmp_path):
    (tmp_path / 'counts').write_text(text)
    with pytest.raises(InputError, match='--class-counts .*counts: expected a list of images per class'):
        load_training_data(dataset='wds/x', data_dir=str(shards), class_counts=str(tmp_path / 'counts'))


def test_label_beyond_the_counts(shards, tmp_path):
    (tmp_path / 'counts').write_text('[14, 7]')
    data = load_training_data(dataset='wds/x', data_dir=str(shards), class_counts=str(tmp_path / 'counts'))
    with pytest.raises(InputError, match='--dataset wds/x: expected labels 0…1, found 2'):
        list(data.train)


@pytest.mark.parametrize('options', [dict(imbalance_factor=10), dict(holdout=1)])
def test_shards_cannot_be_cut(options, shards):
    with pytest.raises(InputError, match='need a source with an index'):
        load_training_data(dataset='wds/x', data_dir=str(shards), **options)


@pytest.mark.parametrize('class_from, names', [(None, None), ('top', ['ant', 'bee']), ('leaf', ['images'])])
def test_classes_of_a_tar_are_those_of_folders(class_from, names, folders, tmp_path):
    for split in ('train', 'validation'):
        with tarfile.open(tmp_path / f'{split}.tar', 'w') as tar:
            for name in ('bee', 'ant'):
                tar.add(folders / split / name, arcname=f'{split}/{name}/images')
    options = dict(data_dir=str(tmp_path), train_split='train.tar', val_split='validation.tar', class_from=class_from)
    if names is None:
        with pytest.raises(InputError, match="ant/images and bee/images would be one class 'images'; --class-from top"):
            load_training_data(**options)
    else:
        data = load_training_data(**options)
        assert data.class_names == names and data.train.image(0).size == (32, 32)


@pytest.mark.parametrize('inside', [False, True])
def test_a_member_larger_than_its_tar_is_refused(inside, folders, tmp_path):
    path = tmp_path / 'train.tar'
    with tarfile.open(tmp_path / 'large.tar' if inside else path, 'w', format=tarfile.GNU_FORMAT) as tar:
        tar.add(folders / 'train', arcname='train')
        large = tarfile.TarInfo('train/ant/large.png')
        large.size = 2 ** 50
        tar.fileobj.write(large.tobuf(tarfile.GNU_FORMAT))
    if inside:
        with tarfile.open(path, 'w') as tar:
            tar.add(tmp_path / 'large.tar', arcname='large.tar')
    with pytest.raises(InputError, match='(has 1,125,899,906,842,624 bytes, the tar has|unexpected end of data)'):
        load_training_data(data_dir=str(path), holdout=1, val_split='none')


# --- columns of a Hugging Face set ---


def hub_set(root, image='image', label='label', values=(0, 1), feature=None):
    file = io.BytesIO()
    coloured(0, 0).save(file, 'PNG')
    features = datasets.Features({image: datasets.Image(), label: feature or datasets.Value('int64')})
    rows = {image: [{'bytes': file.getvalue(), 'path': None}] * len(values), label: list(values)}
    (root / 'data').mkdir()
    for split in ('train', 'validation'):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(root / 'data' / f'{split}-00000-of-00001.parquet')
    return dict(dataset=f'hfds/{root}')


def test_hub_columns_by_other_names(tmp_path):
    data = load_training_data(**hub_set(tmp_path, 'img', 'fine_label'), input_key='img', target_key='fine_label')
    assert data.class_names == ['0', '1'] and data.train.names == ['0', '1'] and data.train.image(1).size == (32, 32)


@pytest.mark.parametrize('columns, message', [
    (dict(image='img'), r"no image column 'image' \(--input-key\), found img, label"),
    (dict(label='fine'), r"no label column 'label' \(--target-key\), found image, fine"),
    (dict(values=(0, -1)), "expected labels 0…C-1 or class names in column 'label', found -1 in row 1"),
    (dict(values=(0, None)), "expected labels 0…C-1 or class names in column 'label', found None in row 1"),
    (dict(values=(0, 10 ** 12)), "expected labels 0…C-1 or class names in column 'label', found 1000000000000 in row 1"),
    (dict(values=('a', None), feature=datasets.Value('string')),
     "expected a class name in each row of column 'label', found None in row 1")])
def test_hub_columns_that_do_not_fit(columns, message, tmp_path):
    with pytest.raises(InputError, match=f'--dataset hfds/.*: {message}'):
        load_training_data(**hub_set(tmp_path, **columns))


def test_names_in_a_hub_column_are_classes(tmp_path):
    data = load_training_data(**hub_set(tmp_path, values=('cat', 'ant', 'cat'), feature=datasets.Value('string')))
    assert data.class_names == ['ant', 'cat'] and data.train.labels.tolist() == data.validation.labels.tolist() == [1, 0, 1]
    assert data.train.image(1).size == (32, 32)


def test_a_row_without_an_image_is_an_unreadable_image(tmp_path):
    source = hub_set(tmp_path)
    path = tmp_path / 'data' / 'train-00000-of-00001.parquet'
    table = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / 'cache')).cast_column(
        'image', datasets.Image(decode=False))
    rows = [*table, {'image': None, 'label': 1}]
    features = datasets.Features(image=datasets.Image(), label=datasets.Value('int64'))
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)
    images = load_training_data(**source).train
    assert len(images) == 3
    with pytest.raises(ImageError, match='cannot decode image 2'):
        images.image(2)


def test_holdout_replaces_a_missing_validation_split(tmp_path):
    data = load_training_data(**hub_set(tmp_path, values=(0, 1) * 3), val_split='test', holdout=1)
    assert data.validation is None and data.holdout.counts().tolist() == [1, 1]
    assert data.profile.counts == (2, 2)


def test_no_validation_split_with_held_out_images():
    data = load_training_data(val_split='none', holdout=5, imbalance_factor=10)
    assert data.validation is None and len(data.holdout) == 50
    with pytest.raises(InputError, match='--val-split none: expected --holdout'):
        load_training_data(val_split='none')
