"""Checkpoints: values read back, whole writes, files that are no checkpoint, and those of the previous version."""
import json
import math
import os
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import train_glmc
from glmc.errors import InputError
from glmc.training import checkpoint
from glmc.training.checkpoint import CheckpointWriter, load_checkpoint, save_checkpoint
from glmc.training.checkpoints import checkpoint_path, keep_best, prune
from glmc.training.resume import epoch_checkpoints
from glmc.training.state import rng_state, set_rng_state


def round_trip(path, state: dict) -> dict:
    save_checkpoint(path, state)
    return load_checkpoint(path)


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'epoch-0000.safetensors'


@pytest.mark.parametrize('value', [
    0, -3, 2 ** 70, 0.1, 1e-300, math.inf, True, False, None, '', 'ä\n"', [], {}, [1, [2, None]], {'a': {'b': {}}},
    {1: 'int key', '1': 'text key'}, {'items': 1, 'tensor': 'words of the format'}])
def test_plain_values_come_back(path, value):
    found = round_trip(path, {'value': value})['value']
    assert found == value
    assert type(found) is type(value)


def test_nan_comes_back_and_tuples_become_lists(path):
    state = round_trip(path, {'nan': math.nan, 'tuple': (1, (2, 3))})
    assert math.isnan(state['nan'])
    assert state['tuple'] == [1, [2, 3]]


@pytest.mark.parametrize('tensor', [
    torch.arange(6).view(2, 3), torch.tensor(2.5), torch.zeros(0, 3), torch.randn(3).bfloat16(), torch.tensor([True]),
    torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.randn(4, 3).t(), torch.tensor([math.nan, 1.0])])
def test_tensors_come_back(path, tensor):
    state = round_trip(path, {'list': [{'tensor': tensor}], 'again': tensor})
    for found in (state['list'][0]['tensor'], state['again']):
        torch.testing.assert_close(found, tensor, rtol=0, atol=0, equal_nan=True)
        assert found.dtype == tensor.dtype


def test_parameters_and_shared_memory_come_back_apart(path):
    weight = torch.nn.Parameter(torch.arange(4.0))
    state = round_trip(path, {'a': weight, 'b': weight, 'half': weight[:2]})
    assert state['a'].tolist() == state['b'].tolist() == [0, 1, 2, 3]
    assert state['half'].tolist() == [0, 1]
    assert not state['a'].requires_grad


def test_names_that_look_alike_stay_apart(path):
    state = {'a.b': torch.tensor(1), 'a': {'b': torch.tensor(2)}, 'c': {1: torch.tensor(3), '1': torch.tensor(4)}}
    found = round_trip(path, state)
    assert [found['a.b'].item(), found['a']['b'].item(), found['c'][1].item(), found['c']['1'].item()] == [1, 2, 3, 4]


def momentum_step(model, optimizer, seed: int) -> torch.Tensor:
    inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    model(inputs).square().sum().backward()
    optimizer.step()
    return model.weight.detach().clone()


@pytest.mark.parametrize('make', [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.AdamW(p, lr=0.1)])
def test_an_optimizer_continues_unchanged(path, make):
    model = torch.nn.Linear(3, 2)
    optimizer = make(model.parameters())
    momentum_step(model, optimizer, 0)
    state = round_trip(path, {'model': model.state_dict(), 'optimizer': optimizer.state_dict()})
    assert all(isinstance(key, int) for key in state['optimizer']['state'])
    restored = torch.nn.Linear(3, 2)
    restored.load_state_dict(state['model'])
    other = make(restored.parameters())
    other.load_state_dict(state['optimizer'])
    assert torch.equal(momentum_step(model, optimizer, 1), momentum_step(restored, other, 1))


def draw_from_all() -> tuple:
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item()


def test_global_generators_continue_unchanged(path):
    draw_from_all()  # leaves a second Gaussian number in two of them
    state = round_trip(path, {'rng': rng_state()})
    expected = draw_from_all()
    draw_from_all()
    set_rng_state(state['rng'])
    assert draw_from_all() == expected


def test_saving_does_not_change_what_is_saved(path):
    state = {'tensor': torch.zeros(2), 'list': [1, {'a': (2, 3)}]}
    save_checkpoint(path, state)
    state['tensor'] += 1
    assert state['list'] == [1, {'a': (2, 3)}]
    assert load_checkpoint(path)['tensor'].tolist() == [0, 0]


def test_a_write_leaves_one_file_that_others_may_read(path):
    old = os.umask(0o027)
    try:
        save_checkpoint(path, {'a': 1})
        save_checkpoint(path, {'a': 2})
    finally:
        os.umask(old)
    assert os.listdir(path.parent) == [path.name]
    assert path.stat().st_mode & 0o777 == 0o640
    assert load_checkpoint(path) == {'a': 2}


@pytest.mark.parametrize('step', ['save_file', 'os.fsync', 'os.replace'])
def test_a_write_that_fails_leaves_the_earlier_checkpoint(path, monkeypatch, step):
    def fail(*args, **kwargs):
        raise OSError('no space left')
    save_checkpoint(path, {'tensor': torch.ones(2)})
    with monkeypatch.context() as patch:
        owner, name = (os, step.removeprefix('os.')) if step.startswith('os.') else (checkpoint, step)
        patch.setattr(owner, name, fail)
        with pytest.raises(OSError, match='no space left'):
            save_checkpoint(path, {'tensor': torch.zeros(2)})
    assert load_checkpoint(path)['tensor'].tolist() == [1, 1]
    assert epoch_checkpoints(path.parent) == [path]


def test_what_cannot_be_stored_is_refused_before_anything_is_written(path):
    with pytest.raises(TypeError):
        save_checkpoint(path, {'value': object()})
    assert os.listdir(path.parent) == []


def foreign(path, text: str | None) -> None:
    save_file({'weight': torch.zeros(2)}, path, metadata=None if text is None else {'state': text})


class Bomb:
    def __reduce__(self):
        return open, ('exploded', 'w')


@pytest.mark.parametrize('write', [
    lambda path: None,
    lambda path: path.mkdir(),
    lambda path: path.write_bytes(b''),
    lambda path: path.write_bytes(b'\xff' * 64),
    lambda path: path.write_text('not a checkpoint'),
    lambda path: path.write_bytes(pickle.dumps(Bomb())),
    lambda path: torch.save({'model': Bomb()}, path),
    lambda path: foreign(path, None),
    lambda path: foreign(path, ''),
    lambda path: foreign(path, '{"items": [["a", {"tensor": "other"}]]}'),
    lambda path: foreign(path, '{"items": 5}'),
    lambda path: foreign(path, '{"items": [["a"]]}'),
    lambda path: foreign(path, '{"items": [[["a"], 1]]}'),
    lambda path: foreign(path, '{"other": 5}'),
    lambda path: foreign(path, '{"tensor": ["weight"]}'),
    lambda path: foreign(path, '[' * 100_000),
    lambda path: foreign(path, '5'),
], ids=['missing', 'folder', 'empty', 'binary', 'text', 'pickle', 'torch', 'no state', 'no JSON', 'no such tensor',
        'no items', 'no pair', 'no key', 'no format', 'no name', 'deep', 'no dict'])
def test_a_file_that_is_no_checkpoint_is_one_error(path, write, monkeypatch):
    monkeypatch.chdir(path.parent)
    write(path)
    with pytest.raises(InputError, match='epoch-0000.safetensors: expected a checkpoint of train_glmc.py') as error:
        load_checkpoint(path)
    assert len(str(error.value)) < 1000
    assert not os.path.exists('exploded')


@pytest.mark.parametrize('keep', [0.1, 0.5, 0.99])
def test_a_truncated_checkpoint_is_an_error(path, keep):
    save_checkpoint(path, {'tensor': torch.zeros(1000)})
    content = path.read_bytes()
    path.write_bytes(content[:int(len(content) * keep)])
    with pytest.raises(InputError, match='expected a checkpoint'):
        load_checkpoint(path)


def test_the_state_is_readable_without_this_package(path):
    save_checkpoint(path, {'epoch': 3, 'weight': torch.ones(1)})
    with safe_open(path, 'pt') as file:
        assert ['epoch', 3] in json.loads(file.metadata()['state'])['items']
        assert file.get_tensor('weight').item() == 1


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    for epoch in (0, 1, 2, 9, 10):
        save_checkpoint(checkpoint_path(tmp_path, epoch), {'epoch': epoch})
    keep_best(checkpoint_path(tmp_path, 0))
    keep_best(checkpoint_path(tmp_path, 1))
    prune(tmp_path, keep=3)
    assert [load_checkpoint(path)['epoch'] for path in epoch_checkpoints(tmp_path)] == [2, 9, 10]
    assert load_checkpoint(tmp_path / 'best.safetensors') == {'epoch': 1}
    assert not list(tmp_path.glob('*.tmp'))


def test_a_writer_saves_what_was_there_when_it_was_asked(tmp_path):
    writer, order = CheckpointWriter(), []
    weight = torch.zeros(1000)
    for epoch in range(3):
        path = checkpoint_path(tmp_path, epoch)
        writer.save(path, {'epoch': epoch, 'weight': weight}, lambda path=path: order.append(load_checkpoint(path)['epoch']))
        weight += 1
    writer.wait()
    assert order == [0, 1, 2]
    assert [load_checkpoint(path)['weight'].unique().tolist() for path in epoch_checkpoints(tmp_path)] == [[0], [1], [2]]


def test_a_checkpoint_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / 'checkpoints').write_text('a file where the folder belongs')
    writer = CheckpointWriter()
    writer.save(tmp_path / 'checkpoints' / 'epoch-0000.safetensors', {'epoch': 0}, lambda: None)
    assert not writer.wait() and 'Checkpoint not saved, the previous one is kept: ' in caplog.text


OLD = Path(__file__).parent / 'files' / 'checkpoint-7053414.safetensors'  # after the first of two epochs


def differences(one, other, path: str = '') -> list[str]:
    """Paths at which two nested states differ."""
    if isinstance(one, torch.Tensor):
        return [] if torch.equal(one, torch.as_tensor(other)) else [path]
    if isinstance(one, dict):
        same = one.keys() == other.keys()
        return sum((differences(one[key], other[key], f'{path}.{key}') for key in one), []) if same else [path]
    if isinstance(one, (list, tuple)):
        same = len(one) == len(other)
        return sum((differences(a, b, f'{path}.{k}') for k, (a, b) in enumerate(zip(one, other, strict=True))), []
                   ) if same else [path]
    return [] if one == other else [path]


def test_a_checkpoint_of_the_previous_version_continues(script, tmp_path, monkeypatch):
    """Everything that its run had comes back, and the second epoch trains."""
    saved, captured, resume = load_checkpoint(OLD), [], train_glmc.Checkpoints.resume

    def resume_and_capture(self, *args):
        position = resume(self, *args)
        save_checkpoint(tmp_path / 'captured', self.setup.state.capture(position, self.meter))
        captured.append(load_checkpoint(tmp_path / 'captured'))
        return position
    monkeypatch.setattr(train_glmc.Checkpoints, 'resume', resume_and_capture)
    (tmp_path / 'run' / 'checkpoints').mkdir(parents=True)
    shutil.copyfile(OLD, tmp_path / 'run' / 'checkpoints' / 'epoch-0000.safetensors')
    outcome = script(
        '--model', 'resnet32_cifar', '--model-kwargs', 'channels=(2,4,8)', 'depth=1', '--epochs', '2', '--workers', '0',
        '--method', 'glmc', '--no-report', '--batch-size', '64', '--projection-dim', '4', '--model-ema', '--output',
        tmp_path, '--experiment', 'run', '--resume', 'auto')
    assert outcome.code == 0 and 'epoch 2 of 2 comes next' in outcome.err and 'differs' not in outcome.err, outcome.err
    assert differences(captured[0], {name: saved[name] for name in captured[0]}) == []
    last = load_checkpoint(tmp_path / 'run' / 'checkpoints' / 'epoch-0001.safetensors')
    assert any(name.startswith('.model.') for name in differences(last['model'], saved['model'], '.model'))
    assert (tmp_path / 'run' / 'export' / 'model.safetensors').exists()
