"""The benchmark as a script, and its plain loop against the task of GLMC."""
import json
import sys

import pytest
import torch
from conftest import ROOT, run_command
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import benchmark_glmc
from glmc.benchmark import agreement
from glmc.benchmark.measure import ShortLoader, bottleneck, consume, endless
from glmc.benchmark.plain import plain_loss
from glmc.config import PARTS
from glmc.losses.glmc import class_weights
from glmc.mixing import GLMCMixer, Mixture
from glmc.models.backbone import create_backbone
from glmc.models.glmc import GLMCModule
from glmc.tasks.glmc import GLMCTask

TINY = ['--model', 'test_resnet', '--batch-size', '16', '--workers', '0', '--rounds', '2', '--steps', '1']


def benchmark(tmp_path, *options) -> tuple:
    outcome = run_command(sys.executable, ROOT / 'benchmark_glmc.py', *options, '--json', tmp_path / 'b.json', cwd=tmp_path,
                          OMP_NUM_THREADS='1')
    return outcome, json.loads((tmp_path / 'b.json').read_text()) if (tmp_path / 'b.json').exists() else None


def test_speed_in_float32_and_the_loss_of_the_plain_loop(tmp_path):
    outcome, result = benchmark(tmp_path, *TINY, '--compare-loss')
    assert outcome.code == 0, outcome.err
    agreement, metadata, parts = result['agreement'], result['metadata'], result['parts']
    assert agreement['agrees'] and max(agreement['eager']['difference'].values()) < 1e-5
    assert agreement['eager']['gradient_difference'] < 1e-3 and agreement['plain']['loss_cb'] > 0
    assert metadata['precision'] == 'float32' and metadata['loader'] == 'resident' and metadata['views'] == 4
    assert list(parts['rows']) == ['plain', 'run', 'step', 'input', 'timm'] and parts['skipped'] == {}
    for name, row in parts['rows'].items():
        assert 0 < row['ms_min'] <= row['ms_per_step'] <= row['ms_max'] and len(row['turns']) == 2
        assert row['images_per_second'] == pytest.approx(16e3 / row['ms_per_step'])
        assert row['views_per_second'] == pytest.approx(4 * row['images_per_second'])
        assert f'\n{name} ' in outcome.out
    rows = parts['rows']
    assert rows['plain']['ratio_to_plain'] == 1 and 'ratio_to_plain' not in rows['timm']
    assert rows['input']['views_per_second_per_core'] == rows['input']['views_per_second']
    assert rows['step']['tflops'] == pytest.approx(parts['step_gflop'] / rows['step']['ms_per_step'])
    assert rows['step']['matmul_share'] == pytest.approx(rows['step']['tflops'] / parts['matmul_tflops'])
    assert parts['bottleneck'] == 'step' and 'Bottleneck of run: step' in outcome.out
    assert list(tmp_path.iterdir()) == [tmp_path / 'b.json']  # no run folder


def test_bfloat16_and_worker_processes(tmp_path):
    outcome, result = benchmark(
        tmp_path, *TINY, '--amp-dtype', 'bfloat16', '--compare-loss', '--workers', '1', '--resident', 'off', '--rounds', '1',
        '--skip', 'timm', 'step')
    assert outcome.code == 0, outcome.err
    assert result['agreement']['agrees'] and result['metadata']['precision'] == 'bfloat16'
    assert 1e-7 < max(result['agreement']['eager']['difference'].values()) < 2 ** -7  # differs by rounding only
    assert list(result['parts']['rows']) == ['plain', 'run', 'input'] and result['metadata']['loader'] == '1 workers'
    assert result['parts']['bottleneck'] is None


@pytest.fixture
def in_process(script, monkeypatch, capsys):
    """Run benchmark_glmc.py in this process: options -> exit code, standard output, standard error."""
    from glmc.cli import run_script

    def run(*options) -> tuple:
        monkeypatch.setattr(sys, 'argv', ['benchmark_glmc.py', *options])
        try:
            code = run_script(benchmark_glmc.main)
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()
    return run


def test_a_loss_out_of_tolerance_is_exit_code_1(in_process, monkeypatch):
    monkeypatch.setattr(agreement, 'class_weights', lambda counts, power: torch.ones(len(counts)))
    code, out, _ = in_process(*TINY, '--compare-loss', '--skip', *PARTS)
    assert code == 1 and 'plain and run DO NOT AGREE' in out


def test_other_methods_skip_the_plain_loop(in_process):
    code, out, _ = in_process(*TINY, '--method', 'ce', '--skip', 'timm')
    assert code == 0 and 'plain is skipped: it supports only --method glmc' in out
    assert [line.split()[0] for line in out.splitlines() if line.startswith(('plain ', 'run ', 'step ', 'input '))] == [
        'run', 'step', 'input', 'plain']


@pytest.mark.parametrize('options, message', [
    (['--method', 'ce', '--compare-loss'], '--compare-loss: expected --method glmc'),
    (['--partner', 'batch', '--compare-loss'], '--compare-loss: expected --method glmc, --partner sampler'),
    (['--skip', 'everything'], '--skip: invalid choice'),
    (['--roundes', '3'], '--roundes: unknown option; did you mean --rounds?')])
def test_wrong_options(in_process, options, message):
    code, _, err = in_process(*TINY, *options)
    assert code == 2 and err.splitlines()[-1].startswith(f'error: {message}')


@pytest.mark.parametrize('progress, gamma, local_lam', [(0.0, 1.0, 0.3), (0.5, 4.0, 0.3), (0.9, 0.0, 0.45)])
def test_plain_loss_equals_the_loss_of_the_task(progress, gamma, local_lam):
    """In float64: class weights in the labels (plain) equal class weights in the loss (task)."""
    torch.manual_seed(0)
    counts, box = [50, 12, 3], (1, 6, 2, 8)
    module = GLMCModule(create_backbone('resnet32_cifar', num_classes=3, channels=(4, 6, 8), depth=1), 5)
    task = GLMCTask(module, counts, reweight_power=1.2, consistency_weight=gamma).double()
    task.set_progress(progress)
    views, labels = torch.randn(6, 2, 2, 3, 8, 8, dtype=torch.float64), torch.randint(3, (6, 2))
    mixture = Mixture(torch.tensor(0.3).double(), torch.tensor(box), torch.tensor(local_lam).double())
    ours = task(*GLMCMixer(counts)(views, labels, mixture))
    ours['loss'].backward()
    gradient = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    plain = plain_loss(module, list(views.flatten(1, 2).unbind(1)), labels.unbind(1), (0.3, local_lam, box),
                       class_weights(counts, 1.2).double(), task.alpha.item(), gamma)
    plain['loss'].backward()
    for name in ('loss', 'loss_c', 'loss_cb', 'loss_sim'):
        assert plain[name].item() == pytest.approx(ours[name].item(), rel=1e-6)
    for parameter, expected in zip(module.parameters(), gradient, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-8)


def test_backward_is_twice_the_forward_but_for_the_first_layer():
    """The assumption of Benchmark.step_flops."""
    layers = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 36, 5))
    images = torch.randn(2, 4, 6, 6, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        layers(images)
    with FlopCounterMode(display=False) as both:
        layers(images).sum().backward()
    assert both.get_total_flops() == 3 * forward.get_total_flops() == 3 * 2 * 2 * (36 * 4 * 8 * 9 + 8 * 36 * 5)


def test_endless_yields_full_batches_of_new_epochs():
    batches = endless(lambda epoch: [(torch.full((size,), epoch), None) for size in (4, 4, 3)], 4)
    assert [next(batches)[0].tolist() for _ in range(5)] == [[0] * 4, [0] * 4, [1] * 4, [1] * 4, [2] * 4]
    short = ShortLoader(batches, 2)
    assert len(short) == len(list(short.epoch(0))) == 2
    consume(batches, 1)
    assert next(batches)[0].tolist() == [4] * 4


@pytest.mark.parametrize('step, input_, expected', [(3, 2, 'step'), (2, 3, 'input')])
def test_the_slower_part_is_the_bottleneck(step, input_, expected):
    assert bottleneck({'step': {'ms_per_step': step}, 'input': {'ms_per_step': input_}}) == expected
    assert bottleneck({'step': {'ms_per_step': step}}) is None


def test_help_names_the_script_and_lists_its_own_options(in_process):
    code, out, _ = in_process('--help')
    assert code == 0 and out.startswith('usage: benchmark_glmc.py [') and '\nMeasure speed and memory' in out
    assert 'python train_glmc.py --help' in out and '--rounds N' in out
    assert '--batch-size' not in out and '--help-all ' in out and len(out.splitlines()) < 50
    _, full, _ = in_process('--help-all')
    assert full.startswith('usage: benchmark_glmc.py [') and '--batch-size' in full and '--rounds N' in full
