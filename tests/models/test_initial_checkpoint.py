"""Weights to start from (`--initial-checkpoint`)."""
import pytest
import timm
import torch

from glmc.errors import InputError
from glmc.models.backbone import create_backbone


def test_weights_of_other_classes_start_all_but_the_classifier(tmp_path):
    weights = timm.create_model('test_resnet', num_classes=1000).state_dict()
    torch.save(weights, tmp_path / 'w.pth')
    found = create_backbone('test_resnet', 3, checkpoint_path=str(tmp_path / 'w.pth')).state_dict()
    assert {name for name in weights if not torch.equal(weights[name], found[name])} == {'fc.weight', 'fc.bias'}
    torch.save({name: value for name, value in weights.items() if name != 'bn1.weight'}, tmp_path / 'w.pth')
    with pytest.raises(InputError, match=r'found: no tensor bn1\.weight, 1 in all'):
        create_backbone('test_resnet', 3, checkpoint_path=str(tmp_path / 'w.pth'))
    with pytest.raises(InputError, match='size mismatch for'):
        torch.save({**weights, 'bn1.weight': torch.ones(3)}, tmp_path / 'w.pth')
        create_backbone('test_resnet', 3, checkpoint_path=str(tmp_path / 'w.pth'))
