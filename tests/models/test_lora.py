"""Low-rank adapters: where they go, what they train, and that merging changes no number."""
import json
import sys

import numpy as np
import pytest
import timm
import torch
from conftest import TINY, free_port, launch_train
from safetensors.torch import load_file
from torch import nn

from glmc.cli import parse_args, pick
from glmc.config import train_parser
from glmc.errors import InputError
from glmc.export import export_checkpoint
from glmc.export.load import load_trained
from glmc.methods import METHODS
from glmc.models.backbone import create_backbone
from glmc.models.classifier import classifier_heads
from glmc.models.lora import LAYERS, adapters, add_adapters, merge_adapters
from glmc.training.checkpoint import load_checkpoint
from glmc.training.engine import TrainStep
from glmc.training.optim import create_optimizer

pytest.importorskip('peft')
COUNTS = [50, 30, 12, 3]
NETS = {  # kinds of layers: linear; 1x1 and 3x3 with strides; depthwise between; 2x2 with stride 2; windows; two heads
    'test_vit': dict(img_size=32), 'test_resnet': {}, 'test_efficientnet': {}, 'test_convnext': {}, 'resnet18': {},
    'swin_tiny_patch4_window7_224': dict(img_size=64, window_size=2, embed_dim=12, depths=(1, 1), num_heads=(2, 2)),
    'deit_tiny_distilled_patch16_224': dict(img_size=32, depth=1, embed_dim=24, num_heads=2),
    'beit_base_patch16_224': dict(img_size=32, depth=2, embed_dim=24, num_heads=2)}
SMALL = 'vit_tiny_patch16_224', dict(img_size=32, depth=2, embed_dim=24, num_heads=2)


def adapted(name: str, rank: int = 4, targets=None, noise: float = 0.1) -> nn.Module:
    """A model whose adapters have an effect on logits of about 1."""
    torch.manual_seed(0)
    model = create_backbone(name, len(COUNTS), **NETS.get(name, {}), lora=dict(rank=rank, targets=targets))
    for layer in adapters(model).values():
        nn.init.normal_(layer.lora_B['default'].weight, std=noise)
    for head in classifier_heads(model):
        nn.init.normal_(head.weight, std=head.in_features ** -0.5)
    return model.eval()


def images_of(model: nn.Module) -> torch.Tensor:
    return torch.randn(2, *timm.models.get_model_input_config(model)['input_size'])


@torch.no_grad()
@pytest.mark.parametrize('name', NETS)
def test_a_merged_model_is_a_plain_one_with_the_same_logits(name):
    model, plain = adapted(name), create_backbone(name, len(COUNTS), **NETS[name]).eval()
    merged, images = merge_adapters(model), images_of(model)
    assert [type(module) for module in merged.modules()] == [type(module) for module in plain.modules()]
    assert merged.state_dict().keys() == plain.state_dict().keys() and not hasattr(merged, 'peft_config')
    torch.testing.assert_close(merged(images), model(images), atol=1e-5, rtol=1e-5)
    plain.load_state_dict({name.replace('.base_layer', ''): value for name, value in model.state_dict().items()
                           if '.lora_' not in name})
    assert (plain(images) - model(images)).abs().max() > 1e-3  # the adapters have an effect
    assert adapters(model) and merge_adapters(plain) is plain


@pytest.mark.parametrize('name', NETS)
def test_adapters_are_beside_every_layer_they_fit(name):
    model, plain = adapted(name), create_backbone(name, len(COUNTS), **NETS[name])
    heads = classifier_heads(plain)
    without = {layer: module for layer, module in plain.named_modules()
               if isinstance(module, LAYERS) and layer not in adapters(model)}
    first = without.pop(plain.pretrained_cfg['first_conv'])
    assert first.in_channels == 3
    others = [module for module in without.values() if module not in heads]
    if name.startswith('beit'):
        assert [layer for layer in without if 'head' not in layer] == ['blocks.0.attn.qkv', 'blocks.1.attn.qkv']
    else:
        assert all(getattr(module, 'groups', 1) > 1 for module in others)
    trained = {layer for layer, parameter in model.named_parameters() if parameter.requires_grad}
    own = {layer for layer in trained if '.lora_A.' in layer or '.lora_B.' in layer}
    assert len(own) == 2 * len(adapters(model)) > 4
    assert trained - own == {layer for layer, parameter in plain.named_parameters()
                             if any(parameter is p for head in heads for p in head.parameters())}


def test_an_adapter_starts_without_effect_and_scaled_for_the_learning_rate():
    """r·AᵀA has the mean 1: its diagonal is 1 on average."""
    torch.manual_seed(0)
    plain = create_backbone('test_resnet', 4).eval()
    weights, images = {name: value.clone() for name, value in plain.state_dict().items()}, torch.randn(2, 3, 160, 160)
    for rank in (2, 8, 16):
        model = create_backbone('test_resnet', 4)
        model.load_state_dict(weights)
        model = add_adapters(model, rank).eval()
        assert torch.equal(model(images), plain(images))
        diagonals = torch.cat([(layer.scaling['default'] * layer.lora_A['default'].weight).square().sum(0).flatten()
                               for layer in adapters(model).values()])
        assert diagonals.mean().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize('targets, expected', [
    (['qkv', 'fc2'], {'attn.qkv', 'mlp.fc2'}), (['attn.proj'], {'attn.proj'}), (['blocks.*.mlp.*'], {'mlp.fc1', 'mlp.fc2'}),
    (['proj'], {'attn.proj', 'patch_embed.proj'})])
def test_targets_are_names_last_words_or_patterns(targets, expected):
    found = {name.partition('.')[2].partition('.')[2] if name.startswith('blocks') else name
             for name in adapters(adapted('test_vit', targets=targets))}
    assert found == expected


REFUSED = {
    'qkw': ('test_vit', '--lora-targets qkw: matches no linear layer or convolution of the model, expected names such as '
                        'proj, qkv, fc1, fc2; did you mean qkv?'),
    'fc': ('test_resnet', '--lora-targets fc: fc is the classifier, which is trained without an adapter'),
    'conv_dw': ('test_efficientnet', '--lora-targets conv_dw: blocks.3.0.conv_dw is a convolution with groups'),
    'qkv': ('beit_base_patch16_224', '--lora-targets qkv: blocks.0.attn.qkv is never called'),
    'conv1': ('resnetv2_50x1_bit', '--lora-targets conv1: stages.0.blocks.0.conv1 is a StdConv2d, expected a plain')}


@pytest.mark.parametrize('target', REFUSED)
def test_targets_that_cannot_have_an_adapter_are_refused(target):
    name, expected = REFUSED[target]
    with pytest.raises(InputError) as error:
        adapted(name, targets=[target])
    assert str(error.value).startswith(expected)


def test_a_rank_that_is_not_low_is_refused():
    with pytest.raises(InputError, match='--lora-targets fc1: blocks.0.mlp.fc1 has rank 64, expected a lower --lora-rank'):
        adapted('test_vit', 64, ['fc1'])
    with pytest.raises(InputError, match='--lora-rank 5000: the model has no layer of a higher rank'):
        adapted('test_vit', 5000)


def test_without_peft_one_line_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, 'peft', None)
    with pytest.raises(InputError, match='^--lora-rank 4: needs pip install peft: '):
        adapted('test_vit')


def trained(method: str, compiler=lambda step: step, **options):
    """Task and optimizer after two steps of a row on random images."""
    row, (args, _) = METHODS[method], parse_args(train_parser(METHODS), ['--method', method])
    args.teacher = create_backbone(SMALL[0], len(COUNTS), **SMALL[1])
    torch.manual_seed(0)
    backbone = create_backbone(SMALL[0], len(COUNTS), **SMALL[1], lora=dict(rank=4))
    task = row.task(row.module(backbone, **pick(args, row.module_options)), COUNTS, **pick(args, row.task_options)).train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    optimizer = create_optimizer(
        task.get_trainable_module(), opt='sgd', lr=0.01, weight_decay=0.1, momentum=0.9, **options)
    mixer, rng = row.mixer(COUNTS, **pick(args, row.mixer_options)), np.random.default_rng(0)
    size, images = images_of(backbone).shape[1:], 2 if row.paired and args.partner == 'sampler' else 1
    views = torch.from_numpy(rng.normal(size=(8, images, len(row.views), *size))).float()
    labels = torch.from_numpy(rng.integers(len(COUNTS), size=(8, images)))
    step = compiler(TrainStep(task, mixer, nn.Identity()))
    for number in range(2):
        task.set_progress(number / 2)
        losses = step(views, labels, mixer.sample_params(8, size[1:], rng))
        losses['loss'].backward()
        optimizer.step()
        task.after_batch(losses)
        optimizer.zero_grad()
        task.update_ema(number)
    return task, optimizer, before


@pytest.mark.parametrize('method', [name for name, row in METHODS.items() if not row.backbone_options])
def test_a_row_trains_adapters_and_classifiers_only(method):
    task, optimizer, before = trained(method)
    model = task.get_eval_model()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    trainable = {name for name in before if '.lora_A.' in name or '.lora_B.' in name} | {'head.weight', 'head.bias'}
    assert changed <= trainable and trainable - changed <= {'head.bias'}  # cosine classifiers have none
    assert all(parameter.requires_grad for parameter in optimizer.state)  # of the frozen ones there is none
    merged, images = merge_adapters(model).eval(), images_of(model)
    torch.testing.assert_close(merged(images), model.eval()(images), atol=1e-5, rtol=1e-5)


def test_a_step_is_one_graph():
    torch._dynamo.reset()
    graphs = []
    trained('glmc', lambda step: torch.compile(
        step, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward))
    assert len(graphs) == 1


def test_layer_decay_gives_an_adapter_the_rate_of_its_layer():
    task, optimizer, _ = trained('glmc', layer_decay=0.5, filter_bias_and_bn=True)
    scales = {parameter: group['lr_scale'] for group in optimizer.param_groups for parameter in group['params']
              if 'lr_scale' in group}
    names = dict(task.get_eval_model().named_parameters())
    rates = [scales[names[f'blocks.{block}.attn.qkv.lora_A.default.weight']] for block in range(2)]
    assert rates[1] == 2 * rates[0] < scales[names['head.weight']] == 1
    assert len(scales) == sum(parameter.requires_grad for parameter in names.values())


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('weights') / 'start.pth'
    torch.save(timm.create_model('test_vit', num_classes=3, img_size=32).state_dict(), path)
    return path


@pytest.fixture
def lora_run(script, folders, weights, tmp_path):
    """Name and further options -> folder of a run with adapters, and its log."""
    def run(name, *options):
        outcome = script(*TINY, '--model', 'test_vit', '--data-dir', folders, '--output', tmp_path, '--experiment', name,
                         '--initial-checkpoint', weights, '--lora-rank', '2', '--epochs', '2', '--model-ema',
                         '--model-ema-decay', '0.5', *options)
        assert outcome.code == 0, outcome.err
        return tmp_path / name, outcome.err
    return run


def test_a_run_exports_a_plain_model_and_resumes(lora_run, weights, tmp_path):
    run, log = lora_run('whole', '--stage2', 'crt')
    assert 'LoRA: adapters of rank 2 beside 24 layers' in log
    exported, start = load_file(run / 'export' / 'model.safetensors'), torch.load(weights)
    assert exported.keys() == start.keys()
    changed = {name for name in start if not torch.equal(exported[name], start[name])}
    assert changed == {name for name in start if name.endswith('weight') and start[name].ndim == 2} | {'head.bias'}
    metrics = json.loads((run / 'export' / 'metrics.json').read_text())
    assert metrics['parameters'] == sum(value.numel() for value in start.values())
    again = load_file(export_checkpoint(run / 'checkpoints' / 'epoch-0001.safetensors', tmp_path / 'again')
                      / 'model.safetensors')
    assert all(torch.equal(again[name], exported[name]) for name in exported)
    loaded = load_trained(str(run / 'checkpoints' / 'epoch-0001.safetensors')).model.state_dict()
    assert loaded.keys() == exported.keys() and all(torch.equal(loaded[name], exported[name]) for name in exported)
    state = load_checkpoint(run / 'checkpoints' / 'epoch-0001.safetensors')
    backbone = create_backbone(**state['description']['model'])
    backbone.load_state_dict(state['ema']['state_dict_ema'])
    images, plain = torch.randn(2, 3, 32, 32), timm.create_model(f"local-dir:{run / 'export'}", pretrained=True).eval()
    torch.testing.assert_close(plain(images), backbone.eval()(images), atol=1e-5, rtol=1e-5)
    resumed, _ = lora_run('resumed', '--resume', run / 'checkpoints' / 'epoch-0000.safetensors')
    found = load_file(resumed / 'export' / 'model.safetensors')
    assert all(torch.equal(found[name], exported[name]) for name in exported)


def test_a_checkpoint_with_other_adapters_is_refused(lora_run, script, folders, weights, tmp_path):
    run, _ = lora_run('run')
    path = run / 'checkpoints' / 'epoch-0000.safetensors'
    common = (*TINY, '--model', 'test_vit', '--data-dir', folders, '--output', tmp_path, '--experiment', 'other')
    done = script(*common, '--initial-checkpoint', weights, '--lora-rank', '3', '--resume', path)
    assert done.code == 2 and "was trained with lora {'rank': 2, 'targets': None}, this run has {'rank': 3" in done.err
    done = script(*common, '--initial-checkpoint', path)
    assert done.code == 2 and 'found: adapters that are not merged; python -m glmc.export CHECKPOINT FOLDER' in done.err


@pytest.mark.slow
def test_two_processes_train_as_one(folders, weights, tmp_path):
    """Same global batch, with gradients of the adapters exchanged; to rounding."""
    found = []
    for name, batch, processes in (('one', '8', ()), ('two', '4', ('--multi_gpu', '--num_processes', '2'))):
        launcher = (*processes, '--main_process_port', str(free_port())) if processes else ()
        done = launch_train(*TINY, '--model', 'test_vit', '--batch-size', batch, '--data-dir', folders, '--method', 'ce',
                            '--initial-checkpoint', weights, '--lora-rank', '2', '--no-aug', '--head-init', 'random',
                            '--output', tmp_path, '--experiment', name, launcher=launcher)
        assert done.code == 0, done.err
        found.append(load_file(tmp_path / name / 'export' / 'model.safetensors'))
    one, two = found
    assert one.keys() == two.keys()
    for tensor in one:
        torch.testing.assert_close(one[tensor], two[tensor], atol=1e-4, rtol=1e-3)
