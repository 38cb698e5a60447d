"""validate_glmc.py: the numbers of the training run, of a plain timm loop, and of adjusted logits; and wrong input."""
import csv
import json
import logging
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from conftest import COUNTS, Outcome, run_command, write_folders
from PIL import Image

from glmc.cli import run_script
from glmc.data.loaders import eval_transform, larger_input
from glmc.errors import InputError
from glmc.evaluation.priors import (
    TARGETS,
    AdjustedModel,
    normalized,
    prior_shift,
    ranked_counts,
    read_prior,
    target_prior,
)

KEYS = ('top1', 'top5', 'loss', 'many', 'medium', 'few', 'class_mean', 'worst_class', 'worst_tenth', 'harmonic_mean',
        'macro_f1', 'ece', 'ece_medium', 'ece_few', 'per_class_accuracy', 'train_counts', 'num_images', 'shot_thresholds')


@pytest.fixture
def validate(capsys, monkeypatch, tmp_path):
    """Run validate_glmc.py in this process: options -> outcome and metrics."""
    import validate_glmc

    def run(*options) -> tuple[Outcome, dict | None]:
        AcceleratorState._reset_state(True)
        words = ['validate_glmc.py', '--workers', '0', '--output', tmp_path / 'out', '--experiment', 'result', *options]
        monkeypatch.setattr(sys, 'argv', list(map(str, words)))
        capsys.readouterr()
        code = run_script(validate_glmc.main)
        path = tmp_path / 'out' / 'result' / 'metrics.json'
        return Outcome(code, *capsys.readouterr()), json.loads(path.read_text()) if code == 0 and path.exists() else None
    handlers, level = list(logging.getLogger().handlers), logging.getLogger().level
    yield run
    AcceleratorState._reset_state(True)
    logging.getLogger().handlers = handlers
    logging.getLogger().setLevel(level)


def timm_images(finished_run, folders, **changes) -> tuple[torch.nn.Module, torch.Tensor, np.ndarray]:
    """Export, normalised validation images and labels by timm alone; `changes` to its data config."""
    model = timm.create_model(f"local-dir:{finished_run / 'export'}", pretrained=True).eval()
    transform = timm.data.create_transform(
        **{**timm.data.resolve_model_data_config(model), **changes}, is_training=False)
    files = sorted((folders / 'validation').rglob('*.png'))
    labels = np.array([sorted(COUNTS).index(path.parent.name) for path in files])
    return model, torch.stack([transform(Image.open(path).convert('RGB')) for path in files]), labels


@pytest.fixture(scope='session')
def logits(finished_run, folders):
    """(N, C) logits of the validation images and of their mirror images, and labels."""
    model, images, labels = timm_images(finished_run, folders)
    with torch.inference_mode():
        return model(images).numpy(), model(images.flip(-1)).numpy(), labels


def assert_same(found: dict, expected: dict) -> None:
    for name in KEYS:
        same = found[name] is None if expected[name] is None else found[name] == pytest.approx(expected[name], rel=1e-5)
        assert same, name


def top1(logits, labels) -> float:
    return 100 * (np.asarray(logits).argmax(1) == labels).mean()


def nll(logits, labels) -> float:
    return torch.nn.functional.cross_entropy(torch.tensor(np.asarray(logits)), torch.tensor(labels)).item()


@pytest.mark.parametrize('place', ['export', '.', 'checkpoints/epoch-0001.safetensors'])
def test_the_numbers_are_those_of_the_training_run_and_of_a_timm_loop(validate, finished_run, folders, logits, place):
    trained = json.loads((finished_run / 'export' / 'metrics.json').read_text())
    outcome, metrics = validate('--model', finished_run / place, '--data-dir', folders, '--no-report')
    assert outcome.code == 0, outcome.err
    assert_same(metrics, trained)
    assert metrics['top1'] == pytest.approx(top1(logits[0], logits[2]))
    assert metrics['loss'] == pytest.approx(nll(logits[0], logits[2]), rel=1e-5)
    in_training = (finished_run.parent / 'stdout.txt').read_text()
    table = [line for line in outcome.out.splitlines() if line.startswith('top-1')][0]
    following = outcome.out.splitlines()[outcome.out.splitlines().index(table) + 1]
    assert f'{table}\n{following}\n' in in_training


@pytest.mark.parametrize('place', ['.', 'checkpoints'])
def test_a_run_without_an_export_is_evaluated_by_its_newest_checkpoint(validate, finished_run, folders, place, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / 'run', ignore=shutil.ignore_patterns('export'))
    outcome, metrics = validate('--model', run / place, '--data-dir', folders, '--no-report')
    assert 'no export yet, loading' in outcome.err or not outcome.err
    assert_same(metrics, json.loads((finished_run / 'export' / 'metrics.json').read_text()))


def test_files_of_an_evaluation(validate, finished_run, folders, tmp_path):
    outcome, metrics = validate('--model', finished_run, '--data-dir', folders)
    assert outcome.code == 0, outcome.err
    result = tmp_path / 'out' / 'result'
    assert {path.name for path in result.iterdir()} == {
        'metrics.json', 'per_class.csv', 'confused_pairs.csv', 'predictions.csv', 'report.html', 'plots'}
    with open(result / 'per_class.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert [(row['name'], int(row['train_images'])) for row in rows] == list(COUNTS.items())
    assert [float(row['accuracy']) for row in rows] == pytest.approx(metrics['per_class_accuracy'])
    with open(result / 'confused_pairs.csv', newline='') as file:
        wrong = sum(int(row['images']) for row in csv.DictReader(file))
    assert wrong == round(metrics['num_images'] * (1 - metrics['top1'] / 100))
    with open(result / 'predictions.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ['file', 'label', 'prediction', 'probability']
    assert sorted(row['file'] for row in rows) == sorted(
        f'{path.parent.name}/{path.name}' for path in (folders / 'validation').rglob('*.png'))
    assert all(row['label'] == row['file'].split('/')[0] for row in rows)
    assert sum(row['label'] != row['prediction'] for row in rows) == wrong
    again, _ = validate('--model', finished_run, '--data-dir', folders)
    assert again.code == 2 and 'exists' in again.err


def test_flip_averages_the_logits(validate, finished_run, folders, logits):
    _, metrics = validate('--model', finished_run, '--data-dir', folders, '--flip-tta', '--no-report')
    mean = (logits[0] + logits[1]) / 2
    assert metrics['loss'] == pytest.approx(nll(mean, logits[2]), rel=1e-5)
    assert metrics['loss'] != pytest.approx(nll(logits[0], logits[2]), rel=1e-5)


@pytest.mark.parametrize('flip', [False, True])
def test_five_crops_average_the_logits(validate, finished_run, folders, flip):
    """Of images an eighth larger than the input, 32 pixels."""
    model, images, labels = timm_images(finished_run, folders, input_size=(3, 36, 36), crop_pct=1.0)
    crops = [images[..., y:y + 32, x:x + 32] for y, x in ((0, 0), (0, 4), (4, 0), (4, 4), (2, 2))]
    with torch.inference_mode():
        mean = sum(model(crop) + flip * model(crop.flip(-1)) for crop in crops).numpy() / (5 * (1 + flip))
    _, metrics = validate('--model', finished_run, '--data-dir', folders, '--crop-tta', *flip * ['--flip-tta'])
    assert metrics['crop_tta'] is True
    assert metrics['loss'] == pytest.approx(nll(mean, labels), rel=1e-5)


def test_the_larger_input_has_the_usual_centre():
    config = dict(input_size=(3, 112, 112), crop_pct=0.875, interpolation='bicubic', mean=(0.5,) * 3, std=(0.5,) * 3)
    photo = Image.fromarray(np.random.default_rng(0).integers(256, size=(150, 170, 3), dtype=np.uint8))
    usual, larger = (torch.as_tensor(eval_transform(each)(photo)) for each in (config, larger_input(config)))
    assert larger.shape == (3, 128, 128) and torch.equal(larger[:, 8:120, 8:120], usual)
    assert larger_input({**config, 'crop_pct': 1.0})['input_size'] == (3, 128, 128)
    assert larger_input({**config, 'crop_pct': 0.5})['input_size'] == (3, 224, 224)


@pytest.mark.parametrize('target, source, expected', [
    ('uniform', 'train', -np.log([14, 7, 4])), ('uniform', 'uniform', np.zeros(3)),
    ('forward', 'uniform', np.log(4.0) * np.array([0, -0.5, -1])),
    ('backward', 'uniform', np.log(4.0) * np.array([-1, -0.5, 0])), ('test', 'uniform', np.log([5, 4, 4])),
    ('test', None, np.log([5, 4, 4]))])  # GLMC's rebalanced classifier has learnt a uniform prior
def test_logits_move_to_the_target_prior(validate, finished_run, folders, logits, target, source, expected):
    options = ['--source-prior', source] if source else []
    _, metrics = validate('--model', finished_run, '--data-dir', folders, '--target-prior', target, *options,
                          '--target-imbalance', '4', '--no-report')
    assert metrics['loss'] == pytest.approx(nll(logits[0] + expected.astype(np.float32), logits[2]), rel=1e-4)


def test_the_prior_of_an_export_may_be_a_list(validate, finished_run, folders, logits, tmp_path):
    export, prior = tmp_path / 'export', [0.6, 0.3, 0.1]
    shutil.copytree(finished_run / 'export', export)
    config = json.loads((export / 'config.json').read_text())
    (export / 'config.json').write_text(json.dumps({**config, 'glmc': {**config['glmc'], 'prior': prior}}))
    _, metrics = validate('--model', export, '--data-dir', folders, '--target-prior', 'uniform', '--no-report')
    assert metrics['loss'] == pytest.approx(nll(logits[0] - np.log(prior).astype(np.float32), logits[2]), rel=1e-4)
    assert metrics['source_prior'] == prior


@pytest.mark.parametrize('distribution, images', [('uniform', [4, 4, 4]), ('forward', [4, 2, 1]), ('backward', [1, 2, 4])])
def test_the_test_set_is_cut_to_the_distribution(validate, finished_run, folders, distribution, images):
    _, metrics = validate('--model', finished_run, '--data-dir', folders, '--test-distribution', distribution,
                          '--target-imbalance', '4', '--no-report')
    assert metrics['per_class_images'] == images


def sade_counts(cls_num: int, img_max: float, imb_factor: float, reverse: bool) -> list[int]:
    """SADE's formula as published (arXiv 2107.09249, section 5.1), classes in order of training frequency."""
    power = [(cls_num - 1 - c if reverse else c) / (cls_num - 1.0) for c in range(cls_num)]
    return [int(img_max * imb_factor ** p) for p in power]


@pytest.mark.parametrize('kind', ['forward', 'backward'])
@pytest.mark.parametrize('factor', [2, 5, 10, 25, 50])
def test_ranked_counts_are_sades(kind, factor):
    train = (500 * 100 ** (-np.arange(100) / 99)).astype(int)
    found = ranked_counts(train, 100, kind, factor)
    np.testing.assert_allclose(found, sade_counts(100, 100, 1 / factor, kind == 'backward'), atol=1)
    assert found.max() == 100 and found.min() == 100 // factor


def test_ranks_go_by_training_images():
    assert ranked_counts([5, 50, 500], 10, 'forward', 10).tolist() == [1, 3, 10]
    assert ranked_counts([5, 50, 500], 10, 'backward', 10).tolist() == [10, 3, 1]
    assert ranked_counts([5, 50, 500], 10, 'uniform', 10).tolist() == [10, 10, 10]
    with pytest.raises(ValueError, match="kind must be one of uniform, forward, backward, got 'sideways'"):
        ranked_counts([1, 2], 10, 'sideways', 10)


@pytest.mark.parametrize('kind', TARGETS)
def test_priors_are_distributions(kind):
    prior = target_prior([9, 100, 30, 2], kind, 50)
    assert prior.sum() == pytest.approx(1)
    assert prior.max() / prior.min() == pytest.approx(1 if kind == 'uniform' else 50, rel=1e-3)


def test_shift_is_bayes_rule():
    rng = np.random.default_rng(0)
    likelihood, source, target = rng.random((5, 4)), normalized([50, 20, 5, 1]), normalized([1, 1, 2, 0])
    posterior = likelihood * source / (likelihood * source).sum(1, keepdims=True)
    expected = likelihood * target / (likelihood * target).sum(1, keepdims=True)
    model = AdjustedModel(torch.nn.Identity(), prior_shift(source, target))
    np.testing.assert_allclose(model(torch.tensor(posterior).log()).softmax(-1), expected, rtol=1e-5)


@pytest.mark.parametrize('content, weights', [('[6, 3, 1]', [6, 3, 1]), ('0.6\n0.3\n0.1\n', [6, 3, 1]),
                                              ('[1, 1, 0]', [1, 1, 1e-6])])
def test_a_prior_from_a_file(validate, finished_run, folders, logits, tmp_path, content, weights):
    file = tmp_path / 'prior'
    file.write_text(content)
    _, metrics = validate('--model', finished_run, '--data-dir', folders, '--no-report', '--target-prior', file)
    expected = logits[0] + np.log(weights).astype(np.float32)  # GLMC's prior is uniform
    assert metrics['loss'] == pytest.approx(nll(expected, logits[2]), rel=1e-4)
    assert metrics['source_prior'] == 'uniform'


@pytest.mark.parametrize('content', [
    '', '[]', '[1, -1, 1]', '[0, 0, 0]', 'a\nb\nc', '[[1, 2, 3]]', '{"a": 1}', '[1, NaN, 1]'])
def test_a_prior_that_is_none_is_one_line(content, tmp_path):
    (tmp_path / 'prior').write_text(content)
    with pytest.raises(InputError, match='prior: expected uniform, forward, backward, test, or a file with a weight per'):
        read_prior(str(tmp_path / 'prior'), 3)


@pytest.mark.parametrize('options, expected', [
    ('--target-imbalance 4', 'target-imbalance has no effect without forward or backward in --target-prior or '
     '--test-distribution'),
    ('--target-imbalance 4 --target-prior test', 'target-imbalance has no effect without forward or backward in '
     '--target-prior or --test-distribution'),
    ('--source-prior train', 'source-prior has no effect without --target-prior'),
    ('--amp --amp-dtype bfloat16', 'amp has no effect with --amp-dtype'),
    ('--dataset-download', 'dataset-download has no effect without a torch/, tfds/ or hfids/ data set'),
    ('--target-imbalance 4 --target-prior forward --source-prior train', '')])
def test_an_option_without_effect_is_warned_about(validate, finished_run, folders, options, expected):
    outcome, _ = validate('--model', finished_run, '--data-dir', folders, '--no-report', *options.split())
    assert outcome.code == 0 and outcome.err.splitlines() == ([f'--{expected}'] if expected else [])


def test_options_of_an_evaluation_are_warned_about_with_compare(validate, finished_run):
    outcome, _ = validate('--compare', finished_run, '--flip-tta')
    assert outcome.out.split()[:2] == ['result', 'top-1'] and outcome.out.splitlines()[1].startswith('first ')
    assert outcome.code == 0, outcome.err
    assert outcome.err.splitlines() == [f'--{name} has no effect with --compare' for name in ('flip-tta', 'workers')]


def test_help_shows_the_options_of_validation_and_help_all_the_rest(capsys):
    from validate_glmc import validate_parser
    short = validate_parser().format_help()
    assert '--target-prior' in short and '--class-counts' in short and '--model-kwargs' not in short
    with pytest.raises(SystemExit):
        validate_parser().parse_args(['--help-all'])
    assert '--model-kwargs' in capsys.readouterr().out


def test_an_existing_folder_is_refused_before_the_evaluation(validate, finished_run, folders, tmp_path, monkeypatch):
    monkeypatch.setattr('validate_glmc.evaluate', lambda *args: pytest.fail('evaluated'))
    (tmp_path / 'out' / 'result').mkdir(parents=True)
    outcome, _ = validate('--model', finished_run, '--data-dir', folders)
    assert outcome.code == 2 and 'exists' in outcome.err


def test_a_plain_timm_model_with_counts_from_a_file(validate, folders, tmp_path):
    counts = tmp_path / 'counts.txt'
    counts.write_text('14\n7\n4\n')
    weights = tmp_path / 'weights.pth'
    torch.manual_seed(0)
    torch.save(timm.create_model('test_resnet', num_classes=3).state_dict(), weights)
    options = ['--model', 'test_resnet', '--checkpoint', weights, '--num-classes', '3', '--data-dir', folders,
               '--img-size', '32', '--no-report']
    assert validate(*options)[0].err == (
        'error: --model test_resnet: the number of training images per class is unknown; expected --class-counts FILE '
        '(JSON list, metrics.json of a run, or one number per line)\n')
    outcome, metrics = validate(*options, '--class-counts', counts)
    assert outcome.code == 0, outcome.err
    assert metrics['train_counts'] == [14, 7, 4] and metrics['num_images'] == 13
    assert metrics['model'] == 'test_resnet'


def test_a_folder_of_classes_in_another_order_and_with_one_missing(validate, finished_run, folders, tmp_path):
    write_folders(tmp_path / 'other' / 'validation', {'cat': 1, 'ant': 2})
    outcome, metrics = validate('--model', finished_run, '--data-dir', tmp_path / 'other')
    assert metrics['per_class_images'] == [2, 0, 1] and metrics['shot_classes'] == {'many': 0, 'medium': 0, 'few': 2}
    assert '  few (2)  ' in outcome.out and '\n1 class without images, not evaluated: bee\n' in outcome.out
    report = (tmp_path / 'out' / 'result' / 'report.html').read_text()
    assert '1 class without images, not evaluated: bee' in report and 'few-shot (2 classes)' in report


def test_two_processes_count_what_one_counts(finished_run, folders, tmp_path, validate):
    _, one = validate('--model', finished_run, '--data-dir', folders, '--batch-size', '4', '--no-report')
    outcome = run_command(
        sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', 'validate_glmc.py',
        '--model', finished_run, '--data-dir', folders, '--batch-size', '4', '--no-report', '--workers', '0', '--output',
        tmp_path, '--experiment', 'two', ACCELERATE_USE_CPU='1', GLOO_SOCKET_IFNAME='lo')
    assert outcome.code == 0, outcome.err
    two = json.loads((tmp_path / 'two' / 'metrics.json').read_text())
    assert two['processes'] == 2
    assert_same(two, one)
    pairs = [Path(tmp_path, *place, 'confused_pairs.csv').read_text() for place in (('two',), ('out', 'result'))]
    assert pairs[0] == pairs[1]


@pytest.mark.parametrize('options, expected', [
    ('--model nowhere/export', '--model nowhere/export: no such file or folder; a Hub model is hf-hub:ORG/NAME'),
    ('--model tests', '--model tests: no config.json in this folder'),
    ('--model README.md', 'README.md: expected a checkpoint of train_glmc.py'),
    ('--model resnet_18', '--model resnet_18: not a model of timm'),
    ('--model RUN --class-counts tests', '--class-counts tests: expected a list of images per class'),
    ('--model RUN --class-counts TWO', 'TWO: found 2 classes, --model RUN/export has 3'),
    ('--model RUN --val-split nothing', "no folder for split 'nothing', found train, validation"),
    ('--model RUN --data-dir OTHER', "class 'dog' is not in the training data, which has 3 classes"),
    ('--model RUN --data-dir nowhere', '--data-dir nowhere: '),
    ('--model RUN --dataset torch/nothing', '--dataset torch/nothing, split validation: cannot be opened'),
    ('--model RUN --test-distribution forward', '--test-distribution forward, --target-imbalance 50: '),
    ('--model RUN --target-prior sideways',
     '--target-prior sideways: expected uniform, forward, backward, test, or a file with a weight per class: No such file'),
    ('--model RUN --target-prior TWO', '--target-prior TWO: found 2 classes, the model has 3'),
    ('--model RUN --num-classes 7', '--num-classes 7: is for a bare architecture; '),
    ('--model RUN --in-chans 1', '--in-chans 1: is for a bare architecture; '),
    ('--model RUN --gp max', '--gp max: is for a bare architecture; '),
    ('--model RUN --checkpoint TWO', '--checkpoint TWO: is for a bare architecture; '),
    ('--model test_resnet --num-classes 3 --checkpoint TWO',
     '--checkpoint TWO: expected weights of test_resnet with 3 classes, found: '),
    ('--model RUN --output README.md', '--output: cannot write to README.md/result: '),
    ('--model test_convnext --num-classes 3 --checkpoint CONVNEXT --class-counts THREE --img-size 7',
     '--model test_convnext, --img-size: cannot take an image of 7x7: '),
    ('--model RUN --epochs 3', '--epochs: unknown option'),
    ('--compare nowhere', 'nowhere: expected a folder with a metrics.json')])
def test_wrong_input_is_one_line(validate, finished_run, folders, tmp_path, options, expected):
    (tmp_path / 'TWO').write_text('[3, 4]')
    write_folders(tmp_path / 'OTHER' / 'validation', {'cat': 1, 'dog': 1})
    (tmp_path / 'THREE').write_text('[3, 4, 5]')
    torch.save(timm.create_model('test_convnext', num_classes=3).state_dict(), tmp_path / 'CONVNEXT')
    places = {'RUN': str(finished_run), **{name: str(tmp_path / name) for name in ('TWO', 'THREE', 'OTHER', 'CONVNEXT')}}
    words = [places.get(word, word) for word in options.split()]
    if '--data-dir' not in words:
        words += ['--data-dir', str(folders)]
    outcome, _ = validate(*words)
    for name, place in places.items():
        expected = expected.replace(name, place)
    assert outcome.code == 2, outcome.err
    assert len(outcome.err.splitlines()) == 1 and outcome.err.startswith('error: ')
    assert expected in outcome.err


@pytest.mark.parametrize('place', ['.', 'export'])
def test_a_run_is_evaluated_on_its_own_images(validate, finished_run, folders, place):
    outcome, metrics = validate('--model', finished_run / place, '--no-report')
    assert outcome.code == 0, outcome.err
    assert f'Data of the run: --data-dir {folders}' in outcome.err
    expected = json.loads((finished_run / 'export' / 'metrics.json').read_text())
    assert metrics['num_images'] == 13 and metrics['per_class_accuracy'] == expected['per_class_accuracy']
