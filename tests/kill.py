"""Kill training again and again, resume it each time, and compare the result with that of an undisturbed run.

    python tests/kill.py --signal KILL --kills 100 --csv kills.csv
    python tests/kill.py --signal TERM --kills 40
    python tests/kill.py --signal KILL --one              to one process of two
    python tests/kill.py --signal STOP                    stopped for up to two seconds, then continued

A run is forked off a process that has imported everything, so that a try costs a second and not ten. The signal goes to all
its processes at a random moment after its folder is claimed; a checkpoint is saved after every update, so that many
moments fall into a save. With stage 2, many fall into its features, classifiers and exports.
"""
import argparse
import csv
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_glmc  # noqa: E402
from glmc.cli import run_script  # noqa: E402
from glmc.errors import InputError  # noqa: E402
from glmc.training.checkpoint import load_checkpoint  # noqa: E402
from glmc.training.preemption import EXIT_CODE  # noqa: E402
from glmc.training.resume import epoch_checkpoints  # noqa: E402

COMMON = ('--model', 'test_resnet', '--img-size', '32', '--epochs', '3', '--imbalance-factor', '20', '--checkpoint-interval',
          '1', '--log-interval', '1', '--no-report', '--drop', '0.2', '--checkpoint-hist', '2')
WORKERS = ('--augmentation', 'timm', '--resident', 'off', '--workers', '2')
CONFIGURATIONS = {  # name -> processes, options
    'one process, workers': (1, (*WORKERS, '--batch-size', '64')),
    'one process, resident, 2 steps an update, EMA': (
        1, ('--batch-size', '32', '--grad-accum-steps', '2', '--model-ema', '--model-ema-decay', '0.9')),
    'one process, resident, bfloat16, AdamW': (
        1, ('--batch-size', '64', '--amp-dtype', 'bfloat16', '--opt', 'adamw', '--sched-on-updates')),
    'two processes, resident': (2, ('--batch-size', '32')),
    'two processes, workers, 2 steps an update, EMA': (
        2, (*WORKERS, '--workers', '1', '--batch-size', '16', '--grad-accum-steps', '2', '--model-ema')),
    'one process, stage 2': (
        1, ('--batch-size', '128', '--method', 'ce', '--stage2', 'crt,tau_norm', '--feature-views', '1')),
}


class Trial:
    """A run that is killed until it ends.

    Args:
        folder: For it and its log.
        processes: Of the run.
        options: Of train_glmc.py.
        one: Whether a signal goes to the last process only.
    """

    def __init__(self, folder: Path, processes: int, options: Sequence[str], one: bool = False):
        self.one = one
        self.folder, self.processes, self.log = folder, processes, folder.with_suffix('.log')
        self.options = ('--output', str(folder.parent), '--experiment', folder.name, '--resume', 'auto', *COMMON, *options)

    def start(self) -> list[int]:
        """Fork the processes; their ids."""
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            port = probe.getsockname()[1]
        return [self._fork(rank, port) for rank in range(self.processes)]

    def _fork(self, rank: int, port: int) -> int:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            self._become(rank, port)
            code = run_script(train_glmc.main, rank == 0)
        except SystemExit as error:
            code = error.code
        finally:
            sys.stderr.flush()
            os._exit(code)

    def _become(self, rank: int, port: int) -> None:
        """This process is now one of the run."""
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ['ACCELERATE_USE_CPU'] = '1'
        if self.processes > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(self.processes), MASTER_ADDR='127.0.0.1',
                              LOCAL_WORLD_SIZE=str(self.processes), MASTER_PORT=str(port), GLOO_SOCKET_IFNAME='lo')
        sys.argv = ['train_glmc.py', *self.options]

    def run(self, number: int | None, delay: Callable[[], float]) -> list[int]:
        """One try: exit codes of its processes, negative for a signal.

        Args:
            number: The signal, or None to let it end.
            delay: Seconds from the claim of the folder to the signal.
        """
        pids, started = self.start(), time.time()
        if number is not None and self._claimed(started, pids[0]):
            time.sleep(delay())
            aims = [pid for pid in pids[-1:] if self.one] or pids
            _send(aims, number)
            if number == signal.SIGSTOP:
                time.sleep(random.uniform(0, 2))
                _send(aims, signal.SIGCONT)
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]

    def _claimed(self, started: float, pid: int) -> bool:
        options = self.folder / 'args.yaml'  # written when the folder has been claimed
        while not (options.exists() and options.stat().st_mtime >= started - 0.01):
            if not _running(pid):
                return False
            time.sleep(0.002)
        return True

    def result(self) -> tuple:
        """Results that must not depend on the kills: weights, all rows of summary.csv but their speed, metrics."""
        with open(self.folder / 'summary.csv', newline='') as file:
            rows = [{**row, 'images_per_second': ''} for row in csv.DictReader(file)]
        exports = sorted(self.folder.rglob('model.safetensors'))
        return {f'{path.relative_to(self.folder)}/{name}': weight for path in exports
                for name, weight in load_file(path).items()}, rows

    def steps(self) -> list[tuple[int, int]]:
        """Epoch and step of each step that was done, as logged."""
        found = re.findall(r'^Train: (\d+) \[ *(\d+)/', self.log.read_text(), re.MULTILINE)
        return [(int(epoch), int(step)) for epoch, step in found]


def _send(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        if _running(pid):
            os.kill(pid, number)


def _running(pid: int) -> bool:
    """Whether a child has not ended; it is not waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def same(one: tuple, other: tuple) -> bool:
    """Bit for bit."""
    (weights, rows), (other_weights, other_rows) = one, other
    return rows == other_rows and weights.keys() == other_weights.keys() and all(
        torch.equal(weights[name], other_weights[name]) for name in weights)


def readable_subset(folder: Path) -> bool:
    """Whether the newest checkpoint, if there is one, is whole."""
    try:
        return all(load_checkpoint(path) for path in epoch_checkpoints(folder / 'checkpoints')[-1:])
    except InputError:
        return False


def torture(name: str, number: int, kills: int, folder: Path, rng: random.Random, one: bool = False) -> dict:
    """Kill runs of a configuration that many times.

    Returns:
        Row of the table: kills, kills while a file was being written, unreadable newest checkpoints, steps done more
        than once, runs that ended, and those that ended bit for bit like the undisturbed run.
    """
    processes, options = CONFIGURATIONS[name]
    whole = Trial(folder / 'whole', processes, options)
    started = time.time()
    assert set(whole.run(None, lambda: 0)) == {0}, whole.log.read_text()
    training = time.time() - (whole.folder / 'args.yaml').stat().st_mtime
    row = dict(configuration=name, signal=signal.Signals(number).name, kills=0, in_a_save=0, unreadable=0, repeated=0,
               runs=0, equal=0)
    print(f'{name}: {time.time() - started:.1f} s, {training:.1f} of them training and export', flush=True)
    while row['kills'] < kills:
        trial = Trial(folder / f"run{row['runs']}", processes, options, one)
        while True:
            row['kills'] += number == signal.SIGSTOP
            codes = trial.run(number, lambda: rng.uniform(0, training * 0.7))
            if set(codes) == {0}:
                break
            log = trial.log.read_text()
            others = {1} if one and 'error: another process of this run has ended' in log else set()
            assert set(codes) <= {-number, EXIT_CODE, 0} | others, (codes, log[-3000:])
            row['kills'] += 1
            row['in_a_save'] += any(trial.folder.rglob('*.tmp'))
            row['unreadable'] += not readable_subset(trial.folder)
        row['runs'] += 1
        row['equal'] += same(trial.result(), whole.result())
        row['repeated'] += len(trial.steps()) - len(whole.steps())
        shutil.rmtree(trial.folder)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--signal', choices=('KILL', 'TERM', 'USR1', 'INT', 'STOP'), default='KILL')
    parser.add_argument('--kills', type=int, default=100, help='of all configurations together, at least')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--only', choices=list(CONFIGURATIONS), help='one configuration')
    parser.add_argument('--one', action='store_true', help='signal one process of two; configurations with two only')
    parser.add_argument('--csv', help='add the rows of the table there')
    args = parser.parse_args()
    number, rng = getattr(signal, f'SIG{args.signal}'), random.Random(args.seed)
    names = [args.only] if args.only else [name for name, (n, _) in CONFIGURATIONS.items() if n > args.one]
    each = -(-args.kills // len(names))
    for k, name in enumerate(names):
        with tempfile.TemporaryDirectory() as folder:
            row = torture(name, number, each, Path(folder) / str(k), rng, args.one)
        print(row, flush=True)
        if args.csv:
            new = not Path(args.csv).exists()
            with open(args.csv, 'a', newline='') as file:
                writer = csv.DictWriter(file, list(row))
                if new:
                    writer.writeheader()
                writer.writerow(row)


if __name__ == '__main__':
    main()
