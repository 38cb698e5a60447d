"""Every recipe parses strictly, builds its model, holds the published values and says where they come from."""
import re
from pathlib import Path

import pytest
import timm
import torch
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs

from glmc.cli import parse_args
from glmc.config import train_parser
from glmc.methods import METHODS, unused_method_options
from glmc.models import cifar_resnet  # noqa: F401  registers the CIFAR nets
from glmc.models.backbone import create_backbone
from glmc.stage2.select import parse_classifiers

HPARAMS = Path(__file__).parents[1] / 'hparams'
SCRATCH = 'scratch'  # ours, for data of one's own
ROWS = ('supcon', 'bcl', 'paco', 'gpaco', 'kcl', 'tsc', 'ride', 'ride_cmo', 'balpoe', 'ssd_features', 'ssd', 'risda',
        'proco')  # rows of other methods that have recipes of their own
OTHERS = [f'{data}_{row}' for data in ('cifar100_lt_if100', 'imagenet_lt') for row in ROWS]
RECIPES = sorted(path.stem for path in HPARAMS.glob('*.yaml') if path.stem not in (SCRATCH, 'pretrained', *OTHERS))

R32X4, R32 = 'resnet32x4_cifar', 'resnet32_cifar'
R50, X50, SWIN = 'resnet50', 'resnext50_32x4d', 'swin_small_patch4_window7_224'

# The published rows; the balanced ones, Swin-S and the narrow net carry over what was not published, as their headers say.
COLUMNS = ('model', 'all_epochs', 'batch_size', 'lr', 'weight_decay', 'resample_power', 'reweight_power',
           'consistency_weight', 'projection_dim', 'imbalance_factor')
TABLE = {
    'cifar100_lt_if100': (R32X4, 200, 64, 0.01, 5e-3, 0.0, 1.2, 4, 128, 100),
    'cifar100_lt_if50': (R32X4, 200, 64, 0.01, 5e-3, 0.2, 1.2, 6, 128, 50),
    'cifar100_lt_if10': (R32X4, 200, 64, 0.01, 5e-3, 0.2, 1.2, 4, 128, 10),
    'cifar100_lt_if100_resnet32': (R32, 200, 64, 0.01, 5e-4, 0.0, 1.2, 4, 128, 100),
    'cifar100_lt_if50_resnet32': (R32, 200, 64, 0.01, 5e-4, 0.2, 1.2, 6, 128, 50),
    'cifar100_lt_if10_resnet32': (R32, 200, 64, 0.01, 5e-4, 0.2, 1.2, 4, 128, 10),
    'cifar10_lt_if100': (R32X4, 200, 64, 0.01, 5e-3, 0.0, 1.2, 1, 128, 100),
    'cifar10_lt_if50': (R32X4, 200, 64, 0.01, 5e-3, 0.0, 1.2, 1, 128, 50),
    'cifar10_lt_if10': (R32X4, 200, 64, 0.01, 5e-3, 0.2, 1.0, 2, 128, 10),
    'imagenet_lt_resnet50': (R50, 135, 120, 0.1, 2e-4, 0.2, 1.0, 10, 256, None),
    'imagenet_lt_resnext50': (X50, 135, 120, 0.1, 2e-4, 0.2, 1.0, 10, 256, None),
    'imagenet_lt_swin_small': (SWIN, 135, 120, 1.2e-4, 0.05, 0.2, 1.0, 10, 256, None),
    'inat18_resnext50': (X50, 120, 128, 0.1, 1e-4, 0.2, 1.0, 10, 256, None),
    'cifar10_balanced_resnet50': (R50, 200, 64, 0.01, 5e-3, 0.0, 1.0, 2, 256, None),
    'cifar100_balanced_resnet50': (R50, 200, 64, 0.01, 5e-3, 0.0, 1.0, 4, 256, None),
    'imagenet_balanced_resnet50': (R50, 135, 120, 0.1, 2e-4, 0.0, 1.0, 10, 256, None),
}

PUBLISHED = {
    'cifar100_lt_if100': ('55.88', '57.97'), 'cifar100_lt_if50': ('61.08', '63.78'), 'cifar100_lt_if10': ('70.74', '73.40'),
    'cifar100_lt_if100_resnet32': ('54.2',), 'cifar100_lt_if50_resnet32': ('57.1',), 'cifar100_lt_if10_resnet32': ('65.5',),
    'cifar10_lt_if100': ('87.75', '88.50'), 'cifar10_lt_if50': ('90.18', '91.04'), 'cifar10_lt_if10': ('94.04', '94.87'),
    'imagenet_lt_resnet50': ('56.3',), 'imagenet_lt_resnext50': ('56.3', '70.1', '52.4', '30.4'),
    'imagenet_lt_swin_small': ('56.3',), 'inat18_resnext50': ('72.21',), 'cifar10_balanced_resnet50': ('97.23',),
    'cifar100_balanced_resnet50': ('83.05',), 'imagenet_balanced_resnet50': ('80.2',),
}

MILLIONS = {R32X4: 7.4, R32: 0.47, R50: 25.6, X50: 25.0, SWIN: 49.6}  # with 1,000 classes; R32 and R32x4 with 100


def read(name):
    options, given = parse_args(train_parser(METHODS), ['-c', str(HPARAMS / f'{name}.yaml'), '--data-dir', 'images'])
    options.data_dir = None
    return options, given - {'data_dir'}


def learning_rates(args):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.lr)
    scheduler, num_epochs = create_scheduler_v2(optimizer, updates_per_epoch=1, **scheduler_kwargs(args))
    rates = []
    for epoch in range(num_epochs):
        rates.append(optimizer.param_groups[0]['lr'])
        scheduler.step(epoch + 1)
    return rates


def header(name):
    """Key -> text of the comment above the options."""
    fields, key = {}, None
    for line in (HPARAMS / f'{name}.yaml').read_text(encoding='utf-8').splitlines():
        if not line.startswith('#'):
            break
        match = re.fullmatch(r'# (\w+)? +(.+)', line) if fields or 'command' in line[:10] else None
        if match:
            key = match[1] or key
            fields[key] = f"{fields.get(key, '')} {match[2]}".strip()
    return fields


def test_one_recipe_per_row():
    assert sorted(TABLE) == RECIPES


@pytest.mark.parametrize('name', RECIPES)
def test_recipe_holds_the_values_of_the_table(name):
    args, given = read(name)
    values = {**vars(args), 'all_epochs': len(learning_rates(args))}
    assert tuple(values[column] for column in COLUMNS) == pytest.approx(TABLE[name])
    assert args.method == ('glmc_balanced' if 'balanced' in name else 'glmc')
    assert not unused_method_options('glmc', given)
    assert (args.mix_beta, args.cutmix_lambda, args.partner) == (1.0, 'nominal', 'sampler')
    assert 'balanced' in name or (args.alpha_power, args.alpha_scope) == (2.0, 'losses')
    assert (args.sched, args.min_lr, args.amp, args.pretrained) == ('cosine', 0.0, False, False)
    if 'swin' not in name:
        assert (args.opt, args.momentum, args.filter_bias_and_bn) == ('momentum', 0.9, False)  # timm's sgd is Nesterov's
    small = name.startswith('cifar')
    assert (args.augmentation, args.img_size) == (('cifar', 32) if small else ('imagenet_lt', 224))
    assert args.warmup_epochs == (0 if small else 10)
    assert args.dataset == (f"torch/{name.split('_')[0]}" if small else '')
    assert args.data_dir is None


@pytest.mark.parametrize('name', ['imagenet_lt_resnext50', 'inat18_resnext50'])
def test_warm_up_then_cosine_as_the_published_loop(name):
    args, _ = read(name)
    rates = learning_rates(args)
    assert rates[0] == pytest.approx(0.01)
    assert rates[:11] == pytest.approx([0.01 + 0.009 * epoch for epoch in range(11)])
    steps = torch.arange(12, len(rates), dtype=torch.float64) - 10
    published = 0.05 * (1 + torch.cos(torch.pi * steps / (len(rates) - 9)))
    assert rates[12:] == pytest.approx(published.tolist(), abs=1e-3)


def test_cifar_cosine_ends_near_zero():
    rates = learning_rates(read('cifar100_lt_if100')[0])
    expected = 0.005 * (1 + torch.cos(torch.pi * torch.arange(200, dtype=torch.float64) / 200))
    assert rates == pytest.approx(expected.tolist())


@pytest.mark.parametrize('name', RECIPES)
def test_recipe_builds_its_model(name):
    args, _ = read(name)
    num_classes = int(re.match(r'cifar(\d+)', name)[1]) if name.startswith('cifar') else 1000
    with torch.device('meta'):
        backbone = create_backbone(args.model, num_classes, img_size=args.img_size, drop_path_rate=args.drop_path,
                                   **args.model_kwargs)
        features = backbone.eval().forward_features(torch.zeros(2, 3, args.img_size, args.img_size))
        assert backbone.forward_head(features).shape == (2, num_classes)
    reference = MILLIONS[args.model] * 1e6 - (100 if args.model in (R32X4, R32) else 1000) * (backbone.head_hidden_size + 1)
    parameters = sum(p.numel() for p in backbone.parameters()) - num_classes * (backbone.head_hidden_size + 1)
    assert parameters == pytest.approx(reference, abs=0.06e6)
    if 'output_stride' in args.model_kwargs:
        assert features.shape[-2:] == (4, 4)


@pytest.mark.parametrize('name', ['imagenet_lt_resnext50', 'inat18_resnext50'])
def test_residual_blocks_of_resnext_start_as_in_the_released_code(name):
    args, _ = read(name)
    backbone = create_backbone(args.model, 10, **args.model_kwargs)
    assert all((block.bn3.weight == 1).all() for stage in range(1, 5) for block in getattr(backbone, f'layer{stage}'))


def test_models_are_in_the_registry():
    assert all(timm.is_model(row[0]) for row in TABLE.values())


@pytest.mark.parametrize('name', RECIPES)
def test_header_says_how_to_run_and_what_to_expect(name):
    fields = header(name)
    assert {'command', 'batch', 'published', 'result', 'source'} <= set(fields)
    assert fields['command'].startswith(f'accelerate launch train_glmc.py -c hparams/{name}.yaml --data-dir ')
    if name.startswith('cifar100'):
        assert fields['or'] == (f'accelerate launch train_glmc.py -c hparams/{name}.yaml '
                                '--dataset hfds/PATH/TO/cifar100 --val-split test')
    assert all(number in fields['published'] for number in PUBLISHED[name])
    assert 'top-1 %' in fields['published'] and 'images' in fields['published'] and 'epoch' in fields['published']
    assert fields['result'] == 'not yet run here' or 'results/' in fields['result']


@pytest.mark.parametrize('name', [*RECIPES, *OTHERS])
def test_commands_of_the_header_parse(name, monkeypatch):
    monkeypatch.chdir(HPARAMS.parent)
    for key in {'command', 'or'} & set(header(name)):
        words = header(name)[key].split(' (')[0].split()
        args, _ = parse_args(train_parser(METHODS), words[words.index('train_glmc.py') + 1:])
        assert args.data_dir or args.dataset.startswith('hfds/')


COLUMNS_OF_OTHERS = ('model', 'all_epochs', 'batch_size', 'lr', 'weight_decay', 'contrast_temperature', 'projection_dim')
OTHER_TABLE = {
    'cifar100_lt_if100_supcon': (R32, 1000, 1024, 0.714, 7e-5, 0.1, 128),
    'cifar100_lt_if100_bcl': (R32, 200, 128, 0.2, 1e-4, 0.1, 128),
    'cifar100_lt_if100_paco': (R32, 400, 128, 0.05, 5e-4, 0.05, 32),
    'cifar100_lt_if100_gpaco': (R32, 400, 128, 0.1, 5e-4, 0.05, 32),
    'cifar100_lt_if100_kcl': (R32, 1000, 1024, 0.5, 1e-4, 0.07, 128),
    'cifar100_lt_if100_tsc': (R32, 1000, 1024, 0.5, 1e-4, 0.07, 128),
    'imagenet_lt_supcon': (R50, 200, 256, 0.1, 1e-4, 0.07, 128),
    'imagenet_lt_bcl': (X50, 90, 256, 0.1, 5e-4, 0.07, 1024),
    'imagenet_lt_paco': (R50, 400, 128, 0.02, 5e-4, 0.2, 128),
    'imagenet_lt_gpaco': (R50, 400, 128, 0.04, 5e-4, 0.2, 128),
    'imagenet_lt_kcl': (R50, 200, 256, 0.1, 1e-4, 0.07, 128),
    'imagenet_lt_tsc': (R50, 400, 256, 0.1, 1e-4, 0.07, 128),
    'cifar100_lt_if100_ride': (R32, 200, 128, 0.1, 5e-4, 0.1, 256),
    'cifar100_lt_if100_ride_cmo': (R32, 200, 128, 0.1, 5e-4, 0.1, 256),
    'cifar100_lt_if100_balpoe': (R32, 200, 128, 0.1, 5e-4, 0.1, 256),
    'cifar100_lt_if100_ssd_features': (R32, 200, 128, 0.1, 5e-4, 0.2, 128),
    'cifar100_lt_if100_ssd': (R32, 200, 128, 0.1, 5e-4, 0.1, 256),
    'cifar100_lt_if100_risda': (R32, 200, 100, 0.1, 5e-4, 0.1, 256),
    'cifar100_lt_if100_proco': (R32, 200, 256, 0.3, 2e-4, 0.1, 128),
    'imagenet_lt_ride': (X50, 100, 256, 0.1, 2e-4, 0.1, 256),
    'imagenet_lt_ride_cmo': (R50, 100, 256, 0.1, 2e-4, 0.1, 256),
    'imagenet_lt_balpoe': (R50, 180, 128, 0.025, 5e-4, 0.1, 256),
    'imagenet_lt_ssd_features': (X50, 135, 256, 0.1, 5e-4, 0.2, 128),
    'imagenet_lt_ssd': (X50, 135, 256, 0.1, 5e-4, 0.1, 256),
    'imagenet_lt_risda': (R50, 100, 128, 0.1, 2e-4, 0.1, 256),
    'imagenet_lt_proco': (X50, 90, 256, 0.1, 5e-4, 0.07, 1024),
}
AIMS = dict(supcon=('76.5', '78.4'), bcl=('51.93', '56.7'), paco=('52.0', '57.0'), gpaco=('52.0', '58.5'),
            kcl=('42.8', '51.5'), tsc=('43.8', '52.4'), ride=('48.6', '55.7'), ride_cmo=('50.0', '56.2'),
            balpoe=('55.9', '62.0'), ssd_features=('46.0', '56.0'), ssd=('46.0', '55.4'), risda=('50.16', '49.3'),
            proco=('52.8', '58.0'))


@pytest.mark.parametrize('name', OTHERS)
def test_recipe_of_another_row(name):
    args, given = read(name)
    values = {**vars(args), 'all_epochs': len(learning_rates(args))}
    row = re.sub('^(cifar100_lt_if100|imagenet_lt)_', '', name)
    assert tuple(values[column] for column in COLUMNS_OF_OTHERS) == pytest.approx(OTHER_TABLE[name])
    assert args.method == row and not unused_method_options(row, given)
    assert (args.stage2 is not None) == (row in ('supcon', 'kcl', 'tsc', 'ssd_features'))
    if args.stage2:
        parse_classifiers(args.stage2, args.stage2_kwargs)
    fields = header(name)
    assert {'command', 'batch', 'published', 'result', 'hours', 'unverified', 'source'} <= set(fields)
    assert fields['command'].startswith(f'accelerate launch train_glmc.py -c hparams/{name}.yaml --data-dir ')
    assert AIMS[row][name.startswith('imagenet')] in fields['published']
    assert all(word in fields['published'] for word in ('top-1 %', 'images', 'epoch'))


def test_the_second_half_of_tsc_starts_at_the_full_rate():
    rates = learning_rates(read('imagenet_lt_tsc')[0])
    assert rates[:200] == pytest.approx(rates[200:]) and rates[0] == pytest.approx(0.1) and rates[199] < 1e-4


def test_scratch_spells_the_defaults_out():
    """So that whoever trains without the file trains the same."""
    args, given = read(SCRATCH)
    defaults, _ = parse_args(train_parser(METHODS), ['--data-dir', 'images'])
    defaults.data_dir = None
    assert {**vars(args), 'config': None} == vars(defaults)
    assert METHODS[args.method].options <= given
    assert {'command', 'batch', 'chosen', 'published', 'change'} == set(header(SCRATCH))


@pytest.mark.parametrize('name', [*RECIPES, *OTHERS])
def test_every_value_names_its_source(name):
    lines = (HPARAMS / f'{name}.yaml').read_text(encoding='utf-8').splitlines()
    for line in (line for line in lines if line and not line.startswith('#')):
        assert re.search(r'  # ([qkγd]; )?(paper|code|ours)\b', line), line
