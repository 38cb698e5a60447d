"""Runs that are killed, stopped, out of space or memory lose no checkpoint and end as an undisturbed run does."""
import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from conftest import COUNTS, ROOT, TINY, free_port, in_two_processes, run_command, write_folders
from safetensors.torch import load_file

import glmc.export.export
import train_glmc
from glmc.config import interval
from glmc.errors import InputError
from glmc.run_folder import lock_run_folder
from glmc.training.preemption import CheckpointClock, Preempted, Preemption, Request
from glmc.training.resume import load_newest

LONG = [*TINY, '--epochs', '200', '--log-interval', '1']


def torture(tmp_path, *options) -> list[dict]:
    """tests/kill.py in a process of its own: rows of its table."""
    outcome = run_command(sys.executable, ROOT / 'tests' / 'kill.py', '--csv', tmp_path / 'kills.csv', *options)
    assert outcome.code == 0, outcome.out + outcome.err
    with open(tmp_path / 'kills.csv', newline='') as file:
        return [{name: cell if name in ('configuration', 'signal') else int(cell) for name, cell in row.items()}
                for row in csv.DictReader(file)]


def test_a_few_kills(tmp_path):
    (row,) = torture(tmp_path, '--kills', '4', '--only', 'one process, resident, 2 steps an update, EMA')
    assert row['kills'] >= 4 and row['equal'] == row['runs'] >= 1 and row['unreadable'] == 0


def test_a_few_stops_lose_no_step(tmp_path):
    (row,) = torture(tmp_path, '--kills', '3', '--signal', 'TERM', '--only', 'two processes, resident')
    assert row['kills'] >= 3 and row['equal'] == row['runs'] >= 1 and row['repeated'] == 0


@pytest.mark.slow
@pytest.mark.parametrize('number, kills', [('KILL', 100), ('TERM', 40), ('USR1', 10), ('INT', 10)])
def test_many_kills(tmp_path, number, kills):
    rows = torture(tmp_path, '--kills', str(kills), '--signal', number)
    assert sum(row['kills'] for row in rows) >= kills
    assert all(row['equal'] == row['runs'] and row['unreadable'] == 0 for row in rows)
    assert number == 'KILL' or all(row['repeated'] == 0 for row in rows)


# --- signals, as a user or a scheduler sends them ---


@pytest.fixture
def running(folders, tmp_path):
    """Start a long run in a new process group; return its process once it trains."""
    started = []

    def start(*options, launcher=()):
        (tmp_path / 'err.txt').write_text('')
        env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'ACCELERATE_USE_CPU': '1',
               'GLOO_SOCKET_IFNAME': 'lo', 'CUDA_VISIBLE_DEVICES': ''}
        with open(tmp_path / 'err.txt', 'w') as log:
            process = subprocess.Popen(
                [sys.executable, *launcher, ROOT / 'train_glmc.py', *LONG, '--data-dir', folders, '--output', tmp_path,
                 '--experiment', 'run', '--resume', 'auto', *options],
                stderr=log, stdout=log, env=env, start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
        started.append(process)
        wait_for(lambda: 'Epoch 1/' in (tmp_path / 'err.txt').read_text() or process.poll() is not None)
        assert process.poll() is None, (tmp_path / 'err.txt').read_text()
        return process
    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def wait_for(condition, seconds: float = 60) -> None:
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.05)


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_to_the_whole_group_saves_and_exits_with_75(number, running, tmp_path):
    """As SLURM and Ctrl-C send it: loader processes get it, too."""
    process = running('--workers', '2', '--batch-size', '4')
    os.killpg(process.pid, number)
    assert process.wait(60) == 75
    log = (tmp_path / 'err.txt').read_text()
    assert re.search(rf'Stopped by {signal.Signals(number).name} in epoch \d+, saved as .*\.safetensors\n'
                     'Next: the same command with --resume auto continues\n$', log), log
    path, state = load_newest(tmp_path / 'run')
    assert str(path) in log
    steps = [(int(epoch), int(step)) for epoch, step in re.findall(r'Train: (\d+) \[ *(\d+)/', log)]
    epoch, step = steps[-1]
    steps_of_an_epoch = max(step for _, step in steps)
    done = (state['position']['epoch'], state['position']['step'])
    assert done == (epoch, step) or done == (epoch + 1, 0) and step == steps_of_an_epoch


def test_a_second_interrupt_stops_at_once(running, tmp_path):
    process = running('--workers', '2')
    process.send_signal(signal.SIGSTOP)  # so that no step ends in between
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    started = time.time()
    while process.poll() is None and time.time() < started + 30:
        time.sleep(1.1)
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
    assert process.returncode in (75, 130, -signal.SIGINT), (tmp_path / 'err.txt').read_text()  # -: while it ended
    assert time.time() < started + 20


TWO = ('-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--mixed_precision', 'no')


def ranks_of(launcher: subprocess.Popen) -> list[int]:
    children = subprocess.run(['pgrep', '-P', str(launcher.pid)], capture_output=True, text=True).stdout.split()
    return [int(pid) for pid in children]


@pytest.mark.slow
def test_two_processes_agree_where_to_stop(running, tmp_path):
    process = running('--batch-size', '4', launcher=(*TWO, '--main_process_port', str(free_port())))
    os.kill(ranks_of(process)[-1], signal.SIGTERM)  # to one of them
    assert process.wait(60) != 0
    log = (tmp_path / 'err.txt').read_text()
    assert 'exitcode  : 75' in log and load_newest(tmp_path / 'run'), log


@pytest.mark.slow
def test_a_process_that_dies_ends_the_others(running, tmp_path):
    process = running('--batch-size', '4', launcher=(*TWO, '--main_process_port', str(free_port())))
    wait_for(lambda: load_newest(tmp_path / 'run'))  # the log line of an epoch comes before its checkpoint
    os.kill(ranks_of(process)[-1], signal.SIGKILL)
    started = time.time()
    assert process.wait(60) != 0 and time.time() - started < 30
    assert load_newest(tmp_path / 'run')


def test_signals_are_caught_and_handlers_restored():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Preempted) as stopped, Preemption() as preemption:
        assert preemption.request(False) is Request.CONTINUE and preemption.request(True) is Request.SAVE
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.request(False) is Request.STOP and preemption.signal is signal.SIGUSR1  # the first
        raise Preempted
    assert signal.getsignal(signal.SIGTERM) is before
    assert stopped.value.code == 75


def test_a_signal_after_the_last_request_is_raised_again():
    caught = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: caught.append(number))
    try:
        with Preemption():
            os.kill(os.getpid(), signal.SIGTERM)
            assert not caught
        assert caught == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_stop_in_the_last_epoch_saves_and_the_next_run_exports(train, tmp_path, monkeypatch, capsys):
    log_epoch = train_glmc.log_epoch

    def log_epoch_and_stop(setup, folder, epoch, *found):
        log_epoch(setup, folder, epoch, *found)
        if epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(train_glmc, 'log_epoch', log_epoch_and_stop)
        with pytest.raises(Preempted):
            train('--epochs', '2')
    assert 'Stopped by SIGTERM after the last epoch, saved as' in capsys.readouterr().err
    assert not (tmp_path / 'run' / 'export').exists()
    outcome = train('--epochs', '2', '--resume', 'auto')
    assert outcome.code == 0 and 'Exported to' in outcome.out and 'Epoch ' not in outcome.err


def test_interrupts_close_together_are_one(monkeypatch):
    clock = iter([10.0, 10.2, 12.0])
    monkeypatch.setattr('glmc.training.preemption.time.monotonic', lambda: next(clock))
    with pytest.raises(Preempted), Preemption():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the launcher passes on what the terminal sent to all
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0)
        raise Preempted


@pytest.mark.parametrize('failing', [(), (1,), (0, 1)], ids=['works', 'fails on one', 'fails on both'])
def test_processes_agree_where_the_group_between_the_cpus_cannot_be_made(failing, monkeypatch, tmp_path, caplog):
    """The default group stands in for one of a GPU, which cannot vote on the CPU."""
    def new_group(backend):
        if dist.get_rank() in failing:
            raise RuntimeError('gloo: no address for the name of this host')
        return dist.GroupMember.WORLD
    monkeypatch.setattr(dist, 'get_backend', lambda: 'nccl')
    monkeypatch.setattr(dist, 'new_group', new_group)

    def stop(rank: int) -> tuple:
        with pytest.raises(Preempted), Preemption() as preemption:
            if rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            first = preemption.request(False)
            answers = first, preemption.request(False), preemption.request(False, at_once=True)
            raise Preempted
        return answers, preemption.group is None, sum('No group for signals' in text for text in caplog.messages)
    answers = Request.CONTINUE, Request.STOP, Request.STOP
    assert in_two_processes(stop, tmp_path) == [
        (answers, bool(failing), 0 in failing), (answers, bool(failing), 1 in failing)]


def test_processes_on_the_cpu_vote_in_the_group_that_they_have(monkeypatch, tmp_path):
    def vote(rank: int) -> Request:
        monkeypatch.setattr(dist, 'new_group', None)
        with Preemption() as preemption:
            return preemption.request(save=rank == 1, at_once=True)
    assert in_two_processes(vote, tmp_path) == [Request.SAVE, Request.SAVE]


def test_checkpoint_clock(monkeypatch):
    steps = CheckpointClock('3')
    assert [steps.due(step) for step in range(5)] == [False, False, False, True, True]
    steps.reset(4)
    assert not steps.due(6) and steps.due(7)
    now = [0.0]
    monkeypatch.setattr('glmc.training.preemption.time.monotonic', lambda: now[0])
    minutes = CheckpointClock('1.5m')
    now[0] = 89
    assert not minutes.due(1000)
    now[0] = 91
    assert minutes.due(1)


@pytest.mark.parametrize('text', ['0', '-1', '1.5', 'm', '0m', '0.0m', '10s', '1 m', ''])
def test_interval_is_checked(text):
    with pytest.raises(Exception, match='expected steps as 500 or minutes as 10m'):
        interval(text)


# --- the folder ---


def test_two_runs_on_one_folder(running, script, folders, tmp_path):
    running()
    outcome = script(*TINY, '--data-dir', folders, '--output', tmp_path, '--experiment', 'run', '--resume', 'auto')
    assert outcome.code == 2
    assert re.search(r'error: --experiment run: process \d+ on \S+ is writing to .*run; wait for it', outcome.err)


def test_a_lock_ends_with_its_process(tmp_path):
    claim = f'import pathlib, glmc.run_folder as r; file = r.lock_run_folder(pathlib.Path({str(tmp_path)!r}))'
    assert run_command(sys.executable, '-c', claim).code == 0
    lock_run_folder(tmp_path).close()


@pytest.fixture
def train(script, folders, tmp_path):
    def run(*options):
        return script(*TINY, '--data-dir', folders, '--output', tmp_path, '--experiment', 'run', *options)
    return run


def test_a_broken_newest_checkpoint_is_ignored(train, tmp_path):
    assert train('--epochs', '3').code == 0
    expected = load_file(tmp_path / 'run' / 'export' / 'model.safetensors')
    newest = tmp_path / 'run' / 'checkpoints' / 'epoch-0002.safetensors'
    content = bytearray(newest.read_bytes())
    content[-100] ^= 1  # one bit of one weight, which only the checksum detects
    newest.write_bytes(content)
    outcome = train('--epochs', '3', '--resume', 'auto')
    assert outcome.code == 0 and 'epoch 3 of 3 comes next' in outcome.err
    assert outcome.err.count('Checkpoint ignored') == 1 and 'epoch-0002.safetensors' in outcome.err
    found = load_file(tmp_path / 'run' / 'export' / 'model.safetensors')
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_only_broken_checkpoints_are_an_error(train, tmp_path):
    assert train('--epochs', '2').code == 0
    for path in (tmp_path / 'run' / 'checkpoints').iterdir():
        path.write_bytes(b'')
    outcome = train('--epochs', '2', '--resume', 'auto')
    assert outcome.code == 2 and 'none of its 2 checkpoints can be read' in outcome.err
    assert (tmp_path / 'run' / 'export').exists()


def test_half_written_files_are_deleted(train, tmp_path):
    assert train('--epochs', '1').code == 0
    half = tmp_path / 'run' / 'checkpoints' / 'epoch-0001.safetensors.tmp'
    half.write_bytes(b'half')
    assert train('--epochs', '2', '--resume', 'auto').code == 0 and not half.exists()


def test_a_full_disk_is_survived(train, tmp_path, monkeypatch):
    """From the second epoch on there is no space; then there is."""
    real, full = shutil.disk_usage, [False, True, True, False]

    def disk_usage(path):
        return real(path)._replace(free=0) if full.pop(0) else real(path)
    monkeypatch.setattr('glmc.training.checkpoint.shutil.disk_usage', disk_usage)
    outcome = train('--epochs', '4')
    assert outcome.code == 0 and not full
    said = re.findall('Checkpoint not saved, the previous one is kept: .* needs .* MiB, 0 MiB are free', outcome.err)
    assert len(said) == 2
    names = sorted(path.name for path in (tmp_path / 'run' / 'checkpoints').iterdir())
    assert names == ['epoch-0000.safetensors', 'epoch-0003.safetensors']


LIMITED = """
import resource, runpy, sys, torch, timm
pages = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (pages + 2 ** 30, resource.RLIM_INFINITY))
sys.argv[0] = 'train_glmc.py'
runpy.run_path('train_glmc.py', run_name='__main__')
"""


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='/proc')
def test_lack_of_memory_is_one_line(tmp_path):
    (tmp_path / 'limited.py').write_text(LIMITED)
    outcome = run_command(sys.executable, tmp_path / 'limited.py', '--method', 'ce', '--model', 'resnet18', '--img-size',
                          '256', '--batch-size', '400', '--workers', '0', '--epochs', '1', '--output', tmp_path)
    assert outcome.code == 1 and 'Traceback' not in outcome.err, outcome.err
    assert re.search(r'\nerror: out of memory: .*; use a smaller --batch-size, --grad-checkpointing or --amp-dtype '
                     r'bfloat16; checkpoints are kept, --resume auto continues from the newest\n$', outcome.err), outcome.err


def test_an_export_that_reads_back_otherwise_is_one_line(train, tmp_path, monkeypatch):
    save_file = glmc.export.export.save_file
    with monkeypatch.context() as patch:
        patch.setattr(glmc.export.export, 'save_file', lambda tensors, path, metadata: save_file(
            {name: value + 1 for name, value in tensors.items()}, path, metadata))
        outcome = train()
    assert outcome.code == 1 and 'Traceback' not in outcome.err
    assert re.search(r'\nerror: .*export: not exported: the loaded model gives other logits than the trained one, or NaN; .*'
                     r'from a checkpoint\n$', outcome.err), outcome.err
    assert not (tmp_path / 'run' / 'export').exists()
    assert train('--resume', 'auto').code == 0 and (tmp_path / 'run' / 'export').exists()


# --- a loss that is not finite ---


def test_training_that_blows_up_stops_with_one_line(train, tmp_path):
    outcome = train('--lr', '1e25', '--epochs', '9', '--max-skipped-steps', '2', '--log-interval', '1')
    assert outcome.code == 1 and 'Traceback' not in outcome.err
    assert re.search(r'error: epoch \d, step \d: not finite: .*; 3 updates of this epoch were skipped, --max-skipped-steps '
                     r'allows 2; .* \(saved as .*safetensors\)\n$', outcome.err), outcome.err


# --- another number of processes, another batch ---


def test_another_batch_in_the_middle_of_an_epoch_is_warned_about(train, tmp_path):
    assert train('--epochs', '2', '--checkpoint-interval', '1', '--batch-size', '4', '--checkpoint-hist', '20').code == 0
    checkpoints = tmp_path / 'run' / 'checkpoints'
    for path in sorted(checkpoints.iterdir())[3:]:
        path.unlink()
    assert [path.name for path in sorted(checkpoints.iterdir())][-1] == 'epoch-0000-step-00000003.safetensors'
    outcome = train('--epochs', '2', '--resume', 'auto', '--batch-size', '8', '--log-interval', '1')
    assert outcome.code == 0
    assert 'The global batch was 4 x 1 steps an update, now it is 8 x 1: from here on this is another' in outcome.err
    assert 'epoch 1 of 2, step 2 comes next' in outcome.err  # 12 of 25 images are done, one whole batch of 8


def test_mid_epoch_checkpoint_exports(train, tmp_path):
    assert train('--checkpoint-interval', '1', '--checkpoint-hist', '9').code == 0
    path = tmp_path / 'run' / 'checkpoints' / 'epoch-0000-step-00000001.safetensors'
    outcome = run_command(sys.executable, '-m', 'glmc.export', path, tmp_path / 'early')
    assert outcome.code == 0, outcome.err
    assert (tmp_path / 'early' / 'model.safetensors').exists()


# --- images that cannot be decoded ---


def spoil(root):
    write_folders(root / 'train', COUNTS)
    write_folders(root / 'validation', {'ant': 3, 'bee': 2, 'cat': 2}, start=100)
    for name in ('train/ant/3.png', 'train/ant/4.png', 'validation/bee/100.png'):
        path = root / name
        path.write_bytes(path.read_bytes()[:40])
    return root


@pytest.mark.parametrize('options', [[], ['--workers', '2'], ['--augmentation', 'cifar']])
def test_bad_images_are_replaced_counted_and_named(options, script, tmp_path):
    root, weights = spoil(tmp_path / 'images'), []
    for name in ('one', 'two'):
        outcome = script(*TINY, '--data-dir', root, '--output', tmp_path, '--experiment', name, '--epochs', '2',
                         '--on-bad-image', 'skip', *options)
        assert outcome.code == 0, outcome.err
        named = '2 training images cannot be decoded and were replaced by others of their class: ant/3.png, ant/4.png'
        assert outcome.err.count(named) == 1
        assert 'validation: 1 images cannot be decoded and are ignored' in outcome.err
        with open(tmp_path / name / 'summary.csv', newline='') as file:
            assert [row['bad_images'] for row in csv.DictReader(file)] == ['2', '2']
        weights.append(load_file(tmp_path / name / 'export' / 'model.safetensors'))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_a_class_of_bad_images_stops(script, tmp_path):
    root = spoil(tmp_path / 'images')
    for path in (root / 'train' / 'cat').iterdir():
        path.write_bytes(b'')
    outcome = script(*TINY, '--data-dir', root, '--output', tmp_path, '--on-bad-image', 'skip')
    assert outcome.code == 2 and re.search(r'cannot decode image cat/\d.png', outcome.err)


def test_first_readable_takes_the_next_of_the_class():
    from glmc.data.datasets import BadImages, ImageSet
    from glmc.errors import ImageError
    labels = torch.tensor([0, 1, 0, 1, 0]).numpy()
    bad = BadImages(ImageSet(lambda index: None, labels, list('abcde'), ['x', 'y'], 'set'))

    def use(broken):
        def of(index):
            if index in broken:
                raise ImageError(str(index))
            return index
        return of
    assert bad.first_readable(0, use({0})) == 2 and bad.first_readable(4, use({4})) == 0  # around the end
    assert bad.first_readable(3, use({3})) == 1 and bad.first_readable(1, use(set())) == 1
    assert bad.names() == ['a', 'd', 'e']
    with pytest.raises(InputError):
        bad.first_readable(1, use({1, 3}))


@pytest.mark.parametrize('words', [('train_glmc.py',), ('validate_glmc.py',), ('-m', 'glmc.predict')])
def test_ctrl_c_during_the_imports_is_one_line(words, tmp_path):
    (tmp_path / 'timm').mkdir()
    (tmp_path / 'timm' / '__init__.py').write_text('raise KeyboardInterrupt')  # where a user's Ctrl-C arrives
    words = [ROOT / word if word.endswith('.py') else word for word in words]
    outcome = run_command(sys.executable, *words, PYTHONPATH=f'{tmp_path}:{ROOT}', cwd=tmp_path)
    assert outcome == (130, '', 'interrupted\n')
