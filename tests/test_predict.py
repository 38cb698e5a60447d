"""python -m glmc.predict: the probabilities of a plain timm loop as a CSV, for files and names of every kind."""
import csv
import io
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from conftest import COUNTS, ROOT, Outcome, coloured, run_command
from PIL import Image

from glmc.cli import run_script
from glmc.data.loaders import create_normalize, eval_transform, larger_input
from glmc.data.walk import find_images
from glmc.evaluation.priors import AdjustedModel, normalized
from glmc.export.load import TrainedModel, load_trained
from glmc.predict import class_names, main, predict, predict_batches, write_predictions
from glmc.training.launch import create_accelerator

LABELS = list(COUNTS)


@pytest.fixture
def run(capsys, monkeypatch, tmp_path, finished_run):
    """Run the command in this process on the export of `finished_run`: words -> outcome and rows of the CSV."""
    def command(*words, model=finished_run) -> tuple[Outcome, list[dict] | None]:
        AcceleratorState._reset_state(True)
        monkeypatch.setattr(sys, 'argv', ['predict', *map(str, [model, *words, '--workers', '0'])])
        capsys.readouterr()
        code = run_script(main)
        path = tmp_path / 'predictions.csv'
        return Outcome(code, *capsys.readouterr()), read(path) if path.exists() else None
    monkeypatch.chdir(tmp_path)
    handlers, level = list(logging.getLogger().handlers), logging.getLogger().level
    yield command
    AcceleratorState._reset_state(True)
    logging.getLogger().handlers = handlers
    logging.getLogger().setLevel(level)


def read(path: Path) -> list[dict]:
    with open(path, newline='', encoding='utf-8', errors='surrogateescape') as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope='session')
def expected(finished_run, folders):
    """Sorted files of the validation set, and (N, C) logits of the images and of their mirror images by timm alone."""
    model = timm.create_model(f"local-dir:{finished_run / 'export'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    files = sorted((folders / 'validation').rglob('*.png'))
    images = torch.stack([transform(Image.open(path).convert('RGB')) for path in files])
    with torch.inference_mode():
        return list(map(str, files)), model(images), model(images.flip(-1))


def assert_rows(rows: list[dict], files: list[str], logits) -> None:
    """Rows with all three classes in descending order."""
    assert [row['file'] for row in rows] == files
    p, order = torch.as_tensor(logits).softmax(-1).sort(descending=True)
    for k, (label, probability) in enumerate(
            (('label', 'probability'), ('label_2', 'probability_2'), ('label_3', 'probability_3'))):
        assert [row[label] for row in rows] == [LABELS[c] for c in order[:, k]]
        assert [float(row[probability]) for row in rows] == pytest.approx(p[:, k].tolist(), abs=1e-5)


@pytest.mark.parametrize('place', ['.', 'export', 'checkpoints/epoch-0001.safetensors'])
def test_the_csv_has_the_probabilities_of_a_timm_loop(place, run, expected, folders, finished_run):
    outcome, rows = run(folders / 'validation', model=finished_run / place)
    assert outcome.code == 0, outcome.err
    assert list(rows[0]) == [
        'file', 'label', 'probability', 'label_2', 'probability_2', 'label_3', 'probability_3', 'error']  # 3 classes
    assert_rows(rows, *expected[:2])
    assert not outcome.out and '\nWritten to predictions.csv\n' in outcome.err
    assert 'Predicting 13 images with ' in outcome.err and '3 classes, 32x32 pixels, float32 on cpu\n' in outcome.err


def test_the_summary_counts_the_predicted_classes(run, expected, folders):
    outcome, rows = run(folders / 'validation', '--topk', '1')
    assert list(rows[0]) == ['file', 'label', 'probability', 'error']
    found = [row['label'] for row in rows]
    for name in set(found):
        assert f'  {found.count(name):>9,}  {100 * found.count(name) / 13:5.1f} %\n' in outcome.err
    assert 'Predicted 13 images in ' in outcome.err


def test_flip_and_prior_adjust_the_logits(run, expected, folders, tmp_path):
    files, plain, mirrored = expected
    (tmp_path / 'prior.txt').write_text('1 2 7')
    shift = torch.tensor(np.log([0.1, 0.2, 0.7]) - np.log(normalized(list(COUNTS.values())))).float()
    assert_rows(run(folders / 'validation', '--flip-tta')[1], files, (plain + mirrored) / 2)
    assert_rows(run(folders / 'validation', '--flip-tta', '--target-prior', 'prior.txt', '--source-prior', 'train')[1],
                files, (plain + mirrored) / 2 + shift)
    (tmp_path / 'counts.txt').write_text('100 10 1')
    shift = torch.tensor(-np.log(normalized([100, 10, 1]))).float()
    assert_rows(run(folders / 'validation', '--target-prior', 'uniform', '--class-counts', 'counts.txt', '--source-prior',
                    'train')[1], files, plain + shift)


def test_crops_are_those_of_validate(run, expected, folders, finished_run):
    trained = load_trained(str(finished_run))
    files, transform = expected[0], eval_transform(larger_input(trained.data_config))
    images = torch.stack([transform(Image.open(file).convert('RGB')) for file in files])
    model = AdjustedModel(trained.model, flip=True, crop=(32, 32)).eval()
    with torch.inference_mode():
        logits = model(create_normalize(trained.data_config, torch.device('cpu'))(images))
    assert_rows(run(folders / 'validation', '--flip-tta', '--crop-tta')[1], files, logits)


def test_the_prior_of_the_export_is_the_default(run, expected, folders, finished_run, tmp_path):
    shutil.copytree(finished_run / 'export', tmp_path / 'export')
    config = json.loads((tmp_path / 'export' / 'config.json').read_text())
    config['glmc']['prior'] = [6, 3, 1]
    (tmp_path / 'export' / 'config.json').write_text(json.dumps(config))
    rows = run(folders / 'validation', '--target-prior', 'uniform', model=tmp_path / 'export')[1]
    assert_rows(rows, expected[0], expected[1] - torch.tensor([6, 3, 1]).log())


def test_below_the_threshold_the_label_is_empty_and_the_class_is_named(run, expected, folders):
    p, order = expected[1].softmax(-1).sort(descending=True)
    threshold = p[:, 0].median().item() + 1e-4
    outcome, rows = run(folders / 'validation', '--threshold', threshold)
    assert list(rows[0])[-2:] == ['uncertain', 'error']
    below = (p[:, 0] < threshold).tolist()
    assert 0 < sum(below) < 13
    for row, unsure, c in zip(rows, below, order[:, 0].tolist(), strict=True):
        assert (row['label'], row['uncertain']) == (('', LABELS[c]) if unsure else (LABELS[c], ''))
        assert row['probability'] and row['label_2']
    assert f'Below --threshold {threshold:g}: {sum(below)} images ({100 * sum(below) / 13:.1f} %)' in outcome.err


@pytest.fixture
def broken(tmp_path):
    """A folder with a good image and images that cannot be read."""
    (tmp_path / 'mixed').mkdir()
    coloured(0, 100).save(tmp_path / 'mixed' / 'good.png')
    coloured(0, 7, size=(64, 64)).save(tmp_path / 'mixed' / 'cut.jpg')
    (tmp_path / 'mixed' / 'cut.jpg').write_bytes((tmp_path / 'mixed' / 'cut.jpg').read_bytes()[:700])
    (tmp_path / 'mixed' / 'empty.png').write_bytes(b'')
    os.symlink('gone', tmp_path / 'mixed' / 'link.png')
    coloured(0, 1).save(tmp_path / 'mixed' / 'odd.dds')
    content = bytearray((tmp_path / 'mixed' / 'odd.dds').read_bytes())
    content[80:84] = bytes(4)  # flags of the pixel format, for which Pillow raises a NotImplementedError
    (tmp_path / 'mixed' / 'odd.dds').write_bytes(content)
    return tmp_path / 'mixed'


def test_an_unreadable_image_is_a_row_with_its_error(run, broken):
    outcome, rows = run('mixed', '--threshold', '0.1')
    assert outcome.code == 0, outcome.err
    found = {os.path.basename(row['file']): row for row in rows}
    assert list(found) == ['cut.jpg', 'empty.png', 'good.png', 'link.png', 'odd.dds']
    assert found['good.png']['label'] in LABELS and not found['good.png']['error']
    for name in ('cut.jpg', 'empty.png', 'link.png', 'odd.dds'):
        assert found[name]['error'], name
        assert not any(value for key, value in found[name].items() if key not in ('file', 'error'))
    assert found['link.png']['error'] == 'No such file or directory'
    assert 'Not predicted: 4 images, see column error; the first: mixed/cut.jpg: image file is truncated' in outcome.err
    assert 'Predicted 1 image in ' in outcome.err


def test_no_readable_image_is_an_error(run, broken):
    outcome, rows = run('mixed/cut.jpg', 'mixed/empty.png', '--threshold', '0.5')
    assert outcome.code == 1 and len(rows) == 2
    assert outcome.err.splitlines()[-1] == 'error: mixed/cut.jpg: no image can be read; see column error'


def test_workers_and_batches_change_nothing(finished_run, folders, broken):
    trained = load_trained(str(finished_run))
    files = [*find_images([str(folders / 'validation')]).files, *find_images([str(broken)]).files]
    found = predict(trained, files, batch_size=4, workers=2)
    assert found.shape == (18, 3) and found.dtype == torch.float32
    assert found.isnan().all(1).nonzero().flatten().tolist() == [13, 14, 16, 17]
    torch.testing.assert_close(found, predict(trained, files, workers=0), equal_nan=True, rtol=1e-5, atol=1e-6)
    assert predict(trained, []).shape == (0, 3)
    assert not found.is_inference() and torch.is_grad_enabled()


def test_the_classifier_computes_in_float32(finished_run, expected):
    AcceleratorState._reset_state(True)
    trained, seen = load_trained(str(finished_run)), []
    trained.model.get_classifier().register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    trained.model.layer1.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    accelerator = create_accelerator(amp_dtype='bfloat16')
    batches = predict_batches(trained, expected[0], accelerator=accelerator, batch_size=64, workers=0)
    next(batches)
    assert seen[-1] is torch.float32 and seen[-2] is torch.bfloat16
    assert not torch.is_autocast_enabled('cpu') and torch.is_grad_enabled()  # the generator is not finished
    AcceleratorState._reset_state(True)


def test_the_precision_is_that_of_the_training(run, folders, finished_run, tmp_path):
    shutil.copytree(finished_run / 'export', tmp_path / 'export')
    config = json.loads((tmp_path / 'export' / 'config.json').read_text())
    config['glmc']['precision'] = 'bf16'
    (tmp_path / 'export' / 'config.json').write_text(json.dumps(config))
    assert 'bfloat16 on cpu' in run(folders / 'validation', model=tmp_path / 'export')[0].err


def test_an_output_that_is_not_finite_is_an_error_of_its_row(finished_run, expected):
    trained = load_trained(str(finished_run))
    with torch.no_grad():
        trained.model.get_classifier().bias[1] = torch.nan
    batches = predict_batches(
        trained, expected[0][:2], accelerator=create_accelerator(), batch_size=2, workers=0)
    probabilities, errors = next(batches)
    assert errors == ['the output of the model is not finite'] * 2 and probabilities.isnan().all()
    AcceleratorState._reset_state(True)


def write(names, labels, file=None, **options) -> list[list[str]]:
    """Rows of a CSV for files that are all of the last class."""
    file = file or io.StringIO(newline='')
    probabilities = torch.eye(len(labels))[-1:].repeat(len(names), 1)
    write_predictions(file, names, [(probabilities, [''] * len(names))], labels, **options)
    return list(csv.reader(io.StringIO(file.getvalue(), newline='')))[1:]


def test_no_cell_is_a_formula_and_every_file_is_exact(tmp_path, monkeypatch):
    names = ['=1+1.png', '-x.png', '+x.png', '@x.png', '\tx.png', 'a,"b".png', 'line\nbreak\r.png', 'ü\udcff.png', ' x.png']
    rows = write(names, ['a', '=cmd|x'])
    assert [row[0] for row in rows] == [f'./{name}' for name in names[:5]] + names[5:]
    assert {row[1] for row in rows} == {"'=cmd|x"}
    monkeypatch.chdir(tmp_path)
    for name, row in zip(names, rows, strict=True):
        Path(name).write_text('')
        assert os.path.samefile(name, row[0])


def test_a_terminal_shows_escapes_instead_of_control_characters():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True
    name, label = 'a\x1b[2J.png', 'b\u202e'
    assert write([name], ['x', label])[0][:2] == [name, label]
    assert write([name], ['x', label], Terminal(newline=''))[0][:2] == ['a\\x1b[2J.png', 'b\\u202e']


def test_standard_output_has_the_csv_alone_with_exact_names(finished_run, tmp_path):
    names = [b'\xff\x1b.png', 'ü\n.png'.encode()]
    for number, name in enumerate(names):
        coloured(0, number).save(tmp_path / 'x.png')
        os.rename(tmp_path / 'x.png', os.path.join(os.fsencode(tmp_path), name))
    done = subprocess.run(
        [sys.executable, '-m', 'glmc.predict', str(finished_run), '.', '--output', '-', '-j', '0'], cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'LC_ALL': 'C'}, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(io.StringIO(done.stdout.decode('utf-8', 'surrogateescape'), newline='')))
    assert {os.fsencode(row['file']) for row in rows} == {b'./' + name for name in names}
    assert b'Predicted 2 images' in done.stderr and b'\x1b' not in done.stderr and not list(tmp_path.glob('*.csv'))


def test_a_reader_that_closes_early_ends_the_command_in_one_line(finished_run, folders):
    command = f'{sys.executable} -m glmc.predict {finished_run} {folders} --output - -j 0 -b 1 | true'
    done = run_command('bash', '-c', f'set -o pipefail; {command}')
    assert done.code == 1
    assert done.err.splitlines()[-1] == 'error: --output -: the reader has closed standard output', done.err


def test_an_earlier_csv_is_replaced_when_the_new_one_is_complete(run, folders, tmp_path, monkeypatch):
    (tmp_path / 'predictions.csv').write_text('earlier')
    with monkeypatch.context() as patch:
        patch.setattr('glmc.predict.write_predictions', lambda *args: (_ for _ in ()).throw(OSError(28, 'No space left')))
        outcome, _ = run(folders / 'validation')
    assert outcome.code == 1 and 'error: --output predictions.csv: cannot be written: No space left' in outcome.err
    assert (tmp_path / 'predictions.csv').read_text() == 'earlier' and len(list(tmp_path.iterdir())) == 1
    assert len(run(folders / 'validation')[1]) == 13


@pytest.mark.parametrize('words, line', [
    (['gone'], 'gone: no such file or folder'),
    (['empty'], 'empty: found no image, expected .jpg, .png, .webp or '),
    (['a.png', '--output', 'gone/x.csv'], '--output gone/x.csv: cannot write to the folder gone'),
    (['a.png', '--output', '\x1b/x.csv'], r'--output \x1b/x.csv: cannot write to the folder \x1b'),
    (['a.png', '--output', 'empty'], '--output empty: not a regular file, expected a file, or - for standard output'),
    (['a.png', '--output', os.devnull], f'--output {os.devnull}: not a regular file'),
    (['.', '--output', 'a.png'], '--output a.png: is one of the images, expected another file'),
    (['a.png', '--target-prior', 'test'], '--target-prior test: the classes of the images are unknown, expected uniform'),
    (['a.png', '--target-prior', 'gone'], '--target-prior gone: expected uniform, forward, backward, '),
    (['a.png', '--threshold', '1.5'], '--threshold: expected a number >= 0 and <= 1, found 1.5'),
    (['a.png', '--topk', '0'], '--topk: expected a number >= 1'),
    (['a.png', '--top', '1'], '--top: unknown option; did you mean --topk?'),
    ([], 'the following arguments are required: FOLDER_OR_FILES'),
])
def test_wrong_input_is_one_line(words, line, run, tmp_path):
    (tmp_path / 'empty').mkdir()
    coloured(0, 1).save(tmp_path / 'a.png')
    before = (tmp_path / 'a.png').read_bytes()
    outcome, rows = run(*words)
    assert outcome.code == 2 and rows is None, outcome.err
    assert f'error: {line}' in outcome.err.splitlines()[-1]
    assert (tmp_path / 'a.png').read_bytes() == before and Path(os.devnull).is_char_device()


def test_options_without_effect_are_warned_of(run, folders):
    err = run(folders / 'validation', '--source-prior', 'train', '--target-imbalance', '5')[0].err
    assert '--source-prior has no effect without --target-prior\n' in err
    assert '--target-imbalance has no effect without --target-prior forward or backward\n' in err


@pytest.mark.parametrize('model, size, line', [
    (lambda: timm.create_model('test_vit', num_classes=3), (3, 7, 7), r'--img-size: cannot take an image of 7x7: '),
    (lambda: timm.create_model('test_resnet', in_chans=5), (5, 64, 64), 'found an input of 5 channels, expected 1 or 3'),
    (lambda: timm.create_model('test_resnet', num_classes=0), (3, 64, 64), 'expected a classifier, found a model without')])
def test_a_model_that_cannot_classify_these_images_is_refused(model, size, line, expected):
    model = model()
    config = dict(input_size=size, mean=(0.5,) * size[0], std=(0.5,) * size[0], interpolation='bilinear', crop_pct=1.0)
    with pytest.raises(ValueError, match=line):
        predict(TrainedModel('name', model, config, None, {}), expected[0])


def test_classes_have_names():
    imagenet = TrainedModel('x', timm.create_model('test_resnet'), {}, None, {})
    assert class_names(imagenet)[:2] == ['tench, Tinca tinca', 'goldfish, Carassius auratus']
    own = TrainedModel('x', timm.create_model('test_resnet'), {}, None, {'method': 'ce'})
    assert class_names(own)[999] == '999'
    hostile = TrainedModel('x', timm.create_model('test_resnet', num_classes=2), {}, ['a', '\ud800'], {})
    assert class_names(hostile) == ['a', '?']
