"""Input that is not square, by --img-size H W and --input-size C H W, through every command."""
import json
import sys

import pytest
import timm
import torch
import yaml
from accelerate.state import AcceleratorState
from conftest import ROOT, TINY, run_command
from safetensors.torch import load_file

from glmc.cli import parse_args
from glmc.config import finetune_parser, train_parser
from glmc.errors import InputError
from glmc.methods import METHODS

OTHERS = [option for option in TINY if option not in ('--img-size', '32', '--no-report')]
KINDS = {  # name -> options
    'workers': '--img-size 32 64', 'resident': '--augmentation cifar --input-size 3 64 32', 'grey': '--input-size 1 32 48',
    'vit': '--model test_vit --img-size 32 64', 'cutmix': '--method cutmix --img-size 64 32 --crop-pct 1 --aa augmix-m3-w3',
    'imagenet_lt': '--augmentation imagenet_lt --img-size 64 32 --reprob 1',
    'ratio': '--train-crop-mode rkrr --img-size 32 64'}


@pytest.mark.parametrize('kind', KINDS)
def test_training_and_export(kind, script, folders, tmp_path):
    options = KINDS[kind].split()
    report = [] if kind in ('workers', 'vit') else ['--no-report']
    outcome = script(*OTHERS, *report, '--data-dir', folders, '--output', tmp_path, '--experiment', 'run', *options)
    assert outcome.code == 0 and 'not written' not in outcome.err, outcome.err
    at = options.index('--img-size' if '--img-size' in options else '--input-size')
    sides = [int(word) for word in options[at + 1:at + 4] if word.isdigit()][-2:]
    model = timm.create_model(f"local-dir:{tmp_path / 'run' / 'export'}", pretrained=True).eval()
    size = timm.data.resolve_model_data_config(model)['input_size']
    assert list(size) == [1 if kind == 'grey' else 3, *sides] and model(torch.zeros(1, *size)).shape == (1, 3)
    assert yaml.safe_load((tmp_path / 'run' / 'args.yaml').read_text())['img_size'] == sides


@pytest.fixture(scope='module')
def wide_run(folders, tmp_path_factory):
    """A run on images of 32x64 pixels, after one of two epochs, and its output folder."""
    output = tmp_path_factory.mktemp('wide')
    outcome = run_command(sys.executable, ROOT / 'train_glmc.py', *OTHERS, '--no-report', '--data-dir', folders, '--output',
                          output, '--experiment', 'run', '--img-size', '32', '64')
    assert outcome.code == 0, outcome.err
    return output / 'run'


def test_resume_and_args(wide_run, script, folders, tmp_path):
    again = script('-c', wide_run / 'args.yaml', '--output', tmp_path, '--experiment', 'again')
    assert again.code == 0, again.err
    one, other = (load_file(run / 'export' / 'model.safetensors') for run in (wide_run, tmp_path / 'again'))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    resumed = script('-c', tmp_path / 'again' / 'args.yaml', '--resume', 'auto', '--epochs', '2')
    assert resumed.code == 0 and 'epoch 2 of 2 comes next' in resumed.err, resumed.err


@pytest.mark.parametrize('words', [
    ('validate_glmc.py', '--model', 'RUN', '--data-dir', 'DATA', '-j', '0', '--output', 'OUT'),
    ('validate_glmc.py', '--model', 'RUN', '--data-dir', 'DATA', '-j', '0', '--output', 'OUT', '--img-size', '64', '32'),
    ('finetune_glmc.py', '--model', 'RUN', '--data-dir', 'DATA', '-j', '0', '--output', 'OUT', '--stage2', 'crt'),
    ('-m', 'glmc.predict', 'RUN', 'DATA', '--output', 'OUT.csv', '-j', '0'),
    ('-m', 'glmc.predict', 'RUN', 'DATA', '--output', 'OUT.csv', '-j', '0', '--input-size', '3', '64', '32'),
    ('benchmark_glmc.py', *OTHERS, '--data-dir', 'DATA', '--img-size', '32', '64', '--rounds', '1', '--steps', '1')])
def test_the_other_commands(words, wide_run, folders, tmp_path):
    places = {'RUN': wide_run, 'DATA': folders, 'OUT': tmp_path / 'out', 'OUT.csv': tmp_path / 'out.csv'}
    words = [places.get(word, ROOT / word if word.endswith('_glmc.py') else word) for word in words]
    outcome = run_command(sys.executable, *words)
    assert outcome.code == 0, outcome.err
    if 'glmc.predict' in words:
        assert ('64x32 pixels' if '--input-size' in words else '32x64 pixels') in outcome.err


def parse(*words, parser=None):
    return parse_args(parser or train_parser(METHODS), list(words))[0]


@pytest.mark.parametrize('words, expected', [
    ('--img-size 64', (64, None)), ('--img-size 64 64', (64, None)), ('--img-size 64 96', ([64, 96], None)),
    ('--input-size 3 64 96', ([64, 96], 3)), ('--input-size 1 64 64', (64, 1)),
    ('--img-size 32 --input-size 3 64 96', ([64, 96], 3))])
def test_flags_and_yaml(words, expected, tmp_path):
    for parser in (train_parser(METHODS), finetune_parser()):
        options = parse(*words.split(), parser=parser)
        assert (options.img_size, options.in_chans) == expected
    path = tmp_path / 'options.yaml'
    path.write_text(json.dumps(dict(img_size=expected[0], in_chans=expected[1])))
    options = parse('-c', str(path))
    assert (options.img_size, options.in_chans) == expected


@pytest.mark.parametrize('text, expected', [
    ('input_size: [3, 64, 96]', ([64, 96], 3)), ('img_size: [64, 96]', ([64, 96], None)), ('img_size: 7', (7, None))])
def test_yaml_of_users(text, expected, tmp_path):
    (tmp_path / 'options.yaml').write_text(text)
    options = parse('-c', str(tmp_path / 'options.yaml'))
    assert (options.img_size, options.in_chans) == expected


@pytest.mark.parametrize('words, message', [
    ('--img-size 1 2 3', '--img-size: expected N or H W, found 3 values'),
    ('--img-size 0 4', '--img-size: expected a number >= 1'),
    ('--input-size 64 96', '--input-size: expected 3 arguments'),
    ('--input-size 2 64 96', '--input-size: expected C H W with'),
    ('img_size: [1, 2, 3]', 'img_size: expected N or H W, found 3 values'), ('input_size: 64', 'input_size: expected C H W'),
    ('img_size: wide', "img_size: expected int, found 'wide'"), ('img_size: []', r'img_size: expected int, found \[\]')])
def test_wrong_sizes(words, message, tmp_path):
    if ':' in words:
        (tmp_path / 'options.yaml').write_text(words)
        words = f"-c {tmp_path / 'options.yaml'}"
    with pytest.raises(InputError, match=message):
        parse(*words.split())


@pytest.fixture(autouse=True)
def accelerate_state():
    yield
    AcceleratorState._reset_state(True)
