"""Checkpoints with a right checksum and a wrong content: one line, whatever part is missing or has another form."""
import copy

import pytest
import torch
from conftest import TINY

from glmc.errors import InputError
from glmc.export.export import export_checkpoint
from glmc.export.load import load_trained
from glmc.training.checkpoint import load_checkpoint, save_checkpoint
from glmc.training.schema import check_state

PARTS = [
    'position', 'position.epoch', 'position.step', 'position.global_batch', 'processes', 'model', 'model.state_dict',
    'optimizer', 'optimizer.param_groups', 'best', 'metrics', 'metrics.method', 'metrics.fingerprint', 'metrics.epoch',
    'seconds', 'description', 'description.model', 'description.model.name', 'description.model.num_classes',
    'description.model.img_size', 'description.training', 'description.export', 'description.export.data_config',
    'description.export.data_config.input_size', 'description.export.data_config.mean',
    'description.export.data_config.crop_pct', 'description.export.class_names', 'description.export.source']


@pytest.fixture(scope='module')
def state(finished_run):
    return load_checkpoint(finished_run / 'checkpoints' / 'epoch-0001.safetensors')


def changed(state: dict, name: str, value) -> dict:
    """Copy of a state with another value of a part, without the part for KeyError."""
    state = copy.deepcopy(state)
    *parents, last = name.split('.')
    part = state
    for key in parents:
        part = part[key]
    if value is KeyError:
        part.pop(last)
    else:
        part[last] = value
    return state


def test_a_real_checkpoint_has_the_form(state):
    assert check_state('x', state) == state


@pytest.mark.parametrize('name', PARTS)
def test_another_form_of_a_part_is_one_line(name, state):
    values = [KeyError, 'text', -1, 2 ** 70, [1], {'a': 1}, torch.ones(2)]
    refused = 0
    for value in values:
        try:
            check_state('the-file', changed(state, name, value))
        except InputError as error:
            refused += 1
            assert str(error).startswith('the-file: ') and '\n' not in str(error) and len(str(error)) < 250
    if name.endswith(('best', 'img_size', 'source', 'training', 'name')):
        assert refused >= 4  # a value may be absent, or another of its type
    else:
        valid = ('metrics.method', 'metrics.fingerprint', 'description.export.data_config.mean')  # 'text' and [1] are
        assert refused == len(values) - (name in valid)


@pytest.mark.parametrize('name, value', [
    ('description.model.pretrained', True), ('description.model.checkpoint_path', '/etc/passwd'),
    ('description.model.pretrained_cfg', {'file': 'x'}), ('description.model.num_classes', 4),
    ('description.model.img_size', 10 ** 6), ('description.export.data_config.input_size', [3, 10 ** 6, 10 ** 6]),
    ('description.model.name', 'no_such_model'), ('description.model.name', 'test_vit'),
    ('description.model.no_such_option', 1), ('model.state_dict', {}), ('model.state_dict', {'x': torch.ones(2)})])
def test_commands_refuse_a_checkpoint_that_contradicts_itself(name, value, state, tmp_path):
    path = tmp_path / 'epoch-0000.safetensors'
    save_checkpoint(path, changed(state, name, value))
    for load in (load_trained, lambda path: export_checkpoint(path, tmp_path / 'export')):
        with pytest.raises(InputError):
            load(str(path))
    assert not (tmp_path / 'export').exists()


def test_weights_that_are_nan_are_refused(state, tmp_path):
    weights = dict(state['model']['state_dict'])
    name = next(iter(weights))
    weights[name] = weights[name] * float('nan')
    save_checkpoint(tmp_path / 'nan.safetensors', changed(state, 'model.state_dict', weights))
    with pytest.raises(InputError, match=f'found NaN in {name}, expected trained weights'):
        load_trained(str(tmp_path / 'nan.safetensors'))


@pytest.mark.parametrize('name, value', [
    ('optimizer.param_groups', []), ('optimizer.state', {0: {'momentum_buffer': torch.ones(1)}}),
    ('optimizer.state', {0: {'momentum_buffer': 'x'}}),
    ('processes', [{'rng': {}, 'meter': None}]), ('model.state_dict', {}), ('description.training', {})])
def test_resuming_refuses_it_in_one_line(name, value, state, script, folders, tmp_path):
    path = tmp_path / 'epoch-0000.safetensors'
    save_checkpoint(path, changed(state, name, value))
    outcome = script(*TINY, '--epochs', '4', '--data-dir', folders, '--output', tmp_path, '--experiment', 'run',
                     '--resume', path)
    assert outcome.code == 2 and 'Traceback' not in outcome.err, outcome.err
    assert outcome.err.splitlines()[-1].startswith('error: --resume ') and not (tmp_path / 'run').exists()


def test_momentum_of_some_weights_only_resumes(state, script, folders, tmp_path):
    some = dict(list(state['optimizer']['state'].items())[:2])
    assert all(values['momentum_buffer'] is not None for values in some.values())
    path = tmp_path / 'epoch-0000.safetensors'
    save_checkpoint(path, changed(state, 'optimizer.state', some))
    outcome = script(*TINY, '--epochs', '3', '--data-dir', folders, '--output', tmp_path, '--experiment', 'run',
                     '--resume', path)
    assert outcome.code == 0, outcome.err
