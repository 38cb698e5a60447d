"""Experts on a shared stem, and the one wide plain net that equals them."""
import json
import subprocess
import sys

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import ROOT

from glmc.errors import InputError
from glmc.export.export import export_model
from glmc.models.backbone import create_backbone
from glmc.models.experts import Experts
from glmc.models.exported import exported_form

THREE = dict(num_experts=3, width=0.75, cosine_scale=30.0)
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def trained(name: str, **kwargs) -> Experts:
    """Experts with random weights and statistics of two batches."""
    torch.manual_seed(0)
    model = create_backbone(name, 4, experts=THREE, **kwargs).train()
    for _ in range(2):
        model.expert_logits(IMAGES)
    return model.eval()


@pytest.mark.parametrize('name, planes', [
    ('resnet32_cifar', [16, 24, 48]), ('test_resnet', [32, 48, 36, 72]), ('resnet18', [64, 128, 192, 384]),
    ('resnet50', [64, 128, 192, 384])])
def test_the_later_stages_are_narrower(name, planes):
    assert trained(name).planes == planes


def test_three_narrow_experts_have_few_more_weights_than_the_net():
    parameters = [sum(p.numel() for p in model.parameters()) for model in (
        trained('resnet32_cifar'), create_backbone('resnet32_cifar', 4))]
    assert 1.5 < parameters[0] / parameters[1] < 1.8


@pytest.mark.parametrize('name', ['test_resnet', 'resnet18', 'seresnet50', 'resnet26d'])
@torch.no_grad()
def test_the_wide_net_is_the_mean_of_the_experts(name):
    """With linear classifiers of the mean norms."""
    model = trained(name)
    features, scale = model.forward_features(IMAGES), 30 / model.feature_norm
    logits = [scale[k] * F.linear(features[:, k], F.normalize(head.weight)) for k, head in enumerate(model.heads)]
    wide = exported_form(model)
    assert type(wide) is timm.models.ResNet and isinstance(wide.fc, torch.nn.Linear)
    expected = torch.stack(logits).mean(0)
    torch.testing.assert_close(wide(IMAGES), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert not any(parameter.is_meta for parameter in wide.parameters())


@torch.no_grad()
def test_one_expert_of_full_width_is_the_net():
    torch.manual_seed(0)
    model = create_backbone('test_resnet', 4, experts=dict(THREE, num_experts=1, width=1.0)).eval()
    wide = exported_form(model)
    assert wide.state_dict().keys() == timm.create_model('test_resnet', num_classes=4).state_dict().keys()
    features = model.forward_features(IMAGES)
    torch.testing.assert_close(wide.forward_head(wide.forward_features(IMAGES), pre_logits=True), features[:, 0])


@pytest.mark.parametrize('name, kwargs', [
    ('resnet32_cifar', {}), ('resnext26ts', None), ('resnext50_32x4d', {}), ('test_resnet', dict(global_pool='catavgmax')),
    ('ecaresnet26t', {})])
def test_experts_without_a_plain_form_are_exported_as_they_are(name, kwargs):
    if kwargs is None:
        with pytest.raises(InputError, match=f'--model {name}: cannot have experts: expected a ResNet'):
            create_backbone(name, 4, experts=THREE)
        return
    model = create_backbone(name, 4, experts=THREE, **kwargs)
    assert exported_form(model) is model


@pytest.mark.parametrize('name', ['resnet32_cifar', 'test_resnet'])
@torch.no_grad()
def test_an_export_reloads_bit_for_bit(name, finished_run, tmp_path):
    """A new process imports glmc first for experts, and nothing else for a plain net."""
    model = trained(name)
    size = model.pretrained_cfg['input_size']
    metrics, config = (json.loads((finished_run / 'export' / f'{part}.json').read_text()) for part in ('metrics', 'config'))
    export_model(tmp_path / 'export', model, data_config=dict(input_size=size), class_names=list('abcd'), metrics=metrics,
                 source=config['glmc'])
    form = exported_form(model)
    assert ('import glmc' in (tmp_path / 'export' / 'README.md').read_text()) == (form is model)
    torch.save(form(IMAGES), tmp_path / 'logits.pt')
    torch.save(IMAGES, tmp_path / 'images.pt')
    code = (f'import torch, timm{", glmc" if form is model else ""}; f = {str(tmp_path)!r}; torch.set_num_threads(1)\n'
            'm = timm.create_model("local-dir:" + f + "/export", pretrained=True).eval()\n'
            'assert torch.equal(m(torch.load(f + "/images.pt")), torch.load(f + "/logits.pt")), type(m)')
    cwd = ROOT if form is model else tmp_path
    done = subprocess.run([sys.executable, '-c', code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_experts_start_from_pretrained_weights_but_for_their_classifiers(tmp_path):
    net = create_backbone('test_resnet', 4)
    torch.save(net.state_dict(), tmp_path / 'net.pth')
    weights, wide = str(tmp_path / 'net.pth'), dict(THREE, width=1.0)
    model = create_backbone('test_resnet', 4, checkpoint_path=weights, experts=wide).eval()
    features = net.eval().forward_head(net.forward_features(IMAGES), pre_logits=True)
    for part in model.forward_features(IMAGES).unbind(1):
        torch.testing.assert_close(part, features)
    assert not torch.equal(model.heads[0].weight, model.heads[1].weight)
    with pytest.raises(InputError, match='--expert-width 0.75: pretrained weights have the full width'):
        create_backbone('test_resnet', 4, checkpoint_path=weights, experts=THREE)


def test_a_foreign_base_is_refused():
    with pytest.raises(ValueError, match="expected the name of a net in timm, found 'hf-hub:a/b'"):
        timm.create_model('experts', base='hf-hub:a/b')
    with pytest.raises(InputError, match='--model vit_tiny_patch16_224: cannot have experts: expected a ResNet'):
        create_backbone('vit_tiny_patch16_224', 4, experts=THREE)
    with pytest.raises(InputError, match='--lora-rank 4: not with a method of several experts'):
        create_backbone('test_resnet', 4, experts=THREE, lora=dict(rank=4))
