"""Image files in folders."""
import os
import re

import pytest
from conftest import coloured

from glmc.data.walk import find_images, image_extensions
from glmc.errors import InputError


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The working folder, with a function that creates empty files in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def create(*names: str) -> None:
    for name in names:
        os.makedirs(os.path.dirname(name) or '.', exist_ok=True)
        open(name, 'w').close()


def test_files_are_sorted_by_code_point_and_folder(root):
    create('x/ä.png', 'x/b.png', 'x/a.png', 'x/B.png', 'x/a/1.png', 'x/a-b/1.png', 'x/10.png', 'x/9.png')
    names = ['10.png', '9.png', 'B.png', 'a/1.png', 'a-b/1.png', 'a.png', 'b.png', 'ä.png']
    assert find_images(['x']).files == [f'x/{name}' for name in names]


def test_arguments_keep_their_order_and_each_file_comes_once(root):
    create('x/a.png', 'x/b.png', 'y/c.png')
    assert find_images(['y', 'x/b.png', 'x', './x/', str(root / 'x' / 'a.png')]).files == ['y/c.png', 'x/b.png', 'x/a.png']


def test_links_are_followed_once_and_circles_end(root):
    create('x/b/1.png', 'outside/2.png', 'single.png')
    os.symlink('b', 'x/a')  # the folder itself comes by its own path
    os.symlink('.', 'x/circle')
    os.symlink('..', 'x/b/up')  # with the other, 2^40 paths
    os.symlink(root / 'outside', 'x/linked')
    os.symlink('1.png', 'x/b/0.png')
    os.symlink('../single.png', 'x/single.png')
    assert find_images(['x']).files == ['x/b/1.png', 'x/linked/2.png', 'x/single.png']


def test_a_broken_link_is_an_image_and_a_pipe_is_none(root):
    create('x/a.png')
    os.symlink('gone.png', 'x/b.png')
    os.symlink('c.png', 'x/c.png')  # to itself
    os.mkfifo('x/pipe.png')
    os.symlink('pipe.png', 'x/to-pipe.png')
    os.symlink(os.devnull, 'x/null.png')
    found = find_images(['x', 'x/b.png'])
    assert found.files == ['x/a.png', 'x/b.png', 'x/c.png'] and found.others == {'.png': 3}
    with pytest.raises(InputError, match='^x/pipe.png: not a regular file$'):
        find_images(['x/pipe.png'])


def test_hidden_and_system_files_are_counted(root):
    create('x/a.png', 'x/.DS_Store', 'x/._a.png', 'x/.hidden/1.png', 'x/__MACOSX/a.png', 'x/@eaDir/a.png', 'x/Thumbs.db',
           'x/notes.txt', 'x/more.TXT', 'x/README', 'x/clip.mp4')
    found = find_images(['x'])
    assert found.files == ['x/a.png']
    assert found.passed_over() == '6 hidden or system files, 4 other files (2 .txt, 1 .mp4, 1 without extension)'
    assert find_images(['x/.hidden']).files == ['x/.hidden/1.png']  # the user names it
    assert find_images(['x/notes.txt']).files == ['x/notes.txt']
    assert find_images(['x/a.png']).passed_over() == ''


@pytest.mark.parametrize('suffix', ['.JPG', '.jpeg', '.png', '.webp', '.tif', '.bmp', '.gif', '.jp2', '.ppm', '.mpo'])
def test_what_pillow_reads_is_found(suffix, root):
    os.mkdir('x')
    coloured(0, 1).save(f'x/a{suffix}')
    assert find_images(['x']).files == [f'x/a{suffix}']


def test_what_pillow_cannot_decode_is_no_image():
    assert not image_extensions() & {'.mpg', '.h5', '.grib', '.pdf', '.txt', ''}


def test_a_folder_that_cannot_be_read_is_named(root, monkeypatch):
    create('x/a.png', 'x/secret/b.png')
    scandir = os.scandir

    def refuse(path):  # the tests may run as root, who may read everything
        if path == 'x/secret':
            raise PermissionError(13, 'Permission denied', path)
        return scandir(path)
    monkeypatch.setattr(os, 'scandir', refuse)
    found = find_images(['x'])
    assert found.files == ['x/a.png']
    assert found.passed_over() == '1 unreadable folder (x/secret: Permission denied)'


def test_names_of_any_bytes_are_exact_and_their_message_is_printable(root):
    os.makedirs(b'x/\xff\x1b')
    for name in (b'a\n.png', b'\xe9.png'):
        open(b'x/\xff\x1b/' + name, 'w').close()
    assert [os.fsencode(file) for file in find_images(['x']).files] == [b'x/\xff\x1b/a\n.png', b'x/\xff\x1b/\xe9.png']
    with pytest.raises(InputError, match=re.escape(r'^x\udcff\x1b: no such file or folder').replace(r'\^', '^')):
        find_images(['x\udcff\x1b'])


def test_a_folder_without_images_names_the_extensions(root):
    create('x/a.heic', 'x/b.heic')
    with pytest.raises(InputError) as error:
        find_images(['x'])
    assert str(error.value).startswith('x: found no image but 2 other files (2 .heic), expected .jpg, .png, .webp or ')
    assert '\n' not in str(error.value)
