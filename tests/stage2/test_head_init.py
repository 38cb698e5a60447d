"""Classifiers that start from fits to the features of the pretrained encoder."""
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from conftest import PACKS, TINY, free_port, launch_train, run_train, write_folders
from timm.utils import unwrap_model

from glmc.cli import parse_args, pick
from glmc.config import FINE_TUNING, train_parser
from glmc.methods import METHODS
from glmc.models.backbone import create_backbone
from glmc.run_folder import read_summary
from glmc.stage2.features import Features
from glmc.stage2.head_init import init_heads
from glmc.stage2.probe import class_means

COUNTS = [120, 40, 8]
COUNTS_OF_FILES = {'ant': 14, 'bee': 7, 'cat': 4}


def features() -> Features:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat_interleave(torch.tensor(COUNTS))
    centres = 2 * torch.randn(3, 96, generator=generator)
    return Features((centres[labels] + torch.randn(len(labels), 96, generator=generator)).relu()[None], labels)


def task_of(method: str, ema: bool = False):
    options, _ = parse_args(train_parser(METHODS), ['--method', method])
    row, options.teacher = METHODS[method], create_backbone('test_resnet', 3)
    backbone = create_backbone('test_resnet', 3, **row.backbone(**pick(options, row.backbone_options)))
    module = row.module(backbone, **pick(options, row.module_options))
    task = row.task(module, COUNTS, **pick(options, row.task_options))
    if ema:
        task.setup_ema(decay=0.9)
    return task, row.class_prior(COUNTS, pick(options, sorted(row.options)))


@pytest.mark.parametrize('kind', ['probe', 'class_mean'])
@pytest.mark.parametrize('method', [name for name, row in METHODS.items() if not row.backbone_options])  # not experts
def test_every_row_starts_from_a_classifier_that_separates_the_classes(method, kind):
    (task, prior), data = task_of(method, ema=True), features()
    init_heads(task, data, COUNTS, prior, kind=kind, seed=0, accelerator=Accelerator(cpu=True))
    for ema in (False, True):
        classifier = task.get_eval_model(ema=ema).get_classifier()
        assert (classifier(data.views[0]).argmax(1) == data.labels).float().mean() > 0.95


def test_probes_embody_the_prior_of_their_classifier():
    data, confident = features(), {}
    noise = torch.randn(data.views.shape, generator=torch.Generator().manual_seed(3))
    data = Features(data.views * 0.02 + noise, data.labels)
    for method in ('ce', 'balanced_softmax', 'glmc'):
        task, prior = task_of(method)
        init_heads(task, data, COUNTS, prior, kind='probe', seed=0, accelerator=Accelerator(cpu=True))
        module = unwrap_model(task.get_trainable_module())
        confident[method] = task.get_eval_model().get_classifier()
        if method == 'glmc':
            assert torch.equal(module.classifier.weight, confident['ce'].weight)
            assert torch.equal(confident['glmc'].weight, confident['balanced_softmax'].weight)
    rare = {name: classifier(data.views[0]).softmax(1)[:, 2].mean().item() for name, classifier in confident.items()}
    assert rare['balanced_softmax'] > 1.5 * rare['ce']


def test_class_means_are_those_of_the_normalised_features():
    data = features()
    means, norm = class_means(data, 3)
    for c in range(3):
        torch.testing.assert_close(means[c], F.normalize(data.views[0][data.labels == c]).mean(0))
    torch.testing.assert_close(norm, data.views[0].norm(dim=1).mean())


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('weights') / 'start.pth'
    torch.save(timm.create_model('test_resnet', num_classes=3).state_dict(), path)
    return path


def test_pretrained_weights_bring_the_defaults_of_fine_tuning(folders, weights, tmp_path):
    parser = train_parser(METHODS)
    options, _ = parse_args(parser, ['--initial-checkpoint', 'w.pth', '--lr-base', '0.5', '--data-dir', 'images'])
    assert pick(options, FINE_TUNING) == {**FINE_TUNING, 'lr_base': 0.5}
    assert parse_args(train_parser(METHODS), ['--data-dir', 'images'])[0].head_init == 'random'
    for words, method in (([], 'balanced_softmax'), (['--method', 'glmc'], 'glmc'), (['--balanced'], 'glmc_balanced')):
        assert parse_args(train_parser(METHODS), ['--pretrained', *words])[0].method == method
    done = run_train(*TINY, '--data-dir', folders, '--initial-checkpoint', weights, '--output', tmp_path, '--method', 'ce')
    assert done.code == 0, done.err
    # TINY has rate and epochs
    chosen = '--head-init probe --freeze-bn --smoothing 0.1 --clip-grad 5 --sched-on-updates --scale 0.4 1\n'
    assert f'hparams/pretrained.yaml: {chosen}' in done.err.replace(' --lr-base 0.02', '')
    assert 'Classifiers start from probe' in done.err and not list(tmp_path.glob('*/features'))


def test_the_file_of_the_defaults_has_their_values():
    path = Path(__file__).parents[2] / 'hparams' / 'pretrained.yaml'
    assert yaml.safe_load(path.read_text(encoding='utf-8')) == FINE_TUNING


@pytest.mark.slow
@pytest.mark.data
def test_the_first_updates_do_not_destroy_the_probe(script, tmp_path):
    weights = PACKS.parent / 'weights' / 'tf_efficientnet_lite0'
    if not weights.exists():
        pytest.skip(f'needs the weights {weights}, which are absent')
    done = script('--model', f'local-dir:{weights}', '--pretrained', '--method', 'glmc', '--epochs', '1', '--no-report',
                  '--workers', '0', '--output', tmp_path, '--experiment', 'run')
    assert done.code == 0, done.err
    (row,) = read_summary(tmp_path / 'run')
    assert row['eval_class_mean'] > 40  # of ten digits; features that all point in one direction give 10


def test_a_resumed_run_keeps_its_classifiers(folders, weights, tmp_path):
    common = ('--data-dir', folders, '--initial-checkpoint', weights, '--output', tmp_path, '--experiment', 'run',
              '--no-freeze-bn')  # random weights have no statistics to keep
    assert run_train(*TINY, *common).code == 0
    done = run_train(*TINY, *common, '--resume', 'auto')
    assert done.code == 0 and 'start from' not in done.err


def test_two_processes_start_alike(folders, weights, tmp_path):
    done = launch_train(*TINY, '--batch-size', '4', '--data-dir', folders, '--initial-checkpoint', weights, '--output',
                        tmp_path, '--no-freeze-bn', launcher=('--multi_gpu', '--num_processes', '2', '--main_process_port',
                                                                str(free_port())))
    assert done.code == 0, done.err
    assert 'Classifiers start from probe' in done.err


def test_unreadable_images_are_ignored_as_in_training(weights, tmp_path):
    write_folders(tmp_path / 'data' / 'train', COUNTS_OF_FILES)
    write_folders(tmp_path / 'data' / 'validation', dict.fromkeys(COUNTS_OF_FILES, 2), start=100)
    (tmp_path / 'data' / 'train' / 'ant' / '0.png').write_bytes(b'no image')
    common = ('--data-dir', tmp_path / 'data', '--initial-checkpoint', weights, '--output', tmp_path, '--no-freeze-bn')
    done = run_train(*TINY, *common, '--on-bad-image', 'skip')
    assert done.code == 0, done.err
    assert f'Extracting features: {sum(COUNTS_OF_FILES.values()) - 1} images' in done.err
    done = run_train(*TINY, *common)
    assert done.code == 2 and '0.png' in done.err.splitlines()[-1]


def test_a_model_without_a_linear_classifier_starts_at_random_by_default(folders, tmp_path):
    torch.save(timm.create_model('dla46_c', num_classes=3).state_dict(), tmp_path / 'w.pth')
    options = ('--data-dir', folders, '--output', tmp_path, '--model', 'dla46_c', '--method', 'ce', '--initial-checkpoint',
               tmp_path / 'w.pth', '--no-freeze-bn')
    done = run_train(*TINY, *options)
    assert done.code == 0, done.err
    assert 'The classifiers start at random: --model dla46_c: expected a classifier that is one linear layer' in done.err
    done = run_train(*TINY, *options, '--head-init', 'probe')
    assert done.code == 2 and 'expected a classifier that is one linear layer' in done.err
