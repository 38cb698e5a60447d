"""Trackers: logged values are read back; a missing package is one line."""
import csv
import os

import pytest
from conftest import TINY
from PIL import Image

from glmc.errors import InputError
from glmc.report.pictures import Picture
from glmc.report.trackers import log_pictures, require_trackers

SERIES = ('train_loss', 'eval_top1', 'eval_many', 'eval_medium', 'eval_few', 'eval_class_mean', 'lr', 'alpha', 'loss_c',
          'loss_cb', 'loss_sim')


def rows(run) -> list[dict]:
    with open(run / 'summary.csv', newline='') as file:
        return list(csv.DictReader(file))


def test_tensorboard_has_every_series_the_options_and_the_pictures(script, folders, tmp_path):
    pytest.importorskip('tensorboard', reason='needs tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    options = [option for option in TINY if option != '--no-report']
    outcome = script(*options, '--epochs', '2', '--data-dir', folders, '--output', tmp_path, '--experiment', 'run',
                     '--report-to', 'tensorboard', '--shot-thresholds', '5', '10')
    assert outcome.code == 0, outcome.err
    events = EventAccumulator(str(tmp_path / 'run' / 'tensorboard')).Reload()
    written = rows(tmp_path / 'run')
    for name in SERIES:
        assert [event.step for event in events.Scalars(name)] == [0, 1], name
        assert [event.value for event in events.Scalars(name)] == pytest.approx([float(row[name]) for row in written]), name
    assert events.Images('mixed_views')
    hparams = list((tmp_path / 'run' / 'tensorboard').rglob('hparams.yml'))
    assert len(hparams) == 1 and 'model: test_resnet' in hparams[0].read_text()


@pytest.mark.parametrize('name, variable', [('trackio', 'TRACKIO_DIR'), ('wandb', 'WANDB_DIR')])
def test_others_work_offline(script, folders, tmp_path, monkeypatch, name, variable):
    monkeypatch.setenv(variable, str(tmp_path / 'store'))  # read on import
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    (tmp_path / 'store').mkdir()
    pytest.importorskip(name, reason=f'needs {name}')
    outcome = script(*TINY, '--data-dir', folders, '--output', tmp_path, '--experiment', 'run', '--report-to', name)
    assert outcome.code == 0, outcome.err
    assert 'eval_top1' in rows(tmp_path / 'run')[0]
    stored = [path for root in ('store', 'run') for path in (tmp_path / root).rglob('*') if path.suffix in ('.db', '.wandb')]
    assert stored


def test_a_missing_package_gives_the_pip_line(script, folders, tmp_path, monkeypatch):
    monkeypatch.setattr('glmc.report.trackers.find_spec', lambda name: None)
    outcome = script(*TINY, '--data-dir', folders, '--output', tmp_path, '--report-to', 'wandb')
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1] == (
        'error: --report-to wandb: the package is not installed: pip install wandb')
    assert os.listdir(tmp_path) == []


def test_an_unknown_tracker_is_one_line(script):
    outcome = script('--report-to', 'tensorbord')
    assert (outcome.code, outcome.err) == (
        2, "error: --report-to: expected names of tensorboard, wandb, trackio; found 'tensorbord'\n")


@pytest.mark.parametrize('names, expected', [(None, []), ('tensorboard', ['tensorboard']), ('a,a,b', ['a', 'b'])])
def test_names(names, expected, monkeypatch):
    monkeypatch.setattr('glmc.report.trackers.find_spec', lambda name: True)
    assert require_trackers(names) == expected


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr('glmc.report.trackers.find_spec', lambda name: name == 'trackio' or None)
    with pytest.raises(InputError, match='pip install wandb'):
        require_trackers('trackio,wandb')


class Recorder:
    """An accelerator with one tracker that stores its images."""
    name = 'tensorboard'

    def __init__(self):
        self.trackers, self.images = [self], None

    def log_images(self, images, step, dataformats):
        self.images = images


def test_images_of_a_picture_are_stacked():
    recorder = Recorder()
    log_pictures(recorder, 'views', [Picture([Image.new('RGB', (8, 6), 'red'), Image.new('RGB', (8, 6), 'blue')], '')], 0)
    assert recorder.images['views'].shape == (1, 12, 8, 3)
    assert recorder.images['views'][0, 0, 0].tolist() == [255, 0, 0]
    assert recorder.images['views'][0, -1, 0].tolist() == [0, 0, 255]
