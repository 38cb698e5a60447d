"""SWA: the mean of a real run's weights by Python, evaluated, exported and resumed."""
import json
import shutil

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file
from timm.utils.model_ema import ModelEmaV3

from glmc.errors import InputError
from glmc.training.checkpoint import load_checkpoint
from glmc.training.optim import averaging_epoch, equal_weights

RUN = [*TINY, '--epochs', '5', '--checkpoint-interval', '1', '--checkpoint-hist', '100', '--lr', '0.05']


@pytest.fixture
def train(script, folders, tmp_path):
    """Options -> the folder of a run that keeps a checkpoint of every update."""
    def run(experiment, *options):
        outcome = script(*RUN, '--data-dir', folders, '--output', tmp_path, '--experiment', experiment, *options)
        assert outcome.code == 0 and 'no effect' not in outcome.err, outcome.err
        return tmp_path / experiment
    return run


def updates(run) -> list[dict]:
    """Checkpoints after each update, in order."""
    states = [load_checkpoint(path) for path in (run / 'checkpoints').glob('epoch-*.safetensors')]
    return sorted(states, key=lambda state: (state['position']['epoch'], state['position']['step']))


def exported(run) -> dict[str, torch.Tensor]:
    return load_file(run / 'export' / 'model.safetensors')


@pytest.mark.parametrize('start, first', [('0.6', 3), ('0', 0), ('0.7', 4)])
def test_what_is_exported_is_the_mean_of_the_weights_since(train, start, first):
    """Weights and running statistics, in double precision; the counter of batches is the last one's."""
    run = train('run', '--swa-start', start)
    states = updates(run)
    assert len(states) == 15  # three updates in each of five epochs
    since = [state['model']['state_dict'] for state in states[3 * first:]]
    found = exported(run)
    for name, value in found.items():
        if value.is_floating_point():
            mean = sum(weights[name].double() for weights in since) / len(since)
            torch.testing.assert_close(value.double(), mean, rtol=1e-5, atol=1e-6)
            assert len(since) == 3 or not torch.equal(value, since[-1][name]) or not value.any()
        else:
            assert torch.equal(value, since[-1][name])
    heads = [state['model']['task_state']['projector.weight'].double() for state in states[3 * first:]]
    average = states[-1]['ema']['task_state_ema']['projector.weight']
    torch.testing.assert_close(average.double(), sum(heads) / len(heads), rtol=1e-5, atol=1e-6)


def test_before_that_the_weights_themselves_are_kept_and_training_is_the_same(train):
    with_mean, without = updates(train('with', '--swa-start', '0.6')), updates(train('without'))
    for number, (one, other) in enumerate(zip(with_mean, without, strict=True)):
        weights, average = one['model']['state_dict'], one['ema']['state_dict_ema']
        assert all(torch.equal(weights[name], value) for name, value in other['model']['state_dict'].items())
        same = all(torch.equal(average[name], value) for name, value in weights.items())
        assert same == (number <= 9)  # the tenth update is the first that counts
        assert other['ema'] is None


def test_the_mean_is_what_is_evaluated(train):
    run, plain = train('run', '--swa-start', '0.4'), train('plain')
    losses = [json.loads((folder / 'export' / 'metrics.json').read_text())['loss'] for folder in (run, plain)]
    assert losses[0] != losses[1]
    recipes = [json.loads((folder / 'export' / 'config.json').read_text())['glmc']['recipe'] for folder in (run, plain)]
    assert recipes[0] == {**recipes[1], 'swa_start': 0.4} and 'swa_start' not in recipes[1]


@pytest.mark.parametrize('options', ['', '--sam-rho 0.05', '--method bbn', '--method weight_balancing --drw-start 0.5'])
@pytest.mark.parametrize('kept', ['epoch-0003-step-0001', 'epoch-0001'])
def test_resuming_is_exact(train, tmp_path, options, kept):
    run = train('run', '--swa-start', '0.6', *options.split())
    again = tmp_path / 'again'
    shutil.copytree(run, again)
    shutil.rmtree(again / 'export')
    matching = [path for path in (again / 'checkpoints').glob('*.safetensors') if stands_at(path, kept)]
    assert len(matching) == 1
    for path in (again / 'checkpoints').glob('*.safetensors'):
        if path not in matching:
            path.unlink()
    train('again', '--swa-start', '0.6', '--resume', 'auto', *options.split())
    one, other = exported(run), exported(again)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def stands_at(path, kept: str) -> bool:
    epoch, _, step = kept.removeprefix('epoch-').partition('-step-')
    position = load_checkpoint(path)['position']
    expected = (int(epoch), int(step)) if step else (int(epoch) + 1, 0)
    return (position['epoch'], position['step']) == expected


def test_the_best_mean_on_held_out_images_is_exported(train):
    run = train('run', '--swa-start', '0.2', '--holdout', '1')
    best = load_checkpoint(run / 'checkpoints' / 'best.safetensors')['ema']['state_dict_ema']
    assert all(torch.equal(value, best[name]) for name, value in exported(run).items())


@pytest.mark.parametrize('start, epochs, expected', [
    (0.6, 200, 120), (0.6, 5, 3), (0.7, 10, 7), (0.61, 5, 4), (0.0, 3, 0), (None, 5, None), (0.99, 200, 198)])
def test_first_epoch(start, epochs, expected):
    assert averaging_epoch(start, epochs) == expected


@pytest.mark.parametrize('start, epochs', [(1.0, 200), (0.9, 5)])
def test_no_epoch_left(start, epochs):
    with pytest.raises(InputError, match=rf'^--swa-start {start:g}: leaves none of {epochs} epochs, expected 0.[89]'):
        averaging_epoch(start, epochs)


def test_ten_thousand_updates_keep_their_equal_weights():
    """A mean in float32 that is updated so often."""
    net = torch.nn.Linear(1, 1, bias=False)
    average = ModelEmaV3(net, **equal_weights(5))
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0)) + 3
    for number, value in enumerate(values, 1):
        with torch.no_grad():
            net.weight.fill_(value)
        average.update(net, step=number)
    assert average.module.weight.item() == pytest.approx(values[5:].double().mean().item(), rel=1e-5)
