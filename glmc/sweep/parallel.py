"""Runs side by side on one machine: each a process group of its own, with its log and its share of the cores."""
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from glmc.sweep.runs import Experiment

SCRIPT = Path(__file__).resolve().parents[2] / 'train_glmc.py'


def run_all(experiments: Sequence[Experiment], jobs: int) -> bool:
    """Run them, so many at a time. A failure stops no other run; Ctrl-C or SIGTERM stops all, and True is returned."""
    waiting, running = deque(experiments), {}
    with catch_signals() as signals:
        try:
            while (waiting or running) and not signals:
                while waiting and len(running) < jobs:
                    experiment = waiting.popleft()
                    running[experiment] = start(experiment, jobs)
                time.sleep(0.2)
                for experiment in [e for e, process in running.items() if process.poll() is not None]:
                    tell(experiment, running.pop(experiment).returncode)
        finally:
            stop(running.values())
    return bool(signals)


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """The signals so far. They are noted and no more: `timeout` sends two at once, and the second must not keep the runs
    from being stopped."""
    heard = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in handlers.items():
        if number == signal.SIGTERM or handler != signal.SIG_IGN:  # a shell's background job ignores Ctrl-C
            signal.signal(number, lambda number, frame: heard.append(number))
    try:
        yield heard
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def start(experiment: Experiment, jobs: int) -> subprocess.Popen:
    """A run in a process group of its own, with its share of the cores and everything it says in its log."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    threads = os.environ.get('OMP_NUM_THREADS', str(max(cores // jobs, 1)))
    experiment.folder.mkdir(parents=True, exist_ok=True)
    print(f'started   {experiment.folder}', flush=True)
    with open(experiment.log, 'a', encoding='utf-8') as log:
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), *experiment.argv], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True, env={**os.environ, 'OMP_NUM_THREADS': threads})


def tell(experiment: Experiment, code: int) -> None:
    if code or experiment.metrics() is None:
        print(f'failed    {experiment.folder}: {last_line(experiment.log)}', file=sys.stderr, flush=True)
    else:
        print(f'finished  {experiment.folder}', flush=True)


def last_line(log: Path) -> str:
    lines = log.read_text(encoding='utf-8', errors='replace').strip().splitlines()
    return f'{lines[-1]} (see {log})' if lines else 'it said nothing'


def stop(processes: Collection[subprocess.Popen]) -> None:
    """Let each finish its step and save."""
    if processes:
        print('interrupted: the runs save where they are; the same command goes on there', file=sys.stderr, flush=True)
    for process in processes:
        os.killpg(process.pid, signal.SIGTERM)  # with its loader workers
    for process in processes:
        process.wait()
