"""SAM: two backward passes written out, weights and statistics put back, nothing that waits, and the script."""
import copy
import shutil
import sys
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import ROOT, TINY, free_port, launch_train, run_command
from safetensors.torch import load_file
from test_engine import Batches, batch, batch_for, draw, new_step, spoil
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from glmc.training.engine import step_generator, train_batch, train_one_epoch, update
from glmc.training.sam import perturbed, restored, sam_batch

RHO = 0.05
NETS = {'ce': dict(method='ce'), 'glmc': {}, 'joint': dict(joint_forward=True), 'balanced': dict(balanced=True)}


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(True)


def ready(net: str = 'glmc', progress: float = 0.6, model: str = 'resnet18', dtype=torch.float32):
    """A step, part of the way through training, so that both classifiers learn."""
    step = new_step(model, **NETS[net]).train().to(dtype)
    step.task.set_progress(progress)
    return step


def classification_loss(step, losses: dict) -> torch.Tensor:
    """Loss for the perturbation: without L_sim for GLMC, the whole loss for others."""
    if 'loss_sim' not in losses:
        return losses['loss']
    return losses['loss'] - step.task.consistency_weight * losses['loss_sim']


def sam_by_hand(step, inputs, rho: float) -> tuple[dict[str, torch.Tensor], float]:
    """Gradients at w + ρ·g/‖g‖ on a second net that is set there, and ‖g‖."""
    names, weights = zip(*step.task.trainable_module.named_parameters(), strict=True)
    loss = classification_loss(step, step(*inputs))
    perturb_ = torch.autograd.grad(loss, weights, allow_unused=True)
    norm = sum((g ** 2).sum().item() for g in perturb_ if g is not None) ** 0.5
    other = copy.deepcopy(step)
    with torch.no_grad():
        for weight, g in zip(other.task.trainable_module.parameters(), perturb_, strict=True):
            weight += 0 if g is None else rho * g / norm
    other(*inputs)['loss'].backward()
    found = {name: weight.grad for name, weight in zip(names, other.task.trainable_module.parameters(), strict=True)}
    return found, norm


@pytest.mark.parametrize('rho', [0.05, 0.5])
@pytest.mark.parametrize('model', ['resnet18', 'vit_tiny_patch16_224'])
@pytest.mark.parametrize('net', NETS)
def test_gradient_is_two_backward_passes_written_out(accelerator, net, model, rho):
    """In double precision, where the two agree to its last digits."""
    step = ready(net, model=model, dtype=torch.float64)
    plain, inputs = copy.deepcopy(step), batch_for(net)
    mixture = draw(step)
    expected, norm = sam_by_hand(plain, (*inputs, mixture), rho)
    losses = sam_batch(accelerator, step, *inputs, step_generator(1, 0, 0), rho=rho)
    found = dict(step.task.trainable_module.named_parameters())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name].grad, gradient, rtol=1e-9, atol=1e-11)
    at_w = ready(net, model=model, dtype=torch.float64)(*inputs, mixture)['loss']
    assert losses['loss'].item() == pytest.approx(at_w.item(), rel=1e-12) and norm > 0.01


@pytest.mark.parametrize('net', NETS)
def test_the_ascent_changes_the_gradient(accelerator, net):
    step, inputs = ready(net), batch_for(net)
    plain = copy.deepcopy(step)
    plain(*inputs, draw(step))['loss'].backward()
    sam_batch(accelerator, step, *inputs, step_generator(1, 0, 0), rho=RHO)
    differences = [(one.grad - two.grad).norm() / two.grad.norm() for one, two in zip(
        step.parameters(), plain.parameters(), strict=True) if two.grad is not None and two.grad.norm() > 1e-6]
    assert max(differences) > 0.01


def test_heads_of_the_consistency_loss_are_not_climbed(accelerator):
    """They have no part in the classification; what they get is the gradient of the descent."""
    step, seen = ready(), {}
    forward = step.task.forward

    def watched(*inputs):
        seen.setdefault('passes', []).append(
            {name: p.detach().clone() for name, p in step.task.trainable_module.named_parameters()})
        return forward(*inputs)
    step.task.forward = watched
    sam_batch(accelerator, step, *batch(), step_generator(1, 0, 0), rho=RHO)
    first, second = seen['passes']
    moved = {name for name in first if not torch.equal(first[name], second[name])}
    assert {'classifier.weight', 'backbone.fc.weight', 'backbone.conv1.weight'} <= moved
    assert not any(name.startswith(('projector', 'predictor')) for name in moved)
    distance = sum((second[name] - first[name]).double().square().sum() for name in moved) ** 0.5
    assert distance.item() == pytest.approx(RHO, rel=1e-4)
    assert step.task.trainable_module.projector.weight.grad.any()


@pytest.mark.parametrize('net', NETS)
def test_weights_and_statistics_are_those_of_one_plain_pass(accelerator, net):
    step, inputs = ready(net), batch_for(net)
    plain = copy.deepcopy(step)
    plain(*inputs, draw(step))
    sam_batch(accelerator, step, *inputs, step_generator(1, 0, 0), rho=0.5)
    ours, theirs = step.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys() and any('running_var' in name for name in ours)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_weights_come_back_even_from_an_error():
    net = torch.nn.Linear(3, 2)
    net(torch.ones(1, 3)).sum().backward()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(KeyError), perturbed(net, 1e3):
        assert not torch.equal(net.weight, before['weight']) and net.weight.grad is None
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with restored([]):
        pass


class Reads(TorchDispatchMode):
    """Counts how often a value is read from the device, which waits for it."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('net', NETS)
def test_it_waits_no_more_than_two_plain_passes(accelerator, net):
    """On the CPU, where one_hot looks at its labels, and on no other device."""
    step, inputs, reads = ready(net), batch_for(net), []
    for run in (train_batch, partial(sam_batch, rho=RHO)):
        step.zero_grad()
        with Reads() as counted:
            run(accelerator, step, *inputs, step_generator(1, 0, 0))
        reads.append(counted.count)
    assert reads[1] == 2 * reads[0]
    with Reads() as counted:
        torch.ones(1).item()
    assert counted.count == 1


@pytest.mark.parametrize('net', NETS)
def test_both_passes_are_one_compiled_graph(accelerator, net):
    torch._dynamo.reset()
    step, counter, inputs = ready(net), CompileCounterWithBackend('aot_eager'), batch_for(net)
    eager = copy.deepcopy(step)
    step.compile(fullgraph=True, backend=counter)
    for number, progress in enumerate((0.3, 0.6)):
        for one in (step, eager):
            one.task.set_progress(progress)
            one.zero_grad()
            sam_batch(accelerator, one, *inputs, step_generator(1, 0, number), rho=RHO)
        for ours, theirs in zip(step.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize('precision, tolerance', [('no', 1e-5), ('bf16', 0.2)])
def test_updates_are_the_loop_written_out(precision, tolerance):
    """Three clipped updates with a moving average, by train_one_epoch and by hand."""
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    batches = Batches(batch(number) for number in range(3))
    ours, plain = ready(model='vit_tiny_patch16_224'), ready(model='vit_tiny_patch16_224')
    start = [p.detach().clone() for p in plain.parameters()]
    sgd, plain_sgd = (torch.optim.SGD(step.parameters(), lr=0.05, momentum=0.9) for step in (ours, plain))
    ours, sgd = accelerator.prepare(ours, sgd)
    ours.task.setup_ema(decay=0.5)
    train_one_epoch(accelerator, ours, batches, sgd, None, epoch=0, seed=1, clip_grad=0.5,
                    run_batch=partial(sam_batch, rho=RHO))
    for number, inputs in enumerate(batches):
        gradients, _ = sam_by_hand(plain, (*inputs, draw(plain, number)), RHO)
        for name, weight in plain.task.trainable_module.named_parameters():
            weight.grad = gradients[name]
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        plain_sgd.step()
        plain.zero_grad()
    moved = torch.cat([(a - b).flatten() for a, b in zip(plain.parameters(), start, strict=True)])
    difference = torch.cat([(a - b).flatten() for a, b in zip(
        ours.task.trainable_module.parameters(), plain.parameters(), strict=True)])
    assert difference.norm() <= tolerance * moved.norm()
    AcceleratorState._reset_state(True)


def test_an_update_is_one_batch(accelerator):
    step = ready()
    with pytest.raises(ValueError, match='an update is one batch'):
        sam_batch(accelerator, step, *batch(), step_generator(1, 0, 0), sync=False, rho=RHO)


# --- what is not finite ---


def break_gradient(step, passes: set[int], value: float = float('inf')) -> None:
    """Fill a gradient with a value in these backward passes."""
    count = iter(range(10 ** 6))
    weight = next(step.task.trainable_module.parameters())
    weight.register_hook(lambda gradient: torch.full_like(gradient, value) if next(count) in passes else gradient)


FAULTS = {  # of a loss that SAM climbs, of one that it does not, of a gradient, and of the norm of a finite gradient
    'loss': spoil, 'loss_sim': partial(spoil, term='loss_sim'), 'gradient': break_gradient,
    'norm': partial(break_gradient, value=3e38)}


@pytest.mark.parametrize('fault', FAULTS)
@pytest.mark.parametrize('passes', [{2}, {3}, {2, 3}])  # of the second batch: ascent, descent, both
def test_a_bad_pass_skips_the_update(accelerator, fault, passes):
    """Weights and momentum equal those of the other batches."""
    batches = [batch(number) for number in range(4)]
    steps = ready(model='vit_tiny_patch16_224'), ready(model='vit_tiny_patch16_224')
    FAULTS[fault](steps[0], passes)
    sgds = [torch.optim.SGD(step.parameters(), lr=0.05, momentum=0.9, fused=True) for step in steps]
    metrics = train_one_epoch(accelerator, steps[0], Batches(batches), sgds[0], None, epoch=0, seed=7,
                              run_batch=partial(sam_batch, rho=RHO))
    for number in (0, 2, 3):
        sam_batch(accelerator, steps[1], *batches[number], step_generator(7, 0, number), rho=RHO)
        update(accelerator, steps[1].task, sgds[1])
    assert metrics['skipped_steps'] == 1
    assert all(torch.equal(one, two) for one, two in zip(steps[0].parameters(), steps[1].parameters(), strict=True))
    states = [[state['momentum_buffer'] for state in sgd.state.values()] for sgd in sgds]
    assert all(torch.equal(one, two) for one, two in zip(*states, strict=True))


# --- the script ---


RUN = [*TINY, '--epochs', '2', '--sam-rho', '0.05']


def weights(run) -> dict:
    return load_file(run / 'export' / 'model.safetensors')


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize('options', [
    '', '--method ce --model-ema --model-ema-decay 0.5', '--amp-dtype bfloat16 --clip-grad 1.0',
    '--method ldam_drw --drw-start 0.5', '--method weight_balancing --drw-start 0.5', '--drop 0.2'])
def test_a_run_resumes_inside_an_epoch(options, script, folders, tmp_path):
    options = (*RUN, '--data-dir', folders, '--output', tmp_path, '--checkpoint-interval', '1', '--checkpoint-hist', '10',
               *options.split())
    outcome = script(*options, '--experiment', 'run')
    assert outcome.code == 0 and '0 steps skipped' not in outcome.err and 'no effect' not in outcome.err, outcome.err
    shutil.copytree(tmp_path / 'run', tmp_path / 'again')
    shutil.rmtree(tmp_path / 'again' / 'export')
    newest = sorted((tmp_path / 'again' / 'checkpoints').glob('epoch-*.safetensors'))
    inside = [path for path in newest if 'step' in path.name and '0001' in path.name.split('step')[0]][0]
    for path in newest:
        if path != inside:
            path.unlink()
    outcome = script(*options, '--experiment', 'again', '--resume', 'auto')
    assert outcome.code == 0 and 'epoch 2 of 2, step 2 comes next' in outcome.err, outcome.err
    assert same(weights(tmp_path / 'run'), weights(tmp_path / 'again'))


def test_it_has_an_effect(script, folders, tmp_path, finished_run):
    for name, rho in (('off', '0'), ('on', '0.05')):
        assert script(*RUN, '--sam-rho', rho, '--data-dir', folders, '--output', tmp_path, '--experiment', name).code == 0
    assert same(weights(tmp_path / 'off'), weights(finished_run))
    assert not same(weights(tmp_path / 'on'), weights(finished_run))


TWO_PROCESSES = """
import copy, sys
import torch
from accelerate import Accelerator
sys.path[:0] = {paths!r}
from test_engine import batch, draw
from test_sam import RHO, ready, sam_by_hand
from glmc.training.engine import step_generator
from glmc.training.sam import sam_batch

accelerator = Accelerator()
step = ready(model='vit_tiny_patch16_224')
plain, rank = copy.deepcopy(step), accelerator.process_index
expected = [sam_by_hand(plain, (*batch(number), draw(plain)), RHO)[0] for number in range(2)]
prepared = accelerator.prepare(step)
for repeat in range(2):
    step.zero_grad()
    sam_batch(accelerator, prepared, *batch(rank), step_generator(1, 0, 0), rho=RHO)
    assert type(prepared).__name__ == 'DistributedDataParallel'
    for name, weight in step.task.trainable_module.named_parameters():
        mean = (expected[0][name] + expected[1][name]) / 2
        torch.testing.assert_close(weight.grad, mean, rtol=1e-3, atol=1e-5)
        assert torch.equal(weight, plain.task.trainable_module.get_parameter(name))
print('alike', rank)
"""


def test_each_process_climbs_alone_and_the_descents_are_averaged(tmp_path):
    (tmp_path / 'two.py').write_text(TWO_PROCESSES.format(paths=[str(ROOT / 'tests'), str(ROOT / 'tests' / 'training')]))
    outcome = run_command(
        sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--mixed_precision', 'no',
        '--main_process_port', free_port(), tmp_path / 'two.py', ACCELERATE_USE_CPU='1', GLOO_SOCKET_IFNAME='lo')
    assert outcome.code == 0, outcome.err
    assert outcome.out.count('alike') == 2  # whose lines may run into each other


def test_two_processes_train(folders, tmp_path):
    launcher = ('--multi_gpu', '--num_processes', '2', '--mixed_precision', 'no', '--main_process_port', str(free_port()))
    outcome = launch_train(*RUN, '--batch-size', '4', '--data-dir', folders, '--output', tmp_path, '--experiment', 'run',
                           launcher=launcher)
    assert outcome.code == 0, outcome.err
    assert all(value.isfinite().all() for value in weights(tmp_path / 'run').values())


def test_queues_change_after_both_passes(accelerator, monkeypatch):
    """The second pass sees the candidates of the first."""
    step, calls = new_step('resnet18', method='ce').train(), []
    forward = step.task.forward
    monkeypatch.setattr(step.task, 'forward', lambda *args: calls.append('forward') or forward(*args))
    monkeypatch.setattr(step.task, 'after_batch', lambda outputs: calls.append('after'))
    sam_batch(accelerator, step, *batch_for('ce'), step_generator(0, 0, 0), rho=RHO)
    assert calls == ['forward', 'forward', 'after']
