"""Two processes on the CPU do what one does: same images, none lost or counted twice, same numbers."""
import csv
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, free_port, in_two_processes, launch_train, write_shards
from safetensors.torch import load_file

from glmc.methods import METHODS
from glmc.models.backbone import create_backbone
from glmc.training.launch import create_accelerator
from glmc.training.state import TrainingState

TWO = ('--multi_gpu', '--num_processes', '2', '--mixed_precision', 'no')


def metrics_of(run) -> dict:
    return json.loads((run / 'export' / 'metrics.json').read_text())


def summary_of(run) -> list[dict]:
    with open(run / 'summary.csv', newline='') as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope='module')
def launch(tmp_path_factory):
    """Options -> outcome and folder of a run by `accelerate launch`, two processes by default."""
    output = tmp_path_factory.mktemp('launched')

    def run(experiment, *options, launcher=TWO):
        launcher = (*launcher, '--main_process_port', str(free_port()))
        outcome = launch_train(*TINY, '--output', output, '--experiment', experiment, *options, launcher=launcher)
        assert outcome.code == 0, outcome.err
        return outcome, output / experiment
    return run


@pytest.fixture(scope='module')
def two_processes(launch, folders):
    return launch('two', '--data-dir', folders, '--epochs', '2', '--batch-size', '4')


def test_same_images_as_one_process(two_processes, finished_run):
    outcome, run = two_processes
    assert 'Training set: 25 images of 3 classes, 14 … 4 per class' in outcome.err
    assert outcome.err.count('25 images at') == 2 and outcome.err.count('Epoch 1/2') == 1  # each epoch, said once
    assert 'Global batch: 8 images (4 x 2 processes' in outcome.err and 'FutureWarning' not in outcome.err
    two, one = metrics_of(run), metrics_of(finished_run)
    assert two['num_images'] == one['num_images'] == 13 and two['processes'] == 2
    assert two['train_counts'] == one['train_counts'] and two['fingerprint'] == one['fingerprint']
    assert two['per_class_images'] == one['per_class_images'] == [5, 4, 4]


def test_same_numbers_given_the_same_weights(script, launch, folders, tmp_path):
    """A finished run with held-out images, resumed, evaluates its best model on the validation images once more."""
    options = ('--data-dir', folders, '--holdout', '1')
    assert script(*TINY, *options, '--output', tmp_path, '--experiment', 'one').code == 0
    shutil.copytree(tmp_path / 'one', tmp_path / 'two')
    shutil.rmtree(tmp_path / 'two' / 'export')
    launch('two', *options, '--output', tmp_path, '--resume', 'auto')
    one, two = metrics_of(tmp_path / 'one'), metrics_of(tmp_path / 'two')
    assert (one['processes'], two['processes']) == (1, 2)
    for name in ('num_images', 'top1', 'top5', 'per_class_accuracy', 'class_mean'):
        assert one[name] == two[name], name
    assert one['loss'] == pytest.approx(two['loss'], rel=1e-5) and one['ece'] == pytest.approx(two['ece'], rel=1e-4)


WATCHED = f"""
import atexit, runpy, sys
import torch.distributed as dist
atexit.register(lambda: print('process group at exit:', dist.is_initialized(), flush=True))
sys.argv[0] = 'train_glmc.py'
runpy.run_path({str(ROOT / 'train_glmc.py')!r}, run_name='__main__')
"""


@pytest.mark.parametrize('options, code', [
    ((), 0), (('--lr', '1e25', '--max-skipped-steps', '0', '--log-interval', '1'), 1)], ids=['end', 'error'])
def test_process_groups_are_destroyed(options, code, folders, tmp_path):
    (tmp_path / 'watched.py').write_text(WATCHED)
    outcome = launch_train(
        *TINY, '--batch-size', '4', '--data-dir', folders, '--output', tmp_path, *options,
        launcher=(*TWO, '--main_process_port', str(free_port())), script=tmp_path / 'watched.py')
    assert outcome.code == code, outcome.err
    said = outcome.out.count('process group at exit: False'), outcome.out.count('process group at exit: True')
    assert said[0] >= (1 if code else 2) and said[1] == 0, outcome.out  # the launcher ends the other at an error


def test_ranks_do_not_broadcast_their_buffers(script):
    assert create_accelerator().ddp_handler.broadcast_buffers is False


@pytest.mark.parametrize('reduce', [True, False])
@pytest.mark.parametrize('method', ['ce', 'glmc_cosine'])
def test_running_statistics_become_equal(method, reduce, tmp_path):
    """Statistics of the weights and of their average: the mean of both processes, or those of the first."""
    row = METHODS[method]
    task = row.task(row.module(create_backbone('resnet32_cifar', 3, channels=(2, 4, 8), depth=1)), [5, 4, 3])
    task.setup_ema()

    def equalize(rank: int) -> list[dict]:
        modules = [task.get_trainable_module(), task.get_trainable_module(ema=True).module]
        for k, module in enumerate(modules):
            for name, buffer in module.named_buffers():
                if buffer.is_floating_point():
                    buffer.fill_(1 + 2 * rank + k + len(name))
        state = TrainingState(SimpleNamespace(num_processes=2, process_index=rank), task, None)
        state.equalize_statistics(reduce)
        return [{name: value.numpy() for name, value in module.state_dict().items()} for module in modules]
    one, two = in_two_processes(equalize, tmp_path)
    for k, (first, second) in enumerate(zip(one, two, strict=True)):
        assert all((first[name] == second[name]).all() for name in first)
        names = [name for name in first if name.endswith(('running_mean', 'running_var', 'feature_norm'))]
        assert len(names) == 14 + (method == 'glmc_cosine')
        assert all((first[name] == 1 + reduce + k + len(name)).all() for name in names)


def test_sync_bn_of_processes_on_the_cpu_is_refused(folders, tmp_path):
    outcome = launch_train(*TINY, '--sync-bn', '--data-dir', folders, '--output', tmp_path,
                           launcher=(*TWO, '--main_process_port', str(free_port())))
    assert outcome.code != 0 and 'error: --sync-bn: needs GPUs, found 2 processes on the CPU' in outcome.err
    assert 'ValueError' not in outcome.err


@pytest.mark.parametrize('average', [(), ('--swa-start', '0.4')], ids=['last', 'swa'])
def test_two_processes_of_half_the_batch_train_the_same_weights(launch, script, folders, tmp_path, average):
    """Without BatchNorm; 25 images in steps of 8, the last of 9, of which one process has 5 and the other 4."""
    options = ('--model', 'test_vit', '--data-dir', folders, '--epochs', '3', '--lr', '0.05', *average)
    _, two = launch(f'halves{len(average)}', *options, '--batch-size', '4')
    assert script(*TINY, *options, '--output', tmp_path, '--experiment', 'whole', '--batch-size', '8').code == 0
    one, two = (load_file(run / 'export' / 'model.safetensors') for run in (tmp_path / 'whole', two))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('batch_size, said', [('8', False), ('4', True)])
def test_another_number_of_processes_continues(two_processes, script, folders, tmp_path, batch_size, said):
    """With the same global batch, or with a warning."""
    shutil.copytree(two_processes[1], tmp_path / 'one')
    outcome = script(*TINY, '--data-dir', folders, '--output', tmp_path, '--experiment', 'one', '--resume', 'auto',
                     '--epochs', '3', '--batch-size', batch_size)
    assert outcome.code == 0 and 'epoch 3 of 3 comes next' in outcome.err
    assert ('The global batch was 8 x 1 steps an update, now it is 4 x 1' in outcome.err) == said
    assert metrics_of(tmp_path / 'one')['processes'] == 1


@pytest.mark.slow
def test_obvious_way_to_ask_for_two_is_warned_about(launch, folders):
    outcome, run = launch('asked', '--data-dir', folders, launcher=('--cpu', '--num_processes', '2'))
    assert 'asked for several processes but started one' in outcome.err
    assert metrics_of(run)['processes'] == 1


@pytest.mark.slow
def test_two_processes_resume(two_processes, launch, folders):
    _, run = two_processes
    again = run.with_name('again')
    shutil.copytree(run, again)
    shutil.rmtree(again / 'export')
    (again / 'checkpoints' / 'epoch-0001.safetensors').unlink()
    launch('again', '--data-dir', folders, '--epochs', '2', '--batch-size', '4', '--resume', 'auto')
    one, two = (load_file(folder / 'export' / 'model.safetensors') for folder in (run, again))
    assert all(torch.equal(one[name], two[name]) for name in one)
    rows = [(row['epoch'], row['train_loss'], row['eval_loss']) for row in summary_of(run)]
    assert rows == [(row['epoch'], row['train_loss'], row['eval_loss']) for row in summary_of(again)]


def test_shards_over_two_processes(launch, tmp_path):
    write_shards(tmp_path, shard_size=4)
    outcome, run = launch('shards', '--dataset', 'wds/x', '--data-dir', tmp_path, '--partner', 'batch', '--batch-size', '4')
    assert 'Training set: 25 images of 3 classes, 14 … 4 per class' in outcome.err
    assert metrics_of(run)['num_images'] == 13 and metrics_of(run)['per_class_images'] == [5, 4, 4]


@pytest.mark.slow
def test_two_machines(folders, tmp_path):
    """Two launches of one process each that meet on the loopback device."""
    port = str(free_port())

    def machine(rank):
        launcher = (*TWO, '--num_machines', '2', '--machine_rank', str(rank), '--same_network',
                    '--main_process_ip', '127.0.0.1', '--main_process_port', port)
        return launch_train(*TINY, '--batch-size', '4', '--data-dir', folders, '--output', tmp_path, '--experiment', 'run',
                            launcher=launcher)
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(machine, range(2)))
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert 'Exported to' in outcomes[0].out and 'Exported to' not in outcomes[1].out
    assert 'Epoch 1/1' in outcomes[0].err and 'Epoch 1/1' not in outcomes[1].err
    metrics = metrics_of(tmp_path / 'run')
    assert metrics['processes'] == 2 and metrics['num_images'] == 13 and metrics['per_class_images'] == [5, 4, 4]
