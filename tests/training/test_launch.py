"""Settings of `accelerate launch`: each reaches the training or is refused by name in one line."""
import builtins
import io
import json
import re
import sys

import joblib
import pytest
import timm
import torch
import yaml
from accelerate.state import AcceleratorState
from conftest import TINY, launch_train, run_command
from safetensors.torch import load_file

from glmc.training import launch
from glmc.training.launch import launcher_accumulation


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


DDP = r'expected data parallelism \(DDP\)'
REFUSED = {  # variable of the launcher -> value, start of the error
    'ACCELERATE_MIXED_PRECISION': ('fp8', 'ACCELERATE_MIXED_PRECISION=fp8, --mixed_precision fp8: is not supported'),
    'ACCELERATE_USE_FSDP': ('true', f'ACCELERATE_USE_FSDP=true, --use_fsdp: FSDP is not supported, {DDP}'),
    'ACCELERATE_USE_DEEPSPEED': ('true', 'ACCELERATE_USE_DEEPSPEED=true, --use_deepspeed: DeepSpeed is not supported'),
    'ACCELERATE_USE_MEGATRON_LM': ('1', 'ACCELERATE_USE_MEGATRON_LM=1, --use_megatron_lm: Megatron-LM is not supported'),
    'ACCELERATE_USE_TP': ('True', 'ACCELERATE_USE_TP=True, --use_tp: tensor parallelism is not supported'),
    'ACCELERATE_USE_PARALLELISM_CONFIG': ('true', '.*--use_parallelism_config: other parallelism is not supported'),
    'ACCELERATE_DYNAMO_BACKEND': ('INDUCTOR', '.*=INDUCTOR, --dynamo_backend: is not passed on, expected --torchcompile'),
    'ACCELERATE_GRADIENT_CLIPPING': ('1.0', '.*--gradient_clipping: is not passed on, expected --clip-grad'),
    'ACCELERATE_GRADIENT_ACCUMULATION_STEPS': ('auto', '.*--gradient_accumulation_steps auto: expected a number >= 1'),
}


@pytest.mark.parametrize('variable', REFUSED)
def test_unsupported_settings_are_refused_by_name(variable, script, folders, tmp_path, monkeypatch):
    value, expected = REFUSED[variable]
    monkeypatch.setenv(variable, value)
    outcome = script(*TINY, '--data-dir', folders, '--output', tmp_path)
    assert outcome.code == 2 and re.match(f'error: {expected}', outcome.err.splitlines()[-1]), outcome.err
    assert 'amp-dtype' not in outcome.err


@pytest.mark.parametrize('variable, value', [
    ('ACCELERATE_USE_FSDP', 'false'), ('ACCELERATE_DYNAMO_BACKEND', 'NO'), ('ACCELERATE_MIXED_PRECISION', 'bf16')])
def test_settings_that_are_off_or_supported(variable, value, script, folders, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, value)
    assert script(*TINY, '--data-dir', folders, '--output', tmp_path, '--experiment', 'run').code == 0
    metrics = json.loads((tmp_path / 'run' / 'export' / 'metrics.json').read_text())
    assert metrics['precision'] == ('bf16' if value == 'bf16' else 'no')


@pytest.mark.parametrize('options, variable, named', [
    ('--amp', None, '--amp: '), ('--amp-dtype float16', None, '--amp-dtype float16: '),
    ('', 'fp16', 'ACCELERATE_MIXED_PRECISION=fp16: ')])
def test_float16_on_a_cpu_is_refused(options, variable, named, script, folders, tmp_path, monkeypatch):
    if variable:
        monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', variable)
    outcome = script(*TINY, '--data-dir', folders, '--output', tmp_path, *options.split())
    assert outcome.code == 2 and outcome.err == (
        f'error: {named}float16 needs a GPU, found a CPU; expected bfloat16 or no mixed precision\n')


def test_accumulation_of_the_launcher_is_that_of_the_run(script, folders, tmp_path, monkeypatch):
    def run(name, *options):
        outcome = script(*TINY, '--data-dir', folders, '--output', tmp_path, '--experiment', name, *options)
        return outcome, tmp_path / name
    asked, by_option = run('asked', '--grad-accum-steps', '2')
    monkeypatch.setenv('ACCELERATE_GRADIENT_ACCUMULATION_STEPS', '2')
    outcome, by_launcher = run('launched')
    weights = [load_file(folder / 'export' / 'model.safetensors') for folder in (by_option, by_launcher)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert '--grad-accum-steps 2, as the launcher asks' in outcome.err and 'launcher' not in asked.err
    assert yaml.safe_load((by_launcher / 'args.yaml').read_text())['grad_accum_steps'] == 2
    outcome, _ = run('both', '--grad-accum-steps', '3')
    assert outcome.code == 2 and outcome.err.splitlines()[-1].startswith(
        'error: --grad-accum-steps 3: the launcher asks for 2 gradient accumulation steps')


def test_one_step_of_the_launcher_is_its_default(monkeypatch):
    monkeypatch.setenv('ACCELERATE_GRADIENT_ACCUMULATION_STEPS', '1')
    assert launcher_accumulation() is None


SHOW = """
import torch
from glmc.training.launch import create_accelerator, launcher_accumulation
create_accelerator()
print('found', torch.get_num_threads(), launcher_accumulation())
"""


@pytest.mark.parametrize('flags, threads, expected', [
    (['--num_cpu_threads_per_process', '1'], None, '1 None'), (['--num-cpu-threads-per-process=2'], '5', '2 None'),
    ([], '1', '1 None'), ([], '3', '3 None'), ([], None, f'{joblib.cpu_count()} None'),
    (['--gradient_accumulation_steps', '4'], '1', '1 4')])
def test_flags_of_the_launcher(flags, threads, expected, tmp_path):
    """Threads by hand are kept, although Accelerate sets OMP_NUM_THREADS in any case."""
    (tmp_path / 'show.py').write_text(SHOW)
    command = ['env', '-u', 'OMP_NUM_THREADS', 'ACCELERATE_USE_CPU=1',
               *([f'OMP_NUM_THREADS={threads}'] if threads else []),
               sys.executable, '-m', 'accelerate.commands.launch', *flags, tmp_path / 'show.py']
    outcome = run_command(*command)
    assert f'found {expected}\n' in outcome.out, outcome.err


@pytest.mark.parametrize('machine, supported, warned', [
    ('x86_64', False, True), ('AMD64', False, True), ('x86_64', True, False), ('aarch64', False, False)])
def test_bfloat16_without_instructions_is_warned_about(machine, supported, warned, monkeypatch, caplog):
    monkeypatch.setattr('platform.machine', lambda: machine)
    monkeypatch.setattr(torch.cpu, '_is_avx512_bf16_supported', lambda: supported)
    monkeypatch.setattr(torch.cpu, '_is_amx_tile_supported', lambda: False)
    monkeypatch.setattr(launch, 'setup_logging', lambda main_process: None)
    AcceleratorState._reset_state(True)
    launch.create_accelerator(amp_dtype='bfloat16')
    assert ('--amp-dtype bfloat16: this CPU has no instructions for bfloat16' in caplog.text) == warned
    AcceleratorState._reset_state(True)


def test_the_quota_of_a_container_limits_the_threads(monkeypatch):
    def opened(path, *args, **kwargs):
        return io.StringIO('250000 100000') if str(path) == '/sys/fs/cgroup/cpu.max' else real(path, *args, **kwargs)
    real, exists, chosen = builtins.open, launch.os.path.exists, []
    monkeypatch.setattr(builtins, 'open', opened)
    monkeypatch.setattr('os.path.exists', lambda path: str(path) == '/sys/fs/cgroup/cpu.max' or exists(path))
    monkeypatch.setattr('os.sched_getaffinity', lambda _: set(range(64)))
    monkeypatch.setattr('os.cpu_count', lambda: 64)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 64)
    monkeypatch.setattr(torch, 'set_num_threads', chosen.append)
    for name in ('OMP_NUM_THREADS', 'ACCELERATE_MIXED_PRECISION'):
        monkeypatch.delenv(name, raising=False)
    launch._set_threads()
    monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', 'no')
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    launch._set_threads()
    assert chosen == [3, 1]  # 2.5 cores


def test_a_launched_run_records_its_threads(folders, tmp_path):
    outcome = launch_train(*TINY, '--data-dir', folders, '--output', tmp_path, '--experiment', 'run', OMP_NUM_THREADS='1')
    assert outcome.code == 0, outcome.err
    metrics = json.loads((tmp_path / 'run' / 'export' / 'metrics.json').read_text())
    assert metrics['threads'] == 1 and metrics['command'].startswith('OMP_NUM_THREADS=1 ')


def test_threads_change_nothing_but_rounding():
    """In float64, the gradients of one thread and of two differ by its precision (docs/trust.md)."""
    torch.manual_seed(0)
    model, images = timm.create_model('test_resnet', num_classes=5).double(), torch.randn(16, 3, 64, 64).double()
    gradients = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(images), torch.arange(16) % 5).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert (gradients[0] - gradients[1]).norm() < 1e-10 * gradients[0].norm()
