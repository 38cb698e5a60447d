"""Starting weights by every route, and a sample of tests/sweep_backbones.py: twenty models that have something odd."""
import csv
import logging
import os
import pickle
import sys
import time

import pytest
import timm
import torch
from conftest import ROOT, run_command
from hub_server import Hub
from huggingface_hub import close_session, constants
from safetensors.torch import load_file, save_file
from timm.models._hub import save_for_hf

from glmc.errors import InputError
from glmc.export.load import load_trained
from glmc.models.backbone import create_backbone

SAMPLE = ('beit_base_patch16_224', 'coat_tiny', 'convnext_atto', 'crossvit_tiny_240', 'dla46_c', 'edgenext_xx_small',
          'efficientformer_l1', 'efficientvit_m0', 'ghostnet_050', 'levit_128s', 'mambaout_femto', 'mobilenetv3_small_050',
          'pit_ti_distilled_224', 'qwen3_vit_88m_enc', 'resnet18', 'resnetv2_50', 'shvit_s1', 'swin_tiny_patch4_window7_224',
          'vit_tiny_patch16_224', 'volo_d1_224')
TRAINED = {'convnext', 'crossvit', 'dla', 'edgenext', 'efficientvit_msra', 'ghostnet', 'levit', 'mambaout', 'mobilenetv3',
           'pit', 'resnet', 'shvit', 'vision_transformer', 'coat'}


def test_sample(tmp_path):
    path, small = tmp_path / 'all.csv', tmp_path / 'small.csv'
    script = ROOT / 'tests' / 'sweep_backbones.py'
    outcome = run_command(sys.executable, script, path, '--filter', *SAMPLE, '--only', 'shapes')
    with open(path, newline='') as file:
        rows = list(csv.DictReader(file))
    assert {row['model']: row['outcome'] for row in rows} == {
        name: 'rejected' if name == 'qwen3_vit_88m_enc' else 'ok' for name in SAMPLE}, outcome
    assert 'qwen3_vit_88m_enc: --model qwen3_vit_88m_enc: expected a model with a classifier, found' in outcome.out
    with open(small, 'w', newline='') as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(row for row in rows if row['module'] in TRAINED)
    outcome = run_command(sys.executable, script, small, '--only', 'train')
    with open(small, newline='') as file:
        trained = {row['module']: row['outcome'] for row in csv.DictReader(file) if row['check'] == 'train'}
    assert trained == dict.fromkeys(TRAINED, 'ok'), outcome


@pytest.fixture
def weights(tmp_path):
    """Write the weights of a model as a folder, as .pth and as .safetensors; returns them."""
    def write(name: str = 'test_resnet', num_classes: int = 7, in_chans: int = 3, safe: bool = True, **kwargs):
        torch.manual_seed(1)
        model = timm.create_model(name, num_classes=num_classes, in_chans=in_chans, **kwargs)
        save_for_hf(model, tmp_path / 'folder', safe_serialization=safe)
        torch.save(model.state_dict(), tmp_path / 'w.pth')
        save_file(model.state_dict(), tmp_path / 'w.safetensors')
        return model.state_dict()
    return write


@pytest.fixture(params=['pth', 'safetensors', 'local-dir', 'hf-hub'])
def route(request, tmp_path):
    """Create a model from the weights by one of the routes."""
    def create(name: str, num_classes: int, **kwargs):
        if request.param in ('pth', 'safetensors'):
            return create_backbone(name, num_classes, checkpoint_path=str(tmp_path / f'w.{request.param}'), **kwargs)
        if request.param == 'hf-hub':
            hub = request.getfixturevalue('hub')
            files = {path.name: path.read_bytes() for path in (tmp_path / 'folder').iterdir()}
            hub.repos['us/net'] = dict(private=False, branches={'main': files})
            return create_backbone('hf-hub:us/net', num_classes, pretrained=True, **kwargs)
        return create_backbone(f"local-dir:{tmp_path / 'folder'}", num_classes, pretrained=True, **kwargs)
    return create


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Server of the Hub on this machine, to which the client is connected, with an empty cache."""
    server = Hub()
    server.connect_client(monkeypatch)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    yield server
    close_session()
    server.close()


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def without_fc(state: dict) -> dict:
    return {name: tensor for name, tensor in state.items() if not name.startswith('fc.')}


def test_a_classifier_of_other_classes_is_not_used(weights, route, caplog):
    caplog.set_level(logging.INFO, 'glmc')
    saved = weights(num_classes=1000)
    model = route('test_resnet', 3)
    assert_equal(without_fc(model.state_dict()), without_fc(saved))
    assert model.fc.weight.shape == (3, saved['fc.weight'].shape[1]) and not model.fc.weight.is_meta
    assert [record.message.split(': ', 1)[1] for record in caplog.records if record.name.startswith('glmc')] == [
        'not used: classifier of 1000 classes']
    assert model.pretrained_cfg.get('state_dict') is None


def test_a_classifier_of_as_many_classes_is_kept(weights, route, caplog):
    caplog.set_level(logging.INFO, 'glmc')
    saved = weights(num_classes=7)
    assert_equal(route('test_resnet', 7).state_dict(), saved)
    assert not [record for record in caplog.records if record.name.startswith('glmc')]


def test_21000_classes(weights, route):
    saved = weights(num_classes=21000)
    assert_equal(route('test_resnet', 21000).state_dict(), saved)


@pytest.mark.parametrize('name, conv', [('test_resnet', 'conv1.0'), ('test_vit', 'patch_embed.proj')])
@pytest.mark.parametrize('found, wanted', [(3, 1), (1, 3), (1, 1)])
def test_channels_are_adapted(weights, route, name, conv, found, wanted):
    saved = weights(name, in_chans=found)
    model = route(name, 3, in_chans=wanted)
    weight = model.get_submodule(conv).weight
    assert weight.shape[1] == wanted
    if wanted == 1:
        torch.testing.assert_close(weight, saved[f'{conv}.weight'].sum(1, keepdim=True))
    else:
        torch.testing.assert_close(weight, saved[f'{conv}.weight'].repeat(1, 3, 1, 1) / 3)


def test_position_embeddings_are_resized(weights, route):
    saved = weights('test_vit', img_size=64)
    model = route('test_vit', 3, img_size=32)
    assert model.pos_embed.shape[1] < saved['pos_embed'].shape[1]
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    prefix = model.num_prefix_tokens
    torch.testing.assert_close(model.pos_embed[:, :prefix], saved['pos_embed'][:, :prefix])
    same = route('test_vit', 3, img_size=64)
    assert torch.equal(same.pos_embed, saved['pos_embed'])


@pytest.mark.parametrize('prefix, wrapper', [
    *[(prefix, None) for prefix in ('module.', 'backbone.', 'model.', 'encoder.', '_orig_mod.', 'module.encoder_q.')],
    *[('model._orig_mod.', wrapper) for wrapper in ('state_dict', 'model', 'state_dict_ema', 'model_ema')]])
def test_prefixes_and_wrappers(weights, tmp_path, prefix, wrapper):
    saved = weights()
    content = {f'{prefix}{name}': tensor for name, tensor in saved.items()}
    torch.save({wrapper: content, 'epoch': 3} if wrapper else content, tmp_path / 'w.pth')
    assert_equal(create_backbone('test_resnet', 7, checkpoint_path=str(tmp_path / 'w.pth')).state_dict(), saved)


def test_prefix_in_a_folder(weights, tmp_path):
    saved = weights()
    save_file({f'encoder.{name}': tensor for name, tensor in saved.items()}, tmp_path / 'folder' / 'model.safetensors')
    assert_equal(create_backbone(f"local-dir:{tmp_path / 'folder'}", 7, pretrained=True).state_dict(), saved)


def test_the_average_is_preferred(weights, tmp_path):
    average = weights()
    latest = {name: torch.zeros_like(tensor) for name, tensor in average.items()}
    torch.save({'student': latest, 'ema': average}, tmp_path / 'w.pth')
    assert_equal(create_backbone('test_resnet', 7, checkpoint_path=str(tmp_path / 'w.pth')).state_dict(), average)


def test_heads_of_a_pretraining_are_named(weights, tmp_path, caplog):
    caplog.set_level(logging.INFO, 'glmc')
    saved = without_fc(weights())
    heads = ['module.fc.0.weight', 'module.fc.2.weight', 'module.projector.0.bias', 'queue', 'evil\n\x1b[31m']
    content = {f'module.{name}': tensor for name, tensor in saved.items()} | {name: torch.ones(4, 4) for name in heads}
    torch.save({'state_dict': content}, tmp_path / 'w.pth')
    model = create_backbone('test_resnet', 3, checkpoint_path=str(tmp_path / 'w.pth'))
    assert_equal(without_fc(model.state_dict()), saved)
    assert caplog.messages[-1] == (
        f"--initial-checkpoint {tmp_path / 'w.pth'}: not used: fc.0.weight, fc.2.weight, projector.0.bias and 2 more")


@pytest.mark.parametrize('change, found', [
    (lambda state: state.pop('layer2.0.conv1.weight'), '{n} of {total} tensors, no layer2.0.conv1.weight, expected shape '),
    (lambda state: state.update({'layer2.0.conv1.weight': torch.ones(2, 3)}),
     '{n} of {total} tensors, layer2.0.conv1.weight of shape 2x3, expected shape 48x32x3x3'),
    (lambda state: state.clear() or state.update({'a.weight': torch.ones(2)}), '0 of {total} tensors, no conv1.0.weight, ')])
def test_weights_that_do_not_fit_are_one_line(weights, route, tmp_path, change, found):
    state = dict(weights())
    total = len(without_fc(state))
    change(state)
    expected = found.format(n=total - 1, total=total)
    torch.save(state, tmp_path / 'w.pth')
    for path in (tmp_path / 'w.safetensors', tmp_path / 'folder' / 'model.safetensors'):
        save_file(state, path)
    with pytest.raises(InputError, match='expected weights of test_resnet, found: ' + expected):
        route('test_resnet', 3)


def test_tensors_of_another_architecture_are_refused(tmp_path):
    torch.save(timm.create_model('test_vit').state_dict(), tmp_path / 'w.pth')
    with pytest.raises(InputError, match=r'w.pth: expected weights of test_resnet, found: 0 of \d+ tensors, no conv1'):
        create_backbone('test_resnet', 3, checkpoint_path=str(tmp_path / 'w.pth'))


class Bomb:
    def __reduce__(self):
        return os.mkdir, ('exploded',)


@pytest.mark.parametrize('save', [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
@pytest.mark.parametrize('name', ['w.pth', 'w.bin', 'folder/pytorch_model.bin', 'hub'])
def test_a_pickle_with_code_is_refused(weights, tmp_path, monkeypatch, request, save, name):
    monkeypatch.chdir(tmp_path)
    weights(safe=False)
    path = tmp_path / ('folder/pytorch_model.bin' if name == 'hub' else name)
    save({'state_dict': {'fc.weight': torch.ones(3)}, 'code': Bomb()}, path)
    options = dict(name='test_resnet', checkpoint_path=str(path))
    if name.startswith('folder'):
        options = dict(name=f"local-dir:{tmp_path / 'folder'}", pretrained=True)
    elif name == 'hub':
        files = {file.name: file.read_bytes() for file in (tmp_path / 'folder').iterdir()}
        request.getfixturevalue('hub').repos['us/net'] = dict(private=False, branches={'main': files})
        options = dict(name='hf-hub:us/net', pretrained=True)
    with pytest.raises(InputError, match=r'only tensors are loaded \(weights_only\)$'):
        create_backbone(num_classes=3, **options)
    if 'checkpoint_path' not in options:
        with pytest.raises(InputError, match=r'only tensors are loaded \(weights_only\)$'):
            load_trained(options['name'])
    assert not (tmp_path / 'exploded').exists()


def test_tensors_as_bin_are_accepted(weights, tmp_path):
    saved = weights(safe=False)
    assert [path.name for path in (tmp_path / 'folder').iterdir() if path.suffix != '.json'] == ['pytorch_model.bin']
    path = tmp_path / 'folder' / 'pytorch_model.bin'
    assert_equal(create_backbone(f'local-dir:{path.parent}', 7, pretrained=True).state_dict(), saved)
    assert_equal(create_backbone('test_resnet', 7, checkpoint_path=str(path)).state_dict(), saved)


@pytest.mark.parametrize('content', [b'', b'PK\x03\x04', b'\x80\x04K\x01.', b'[1, 2]', pickle.dumps([1])])
@pytest.mark.parametrize('suffix', ['pth', 'safetensors'])
def test_a_broken_file_is_one_line(tmp_path, content, suffix):
    path = tmp_path / f'w.{suffix}'
    path.write_bytes(content)
    expected = f'^--initial-checkpoint {path}: expected weights of test_resnet, found: .'
    with pytest.raises(InputError, match=expected) as error:
        create_backbone('test_resnet', 3, checkpoint_path=str(path))
    assert len(str(error.value).splitlines()) == 1


def test_checkpoints_and_exports_start_another_run(finished_run, caplog):
    caplog.set_level(logging.INFO, 'glmc')
    export = finished_run / 'export' / 'model.safetensors'
    checkpoint = finished_run / 'checkpoints' / 'epoch-0001.safetensors'
    assert_equal(create_backbone('test_resnet', 3, checkpoint_path=str(export)).state_dict(), load_file(export))
    trained = load_trained(str(checkpoint)).model.state_dict()
    assert_equal(create_backbone('test_resnet', 3, checkpoint_path=str(checkpoint)).state_dict(), trained)
    other = create_backbone('test_resnet', 5, checkpoint_path=str(checkpoint))
    assert_equal(without_fc(other.state_dict()), without_fc(trained))
    assert 'not used: classifier of 3 classes, ' in caplog.text


def test_random_numbers_do_not_change(weights, tmp_path):
    weights()
    torch.manual_seed(3)
    expected = timm.create_model('test_resnet', num_classes=3).fc.weight
    torch.manual_seed(3)
    found = create_backbone('test_resnet', 3, checkpoint_path=str(tmp_path / 'w.pth')).fc.weight
    assert torch.equal(found, expected)


@pytest.mark.parametrize('offline', [True, False])
@pytest.mark.parametrize('model, place', [('test_resnet', 'timm/test_resnet.r160_in1k'), ('hf-hub:us/net', 'us/net')])
def test_no_network_is_one_line_within_seconds(hub, monkeypatch, offline, model, place):
    hub.close()
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', offline)
    start, reason = time.time(), 'HF_HUB_OFFLINE is set' if offline else r'\[Errno \d+\] Connection refused'
    expected = (f'^--model {model}: cannot download {place}: {reason}; expected a network, an architecture with '
                '--initial-checkpoint FILE, or --model local-dir:FOLDER$')
    with pytest.raises(InputError, match=expected):
        create_backbone(model, 3, pretrained=True)
    assert time.time() - start < 5


def test_an_architecture_without_weights_is_one_line():
    expected = '^--pretrained: timm has no weights of resnet32_cifar; it has resnet.*_in1k, .*'
    with pytest.raises(InputError, match=expected):
        create_backbone('resnet32_cifar', 3, pretrained=True)


def test_a_checkpoint_to_evaluate_has_the_classifier(weights, tmp_path):
    weights(num_classes=4)
    expected = 'w.pth: expected weights of test_resnet with 3 classes, found: .* fc.weight of shape 4x.*, expected shape 3x'
    with pytest.raises(InputError, match='^--checkpoint .*' + expected):
        load_trained('test_resnet', checkpoint=str(tmp_path / 'w.pth'), num_classes=3)
    assert load_trained('test_resnet', checkpoint=str(tmp_path / 'w.pth'), num_classes=4).num_classes == 4
