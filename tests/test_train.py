"""Training with the script itself: output and files of a run, its options, resuming."""
import csv
import json
import os
import re
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import yaml
from accelerate import Accelerator
from conftest import COUNTS, TINY, coloured, launch_train, write_folders, write_shards
from PIL import Image
from safetensors.torch import load_file
from torch import equal

import glmc.setup

COLUMNS = ['epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'eval_many', 'eval_medium', 'eval_few',
           'eval_class_mean', 'lr', 'alpha', 'loss_c', 'loss_cb', 'loss_sim', 'skipped_steps', 'bad_images',
           'images_per_second']


@pytest.fixture
def train(script, folders, tmp_path):
    """Options -> a tiny run on `folders`, which must succeed; its outcome and its folder."""
    def run(*options, data_dir=folders, experiment='run'):
        where = ['--data-dir', data_dir] if data_dir else []
        outcome = script(*TINY, *where, '--output', tmp_path / 'output', '--experiment', experiment, *options)
        assert outcome.code == 0, outcome.err
        return outcome, tmp_path / 'output' / experiment
    return run


def summary(run) -> list[dict]:
    with open(run / 'summary.csv', newline='') as file:
        return list(csv.DictReader(file))


def weights(run) -> dict:
    return load_file(run / 'export' / 'model.safetensors')


def same_weights(one, other) -> bool:
    one, other = weights(one), weights(other)
    return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)


# --- a run as a user sees it ---


def test_demonstration(tmp_path):
    outcome = launch_train('--epochs', '2', '--model', 'test_resnet', '--workers', '0', '--output', tmp_path / 'output')
    assert outcome.code == 0, outcome.err
    table, path = re.fullmatch(
        r'\nglmc_one_view on validation, 500 images:\n(.*\n.*)\nExported to (.*)\n'
        r'(?:Report: .*\n)?Next: python -m glmc.predict .* IMAGES\n', outcome.out).groups()
    assert table.split('\n')[0].split('  ') == ['top-1', 'top-5', 'many (1)', 'medium (5)', 'few (4)', 'class mean']
    assert path == str(tmp_path / 'output' / 'digits-test_resnet-glmc_one_view' / 'export')
    assert outcome.err.count('this is a demonstration') == 1 and 'Epoch 2/2' in outcome.err
    assert 'Training set: 417 images of 10 classes, 124 … 6 per class (1 many, 5 medium, 4 few)' in outcome.err


def test_summary(finished_run):
    first, second = summary(finished_run)
    assert list(first) == COLUMNS
    assert (first['epoch'], second['epoch']) == ('0', '1') and (first['alpha'], second['alpha']) == ('1.0', '0.75')
    assert (float(first['lr']), float(second['lr'])) == (0.01, 0.005)  # cosine over two epochs
    assert first['eval_many'] == '' and 0 <= float(first['eval_few']) <= 100  # no class of that many images
    metrics = json.loads((finished_run / 'export' / 'metrics.json').read_text())
    assert float(second['eval_top1']) == pytest.approx(metrics['top1'])


def test_predictions_are_beside_the_table_of_classes(finished_run):
    with open(finished_run / 'predictions.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    metrics = json.loads((finished_run / 'export' / 'metrics.json').read_text())
    assert len({row['file'] for row in rows}) == len(rows) == metrics['num_images']
    hits = [row['label'] == row['prediction'] for row in rows]
    assert 100 * sum(hits) / len(hits) == pytest.approx(metrics['top1'])
    assert all(row['file'].startswith(f"{row['label']}/") and 0 < float(row['probability']) <= 1 for row in rows)


def test_epoch_lines_have_a_legend_the_duration_and_the_time_left(finished_run):
    messages = (finished_run.parent / 'stderr.txt').read_text()
    legend = ('In brackets: many- / medium- / few-shot classes. Training images per class: many-shot: more than 100, '
              'medium-shot: 21 to 100, few-shot: at most 20\n')
    assert messages.count(legend) == 1 and messages.index(legend) < messages.index('Epoch 1/2')
    assert re.search(r'Epoch 1/2: .* 25 images at \d+/s, \d+(\.\d)? s per epoch, \d+(\.\d)? s left\n', messages)
    assert re.search(r'Epoch 2/2: .* \d+(\.\d)? s per epoch\n', messages)


def test_messages(finished_run):
    messages = (finished_run.parent / 'stderr.txt').read_text()
    assert 'Training set: 25 images of 3 classes, 14 … 4 per class (0 many, 0 medium, 3 few), fingerprint' in messages
    assert 'Warning' not in messages and 'No data given' not in messages
    table = (finished_run.parent / 'stdout.txt').read_text().splitlines()[3]
    assert table.split()[2:4] == ['–', '–']  # empty groups


def test_classes_without_test_images_are_named_and_not_counted(train, folders, tmp_path):
    """Numbers of two classes without images: at the start, in the tables of both stages, metrics, report and card."""
    data = tmp_path / 'data'
    shutil.copytree(folders, data)
    for name in ('bee', 'cat'):
        shutil.rmtree(data / 'validation' / name)
    outcome, run = train('--report', '--stage2', 'balanced_softmax', data_dir=data)
    missing = '2 classes without images, not evaluated: bee, cat'
    assert f'validation: {missing}\n' in outcome.err
    assert outcome.out.count(f'\n{missing}\n') == 2 and outcome.out.count('  few (1)  ') == 2
    metrics = json.loads((run / 'export' / 'metrics.json').read_text())
    assert metrics['shot_classes'] == {'many': 0, 'medium': 0, 'few': 1}
    assert missing in (run / 'report.html').read_text()
    card = (run / 'export' / 'README.md').read_text()
    assert '2 classes without images, not evaluated: `bee`, `cat`.' in card and '| few-shot | at most 20 | 1 |' in card


def test_args_are_accepted_back(finished_run, script, tmp_path):
    outcome = script('-c', finished_run / 'args.yaml', '--output', tmp_path, '--experiment', 'again')
    assert outcome.code == 0, outcome.err
    assert same_weights(finished_run, tmp_path / 'again')
    first, again = (yaml.safe_load((run / 'args.yaml').read_text()) for run in (finished_run, tmp_path / 'again'))
    assert {name for name in first if first[name] != again[name]} == {'output', 'experiment'}


def test_seed_decides_everything(train, finished_run):
    _, same = train('--epochs', '2', experiment='same')
    _, other = train('--epochs', '2', '--seed', '43', experiment='other')
    assert same_weights(same, finished_run) and not same_weights(other, finished_run)


def test_second_run_gets_its_own_folder(script, folders, tmp_path):
    for _ in range(2):
        assert script(*TINY, '--data-dir', folders, '--output', tmp_path).code == 0
    name = f'{folders.name}-test_resnet-glmc'
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, f'{name}-2']


# --- options ---


@pytest.mark.parametrize('options', [
    '--method ce', '--model-ema --model-ema-decay 0.5', '--grad-accum-steps 2', '--amp-dtype bfloat16',
    '--clip-grad 1.0', '--clip-grad 0.01 --clip-mode agc', '--sched-on-updates --warmup-epochs 1 --epochs 2',
    '--model test_vit --layer-decay 0.7', '--layer-decay 0.7', '--drop 0.3', '--drop-path 0.1', '--grad-checkpointing',
    '--channels-last', '--partner batch', '--balanced', '--cutmix-lambda nominal', '--mix-beta 0.5',
    '--sam-rho 0.05',
    '--resample-power 0.2 --reweight-power 1.2', '--augmentation imagenet_lt', '--augmentation cifar', '--no-aug',
    '--augmentation cifar --aa v0r', '--augmentation cifar --reprob 1',
    '--augmentation cifar --resident off', '--aa rand-m9-mstd0.5', '--reprob 1.0 --remode pixel', '--in-chans 1',
    '--in-chans 1 --augmentation imagenet_lt', '--opt adamw --opt-betas 0.9 0.99', '--workers 2',
    '--mean 0.4 --std 0.2', '--filter-bias-and-bn --opt lamb', '--gp max', '--sched step --decay-epochs 1',
    '--sched none', '--model-kwargs output_stride=8', '--imbalance-factor 4 --batch-size 4',
    '--val-interval 2 --epochs 3', '--method ce --reprob 0.5', '--train-crop-mode rkrc'])
def test_options_train(options, train):
    outcome, run = train(*options.split())
    assert 'Exported to' in outcome.out and not re.search('nan', outcome.out + outcome.err)
    assert (run / 'export' / 'config.json').exists() and 'no effect' not in outcome.err


@pytest.mark.parametrize('options', [
    '--mix-beta 0.3',
    '--consistency-weight 5', '--resample-power 1', '--cutmix-lambda nominal', '--model-ema', '--drop 0.5',
    '--grad-accum-steps 2', '--clip-grad 0.001', '--weight-decay 0.5', '--augmentation imagenet_lt', '--hflip 0',
    '--reprob 1', '--partner batch', '--momentum 0.5', '--mean 0.1', '--projection-dim 8', '--balanced', '--method ce',
    '--train-interpolation nearest', '--reweight-power 3'])
def test_options_have_an_effect(options, train, finished_run):
    _, run = train('--epochs', '2', *options.split())
    assert not same_weights(run, finished_run)


def test_ignored_options_are_warned_about(train):
    outcome, _ = train('--method', 'ce', '--resample-power', '0.2', '--mix-beta', '1.0')
    assert [line for line in outcome.err.splitlines() if 'no effect' in line] == [
        '--mix-beta has no effect with --method ce', '--resample-power has no effect with --method ce']


@pytest.mark.parametrize('options, warned', [
    ('--opt adamw', True), ('--opt lion', True), ('--opt adamw --lr 0.001', False), ('--opt adamw --lr-base 0.002', False),
    ('--opt sgd', False), ('--opt nesterovw', False), ('', False)])
def test_learning_rate_of_sgd_for_another_optimizer_is_warned_about(options, warned, script, folders, tmp_path):
    tiny = [option for option in TINY if option not in ('--lr', '0.01')]
    outcome = script(*tiny, '--data-dir', folders, '--output', tmp_path, *options.split())
    assert outcome.code == 0 and ('the default --lr-base is for SGD' in outcome.err) == warned, outcome.err


@pytest.mark.parametrize('options, told', [
    ('--aa v0r --no-aug', '--aa has no effect with --no-aug'),
    ('--rearea 0.1 0.2 --reaspect 1', '--rearea has no effect without --reprob|--reaspect has no effect without --reprob')])
def test_levers_without_effect_are_warned_about(options, told, train):
    outcome, _ = train(*options.split())
    assert sorted(line for line in outcome.err.splitlines() if 'no effect' in line) == told.split('|')


def test_levers_of_augmentation_have_an_effect_and_resume_inside_an_epoch(train):
    cutout = '--augmentation cifar --reprob 1 --remode const'
    steps, runs = ('--resident', 'off', '--checkpoint-interval', '1'), {}
    for number, options in enumerate((
            '--augmentation cifar', '--augmentation cifar --aa v0r', cutout, f'{cutout} --rearea 0.25 0.25 --reaspect 1')):
        _, runs[options] = train(*steps, *options.split(), experiment=f'run{number}')
    named = list(runs.values())
    assert not any(same_weights(one, two) for k, one in enumerate(named) for two in named[k + 1:])
    for options in ('--augmentation cifar --aa v0r', cutout):
        run = runs[options]
        again = run.with_name(f'again-{run.name}')
        shutil.copytree(run, again)
        shutil.rmtree(again / 'export')
        (again / 'checkpoints' / 'epoch-0000.safetensors').unlink()
        outcome, _ = train(*steps, *options.split(), '--resume', 'auto', experiment=again.name)
        assert 'step 3 comes next' in outcome.err and same_weights(run, again)


def test_drop_changes_training_only(train):
    _, run = train('--drop', '0.5')
    assert json.loads((run / 'export' / 'metrics.json').read_text())['num_images'] == 13


@pytest.mark.parametrize('model', [
    'test_efficientnet', 'regnetx_002', 'resnetv2_18', 'mobilenetv3_small_050', 'test_resnet'])
def test_sync_bn_of_one_process_is_batchnorm(model, train):
    """With all activations: the training, its evaluation and the export are the same."""
    runs = [train('--model', model, *options, experiment=f'run{len(options)}')[1] for options in ((), ('--sync-bn',))]
    assert same_weights(*runs)
    assert summary(runs[0])[0]['eval_loss'] == summary(runs[1])[0]['eval_loss']


def test_average_of_a_short_run_is_as_good_as_its_weights(script, tmp_path):
    outcome = script('--model', 'test_resnet', '--epochs', '12', '--workers', '0', '--no-report', '--val-interval', '12',
                     '--model-ema', '--output', tmp_path)
    average, weights = map(float, re.findall(r'^EMA (.*), weights themselves (.*) top-1$', outcome.err, re.MULTILINE)[0])
    assert weights > 60 and average > weights - 5, outcome.err
    assert f' {average:.1f}' in outcome.out  # the average is exported


def test_accumulation_in_cuda_graphs_is_refused(script, folders):
    for mode in ('reduce-overhead', 'max-autotune'):
        outcome = script(*TINY, '--data-dir', folders, '--torchcompile', mode, '--grad-accum-steps', '2')
        assert outcome.code == 2 and outcome.err.startswith(f'error: --torchcompile {mode}: its CUDA graphs overwrite')


@pytest.mark.parametrize('options', [[], ['--dataset-download']])
def test_first_process_of_a_machine_downloads(options, train, monkeypatch):
    inside, load = [], glmc.setup.load_training_data

    @contextmanager
    def first(self):
        inside.append(True)
        yield
        inside.append(False)

    def load_inside(**kwargs):
        inside.append('load')
        return load(**kwargs)
    monkeypatch.setattr(Accelerator, 'local_main_process_first', first)
    monkeypatch.setattr(glmc.setup, 'load_training_data', load_inside)
    train(*options)
    assert inside == ([True, 'load', False] if options else ['load'])


def test_gpu_is_hidden():
    assert os.environ['CUDA_VISIBLE_DEVICES'] == ''


def test_holdout(train):
    outcome, run = train('--holdout', '2', '--epochs', '3')
    metrics = json.loads((run / 'export' / 'metrics.json').read_text())
    assert 'Training set: 19 images' in outcome.err and 'Best on held-out images' in outcome.err
    assert (run / 'checkpoints' / 'best.safetensors').exists()
    assert metrics['evaluated_on'] == 'validation' and metrics['num_images'] == 13 and metrics['train_images'] == 19
    best = max(summary(run), key=lambda row: float(row['eval_class_mean']))
    assert metrics['epoch'] == int(best['epoch'])


def test_holdout_without_validation(train, folders, tmp_path):
    shutil.copytree(folders / 'train', tmp_path / 'only' / 'train')
    outcome, run = train('--holdout', '0.3', data_dir=tmp_path / 'only')
    metrics = json.loads((run / 'export' / 'metrics.json').read_text())
    assert metrics['evaluated_on'] == 'holdout' and metrics['num_images'] == 4 + 2 + 1
    assert 'No validation set, only held-out images' in outcome.err


def test_checkpoint_history(train):
    _, run = train('--epochs', '4', '--checkpoint-hist', '2')
    assert sorted(path.name for path in (run / 'checkpoints').iterdir()) == [
        'epoch-0002.safetensors', 'epoch-0003.safetensors']
    assert [row['epoch'] for row in summary(run)] == ['0', '1', '2', '3']


@pytest.mark.parametrize('options', [[], ['--workers', '2'], ['--augmentation', 'cifar']])
def test_images_of_all_kinds(options, train, tmp_path):
    root = tmp_path / 'kinds'
    write_folders(root / 'train', {'ant': 2, 'bee': 2})
    write_folders(root / 'val', {'ant': 2, 'bee': 1})
    grey = np.arange(40 * 30).reshape(40, 30)
    for split in ('train', 'val'):
        folder = root / split / 'bee'
        for name, mode in (
                ('grey.png', 'L'), ('alpha.png', 'RGBA'), ('palette.png', 'P'), ('cmyk.jpg', 'CMYK'), ('bit.png', '1')):
            coloured(0, 1, size=(50, 37), mode=mode).save(folder / name)
        Image.fromarray((grey * 50).astype(np.uint16)).save(folder / 'sixteen.png')
    outcome, _ = train(*options, '--batch-size', '4', data_dir=root)
    assert 'Training set: 10 images of 2 classes, 8 … 2 per class' in outcome.err


@pytest.mark.parametrize('options', [
    ['--partner', 'batch'], ['--partner', 'batch', '--workers', '2'], ['--method', 'ce'],
    ['--partner', 'batch', '--in-chans', '1', '--resample-power', '1']])
def test_shards(options, train, tmp_path):
    (tmp_path / 'shards').mkdir()
    outcome, run = train('--dataset', 'wds/x', *options, data_dir=write_shards(tmp_path / 'shards', shard_size=4))
    assert f'Training set: 25 images of {len(COUNTS)} classes, 14 … 4 per class' in outcome.err
    assert json.loads((run / 'export' / 'metrics.json').read_text())['num_images'] == 13


# --- resuming ---


def interrupted(run, copy, epochs: int):
    """A copy of a run as it was after that many epochs."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / 'export')
    for path in sorted((copy / 'checkpoints').iterdir())[epochs:]:
        path.unlink()
    return copy


RESUMED = ['--epochs', '4', '--checkpoint-hist', '4', '--drop', '0.3', '--model-ema', '--model-ema-decay', '0.9',
           '--sched-on-updates', '--resample-power', '0.2']


@pytest.mark.parametrize('how', ['auto', 'checkpoint', 'folder', 'checkpoints'])
def test_resumed_run_equals_an_uninterrupted_one(how, train, script, folders, tmp_path):
    _, whole = train(*RESUMED, experiment='whole')
    run = interrupted(whole, tmp_path / 'output' / 'cut', epochs=2)
    paths = {'checkpoint': run / 'checkpoints' / 'epoch-0001.safetensors', 'folder': run, 'checkpoints': run / 'checkpoints'}
    if how == 'auto':
        outcome, _ = train(*RESUMED, '--resume', 'auto', experiment='cut')
    else:
        outcome = script(*TINY, '--data-dir', folders, *RESUMED, '--resume', paths[how])
    assert 'epoch 3 of 4 comes next' in outcome.err and 'Epoch 2/4' not in outcome.err
    assert same_weights(whole, run)
    assert [{**row, 'images_per_second': ''} for row in summary(run)] == [
        {**row, 'images_per_second': ''} for row in summary(whole)]
    assert len(list((run / 'checkpoints').iterdir())) == 4


def test_resume_auto_starts_where_there_is_nothing(train):
    outcome, run = train('--resume', 'auto')
    assert 'Resumed' not in outcome.err and (run / 'export').exists()


def test_average_that_a_checkpoint_lacks_starts_from_its_weights(finished_run, train, tmp_path):
    shutil.copytree(finished_run, tmp_path / 'output' / 'run')
    outcome, run = train('--epochs', '2', '--resume', 'auto', '--model-ema')
    assert 'The checkpoint has no average of the weights: the average starts from its weights' in outcome.err
    assert same_weights(run, finished_run)


def test_finished_run_resumed_exports_again(finished_run, train, tmp_path):
    shutil.copytree(finished_run, tmp_path / 'output' / 'run')
    shutil.rmtree(tmp_path / 'output' / 'run' / 'export')
    outcome, run = train('--epochs', '2', '--resume', 'auto')
    assert 'Epoch' not in outcome.err and same_weights(run, finished_run)
    first, again = (json.loads((folder / 'export' / 'metrics.json').read_text()) for folder in (finished_run, run))
    assert first['top1'] == again['top1'] and first['seconds'] <= again['seconds']


def test_resume_on_other_images_is_warned_about(finished_run, train, folders, tmp_path):
    shutil.copytree(finished_run, tmp_path / 'output' / 'run')
    shutil.copytree(folders, tmp_path / 'images')
    (tmp_path / 'images' / 'train' / 'ant' / '0.png').unlink()
    outcome, _ = train('--epochs', '3', '--resume', 'auto', data_dir=tmp_path / 'images')
    assert 'The training set differs from the one of the checkpoint' in outcome.err
