"""The export is an ordinary timm model, also for a process that knows nothing of this package."""
import json
import os
import re
import shutil
import stat
import sys

import pytest
import timm
import torch
from conftest import COUNTS, TINY, run_command
from PIL import Image
from safetensors.torch import load_file

import glmc.export.export
from glmc.errors import RunError
from glmc.export import export_checkpoint, export_model
from glmc.models.backbone import create_backbone
from glmc.training.checkpoint import load_checkpoint, save_checkpoint

ALONE = '''
import sys, timm, torch
model = timm.create_model(sys.argv[1], pretrained=True).eval()
assert 'glmc' not in sys.modules
torch.save(model(torch.load(sys.argv[2])), sys.argv[3])
'''
METRICS = {
    'top1', 'top5', 'many', 'medium', 'few', 'shot_classes', 'class_mean', 'worst_class', 'harmonic_mean', 'macro_f1', 'ece',
    'per_class_accuracy', 'train_counts', 'shot_thresholds', 'fingerprint', 'parameters', 'command', 'seed', 'versions',
    'commit', 'seconds', 'model', 'method', 'evaluated_on', 'num_images'}


def trained_model(run) -> torch.nn.Module:
    """The model as the training had it, from the checkpoint."""
    state = load_checkpoint(sorted((run / 'checkpoints').glob('epoch-*'))[-1])
    model = create_backbone(**state['description']['model'])
    model.load_state_dict(state['model']['state_dict'])
    return model.eval()


def metrics_of(run) -> dict:
    return json.loads((run / 'export' / 'metrics.json').read_text())


@pytest.fixture
def export_of(script, folders, tmp_path):
    """Options -> the folder of a tiny run."""
    def run(*options):
        outcome = script(*TINY, '--data-dir', folders, '--output', tmp_path, '--experiment', 'run', *options)
        assert outcome.code == 0, outcome.err
        return tmp_path / 'run'
    return run


def logits_without_the_package(run, images, tmp_path) -> torch.Tensor | str:
    torch.save(images, tmp_path / 'images.pt')
    outcome = run_command(
        sys.executable, '-c', ALONE, f"local-dir:{run / 'export'}", tmp_path / 'images.pt', tmp_path / 'logits.pt',
        cwd=tmp_path, PYTHONPATH='')
    return torch.load(tmp_path / 'logits.pt') if outcome.code == 0 else outcome.err


@pytest.mark.parametrize('options', ['', '--model resnet10t --channels-last --in-chans 1'])
def test_loads_without_the_package(options, export_of, finished_run, tmp_path):
    run = export_of(*options.split()) if options else finished_run
    model = trained_model(run)
    images = torch.randn(3, model.pretrained_cfg['input_size'][0] if not options else 1, 32, 32)
    assert torch.equal(logits_without_the_package(run, images, tmp_path), model(images))


def test_cifar_nets_need_the_package(export_of, tmp_path):
    run = export_of('--model', 'resnet32_cifar')
    images = torch.randn(3, 3, 32, 32)
    assert 'Unknown model (resnet32_cifar)' in logits_without_the_package(run, images, tmp_path)
    assert 'import glmc  # adds resnet32_cifar to timm\nimport timm\n' in (run / 'export' / 'README.md').read_text()
    loaded = timm.create_model(f"local-dir:{run / 'export'}", pretrained=True).eval()
    assert torch.equal(loaded(images), trained_model(run)(images))


@pytest.mark.parametrize('options', [
    '--channels-last', '--model test_vit', '--model test_vit --gp avg', '--model-kwargs output_stride=8', '--gp max',
    '--img-size 48', '--mean 0.1 --std 0.3', '--balanced', '--method ce', '--model test_efficientnet --in-chans 1'])
def test_every_option_survives(options, export_of):
    run = export_of(*options.split())
    loaded, model = timm.create_model(f"local-dir:{run / 'export'}", pretrained=True).eval(), trained_model(run)
    config = timm.data.resolve_model_data_config(loaded)
    images = torch.randn(2, *config['input_size'])
    assert torch.equal(loaded(images), model(images))
    assert config['input_size'][1:] == ((48, 48) if '48' in options else (32, 32))
    assert not options.startswith('--mean') or [*config['mean'], *config['std']] == [0.1] * 3 + [0.3] * 3


def test_moving_average_is_what_is_exported(export_of):
    run = export_of('--model-ema', '--model-ema-decay', '0.5', '--epochs', '2')
    state = load_checkpoint(run / 'checkpoints' / 'epoch-0001.safetensors')
    loaded = timm.create_model(f"local-dir:{run / 'export'}", pretrained=True).state_dict()
    average, last = state['ema']['state_dict_ema'], state['model']['state_dict']
    assert all(torch.equal(loaded[name], average[name]) for name in loaded)
    assert not torch.equal(average['fc.weight'], last['fc.weight'])


def test_plain_timm_loop_measures_the_same(finished_run, folders):
    model = timm.create_model(f"local-dir:{finished_run / 'export'}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    names, metrics = model.pretrained_cfg['label_names'], metrics_of(finished_run)
    hits = {name: [] for name in names}
    for path in sorted((folders / 'validation').rglob('*.png')):
        logits = model(transform(Image.open(path).convert('RGB'))[None])
        hits[path.parent.name].append(names[logits.argmax()] == path.parent.name)
    every = sum(hits.values(), [])
    assert metrics['top1'] == pytest.approx(100 * sum(every) / len(every)) and metrics['num_images'] == len(every) == 13
    assert metrics['per_class_accuracy'] == pytest.approx([100 * sum(hits[name]) / len(hits[name]) for name in names])


def test_metrics(finished_run):
    metrics = metrics_of(finished_run)
    assert metrics.keys() >= METRICS
    assert metrics['train_counts'] == list(COUNTS.values()) and metrics['shot_classes'] == {'many': 0, 'medium': 0, 'few': 3}
    assert metrics['many'] is None and metrics['shot_thresholds'] == [20, 100] and metrics['seed'] == 42
    assert 'train_glmc.py --model test_resnet' in metrics['command'] and {'torch', 'timm'} <= metrics['versions'].keys()
    assert metrics['parameters'] == sum(p.numel() for p in timm.create_model('test_resnet', num_classes=3).parameters())


def test_config(finished_run):
    config = json.loads((finished_run / 'export' / 'config.json').read_text())
    source = config['pretrained_cfg']
    assert config['architecture'] == 'test_resnet' and config['num_classes'] == 3 and config['label_names'] == list(COUNTS)
    assert source['input_size'] == [3, 32, 32] and source['mean'] == source['std'] == [0.5, 0.5, 0.5]
    assert {'interpolation', 'crop_pct'} <= source.keys() and source['tag'] == 'glmc'
    assert not any(source.get(key) for key in ('license', 'origin_url', 'paper_ids', 'hf_hub_id'))
    assert {path.name for path in (finished_run / 'export').iterdir()} >= {
        'model.safetensors', 'config.json', 'README.md', 'metrics.json'}


def test_files_are_readable_as_the_umask_says(finished_run):
    mask = os.umask(0)
    os.umask(mask)
    for path in finished_run.rglob('*'):
        assert stat.S_IMODE(path.stat().st_mode) == (0o777 if path.is_dir() else 0o666) & ~mask, path


def test_export_from_a_checkpoint_alone(finished_run, tmp_path, monkeypatch, capsys):
    checkpoint = finished_run / 'checkpoints' / 'epoch-0001.safetensors'
    monkeypatch.setattr(sys, 'argv', ['glmc.export', str(checkpoint), str(tmp_path / 'export')])
    assert glmc.export.export.main() in (0, None) and str(tmp_path / 'export') in capsys.readouterr().out
    for name in ('model.safetensors', 'config.json', 'metrics.json', 'README.md'):
        assert (tmp_path / 'export' / name).read_bytes() == (finished_run / 'export' / name).read_bytes(), name


def test_onnx_by_timms_route_gives_the_same_logits(finished_run, tmp_path):
    onnx = pytest.importorskip('onnx', reason='needs onnx')
    pytest.importorskip('onnxscript', reason='needs onnxscript')
    from onnx.reference import ReferenceEvaluator
    from timm.utils.onnx import onnx_export
    name = f"local-dir:{finished_run / 'export'}"
    onnx_export(timm.create_model(name, pretrained=True, exportable=True), str(tmp_path / 'model.onnx'), batch_size=1)
    graph, images = onnx.load(tmp_path / 'model.onnx'), torch.randn(1, 3, 32, 32)
    found = ReferenceEvaluator(graph).run(None, {graph.graph.input[0].name: images.numpy()})[0]
    expected = timm.create_model(name, pretrained=True).eval()(images)
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-5, rtol=1e-5)


def test_an_earlier_checkpoint_exports_too(finished_run, tmp_path):
    export_checkpoint(finished_run / 'checkpoints' / 'epoch-0000.safetensors', tmp_path / 'early')
    assert json.loads((tmp_path / 'early' / 'metrics.json').read_text())['epoch'] == 0


@pytest.mark.parametrize('name, layer, expected', [
    ('act1', torch.nn.Identity(), 'the loaded model gives other logits than the trained one, or NaN'),
    ('bn1', torch.nn.Identity(), 'the written files cannot be loaded: Error\\(s\\) in loading state_dict for ResNet')])
def test_a_failed_export_keeps_the_earlier_one(finished_run, tmp_path, name, layer, expected):
    description = load_checkpoint(finished_run / 'checkpoints' / 'epoch-0001.safetensors')['description']['export']
    shutil.copytree(finished_run / 'export', tmp_path / 'export')
    model = trained_model(finished_run)
    setattr(model, name, layer)  # config.json does not record this change
    with pytest.raises(RunError) as error:
        export_model(tmp_path / 'export', model, **description, metrics=metrics_of(finished_run))
    assert re.fullmatch(
        f"{tmp_path / 'export'}: not exported: {expected}; an earlier export and the checkpoints are unchanged; "
        '`python -m glmc.export CHECKPOINT FOLDER` tries again from a checkpoint', str(error.value))
    assert [path.name for path in tmp_path.iterdir()] == ['export'], 'the half-written folder is removed'
    for path in (finished_run / 'export').glob('*.*'):
        assert path.read_bytes() == (tmp_path / 'export' / path.name).read_bytes(), path.name


def test_a_failed_export_of_a_checkpoint_is_one_line(finished_run, tmp_path, monkeypatch, capsys):
    state = load_checkpoint(finished_run / 'checkpoints' / 'epoch-0001.safetensors')
    state['model']['state_dict']['fc.bias'][0] = float('nan')
    save_checkpoint(tmp_path / 'nan.safetensors', state)
    monkeypatch.setattr(sys, 'argv', ['glmc.export', str(tmp_path / 'nan.safetensors'), str(tmp_path / 'export')])
    assert glmc.export.export.main() == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith(f"error: {tmp_path / 'nan.safetensors'}: ") and 'NaN' in err and err.count('\n') == 1
    assert [path.name for path in tmp_path.iterdir()] == ['nan.safetensors']


def test_an_export_starts_another_run_with_other_classes(finished_run):
    trained = load_file(finished_run / 'export' / 'model.safetensors')
    model = create_backbone(f"local-dir:{finished_run / 'export'}", num_classes=5, pretrained=True)
    found = model.state_dict()
    assert model.num_classes == 5 and found['fc.weight'].shape[0] == 5
    assert all(torch.equal(found[name], trained[name]) for name in trained if not name.startswith('fc.'))
