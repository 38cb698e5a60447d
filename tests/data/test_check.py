"""Images of every kind, and the scan of a set before training."""
import os
import re
import shlex
import shutil
import struct
import sys
import zlib

import numpy as np
import pytest
from conftest import TINY, coloured, run_command, write_folders, write_shards
from PIL import Image

from glmc.cli import parse_args, run_script
from glmc.config import finetune_parser, train_parser
from glmc.data.advice import advise, describe_tail, measure, suggest_thresholds
from glmc.data.check import find_problems, main, readable_subset, scan, shorten
from glmc.data.datasets import ImageSet
from glmc.data.profiles import Profile
from glmc.data.readers import load_source
from glmc.methods import METHODS


def huge_png(path) -> None:
    """20,000 x 20,000 black pixels in 50 kB."""
    rows = zlib.compressobj(9)
    data = b''.join(rows.compress(bytes(2501)) for _ in range(20_000)) + rows.flush()
    chunks = [(b'IHDR', struct.pack('>IIBBBBB', 20_000, 20_000, 1, 0, 0, 0, 0)), (b'IDAT', data), (b'IEND', b'')]
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + b''.join(
        struct.pack('>I', len(body)) + name + body + struct.pack('>I', zlib.crc32(name + body)) for name, body in chunks))


def turned(path) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    coloured(0, 1, (40, 20)).save(path, exif=exif)


def animated(path) -> None:
    frames = [coloured(label, 1) for label in range(3)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


KINDS = {  # name -> how it is made; all of these train
    'one.png': lambda path: coloured(0, 1, (1, 1)).save(path),
    'thin.png': lambda path: coloured(0, 1, (1, 300)).save(path),
    'palette.png': lambda path: coloured(0, 1).convert('P').save(path),
    'transparent.gif': lambda path: coloured(0, 1).convert('P').save(path, transparency=3),
    'animated.gif': animated,
    'sixteen.png': lambda path: Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(path),
    'float.tiff': lambda path: Image.fromarray(np.full((9, 9), 90.5, np.float32)).save(path),
    'cmyk.jpg': lambda path: coloured(0, 1, mode='CMYK').save(path),
    'alpha.webp': lambda path: coloured(0, 1, mode='RGBA').save(path),
    'two.png': lambda path: coloured(0, 1, mode='1').save(path),
    'png-called.jpg': lambda path: coloured(0, 1).save(path, 'PNG'),
    'turned.jpg': turned,
}
BROKEN = {  # name -> how it is made, start of its error
    'empty.png': (lambda path: path.write_bytes(b''), 'cannot identify image file'),
    'text.jpg': (lambda path: path.write_text('not an image'), 'cannot identify image file'),
    'cut.jpg': (lambda path: cut(path), 'truncated'),
    'huge.png': (huge_png, 'exceeds limit'),
}


def cut(path) -> None:
    coloured(0, 7, size=(64, 64)).save(path)
    path.write_bytes(path.read_bytes()[:700])


@pytest.fixture
def odd(tmp_path):
    """An image folder with every kind of image that trains."""
    root = tmp_path / 'odd'
    write_folders(root / 'train', {'ant': 3, 'bee': 3})
    write_folders(root / 'validation', {'ant': 2, 'bee': 2}, start=100)
    for name, make in KINDS.items():
        make(root / 'train' / 'bee' / name)
    return root


@pytest.mark.parametrize('options', [[], ['--augmentation', 'cifar'], ['--in-chans', '1']])
def test_every_kind_trains(odd, options, script, tmp_path):
    extensions = '.png;.jpg;.gif;.tiff;.webp'
    outcome = script(*TINY, '--data-dir', odd, '--input-key', extensions, '--output', tmp_path / 'output', *options)
    assert outcome.code == 0, outcome.err
    assert f'Training set: {6 + len(KINDS)} images' in outcome.err


@pytest.mark.parametrize('name', BROKEN)
def test_unreadable_image_is_named(name, odd, script, tmp_path):
    make, message = BROKEN[name]
    make(odd / 'train' / 'ant' / name)
    outcome = script(*TINY, '--data-dir', odd, '--output', tmp_path / 'output')
    assert outcome.code == 2
    assert re.search(rf'error: --data-dir .*: cannot decode image ant/{name}: .*{message}', outcome.err), outcome.err
    images = load_source('', str(odd), 'train')
    kept, errors = readable_subset(images)
    assert len(kept) == len(images) - 1 and len(errors) == 1 and name in errors[0]


def test_rotation_is_ignored_as_timm_ignores_it(odd):
    images = load_source('', str(odd), 'train')
    index = list(images.names).index('bee/turned.jpg')
    assert images.image(index).size == (40, 20)
    assert [result.rotated for result in scan(images)].count(True) == 1


def test_sixteen_bits_keep_their_brightness(odd):
    images = load_source('', str(odd), 'train', input_key='.png')
    index = list(images.names).index('bee/sixteen.png')
    assert images.image(index).getpixel((0, 0)) == (156,) * 3  # 40,000 / 256


def test_scan(odd, capsys, monkeypatch):
    for name, (make, _) in BROKEN.items():
        make(odd / 'train' / 'ant' / name)
    shutil.copy(odd / 'validation' / 'ant' / '100.png', odd / 'train' / 'ant' / 'again.png')
    shutil.copy(odd / 'train' / 'ant' / '0.png', odd / 'train' / 'bee' / 'other.png')
    monkeypatch.setattr('sys.argv', ['check', str(odd), '--workers', '0'])
    with pytest.raises(SystemExit) as error:
        run_script(main)
    out = capsys.readouterr().out
    assert error.value.code == 1
    assert 'validation: 4 images, 2 … 2 per class' in out
    assert f'train: {len(BROKEN)} images that cannot be decoded (--on-bad-image skip' in out
    assert '\n    ant/huge.png: ' in out
    assert '\n1 image in more than one set' in out and '\n    train ant/again.png = validation ant/100.png\n' in out
    assert '\n2 images with more than one label:\n' in out and '\n    train ant/0.png = train bee/other.png\n' in out
    assert '\n1 image with an EXIF rotation' in out and '\n2 images with a side of less than 8 pixels' in out
    assert 'no problems' not in out


def test_scan_of_a_good_set(folders, capsys, monkeypatch):
    monkeypatch.setattr('sys.argv', ['check', str(folders), '--workers', '0'])
    assert run_script(main) == 0
    out = capsys.readouterr().out
    assert 'train: 25 images of 3 classes, 14 … 4 per class (0 many, 0 medium, 3 few), imbalance 3.5' in out
    assert '\nno problems found\n' in out
    assert '    shot thresholds: 6 9, thirds of the classes' in out


def last_lines(out: str) -> list[str]:
    return out[out.index('\nnext: ') + 1:].splitlines()[1:]


def test_photos_end_with_the_commands_for_a_pretrained_model(tmp_path, capsys, monkeypatch):
    root = tmp_path / "Ann's photos; $HOME"
    for split, start in (('train', 0), ('validation', 100)):
        for label in range(2):
            (root / split / f'class{label}').mkdir(parents=True)
            for number in range(start, start + 3):
                coloured(label, number, (90, 70)).save(root / split / f'class{label}' / f'{number}.jpg')
    monkeypatch.setattr('sys.argv', [
        'check', str(root), '-j', '0', '--shot-thresholds', '1', '2', '--holdout', '0.5', '--lt-split', 'cao'])
    assert run_script(main) == 0
    features, training = map(shlex.split, last_lines(capsys.readouterr().out))
    data = ['--data-dir', str(root), '--holdout', '0.5', '--shot-thresholds', '1', '2']
    assert features == ['python', 'finetune_glmc.py', '--model', 'resnet50', *data]
    assert training == ['accelerate', 'launch', 'train_glmc.py', '--model', 'resnet50', '--pretrained', '--method', 'ce',
                        '--batch-size', '2', *data]
    parse_args(train_parser(METHODS), training[3:])
    parse_args(finetune_parser(), features[2:])


@pytest.mark.parametrize('options, command', [
    (['--data-dir', 'FOLDERS', '--input-key', '.png'],
     'accelerate launch train_glmc.py --model resnet32_cifar --img-size 32 --augmentation cifar --batch-size 4 '
     '--data-dir FOLDERS --input-key .png --shot-thresholds 6 9'),
    (['--imbalance-factor', '60'], 'accelerate launch train_glmc.py --imbalance-factor 60')])
def test_small_images_end_with_the_command_from_scratch(options, command, folders, capsys, monkeypatch):
    words = [word.replace('FOLDERS', str(folders)) for word in options]
    monkeypatch.setattr('sys.argv', ['check', *words, '--workers', '0'])
    assert run_script(main) == 0
    assert last_lines(capsys.readouterr().out) == [command.replace('FOLDERS', str(folders))]


@pytest.mark.parametrize('options, added', [
    ([], '--select-split validation --val-split test --shot-thresholds 6 9'),
    (['--val-split', 'test'], '--val-split test --select-split validation --shot-thresholds 6 9'),
    (['--holdout', '1', '--shot-thresholds', '2', '9'], '--holdout 1 --shot-thresholds 2 9')])
def test_a_validation_and_a_test_folder_are_both_used(options, added, folders, tmp_path, capsys, monkeypatch):
    shutil.copytree(folders, tmp_path / 'images')
    shutil.copytree(folders / 'validation', tmp_path / 'images' / 'test')
    monkeypatch.setattr('sys.argv', ['check', str(tmp_path / 'images'), *options, '-j', '0'])
    assert run_script(main) == 0
    out = capsys.readouterr().out
    assert last_lines(out)[-1].endswith(f"--data-dir {tmp_path / 'images'} {added}")
    assert ('three splits: the images of validation choose the epoch' in out) == ('--holdout' not in options)


def test_sets_have_the_names_of_their_splits(folders, tmp_path, capsys, monkeypatch):
    shutil.copytree(folders, tmp_path / 'images')
    shutil.copytree(folders / 'validation', tmp_path / 'images' / 'test')
    splits = ['--select-split', 'validation', '--val-split', 'test']
    monkeypatch.setattr('sys.argv', ['check', str(tmp_path / 'images'), *splits, '-j', '0'])
    with pytest.raises(SystemExit, match='1'):
        main()
    out = capsys.readouterr().out
    assert '\nvalidation: 13 images' in out and '\ntest: 13 images' in out
    assert '    validation ant/100.png = test ant/100.png\n' in out


def test_no_name_of_a_file_controls_the_terminal(folders, tmp_path):
    shutil.copytree(folders, tmp_path / 'images')
    bad = os.path.join(os.fsencode(tmp_path / 'images' / 'train' / 'ant'), b'\xff\x1b[2J.png')
    with open(bad, 'wb') as file:
        file.write(b'no image')
    outcome = run_command(sys.executable, '-m', 'glmc.data.check', tmp_path / 'images', '-j', '0')
    assert outcome.code == 1 and '\n    ant/\\udcff\\x1b[2J.png: ' in outcome.out, outcome.err


def test_scan_names_classes_that_validation_misses(folders, tmp_path, capsys, monkeypatch):
    shutil.copytree(folders, tmp_path / 'images')
    shutil.rmtree(tmp_path / 'images' / 'validation' / 'bee')
    monkeypatch.setattr('sys.argv', ['check', str(tmp_path / 'images'), '--workers', '0'])
    assert run_script(main) == 0
    assert '\nvalidation: 1 class without images, not evaluated: bee\n' in capsys.readouterr().out


def test_source_without_an_index_cannot_be_scanned(tmp_path, capsys, monkeypatch):
    write_shards(tmp_path, shard_size=8)
    monkeypatch.setattr('sys.argv', ['check', str(tmp_path), '--dataset', 'wds/x'])
    assert run_script(main) == 2
    assert 'error: --dataset wds/x: has no index and cannot be scanned' in capsys.readouterr().err


def test_long_lists_end_with_the_number_of_the_others():
    assert shorten(list('abc')) == list('abc') and shorten(list('abcdefghij')) == list('abcdefghij')
    assert shorten(list('abcdefghijkl')) == [*'abcdefghij', '2 more']


def test_help_names_the_exit_codes(capsys, monkeypatch):
    monkeypatch.setattr('sys.argv', ['check', '--help'])
    with pytest.raises(SystemExit):
        main()
    out = capsys.readouterr().out
    assert out.startswith('usage: python -m glmc.data.check [DIR] [options]\n') and 'exit code: 0 without problems' in out


def test_scan_needs_a_folder_that_exists(tmp_path):
    outcome = run_command(sys.executable, '-m', 'glmc.data.check', tmp_path / 'gone')
    assert outcome.code == 2 and re.fullmatch('error: --data-dir .*gone: no such folder\n', outcome.err)


def test_workers_see_what_one_process_sees(folders):
    images = load_source('', str(folders), 'train')
    assert scan(images) == scan(images, workers=2)


@pytest.mark.parametrize('counts, side, model, words', [
    ((1000, 50, 5), 300, '--model resnet50 --pretrained --method balanced_softmax', ['imbalance 200', 'worth it', '5, the']),
    ((500, 200, 150), 300, '--model resnet50 --pretrained --method balanced_softmax', ['small effect', '0.005 for batches']),
    ((100, 100, 110), 300, '--model resnet50 --pretrained --method ce', ['not needed', 'median side 300 px']),
    ((1000, 50, 5), 32, '--model resnet32_cifar --img-size 32 --augmentation cifar',
     ['since the images are small (32 px)', 'glmc_one_view, or ce', '0.01 for batches', '60, the default: ']),
    ((100, 100, 110), 32, '--model resnet32_cifar --img-size 32 --augmentation cifar --method glmc_balanced',
     ['not needed'])])
def test_advice_follows_from_tail_and_size(counts, side, model, words):
    advice = advise(Profile(counts), [side] * 9)
    text = '\n'.join(advice.lines)
    assert advice.model == model.split() and all(word in text for word in words), text
    args, _ = parse_args(train_parser(METHODS), ['--data-dir', 'x', *advice.training, *advice.data])
    assert args.batch_size <= sum(counts) // 4


@pytest.mark.parametrize('counts, thresholds', [
    ((1000, 50, 5), None), ((14, 7, 4), (6, 9)), ((1000, 600, 300), (500, 733)), ((10, 10, 11), None), ((9, 3), None)])
def test_thresholds_are_advised_if_a_group_is_empty(counts, thresholds):
    assert suggest_thresholds(Profile(counts)) == thresholds
    assert thresholds is None or all(map(len, Profile(counts, thresholds).groups().values()))


def test_the_tail_is_in_numbers():
    assert describe_tail(Profile((60, 30, 5, 5))) == (
        'imbalance 12 (60 … 5 images per class); half of the images are in 1 of 4 classes; 2 few-shot')


@pytest.mark.slow
def test_three_steps_measure_time_and_memory(folders):
    outcome = run_command(sys.executable, '-m', 'glmc.data.check', folders, '-j', '0', '--measure')
    found = re.search(r'time and memory: about ([\d.]+) s per epoch \(most for (?:the model|reading images)\), .* in all, '
                      r'([\d.]+) GB for batches of 4 on cpu; from three steps of 4 images', outcome.out)
    assert found and 0 < float(found[1]) < 60 and 0.1 < float(found[2]) < 4, outcome.out + outcome.err


def test_a_failed_measurement_is_one_line():
    advice = advise(Profile((30, 20, 10)), [32] * 60)
    assert re.fullmatch(r'time and memory: not measured: error: --data-dir /nowhere/x: .*',
                        measure(advice, ['--data-dir', '/nowhere/x'], 60))


def test_the_same_pixels_in_another_format_are_found():
    image = coloured(0, 1)
    sets = {'train': ImageSet(lambda index: image.copy(), np.zeros(2, np.int64), ['a', 'b'], ['x'], 'set')}
    problems = list(find_problems(sets, {name: scan(images) for name, images in sets.items()}))
    assert problems == []  # twice under one label in one set: no harm
