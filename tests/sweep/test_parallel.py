"""Parallel runs: Ctrl-C and `timeout` stop all of them after a save; each has its cores and its log."""
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from glmc.sweep import parallel
from glmc.sweep.parallel import catch_signals, start
from glmc.sweep.runs import Experiment

# Replaces train_glmc.py, whose signals tests/training/test_preemption.py tests: SIGTERM starts a save of one second.
RUN = """
import signal, sys, time
def save(number, frame):
    time.sleep(1)
    print('saved', flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
print('ready', flush=True)
time.sleep(120)
"""


def sweep(folder: Path) -> None:
    """Three runs, two at a time; called in a child process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` ignores it
    sys.stdout = sys.stderr = open(folder / 'out.txt', 'w', encoding='utf-8', buffering=1)  # noqa: SIM115
    parallel.SCRIPT = folder / 'run.py'
    runs = [Experiment(name, 0, None, (), folder / name) for name in 'abc']
    print('interrupted' if parallel.run_all(runs, jobs=2) else 'all have run')


@pytest.mark.parametrize('numbers', [[signal.SIGTERM, signal.SIGTERM], [signal.SIGINT]])
def test_all_runs_save_when_the_sweep_is_stopped(numbers, tmp_path):
    """`timeout` signals the sweep and then its process group, so the sweep gets two signals."""
    (tmp_path / 'run.py').write_text(RUN)
    process = multiprocessing.get_context('fork').Process(target=sweep, args=(tmp_path,))
    process.start()
    logs, deadline = [tmp_path / name / 'train.log' for name in 'ab'], time.monotonic() + 60
    while not all(log.exists() and 'ready' in log.read_text() for log in logs):
        assert time.monotonic() < deadline and process.is_alive()
        time.sleep(0.05)
    for number in numbers:
        os.kill(process.pid, number)
        time.sleep(0.3)
    process.join(60)
    assert (tmp_path / 'out.txt').read_text().splitlines()[2:] == [
        'interrupted: waiting for the runs to save; run the same command again to resume', 'interrupted']
    assert [log.read_text() for log in logs] == ['ready\nsaved\n'] * 2 and not (tmp_path / 'c').exists()


def test_sigterm_is_caught_where_ctrl_c_is_ignored():
    """A shell starts background jobs with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with catch_signals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.05)
            assert signals == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize('preset, jobs, threads', [(None, 2, 4), (None, 99, 1), ('3', 2, 3)])
def test_each_run_has_its_share_of_the_cores_and_a_log(preset, jobs, threads, tmp_path, monkeypatch):
    script = tmp_path / 'script.py'
    script.write_text('import json, os, sys\n'
                      "print(json.dumps([os.environ['OMP_NUM_THREADS'], os.environ['CARD'], *sys.argv[1:]]))")
    monkeypatch.setattr('glmc.sweep.parallel.SCRIPT', script)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: set(range(8)), raising=False)
    monkeypatch.setenv('CARD', '0')  # as CUDA_VISIBLE_DEVICES: all runs get what the sweep has
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    if preset:
        monkeypatch.setenv('OMP_NUM_THREADS', preset)
    experiment = Experiment('name', 0, None, ('--lr', '1'), tmp_path / 'name-seed0')
    assert start(experiment, jobs).wait() == 0
    assert json.loads(experiment.log.read_text()) == [str(threads), '0', *experiment.argv]
