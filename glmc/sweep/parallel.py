"""Run experiments in parallel on one machine, each in its own process group with its share of the cores and a log file."""
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from glmc.evaluation.text import shot_line
from glmc.sweep.runs import Experiment

SCRIPT = Path(__file__).resolve().parents[2] / 'train_glmc.py'


def run_all(experiments: Sequence[Experiment], jobs: int) -> bool:
    """Run experiments, at most `jobs` at a time. A failed run stops no other; Ctrl-C or SIGTERM stops all.

    Returns:
        True if a signal stopped them.
    """
    waiting, running = deque(experiments), {}
    with catch_signals() as signals:
        try:
            while (waiting or running) and not signals:
                while waiting and len(running) < jobs:
                    experiment = waiting.popleft()
                    running[experiment] = start(experiment, jobs)
                time.sleep(0.2)
                for experiment in [e for e, process in running.items() if process.poll() is not None]:
                    log_result(experiment, running.pop(experiment).returncode)
        finally:
            terminate(running.values())
    return bool(signals)


@contextmanager
def catch_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM in a list instead of handling them.

    `timeout` sends two signals at once; the second must not interrupt the wait for runs that are saving.
    """
    received = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in handlers.items():
        if number == signal.SIGTERM or handler != signal.SIG_IGN:  # a shell's background job ignores Ctrl-C
            signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def start(experiment: Experiment, jobs: int) -> subprocess.Popen:
    """Start a run in its own process group with 1/jobs of the cores; its output goes to its log."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
    threads = os.environ.get('OMP_NUM_THREADS', str(max(cores // jobs, 1)))
    experiment.folder.mkdir(parents=True, exist_ok=True)
    print(f'started   {experiment.folder}', flush=True)
    with open(experiment.log, 'a', encoding='utf-8') as log:
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), *experiment.argv], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True, env={**os.environ, 'OMP_NUM_THREADS': threads})


def log_result(experiment: Experiment, code: int) -> None:
    """Print the metrics of a finished run, or the last line of the log of a failed one."""
    metrics = experiment.metrics()
    if metrics and not code:
        print(f'finished  {experiment.folder}: {shot_line(metrics)}', flush=True)
        return
    lines = experiment.log.read_text(encoding='utf-8', errors='replace').strip().splitlines() or ['no output']
    print(f'failed    {experiment.folder}: {lines[-1]} (see {experiment.log})', file=sys.stderr, flush=True)


def terminate(processes: Collection[subprocess.Popen]) -> None:
    """Stop runs and their loader workers with SIGTERM and wait until they have saved a checkpoint."""
    if processes:
        print('interrupted: waiting for the runs to save; run the same command again to resume', file=sys.stderr, flush=True)
    for process in processes:
        os.killpg(process.pid, signal.SIGTERM)
    for process in processes:
        process.wait()
