"""Frozen parameters and BatchNorm statistics."""
import pytest
import timm
import torch
from conftest import TINY, run_train
from safetensors.torch import load_file

from glmc.errors import InputError
from glmc.models.freeze import freeze, frozen_norms


def backbone() -> torch.nn.Module:
    return timm.create_model('test_resnet', num_classes=3)


def test_a_pattern_freezes_the_parameters_it_matches_and_their_norms():
    model = backbone()
    freeze(model, ['conv1.*', 'bn1.*'])
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen and frozen == {name for name, _ in model.named_parameters() if name.startswith(('conv1', 'bn1'))}
    norms = {id(module) for name, module in model.named_modules()
             if name.startswith(('conv1', 'bn1')) and isinstance(module, torch.nn.BatchNorm2d)}
    assert norms and {id(norm) for norm in frozen_norms(model, False)} == norms


def test_all_norms_keep_their_statistics():
    model = backbone()
    assert len(frozen_norms(model, True)) == sum(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules()) > 3
    assert frozen_norms(model, False) == []


@pytest.mark.parametrize('patterns, expected', [
    (['layer9.*'], r'--freeze layer9\.\*: matches no parameter'), (['*'], r'--freeze \*: matches every parameter')])
def test_patterns_that_match_nothing_or_everything_are_refused(patterns, expected):
    with pytest.raises(InputError, match=expected):
        freeze(backbone(), patterns)


def export_of(done) -> dict:
    assert done.code == 0, done.err
    folder = next(line.split()[-1] for line in done.out.splitlines() if line.startswith('Exported'))
    return load_file(f'{folder}/model.safetensors')


@pytest.mark.parametrize('method', ['ce', 'glmc'])
def test_a_run_changes_only_what_is_not_frozen(folders, tmp_path, method):
    torch.manual_seed(0)
    start = backbone().state_dict()
    torch.save(start, tmp_path / 'start.pth')
    common = ('--data-dir', folders, '--initial-checkpoint', tmp_path / 'start.pth', '--method', method, '--model-ema',
              '--head-init', 'random', '--output', tmp_path)
    found = export_of(run_train(*TINY, *common, '--freeze-bn', '--freeze', 'conv1.*'))
    changed = {name for name in found if not torch.equal(found[name], start[name])}
    assert not any('running' in name or 'tracked' in name or name.startswith('conv1.') for name in changed)
    assert 'fc.weight' in changed and found.keys() == start.keys()
    moved = export_of(run_train(*TINY, *common, '--no-freeze-bn'))
    assert any('running_mean' in name and not torch.equal(moved[name], start[name]) for name in start)
