"""Training on a GPU: `pytest -m cuda`. Skipped without one; the tests of two GPUs need two."""
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import ROOT, TINY, free_port
from safetensors.torch import load_file

from glmc.cli import parse_args, pick
from glmc.config import train_parser
from glmc.data.loaders import Normalize
from glmc.methods import METHODS
from glmc.models.backbone import create_backbone
from glmc.training.engine import TrainStep, step_generator, train_batch, train_one_epoch

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
COUNTS = [50, 30, 12, 3]
TOLERANCE = {'no': 1e-3, 'bf16': 0.05, 'fp16': 0.05}


class Batches(list):
    """A training loader of batches that are on the device."""

    def epoch(self, epoch: int, start_step: int = 0):
        yield from ((*batch, 1.0) for batch in self[start_step:])


def new_step(name: str, device: str, **options) -> TrainStep:
    method, (args, _) = METHODS[name], parse_args(train_parser(METHODS), ['--method', name])
    vars(args).update({'teacher': create_backbone('resnet32_cifar', len(COUNTS), depth=1), **options})
    torch.manual_seed(0)
    backbone = create_backbone('resnet32_cifar', len(COUNTS), channels=(8, 12, 16), depth=1,
                               **method.backbone(**pick(args, method.backbone_options)))
    module = method.module(backbone, **pick(args, method.module_options))
    task = method.task(module, COUNTS, **pick(args, method.task_options))
    mixer = method.mixer(COUNTS, **pick(args, method.mixer_options))
    return TrainStep(task, mixer, Normalize((0.5,) * 3, (0.25,) * 3)).to(device).train()


def batches(name: str, number: int, device: str, partner: str = 'sampler') -> Batches:
    method, rng = METHODS[name], np.random.default_rng(0)
    shape = (32, 2 if method.paired and partner == 'sampler' else 1)
    views = rng.integers(256, size=(number, *shape, len(method.views), 3, 32, 32), dtype=np.uint8)
    labels = rng.integers(len(COUNTS), size=(number, *shape))
    return Batches(zip(torch.from_numpy(views).to(device), torch.from_numpy(labels).to(device), strict=True))


def losses(name: str, device: str, precision: str = 'no', compiled: bool = False) -> list[float]:
    """Losses of three steps of SGD."""
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=device == 'cpu', mixed_precision=precision)
    step, found = new_step(name, device), []
    if compiled:
        step.compile(fullgraph=True)
    optimizer = torch.optim.SGD(step.task.parameters(), lr=0.01)
    step, optimizer = accelerator.prepare(step, optimizer)
    for number, batch in enumerate(batches(name, 3, device)):
        found.append(train_batch(accelerator, step, *batch, step_generator(0, 0, number))['loss'].item())
        optimizer.step()
        optimizer.zero_grad()
    AcceleratorState._reset_state(True)
    return found


@pytest.mark.parametrize('precision, compiled', [('no', False), ('bf16', False), ('fp16', False), ('no', True)])
@pytest.mark.parametrize('name', METHODS)
def test_losses_are_those_of_the_cpu(name, precision, compiled):
    expected = losses(name, 'cpu')
    assert losses(name, 'cuda', precision, compiled) == pytest.approx(expected, rel=TOLERANCE[precision])


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(True)
    yield Accelerator(mixed_precision='bf16')
    AcceleratorState._reset_state(True)


def train(accelerator, step, loader, epoch: int = 0) -> dict:
    optimizer = torch.optim.SGD(step.task.parameters(), lr=0.01, momentum=0.9, fused=True)
    return train_one_epoch(accelerator, step, loader, optimizer, None, epoch=epoch, seed=0, log_interval=1000)


def test_no_step_waits_for_the_device(accelerator):
    step, loader = new_step('glmc', 'cuda'), batches('glmc', 5, 'cuda')
    train(accelerator, step, loader)  # the first fused step and the kernels' choices may wait
    optimizer = torch.optim.SGD(step.task.parameters(), lr=0.01, momentum=0.9, fused=True)
    for number, batch in enumerate(loader):
        train_batch(accelerator, step, *batch, step_generator(0, 0, number))
        optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        for number, batch in enumerate(loader):
            train_batch(accelerator, step, *batch, step_generator(0, 1, number))
            optimizer.step()
            optimizer.zero_grad()
            step.task.update_ema(step=number)
    finally:
        torch.cuda.set_sync_debug_mode('default')


def test_one_compiled_graph_after_two_epochs_with_evaluation_between(accelerator):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend('inductor')
    step, loader = new_step('glmc', 'cuda', partner='batch'), batches('glmc', 4, 'cuda', partner='batch')
    step.compile(fullgraph=True, backend=counter)
    for epoch in range(2):
        step.task.set_progress(epoch / 2)
        train(accelerator, step, loader, epoch)
        with torch.inference_mode():
            step.task.get_eval_model().eval()(torch.randn(8, 3, 32, 32, device='cuda'))
    assert counter.frame_count == 1


def test_reduce_overhead_equals_eager(accelerator):
    found = []
    for mode in (None, 'reduce-overhead'):
        step = new_step('glmc', 'cuda')
        if mode:
            step.compile(fullgraph=True, mode=mode)
        found.append(train(accelerator, step, batches('glmc', 4, 'cuda'))['loss'])
    assert found[1] == pytest.approx(found[0], rel=0.02)


def test_memory_does_not_grow(accelerator):
    step, loader, seen = new_step('glmc', 'cuda'), batches('glmc', 10, 'cuda'), []
    optimizer = torch.optim.SGD(step.task.parameters(), lr=0.01, momentum=0.9, fused=True)
    for number, batch in enumerate(loader):
        train_batch(accelerator, step, *batch, step_generator(0, 0, number))
        optimizer.step()
        optimizer.zero_grad()
        seen.append(torch.cuda.memory_allocated())
    assert seen[2] == seen[9]


def run_script(*options, processes: int = 1):
    launcher = [] if processes == 1 else ['-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', processes,
                                          '--main_process_port', free_port()]
    command = [sys.executable, *launcher, ROOT / 'train_glmc.py', *TINY, *options]
    return subprocess.run([str(word) for word in command], cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_resume_inside_an_epoch_restores_the_generator_of_the_gpu(folders, tmp_path):
    options = ['--data-dir', folders, '--output', tmp_path, '--drop', '0.5', '--checkpoint-interval', '1', '--epochs', '2']
    assert run_script(*options, '--experiment', 'whole').returncode == 0
    checkpoints = tmp_path / 'whole' / 'checkpoints'
    assert run_script(*options, '--experiment', 'parts', '--checkpoint-hist', '100').returncode == 0
    parts = tmp_path / 'parts'
    for path in sorted((parts / 'checkpoints').glob('epoch-0001*')):
        if 'step-00000002' not in path.name:
            path.unlink()
    assert run_script(*options, '--experiment', 'parts', '--resume', 'auto').returncode == 0
    one, other = (load_file(folder / 'export' / 'model.safetensors') for folder in (checkpoints.parent, parts))
    assert all(torch.allclose(one[name], other[name], atol=1e-5) for name in one)  # some kernels add in any order


def test_export_of_a_channels_last_bfloat16_run_is_the_same_on_the_cpu(folders, tmp_path):
    outcome = run_script('--data-dir', folders, '--output', tmp_path, '--experiment', 'run', '--amp-dtype', 'bfloat16')
    assert outcome.returncode == 0, outcome.stderr  # the run itself compares the logits on the CPU, bit for bit
    assert json.loads((tmp_path / 'run' / 'export' / 'metrics.json').read_text())['precision'] == 'bf16'


@two_gpus
@pytest.mark.parametrize('options', [
    ['--model', 'test_efficientnet', '--sync-bn'], ['--grad-accum-steps', '2'], ['--model-ema']])
def test_two_gpus_train_and_end_with_equal_buffers(folders, tmp_path, options):
    outcome = run_script('--data-dir', folders, '--output', tmp_path, '--batch-size', '4', *options, processes=2)
    assert outcome.returncode == 0, outcome.stderr
    assert 'Exported to' in outcome.stdout


def test_reduce_overhead_with_accumulation_is_refused(folders, tmp_path):
    options = ('--torchcompile', 'reduce-overhead', '--grad-accum-steps', '2')
    outcome = run_script('--data-dir', folders, '--output', tmp_path, *options)
    assert outcome.returncode == 2 and '--torchcompile reduce-overhead' in outcome.stderr
