"""Loading of any model that timm can load, with any content of its config.json."""
import json
import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models._hub import save_for_hf

from glmc.errors import InputError
from glmc.export.load import load_trained, valid_metadata

PROFILE = dict(class_counts=[14, 7, 4], shot_thresholds=[5, 10], fingerprint='f')


@pytest.fixture
def export(tmp_path):
    """Write a folder as timm pushes it, with extra keys in config.json."""
    def write(_name: str = 'test_resnet', **extra):
        torch.manual_seed(0)
        model = timm.create_model(_name, num_classes=3, **({'img_size': 32} if 'vit' in _name else {}))
        save_for_hf(model, tmp_path / 'export', safe_serialization=True)
        path = tmp_path / 'export' / 'config.json'
        path.write_text(json.dumps({**json.loads(path.read_text()), **extra}))
        return tmp_path / 'export'
    return write


def test_a_model_that_timm_pushed_has_no_metadata(export):
    found = load_trained(str(export()))
    assert (found.num_classes, found.class_names, found.metadata) == (3, None, {})
    assert not found.model.training


def test_metadata_of_an_export_is_kept(export):
    folder = export(label_names=['a', 'b', 'c'], glmc=dict(method='ce', profile=PROFILE, prior='train'))
    found = load_trained(f'local-dir:{folder}')
    assert found.class_names == ['a', 'b', 'c']
    assert found.metadata == dict(method='ce', prior='train', profile=PROFILE)


def test_the_weights_file_of_an_export_is_the_export(export):
    folder = export()
    by_file, by_folder = load_trained(str(folder / 'model.safetensors')), load_trained(str(folder))
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(by_file.model(images), by_folder.model(images))


@pytest.mark.parametrize('source', [
    None, [], 'glmc', 5, {'profile': []}, {'method': {}, 'precision': [], 'prior': 'x'}, {'prior': [1, 1]}])
def test_malformed_metadata_is_dropped(source):
    assert valid_metadata(source, 3) == {}


@pytest.mark.parametrize('profile', [
    {'class_counts': 'many'}, {'class_counts': [1, -2]}, {'class_counts': [1, 2.5]}, {'class_counts': [True]},
    {'class_counts': [10 ** 30]}, {'shot_thresholds': [100, 20]}, {'shot_thresholds': [1]}, {'shot_thresholds': ['a', 'b']},
    {'fingerprint': {}}])
def test_malformed_profiles_are_dropped(profile):
    assert valid_metadata({'profile': profile}, 3) == {}


@pytest.mark.parametrize('prior, valid', [
    ('train', True), ('uniform', True), ([0.5, 0.5, 0], True), ([100, 0, 3.5], True), ('test', False), ({}, False),
    ([], False), ([0.5, 0.5], False), ([0, 0, 0.0], False), ([1, 1, -1], False), ([1, 1, True], False), ([1, 1, '1'], False),
    ([1, 1, None], False), ([1, 1, float('nan')], False), ([1, 1, float('inf')], False), ([1, 1, 10 ** 400], False)])
def test_prior_is_kept_where_it_is_valid(export, prior, valid):
    metadata = load_trained(str(export(glmc=dict(prior=prior)))).metadata
    assert metadata == (dict(prior=prior) if valid else {})


@pytest.mark.parametrize('names', [5, 'abc', {'a': 1}, ['a', 'b'], ['a', 'a', 'b'], [None] * 3])
def test_malformed_class_names_are_none(export, names):
    assert load_trained(str(export(label_names=names))).class_names is None


def test_other_metadata_of_an_export_is_kept():
    profile = dict(PROFILE, num_images=25)
    source = dict(method='ce', recipe=dict(epochs=3), license='mit', base_model='us/net', profile=profile)
    assert valid_metadata(source, 3) == source
    assert valid_metadata({**source, 'recipe': [], 'license': None}, 3) == dict(
        method='ce', base_model='us/net', profile=profile)


def test_class_names_are_text(export):
    assert load_trained(str(export(label_names=[1, 2, None]))).class_names == ['1', '2', 'None']


@pytest.mark.parametrize('extra', [
    dict(architecture=5), dict(architecture='nothing'), dict(pretrained_cfg=[]), dict(num_classes='three'),
    dict(model_args=[1])])
def test_a_config_that_timm_cannot_take_is_one_line(export, extra):
    with pytest.raises(InputError, match='export: cannot be loaded: ') as error:
        load_trained(str(export(**extra)))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize('file, content', [
    ('config.json', b'{'), ('config.json', b'[]'), ('config.json', b'null'), ('config.json', b'\xff'), ('config.json', b''),
    ('model.safetensors', b''), ('model.safetensors', b'\x80\x04K\x01.'), ('model.safetensors', b'\xff' * 100)])
def test_broken_files_are_one_line(export, file, content):
    folder = export()
    (folder / file).write_bytes(content)
    with pytest.raises(InputError, match='export: cannot be loaded: ') as error:
        load_trained(str(folder))
    assert len(str(error.value).splitlines()) == 1


def test_weights_of_another_model_are_one_line(export):
    folder = export()
    save_file({'fc.weight': torch.zeros(3, 5)}, folder / 'model.safetensors')
    with pytest.raises(InputError, match='export: cannot be loaded: '):
        load_trained(str(folder))


def test_a_vision_transformer_takes_another_size(export):
    found = load_trained(str(export('test_vit')), data_options=dict(img_size=48), img_size=48)
    assert found.data_config['input_size'] == (3, 48, 48)
    assert found.model(torch.zeros(1, 3, 48, 48)).shape == (1, 3)
    with pytest.raises(InputError, match='--img-size 8: .*export cannot take it'):
        load_trained(str(export('test_vit')), data_options=dict(img_size=8), img_size=8)


@pytest.mark.parametrize('options, flag', [
    (dict(checkpoint='x.pth'), '--checkpoint x.pth'), (dict(num_classes=4), '--num-classes 4'),
    (dict(in_chans=1), '--in-chans 1'), (dict(global_pool='max'), '--gp max'),
    (dict(drop_rate=0.1), '--model-kwargs drop_rate 0.1')])
def test_a_trained_model_is_not_changed(export, options, flag):
    expected = f'{flag}: is for a bare architecture; .*export is a trained model with 3 classes and 3 channels'
    with pytest.raises(InputError, match=expected):
        load_trained(str(export()), **options)


def test_options_equal_to_the_models_are_accepted(export):
    assert load_trained(str(export()), num_classes=3, in_chans=3).num_classes == 3


def test_a_data_config_that_does_not_fit_is_one_line(export):
    with pytest.raises(InputError, match='export: .*'):
        load_trained(str(export()), data_options=dict(mean=[0.1, 0.2]))


@pytest.mark.parametrize('name, expected', [
    ('nowhere/export', 'no such file or folder; a Hub model is hf-hub:ORG/NAME'),
    ('local-dir:nowhere', 'cannot be loaded: '),
    ('hf-hub:us/nothing', 'cannot download us/nothing: HF_HUB_OFFLINE is set; expected a network'),
    ('hf-hub:', 'cannot be loaded: '), ('resnet_18', 'not a model of timm')])
def test_a_missing_model_is_one_line(name, expected):
    with pytest.raises(InputError, match=expected) as error:
        load_trained(name, num_classes=3)
    assert len(str(error.value).splitlines()) == 1


def test_damaged_weights_of_an_export_are_refused(finished_run, tmp_path):
    folder = tmp_path / 'export'
    shutil.copytree(finished_run / 'export', folder)
    assert load_trained(str(folder)).num_classes == 3
    content = bytearray((folder / 'model.safetensors').read_bytes())
    content[-100] ^= 1
    (folder / 'model.safetensors').write_bytes(content)
    for name in (folder, f'local-dir:{folder}', folder / 'model.safetensors'):
        with pytest.raises(InputError, match='its sha256 differs from weights_sha256 in metrics.json'):
            load_trained(str(name))


def test_weights_of_an_export_that_are_nan_are_refused(export):
    folder = export()
    weights = load_file(folder / 'model.safetensors')
    weights['fc.bias'] = weights['fc.bias'] * float('nan')
    save_file(weights, folder / 'model.safetensors', metadata={'format': 'pt'})
    with pytest.raises(InputError, match='found NaN in fc.bias'):
        load_trained(str(folder))


@pytest.mark.parametrize('name, values', [
    ('input_size', ['x', 3, [3, 32], [3, -1, 32], [3, 10 ** 6, 10 ** 6], ['3', 32, 32], {}, [3, 32.5, 32]]),
    ('mean', ['x', [1], 5, ['a', 'b', 'c'], [None] * 3]), ('std', [[0, 0, 0], 'x', {}]),
    ('interpolation', [5, [], {}]), ('crop_pct', ['x', -1, 0, [], 1e9]), ('crop_mode', [5, []])])
def test_preprocessing_of_another_form_is_one_line(name, values, export):
    folder = export()
    config = json.loads((folder / 'config.json').read_text())
    for value in values:
        changed = {**config, 'pretrained_cfg': {**config['pretrained_cfg'], name: value}}
        (folder / 'config.json').write_text(json.dumps(changed))
        try:
            found = load_trained(str(folder)).data_config
        except InputError as error:
            assert '\n' not in str(error)
        else:  # timm ignores it
            assert found[name] != value or value in ([1],)


@pytest.mark.parametrize('name, values', [
    ('architecture', [5, None, [], 'no_such', {}]), ('num_classes', ['x', -1, 1.5, None, {}, 10 ** 12]),
    ('pretrained_cfg', ['x', [], 5, None]), ('label_names', [5, {}, [[]], None, ['a']]),
    ('glmc', [5, [], 'x', {'prior': {}}]),
    ('global_pool', [5, {}, 'none']), ('model_args', [5, [], {'no_such': 1}, {'num_classes': 7}]), ('num_features', ['x'])])
def test_config_of_another_form_loads_or_is_one_line(name, values, export):
    for value in values:
        folder = export(**{name: value})
        try:
            load_trained(str(folder))
        except InputError as error:
            assert '\n' not in str(error)
