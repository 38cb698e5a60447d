"""Image folders: what is an image, what is a class, and the order of the classes."""
import logging
import os

import pytest
from conftest import write_folders
from PIL import Image

from glmc.data.folders import load_folders, name_classes, sorted_names
from glmc.data.sources import load_training_data
from glmc.errors import ImageError, InputError


def write(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (4, 4)).save(root / name) if not name.endswith(('.txt', '.db')) else (root / name).write_text('x')
    return str(root)


def load(root, **options):
    return load_folders(str(root), '--data-dir x', **options)


def test_every_kind_of_image_is_read_and_the_rest_is_counted(tmp_path, caplog):
    caplog.set_level(logging.INFO, 'glmc')
    root = write(tmp_path, 'ant/a.png', 'ant/b.webp', 'ant/c.BMP', 'bee/d.tiff', 'bee/e.gif', 'ant/.f.png', 'bee/Thumbs.db',
                 '.git/g.png', '__MACOSX/ant/h.png', 'bee/notes.txt')
    Image.new('RGB', (4, 4)).save(tmp_path / 'bee' / 'i.jfif', 'JPEG')
    images = load(root)
    assert list(images.names) == ['ant/a.png', 'ant/b.webp', 'ant/c.BMP', 'bee/d.tiff', 'bee/e.gif', 'bee/i.jfif']
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1] and images.class_names == ['ant', 'bee']
    assert all(images.image(index).size == (4, 4) for index in range(6))
    assert [record.message for record in caplog.records] == [
        f'{root}: passed over 4 hidden or system files, 1 other file (1 .txt)']


def test_links_are_followed_once_and_end_in_circles(tmp_path):
    write(tmp_path / 'x', 'ant/1.png', 'bee/2.png')
    write(tmp_path / 'y', '3.png')
    os.symlink(tmp_path / 'y', tmp_path / 'x' / 'cat')
    os.symlink(tmp_path / 'x', tmp_path / 'x' / 'bee' / 'again')
    os.symlink(tmp_path / 'x' / 'ant' / '1.png', tmp_path / 'x' / 'bee' / '1.png')
    assert list(load(tmp_path / 'x').names) == ['ant/1.png', 'bee/2.png', 'cat/3.png']


def test_a_link_to_nothing_is_an_unreadable_image(tmp_path):
    write(tmp_path, 'ant/1.png', 'bee/2.png')
    os.symlink(tmp_path / 'gone.png', tmp_path / 'bee' / '3.png')
    images = load(tmp_path)
    assert len(images) == 3
    with pytest.raises(ImageError, match='bee/3.png'):
        images.image(2)


@pytest.mark.parametrize('names, match', [
    (['ant/images/1.png', 'bee/images/2.png'], "ant/images and bee/images would be one class 'images'; --class-from"),
    (['a/other/1.png', 'b/other/2.png'], "folders a/other and b/other would be one class 'other'"),
    (['ant/1.png', 'ant/old/2.png', 'bee/3.png'], 'folders ant and ant/old both contain images; --class-from'),
    (['ant/1.png', '2.png'], 'image 2.png lies in no class folder, expected class/image')])
def test_ambiguous_folders_are_refused(names, match, tmp_path):
    with pytest.raises(InputError, match=match):
        load(write(tmp_path, *names))


@pytest.mark.parametrize('class_from, classes, labels', [
    ('leaf', ['images', 'raw'], [0, 1, 0]), ('top', ['ant', 'bee'], [0, 0, 1]),
    ('path', ['ant/images', 'ant/raw', 'bee/images'], [0, 1, 2])])
def test_the_user_says_which_folder_is_the_class(class_from, classes, labels, tmp_path):
    images = load(write(tmp_path, 'ant/images/1.png', 'ant/raw/2.png', 'bee/images/3.png'), class_from=class_from)
    assert images.class_names == classes and images.labels.tolist() == labels


def test_different_depths_are_warned_about(caplog):
    assert name_classes(['birds/owl', 'birds/jay', 'cat'], 'x') == {'birds/owl': 'owl', 'birds/jay': 'jay', 'cat': 'cat'}
    assert 'class folders lie at different depths, cat and birds/jay' in caplog.text


def test_an_empty_class_folder_is_refused(tmp_path):
    write(tmp_path, 'ant/1.png', 'bee/notes.txt')
    with pytest.raises(InputError, match=r'class folder .*bee has no images, found 1 other file \(1 \.txt\), expected'):
        load(tmp_path)


def test_the_order_of_classes_is_one_of_their_names(caplog):
    assert sorted_names({'b', 'A', 'a', 'B', 'a10', 'a2', '01', '1'}) == ['01', '1', 'A', 'a', 'a2', 'a10', 'B', 'b']
    assert caplog.text.count('they are two classes') == 1


@pytest.mark.parametrize('options', [{}, {'class_from': 'top'}])
def test_splits_share_the_naming(options, tmp_path):
    for split in ('train', 'validation'):
        write_folders(tmp_path / split, {'bee': 2, 'ant': 3})
    data = load_training_data(data_dir=str(tmp_path), **options)
    assert data.class_names == data.validation.class_names == ['ant', 'bee']
