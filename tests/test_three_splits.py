"""Three splits: one trains, one chooses the epoch and when to stop, one is read once at the end."""
import csv
import json
import re
import shutil

import pytest
from conftest import COUNTS, TINY, VALIDATION, write_folders, write_shards

from glmc.data.datasets import ImageSet
from glmc.training.checkpoints import BEST, load_checkpoint

SELECT = ['--select-split', 'val', '--val-split', 'test']


@pytest.fixture(scope='module')
def splits(tmp_path_factory):
    """train/, val/ and test/ with 25, 13 and 6 images."""
    root = tmp_path_factory.mktemp('splits')
    for split, counts, start in (('train', COUNTS, 0), ('val', VALIDATION, 100), ('test', dict.fromkeys(COUNTS, 2), 200)):
        write_folders(root / split, counts, start=start)
    return root


@pytest.fixture
def train(script, splits, tmp_path):
    def run(*options, data_dir=splits):
        outcome = script(*TINY, '--data-dir', data_dir, '--output', tmp_path, '--experiment', 'run', *options)
        return outcome, tmp_path / 'run'
    return run


def epochs_of(run) -> list[dict]:
    with open(run / 'summary.csv', newline='') as file:
        return list(csv.DictReader(file))


def test_one_split_chooses_the_epoch_and_the_other_is_read_once_at_the_end(train, monkeypatch):
    opened, real = [], ImageSet.opened
    monkeypatch.setattr(ImageSet, 'opened', lambda images, index: opened.append(images.names[index]) or real(images, index))
    outcome, run = train(*SELECT, '--epochs', '3')
    assert outcome.code == 0 and 'Training set: 25 images' in outcome.err, outcome.err
    metrics, best = (json.loads((run / 'export' / 'metrics.json').read_text()),
                     load_checkpoint(run / 'checkpoints' / BEST)['metrics'])
    assert (metrics['evaluated_on'], metrics['num_images']) == ('test', 6) and best['num_images'] == 13
    assert best['evaluated_on'] == 'val' and f"Best on val: epoch {best['epoch'] + 1}" in outcome.err
    assert metrics['epoch'] == best['epoch']
    read = [re.search(r'/(\d+)', name)[1] for name in opened]
    tests = [index for index, number in enumerate(read) if number.startswith('20')]
    assert len(tests) == 6 and tests[0] > max(i for i, number in enumerate(read) if not number.startswith('20'))


def test_patience_ends_the_run_and_a_resumed_run_remains_ended(train, monkeypatch):
    options = [*SELECT, '--epochs', '9', '--patience', '2', '--lr', '1e-9', '--method', 'ce', '--freeze-bn']  # no change
    outcome, run = train(*options)
    assert outcome.code == 0 and len(epochs_of(run)) == 3, outcome.err
    assert 'Stopped after epoch 3 of 9: no better class mean in 2 evaluations (--patience)' in outcome.err
    shutil.rmtree(run / 'export')
    outcome, run = train(*options, '--resume', 'auto')
    assert outcome.code == 0 and 'Epoch' not in outcome.err and (run / 'export' / 'metrics.json').exists(), outcome.err
    outcome, run = train(*options, '--resume', 'auto', '--patience', '4')
    assert outcome.code == 0 and len(epochs_of(run)) == 5, outcome.err


def test_without_a_test_split_the_selecting_one_is_measured(train):
    outcome, run = train('--select-split', 'val', '--val-split', 'none', '--patience', '1')
    assert outcome.code == 0, outcome.err
    assert json.loads((run / 'export' / 'metrics.json').read_text())['evaluated_on'] == 'val'


def test_shards(train, tmp_path):
    (tmp_path / 'shards').mkdir()
    root = write_shards(tmp_path / 'shards', shard_size=8)
    info = json.loads((root / '_info.json').read_text())
    info['splits']['test'] = {**info['splits']['validation'], 'name': 'test'}
    (root / '_info.json').write_text(json.dumps(info))
    outcome, run = train(
        '--dataset', 'wds/x', '--partner', 'batch', '--select-split', 'validation', '--val-split', 'test', data_dir=root)
    assert outcome.code == 0 and 'Best on validation: epoch 1' in outcome.err, outcome.err
    assert json.loads((run / 'export' / 'metrics.json').read_text())['evaluated_on'] == 'test'


@pytest.mark.parametrize('options, expected', [
    ('--select-split val', '--select-split val: is the split of --val-split validation, expected another one'),
    ('--select-split training', '--select-split training: is the split of --train-split train'),
    ('--select-split test --val-split test', '--select-split test: is the split of --val-split test'),
    ('--select-split val --val-split test --holdout 1', '--select-split val: its images choose the epoch, expected no'),
    ('--select-split dev --val-split test', '--data-dir .*: no folder for --select-split dev'),
    ('--select-split val --val-split final', '--data-dir .*: no folder for --val-split final'),
    ('--patience 3', '--patience 3: no images choose the epoch, expected --holdout or --select-split'),
    ('--patience 0', '--patience: expected a number >= 1')])
def test_wrong_splits(options, expected, train):
    outcome, _ = train(*options.split())
    assert outcome.code == 2 and re.match(f'error: {expected}', outcome.err.splitlines()[-1]), outcome.err
