"""What records a run cannot end it: damaged tables, folders in the place of files, an output folder that is gone."""
import csv
import shutil

import pytest
from conftest import TINY
from safetensors.torch import load_file

import train_glmc
from glmc.run_folder import SUMMARY, read_summary, write_summary
from glmc.training.checkpoints import checkpoint_path, prune
from glmc.training.resume import epoch_checkpoints

ROW = b'epoch,train_loss\r\n0,1.5\r\n'


@pytest.fixture
def train(script, folders, tmp_path):
    def run(*options):
        return script(*TINY, '--method', 'ce', '--data-dir', folders, '--output', tmp_path / 'out', '--experiment', 'run',
                      *options)
    return run


@pytest.mark.parametrize('content, kept', [
    (b'\x89PNG\r\n\x1a\n\x00\x00', []), (b'', []), (b'epoch,train_loss\r\n', []), (ROW + b'one,2\r\n', [0]),
    (ROW + b'1,2,3\r\n', [0]), (ROW + b'1\r\n', [0]), (ROW + b'1,x\r\n', [0]), (ROW + b'\xff\xfe', [0]),
    (ROW + b'"' + b'x' * 200_000, [0]), (ROW.replace(b'epoch', b'epo\0ch'), [0]), (ROW + b'9' * 30 + b',1\r\n', [0])])
def test_a_damaged_summary_is_set_aside(content, kept, tmp_path, caplog):
    (tmp_path / SUMMARY).write_bytes(content)
    assert [row['epoch'] for row in read_summary(tmp_path)] == kept
    write_summary(tmp_path, {'epoch': 2, 'train_loss': 1.0})
    assert 'is damaged, set aside as summary.csv.damaged-1' in caplog.text
    assert (tmp_path / f'{SUMMARY}.damaged-1').read_bytes() == content
    assert [row['epoch'] for row in read_summary(tmp_path)] == [*kept, 2]


def test_a_folder_in_the_place_of_the_summary_is_set_aside(tmp_path):
    (tmp_path / SUMMARY).mkdir()
    write_summary(tmp_path, {'epoch': 0, 'train_loss': 1.0})
    assert len(read_summary(tmp_path)) == 1 and (tmp_path / f'{SUMMARY}.damaged-1').is_dir()


def test_a_whole_summary_is_not_set_aside(tmp_path, caplog):
    for epoch in (0, 1, 1, 2):
        write_summary(tmp_path, {'epoch': epoch, 'eval_top1': '', 'train_loss': float('nan')})
    assert [row['epoch'] for row in read_summary(tmp_path)] == [0, 1, 2] and not caplog.text
    assert [path.name for path in tmp_path.iterdir()] == [SUMMARY]


def test_a_run_resumes_beside_damaged_records_and_folders(train, tmp_path):
    assert train('--epochs', '1').code == 0
    run = tmp_path / 'out' / 'run'
    (run / SUMMARY).write_bytes(b'\0')
    (run / 'per_class.csv').unlink()
    (run / 'per_class.csv').mkdir()
    (run / 'predictions.csv').unlink()
    checkpoint_path(run / 'checkpoints', 1).mkdir()  # where a checkpoint belongs
    shutil.rmtree(run / 'export')
    (run / 'export').write_text('no export')
    outcome = train('--epochs', '3', '--resume', 'auto')
    assert outcome.code == 0 and 'Traceback' not in outcome.err, outcome.err
    assert [row['epoch'] for row in read_summary(run)] == [1, 2]
    assert 'per_class.csv not written: IsADirectoryError' in outcome.err and (run / 'predictions.csv').is_file()
    assert 'Checkpoint not saved' in outcome.err and (run / 'checkpoints' / 'epoch-0002.safetensors').is_file()
    assert (run / 'export' / 'model.safetensors').is_file() and (run / 'export.damaged-1').is_file()


@pytest.mark.parametrize('way', ['deleted', 'renamed', 'replaced'])
def test_an_output_folder_that_is_gone(way, train, tmp_path, monkeypatch):
    log_epoch, out = train_glmc.log_epoch, tmp_path / 'out'

    def log_epoch_and_remove(setup, folder, epoch, *found):
        log_epoch(setup, folder, epoch, *found)
        if epoch == 1:
            out.rename(tmp_path / 'elsewhere')
            if way == 'deleted':
                shutil.rmtree(tmp_path / 'elsewhere')
            elif way == 'replaced':
                out.write_text('a file')
    monkeypatch.setattr(train_glmc, 'log_epoch', log_epoch_and_remove)
    outcome = train('--epochs', '4', '--holdout', '1')
    assert 'Traceback' not in outcome.err, outcome.err
    if way == 'replaced':
        assert outcome.code == 1 and outcome.err.count('Checkpoint not saved') >= 2
        assert f'error: {out}' in outcome.err and 'Not a directory' in outcome.err
        return
    assert outcome.code == 0, outcome.err
    assert len(load_file(out / 'run' / 'export' / 'model.safetensors'))
    with open(out / 'run' / SUMMARY, newline='') as file:
        assert [row['epoch'] for row in csv.DictReader(file)] == ['2', '3']


def test_the_newest_checkpoint_is_that_of_the_highest_numbers(tmp_path):
    places = [(9998, 0), (9999, 0), (10000, 0), (10002, 99_999_999), (10002, 100_000_000), (10002, 0), (10003, 5)]
    paths = [checkpoint_path(tmp_path, *place) for place in places]
    for path in (*reversed(paths), tmp_path / 'epoch-mine.safetensors'):
        path.touch()
    assert epoch_checkpoints(tmp_path) == paths
    prune(tmp_path, 2)
    assert epoch_checkpoints(tmp_path) == paths[-2:] and (tmp_path / 'epoch-mine.safetensors').exists()
