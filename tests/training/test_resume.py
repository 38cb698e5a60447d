"""The origin of a checkpoint: what a resumed run must share with it, and names of 0.1.0."""
import logging
from pathlib import Path

import pytest

from glmc.errors import InputError
from glmc.training.resume import check_origin, translate
from glmc.training.state import Position

PATH = Path('epoch-0000.safetensors')


def description(**training) -> dict:
    return dict(model=dict(name='resnet18', num_classes=3), training=dict(opt='momentum', **training))


def state(method: str, fingerprint: str = 'a', **training) -> dict:
    return dict(description=description(**training), metrics=dict(method=method, fingerprint=fingerprint))


@pytest.mark.parametrize('saved, method', [
    (state('glmc'), 'glmc'), (state('glmc', balanced=False), 'glmc'), (state('glmc', balanced=True), 'glmc_balanced'),
    (state('glmc_no_rebalance'), 'glmc_balanced'), (state('glmc_balanced'), 'glmc_balanced')])
def test_rows_of_earlier_versions_resume_under_their_name_of_today(saved, method):
    check_origin(PATH, saved, description(), method, 'a')


@pytest.mark.parametrize('saved, method, error', [
    (state('ce'), 'glmc', 'holds resnet18 with 3 classes by ce, this run trains resnet18 with 3 classes by glmc'),
    (state('glmc', balanced=True), 'glmc', 'by glmc_balanced, this run'),
    (state('glmc', projection_dim=8), 'glmc', 'was trained with projection_dim 8, this run has None')])
def test_another_origin_is_refused(saved, method, error):
    with pytest.raises(InputError, match=error):
        check_origin(PATH, saved, description(), method, 'a')


def test_another_training_set_is_warned_about(caplog):
    with caplog.at_level(logging.WARNING):
        check_origin(PATH, state('glmc', fingerprint='b'), description(), 'glmc', 'a')
    assert 'The training set differs' in caplog.text


def test_position_in_steps_of_another_batch(caplog):
    with caplog.at_level(logging.WARNING):
        assert translate(Position(2, 6, 8, 1), Position(0, 0, 16, 1), 10) == Position(2, 3, 16, 1)
        assert translate(Position(2, 6, 8, 1), Position(0, 0, 8, 1), 5) == Position(3, 0, 8, 1)
    assert caplog.text.count('another training') == 1
