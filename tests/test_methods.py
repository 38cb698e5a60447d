"""The table of methods: every row runs, and its seeded loss is the one that was written down."""
import json
import shutil

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import TINY, free_port, launch_train
from safetensors.torch import load_file

from glmc.cli import parse_args, pick
from glmc.config import train_parser
from glmc.errors import InputError
from glmc.methods import METHODS, unused_method_options
from glmc.models.backbone import create_backbone
from glmc.training.checkpoint import load_checkpoint
from glmc.training.engine import TrainStep, step_generator, train_one_epoch

COUNTS = [50, 30, 12, 3]


def small_teacher() -> torch.nn.Module:
    """Net of random weights, as the teacher of rows that have one."""
    torch.manual_seed(1)
    return create_backbone('resnet32_cifar', len(COUNTS), channels=(4, 8, 8), depth=1)


GOLDEN = {  # loss of the second of two steps, with the options' defaults
    'ce': 0.592514,
    'mixup': 0.724316,
    'cutmix': 0.740818,
    'focal': 0.141038,
    'cb_focal': 0.074577,
    'ldam_drw': 11.118105,
    'balanced_softmax': 0.487075,
    'logit_adjustment': 0.487075,
    'ce_drw': 0.600852,
    'ce_resample': 1.423691,
    'weight_balancing': 0.600852,
    'bbn': 1.200810,
    'cmo': 1.202826,
    'glmc': 5.558264,
    'glmc_cosine': 79.483253,
    'glmc_one_view': 1.702181,
    'glmc_no_consistency': 6.754160,
    'glmc_balanced': 1.288776,
    'supcon': 5.217678,
    'bcl': 1.927161,
    'paco': 17.538130,
    'gpaco': 23.439682,
    'kcl': 4.780641,
    'tsc': 4.975794,
    'ride': 13.544130,
    'ride_cmo': 114.662834,
    'ssd_features': 3.158147,
    'ssd': 1.377395,
    'risda': 0.588033,
    'proco': 1.734794,
    'balpoe': 6.122658,
}
PUBLISHED = dict(mix_beta=1.0, cutmix_lambda='nominal', alpha_scope='losses')  # what GLMC's defaults here are not
GOLDEN_AS_PUBLISHED = {
    'glmc': 0.884790,
    'glmc_no_consistency': 2.096285,
    'glmc_balanced': 0.827996,
}


def golden_losses(name: str, compiler=lambda step: step, steps: int = 2, **changed) -> list[float]:
    """Losses of SGD steps on random images, through all parts of a row."""
    method, (options, _) = METHODS[name], parse_args(train_parser(METHODS), ['--method', name])
    changed = {'teacher': small_teacher(), **changed}
    vars(options).update({'drw_start': 0.5, 'queue_size': 11, **changed})  # the second step is in its time; the queue wraps
    torch.manual_seed(0)
    backbone = create_backbone('resnet32_cifar', len(COUNTS), channels=(8, 12, 16), depth=1,
                               **method.backbone(**pick(options, method.backbone_options)))
    module = method.module(backbone, **pick(options, method.module_options))
    task = method.task(module, COUNTS, **pick(options, method.task_options)).train()
    mixer = method.mixer(COUNTS, **pick(options, method.mixer_options))
    images = 2 if method.paired and options.partner == 'sampler' else 1
    rng = np.random.default_rng(0)
    views = torch.from_numpy(rng.normal(size=(8, images, len(method.views), 3, 16, 16))).float()
    labels = torch.from_numpy(rng.integers(len(COUNTS), size=(8, images)))
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    train_step, losses = compiler(TrainStep(task, mixer, torch.nn.Identity())), []
    for step in range(steps):
        task.set_progress(step / steps)
        mixture = mixer.sample_params(8, (16, 16), step_generator(0, 0, step))
        outputs = train_step(views, labels, mixture)
        loss = outputs['loss']
        optimizer.zero_grad()
        loss.backward()
        task.after_batch({name: value.detach() for name, value in outputs.items()})
        optimizer.step()
        task.update_ema(step)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize('name', METHODS)
def test_golden_loss(name):
    loss = golden_losses(name)[-1]
    assert name in GOLDEN, f"add to GOLDEN in tests/test_methods.py, once it is right: '{name}': {loss:.6f},"
    assert loss == pytest.approx(GOLDEN[name], rel=1e-4), f'{name}: {loss:.6f}'


@pytest.mark.parametrize('row, same, changed', [
    ('glmc_no_consistency', 'glmc', dict(consistency_weight=0.0)),
    ('balanced_softmax', 'logit_adjustment', {}), ('ce_drw', 'weight_balancing', {}), ('ce', 'ce_drw', dict(drw_start=0.9)),
    ('mixup', 'ce', dict(mixup_prob=0.0)), ('cutmix', 'ce', dict(mixup_prob=0.0)), ('focal', 'ce', dict(focal_gamma=0.0))])
def test_rows_that_meet(row, same, changed):
    """Whose option is changed: that of the row that has it."""
    has = METHODS[row].options | METHODS[row].defaults.keys()
    one, two = (golden_losses(name, **(changed if own else {}))
                for name, own in ((row, changed.keys() <= has), (same, not changed.keys() <= has)))
    assert one == pytest.approx(two, rel=1e-6)


@pytest.mark.parametrize('name', GOLDEN_AS_PUBLISHED)
def test_golden_loss_of_the_published_values(name):
    loss = golden_losses(name, **PUBLISHED)[-1]
    assert loss == pytest.approx(GOLDEN_AS_PUBLISHED[name], rel=1e-4), f'{name}: {loss:.6f}'


def test_no_golden_loss_without_a_method():
    assert GOLDEN.keys() <= METHODS.keys()


@pytest.mark.parametrize('name', METHODS)
def test_a_row_is_one_graph_at_every_epoch(name):
    """Nothing that changes as training goes on, weights, α, mixed or not, makes torch compile anew."""
    torch._dynamo.reset()
    graphs = []
    losses = golden_losses(name, compiler=lambda task: torch.compile(
        task, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward), mixup_prob=0.5)
    assert len(graphs) == 1
    assert losses == pytest.approx(golden_losses(name, mixup_prob=0.5), rel=1e-5)


@pytest.mark.parametrize('name', METHODS)
def test_a_row_repeats(name):
    assert golden_losses(name) == golden_losses(name)


OTHER_VALUES = dict(
    reweight_power=0.5, consistency_weight=3.0, alpha_power=3.0, alpha_scope='losses', projection_dim=7,
    mix_beta=0.3, cutmix_lambda='area', partner='batch', joint_forward=True, mixup_prob=0.1,
    focal_gamma=0.5, effective_beta=0.9, drw_start=0.9, adjustment_tau=0.5, ldam_margin=0.1, cosine_scale=10.0,
    projection_hidden=9, contrast_temperature=0.4, contrast_weight=2.0, queue_size=3, key_momentum=0.1, positives=1,
    target_weight=2.0, experts=2, expert_width=0.5, diversity_weight=-0.1, diversity_eta=0.5,
    distill_temperature=4.0, isda_variance=9.0, isda_shift=9.0)


@pytest.mark.parametrize('name, option', [
    (name, option) for name, row in METHODS.items() for option in sorted(row.options & OTHER_VALUES.keys())])
def test_an_option_has_an_effect(name, option):
    other = {'area': 'nominal', 'batch': 'sampler'}.get(METHODS[name].defaults.get(option), OTHER_VALUES[option])
    same = dict(alpha_scope='losses') if option == 'alpha_power' else {}  # else the last step's α has not been felt yet
    steps = 3 if option == 'key_momentum' else 2  # in the first, the queue is empty and nothing moves the encoder
    assert golden_losses(name, steps=steps, **{**same, option: other}) != golden_losses(name, steps=steps, **same)


@pytest.mark.parametrize('name', METHODS)
def test_a_row_names_options_that_exist(name):
    defaults = vars(train_parser(METHODS).parse_args([]))
    assert METHODS[name].options <= defaults.keys()
    assert METHODS[name].summary


def test_every_option_of_a_method_is_heeded_by_one():
    group = next(group for group in train_parser(METHODS)._action_groups if group.title == 'method')
    heeded = set().union(*(row.options for row in METHODS.values()))
    assert {action.dest for action in group._group_actions} - {'method', 'balanced'} == heeded


@pytest.mark.parametrize('name', METHODS)
def test_published_values_are_defaults_below_file_and_command_line(name, tmp_path):
    defaults, parser = METHODS[name].defaults, train_parser(METHODS)
    options, given = parse_args(parser, ['--method', name])
    assert pick(options, defaults) == defaults and given == {'method'}
    (tmp_path / 'options.yaml').write_text(f'method: {name}\nresample_power: 0.3\n')
    options, _ = parse_args(train_parser(METHODS), ['-c', str(tmp_path / 'options.yaml'), '--weight-decay', '0.2'])
    assert (options.method, options.resample_power, options.weight_decay) == (name, 0.3, 0.2)


def test_a_method_leaves_no_default_behind():
    options, _ = parse_args(train_parser(METHODS), ['--method', 'ce'])
    assert (options.resample_power, options.weight_decay, options.cutmix_lambda) == (0.0, 5e-4, 'nominal')


@pytest.mark.parametrize('words', [['--method', 'glmc_no_rebalance'], ['--balanced'], ['--method', 'glmc', '--balanced']])
def test_aliases_of_the_balanced_row(words):
    options, _ = parse_args(train_parser(METHODS), words)
    defaults = METHODS['glmc_balanced'].defaults
    assert options.method == 'glmc_balanced' and pick(options, defaults) == defaults


def test_options_that_are_gone_may_keep_their_default(tmp_path):
    (tmp_path / 'old.yaml').write_text('mix_lambda: shared\naug_views: both\n')
    assert parse_args(train_parser(METHODS), ['-c', str(tmp_path / 'old.yaml')])[0].method == 'glmc_one_view'
    (tmp_path / 'old.yaml').write_text('mix_lambda: per_view\n')
    with pytest.raises(InputError, match="unknown key 'mix_lambda'"):
        parse_args(train_parser(METHODS), ['-c', str(tmp_path / 'old.yaml')])


@pytest.mark.parametrize('method, changed, expected', [
    ('ce', {}, 'train'), ('mixup', {}, 'train'), ('balanced_softmax', {}, 'uniform'), ('logit_adjustment', {}, 'uniform'),
    ('logit_adjustment', dict(adjustment_tau=0.0), 'train'), ('logit_adjustment', dict(adjustment_tau=0.5), [8, 4, 2, 1]),
    ('ce_resample', {}, 'uniform'), ('ce_resample', dict(resample_power=0.0), 'train'),
    ('ce_resample', dict(resample_power=0.5), [8, 4, 2, 1]),
    ('glmc', {}, 'uniform'), ('glmc', dict(reweight_power=0.0), 'train'), ('glmc', dict(reweight_power=0.5), [8, 4, 2, 1]),
    ('glmc_cosine', dict(reweight_power=0.0), 'train'),
    ('glmc_balanced', {}, 'train'),
    ('glmc_balanced', dict(resample_power=1.0), [n / 85 + 1 / 4 for n in (64, 16, 4, 1)]),
    ('ce_drw', dict(drw_start=1.0), 'train'), ('bbn', {}, 'uniform')])
def test_the_prior_that_a_classifier_embodies(method, changed, expected):
    options, _ = parse_args(train_parser(METHODS), ['--method', method])
    row = METHODS[method]
    found = row.class_prior([64, 16, 4, 1], {**pick(options, row.options), **changed})
    if not isinstance(expected, str):
        expected = pytest.approx([share / sum(expected) for share in expected])
    assert found == expected


@pytest.mark.parametrize('method', ['cb_focal', 'ldam_drw', 'ce_drw', 'weight_balancing'])
def test_the_prior_of_the_effective_number_is_nearly_uniform(method):
    options, _ = parse_args(train_parser(METHODS), ['--method', method])
    found = METHODS[method].class_prior([64, 16, 4, 1], pick(options, METHODS[method].options))
    assert found == pytest.approx([0.25] * 4, rel=5e-3)


def test_options_without_effect_are_told():
    given = {'consistency_weight', 'mix_beta', 'lr', 'epochs'}
    assert unused_method_options('ce', given) == {'consistency_weight', 'mix_beta'}
    assert unused_method_options('glmc', given) == set()


@pytest.mark.parametrize('name', METHODS)
def test_a_batch_that_is_not_finite_spoils_no_state(name, script):
    """State of model and task, and its average, after an epoch with such a batch."""
    AcceleratorState._reset_state(True)
    row, (options, _) = METHODS[name], parse_args(train_parser(METHODS), ['--method', name, '--queue-size', '11'])
    options.teacher = small_teacher()
    backbone = create_backbone('resnet32_cifar', len(COUNTS), channels=(8, 12, 16), depth=1,
                               **row.backbone(**pick(options, row.backbone_options)))
    task = row.task(row.module(backbone, **pick(options, row.module_options)), COUNTS, **pick(options, row.task_options))
    step = TrainStep(task, row.mixer(COUNTS, **pick(options, row.mixer_options)), torch.nn.Identity())
    images = 2 if row.paired and options.partner == 'sampler' else 1
    views = [torch.randn(8, images, len(row.views), 3, 16, 16) for _ in range(3)]
    views[1][:] = float('nan')
    batches = [(each, torch.arange(8 * images).view(8, images) % len(COUNTS), 1.0) for each in views]
    loader = type('Loader', (list,), dict(epoch=lambda self, epoch, start_step: iter(self)))(batches)
    task.setup_ema(decay=0.5)
    task.set_progress(0.9)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.01)
    metrics = train_one_epoch(Accelerator(cpu=True), step, loader, optimizer, None, epoch=0, seed=0)
    assert metrics['skipped_steps'] == 1 and metrics['images'] == 16
    state = [*task.state_dict().items(), *task.get_task_state().items()]
    assert [key for key, value in state if value.is_floating_point() and not value.isfinite().all()] == []


RUN = [*TINY, '--epochs', '2', '--drw-start', '0.5', '--partner', 'sampler', '--queue-size', '20']  # which wraps around
IN_TWO_PROCESSES = ('ldam_drw', 'bbn')  # without -m slow: modules of another form, one and two images a draw


@pytest.fixture
def extra(request, finished_run):
    """Further options of a row: a teacher."""
    def options(name: str) -> tuple:
        return ('--teacher', finished_run) if 'teacher' in METHODS[name].task_options else ()
    return options


def same_export(one, two) -> bool:
    first, second = (load_file(run / 'export' / 'model.safetensors') for run in (one, two))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize('name', METHODS)
def test_a_row_trains_resumes_and_exports_a_plain_model(name, script, folders, extra, tmp_path):
    options = (*RUN, '--method', name, *extra(name), '--data-dir', folders, '--output', tmp_path)
    outcome = script(*options, '--experiment', 'run')
    assert outcome.code == 0, outcome.err
    shutil.copytree(tmp_path / 'run', tmp_path / 'again')
    shutil.rmtree(tmp_path / 'again' / 'export')
    (tmp_path / 'again' / 'checkpoints' / 'epoch-0001.safetensors').unlink()
    assert script(*options, '--experiment', 'again', '--resume', 'auto').code == 0
    assert same_export(tmp_path / 'run', tmp_path / 'again')
    loaded = timm.create_model(f"local-dir:{tmp_path / 'run' / 'export'}", pretrained=True)
    assert type(loaded) is type(timm.create_model('test_resnet')) and loaded.num_classes == 3
    metrics = json.loads((tmp_path / 'run' / 'export' / 'metrics.json').read_text())
    assert metrics['method'] == name and metrics['num_images'] == 13
    config = json.loads((tmp_path / 'run' / 'export' / 'config.json').read_text())['glmc']
    options, row = parse_args(train_parser(METHODS), ['--method', name])[0], METHODS[name]
    assert config['prior'] == row.class_prior(config['profile']['class_counts'], pick(options, row.options))


@pytest.mark.parametrize('name', ['bcl', 'paco', 'gpaco', 'kcl', 'tsc', 'ssd_features', 'risda', 'proco'])
def test_a_row_with_state_resumes_within_an_epoch(name, script, folders, tmp_path):
    """From the second step of the last epoch, when the queue has wrapped around; `tsc` has its targets."""
    options = (*RUN, '--method', name, '--data-dir', folders, '--output', tmp_path, '--checkpoint-interval', '1',
               '--checkpoint-hist', '9', '--stage2', '')
    assert script(*options, '--experiment', 'run').code == 0
    shutil.copytree(tmp_path / 'run', tmp_path / 'again')
    shutil.rmtree(tmp_path / 'again' / 'export')
    folder = tmp_path / 'again' / 'checkpoints'
    within = folder / 'epoch-0001-step-00000002.safetensors'
    assert within.exists()
    for path in (*folder.glob('epoch-0001-step-0000000[3-9]*'), folder / 'epoch-0001.safetensors'):
        path.unlink(missing_ok=True)
    assert 'epoch 2 of 2, step 3 comes next' in script(*options, '--experiment', 'again', '--resume', 'auto').err
    assert same_export(tmp_path / 'run', tmp_path / 'again')
    one, two = (load_checkpoint(tmp_path / run / 'checkpoints' / 'epoch-0001.safetensors') for run in ('run', 'again'))
    states = [saved['model']['task_state'] for saved in (one, two)]
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_queue_of_another_size_is_not_resumed(script, folders, tmp_path):
    options = (*TINY, '--method', 'kcl', '--stage2', '', '--data-dir', folders, '--output', tmp_path, '--experiment', 'run')
    assert script(*options, '--queue-size', '20').code == 0
    outcome = script(*options, '--queue-size', '30', '--resume', 'auto', '--epochs', '2')
    assert outcome.code == 2 and 'was trained with queue_size 20, this run has 30' in outcome.err


@pytest.mark.parametrize('name', [
    'ce', 'ldam_drw', 'bbn', 'weight_balancing', 'glmc_cosine', 'bcl', 'paco', 'tsc', 'risda', 'proco'])
def test_the_best_average_is_what_is_exported_and_reported(name, script, folders, tmp_path):
    outcome = script(*RUN, '--method', name, '--data-dir', folders, '--output', tmp_path, '--experiment', 'run', '--report',
                     '--holdout', '1', '--model-ema', '--model-ema-decay', '0.5')
    assert outcome.code == 0, outcome.err
    best = load_checkpoint(tmp_path / 'run' / 'checkpoints' / 'best.safetensors')['ema']['state_dict_ema']
    exported = load_file(tmp_path / 'run' / 'export' / 'model.safetensors')
    assert all(torch.equal(exported[key], best[key]) for key in exported)
    assert 'No report' not in outcome.err and (tmp_path / 'run' / 'report.html').exists()


@pytest.mark.parametrize('name', [
    name if name in IN_TWO_PROCESSES else pytest.param(name, marks=pytest.mark.slow) for name in METHODS])
def test_a_row_runs_in_two_processes(name, folders, extra, tmp_path):
    launcher = ('--multi_gpu', '--num_processes', '2', '--mixed_precision', 'no', '--main_process_port', str(free_port()))
    outcome = launch_train(*RUN, '--batch-size', '4', '--method', name, *extra(name), '--data-dir', folders,
                           '--output', tmp_path, '--experiment', 'run', launcher=launcher)
    assert outcome.code == 0, outcome.err
    metrics = json.loads((tmp_path / 'run' / 'export' / 'metrics.json').read_text())
    assert metrics['processes'] == 2 and metrics['num_images'] == 13


@pytest.mark.parametrize('name', ['ldam_drw', 'bbn', 'weight_balancing', 'glmc_cosine', 'supcon', 'kcl', 'ssd', 'risda'])
def test_a_row_that_needs_a_linear_classifier_says_so(name, script, folders, tmp_path):
    outcome = script(*RUN, '--method', name, '--data-dir', folders, '--output', tmp_path, '--model', 'levit_128s',
                     '--img-size', '64')
    assert outcome.code == 2 and 'expected a classifier that is one linear layer with a bias' in outcome.err.splitlines()[-1]
