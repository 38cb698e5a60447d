"""Train a tiny network for thousands of epochs and watch the memory, descriptors and threads of all its processes.

    python tests/long_run.py                                       2,000 epochs of 10 steps, without loader processes
    python tests/long_run.py --epochs 200 --workers 1              with one
"""
import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
from conftest import write_folders  # noqa: E402

from glmc.run_folder import read_summary  # noqa: E402

GROWTH = 1.05  # of the memory from a quarter of the run to its end
SAMPLES = 20  # of the memory for each row; the least counts, because a step and a checkpoint take more for a moment
COLUMNS = ('epochs', 'seconds', 'memory_mib', 'descriptors', 'threads', 'processes')


def sample(process: psutil.Process) -> tuple[float, int, int, int]:
    """MiB that the processes of a run have for themselves, their descriptors and threads, and their number: the least of
    several samples."""
    found = []
    for _ in range(SAMPLES):
        family = [process, *process.children(recursive=True)]
        memory = sum(each.memory_full_info().uss for each in family) / 2 ** 20
        found.append((round(memory, 1), sum(each.num_fds() for each in family), sum(each.num_threads() for each in family),
                      len(family)))
        time.sleep(0.1)
    return tuple(map(min, zip(*found, strict=True)))


def watch(folder: Path, epochs: int, workers: int, points: int) -> list[dict]:
    """Train, and return a row after each of `points` equal parts of the epochs."""
    write_folders(folder / 'images' / 'train', {'ant': 10, 'bee': 6, 'cat': 4})
    write_folders(folder / 'images' / 'validation', {'ant': 1, 'bee': 1, 'cat': 1}, start=100)
    options = ('--model', 'test_resnet', '--img-size', '32', '--batch-size', '2', '--lr', '0.001', '--no-report',
               '--method', 'ce', '--epochs', str(epochs), '--workers', str(workers), '--data-dir', str(folder / 'images'),
               '--output', str(folder), '--experiment', 'run', '--resident', 'off', '--log-interval', '1000')
    with open(folder / 'log', 'w') as log:
        run = subprocess.Popen([sys.executable, ROOT / 'train_glmc.py', *options], stdout=log, stderr=log,
                               env={**os.environ, 'PYTHONPATH': str(ROOT)})
    process, rows, started = psutil.Process(run.pid), [], time.monotonic()
    while run.poll() is None:
        time.sleep(0.05)
        done = len(read_summary(folder / 'run')) if len(rows) < points else 0
        if done >= (len(rows) + 1) * epochs // (points + 1):
            try:
                found = sample(process)
            except psutil.Error:  # a process has just ended
                continue
            rows.append(dict(zip(COLUMNS, (done, round(time.monotonic() - started), *found), strict=True)))
            print(*rows[-1].values(), sep=' | ', flush=True)
        time.sleep(0.5)
    assert run.returncode == 0, (folder / 'log').read_text()[-2000:]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--epochs', type=int, default=2000, help='of 10 steps')
    parser.add_argument('--workers', type=int, default=0)
    parser.add_argument('--points', type=int, default=10, help='rows of the table')
    parser.add_argument('--csv', help='write the table there')
    args = parser.parse_args()
    print(*COLUMNS, sep=' | ')
    with tempfile.TemporaryDirectory() as folder:
        rows = watch(Path(folder), args.epochs, args.workers, args.points)
    if args.csv:
        with open(args.csv, 'w', newline='', encoding='utf-8') as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    early, last = rows[len(rows) // 4], rows[-1]
    flat = all(last[name] <= early[name] for name in ('descriptors', 'threads', 'processes'))
    sys.exit(0 if flat and last['memory_mib'] <= early['memory_mib'] * GROWTH else 'memory, descriptors or threads grow')


if __name__ == '__main__':
    main()
