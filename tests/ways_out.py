"""End training in every way there is, and measure the seconds until the last of its processes is gone.

    python tests/ways_out.py --csv ways.csv                    all ways, with 0, 1 and 2 workers, one and two processes
    python tests/ways_out.py --only 'bad image' --workers 2    one way

A run is forked off a process that has imported everything, and ends as a script does. All its processes hold the pipe of its
log: the pipe ends with the last of them.
"""
import argparse
import csv
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
from conftest import free_port, write_folders  # noqa: E402

import train_glmc  # noqa: E402
from glmc.cli import run_script  # noqa: E402
from glmc.training.meter import Meter  # noqa: E402

GONE = 20.0  # seconds after which a run hangs
OPTIONS = ('--model', 'test_resnet', '--img-size', '32', '--batch-size', '4', '--epochs', '500', '--lr', '0.01',
           '--no-report', '--method', 'ce')
LAUNCHER = (sys.executable, '-m', 'accelerate.commands.launch', '--multi_gpu', '--num_processes', '2', '--mixed_precision',
            'no', '--num_machines', '1', '--dynamo_backend', 'no')


class Run:
    """A run with its folder of images.

    Args:
        folder: Folder of the run, its images and its output.
        workers: Loader processes of each process.
        processes: Number of processes.
        launched: Whether Accelerate's launcher starts them.
    """

    def __init__(self, folder: Path, workers: int, processes: int, launched: bool = False):
        self.folder, self.workers, self.processes, self.launched = folder, workers, processes, launched
        self.images, self.log, self.pids = folder / 'images', '', []
        write_folders(self.images / 'train', {'ant': 10, 'bee': 6, 'cat': 3})
        write_folders(self.images / 'validation', {'ant': 2, 'bee': 2, 'cat': 2}, start=100)

    def start(self, way: 'Way') -> None:
        """Start the processes, and return when they train, or have ended."""
        words = ['train_glmc.py', *OPTIONS, *way.options, '--workers', str(self.workers), '--data-dir', str(self.images),
                 '--output', str(self.folder), '--experiment', 'run']
        self.pipe, log = os.pipe()
        if self.launched:
            env = {**os.environ, 'ACCELERATE_USE_CPU': '1', 'GLOO_SOCKET_IFNAME': 'lo', 'PYTHONPATH': str(ROOT)}
            command = [*LAUNCHER, '--main_process_port', str(free_port()), str(ROOT / words[0]), *words[1:]]
            self.pids = [subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True).pid]
        else:
            port = free_port()
            self.pids = [self._fork(rank, port, log, words, way.prepare) for rank in range(self.processes)]
        os.close(log)
        if way.act is not None:
            self.read_until('Epoch 2/', 120)

    def _fork(self, rank: int, port: int, log: int, words: list[str], prepare: Callable[[], None]) -> int:
        pid = os.fork()
        if pid:
            return pid
        os.setpgid(0, self.pids[0] if self.pids else 0)
        os.close(self.pipe)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        sys.stdout, sys.stderr = (open(number, 'w', buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
        os.environ['ACCELERATE_USE_CPU'] = '1'
        if self.processes > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(self.processes), MASTER_ADDR='127.0.0.1',
                              LOCAL_WORLD_SIZE=str(self.processes), MASTER_PORT=str(port), GLOO_SOCKET_IFNAME='lo')
        sys.argv = words
        prepare()
        sys.exit(run_script(train_glmc.main, rank == 0, exits=True))  # up to the top of this script, with all exit handlers

    def read_until(self, text: str | None, seconds: float) -> None:
        """Read the log until it has `text`, or to its end; raise TimeoutError after some seconds."""
        end = time.monotonic() + seconds
        while text is None or text not in self.log:
            ready, _, _ = select.select([self.pipe], [], [], max(end - time.monotonic(), 0))
            if not ready:
                raise TimeoutError(self.log[-2000:])
            part = os.read(self.pipe, 65536)
            if not part:
                return
            self.log += part.decode(errors='replace')

    def ranks(self) -> list[int]:
        """Ids of the processes that train."""
        return _children(self.pids[0]) if self.launched else self.pids

    def worker(self) -> int:
        """Id of a loader process of the first process."""
        return _children(self.ranks()[0])[0]

    def signal_all(self, number: int) -> None:
        os.killpg(self.pids[0], number)

    def codes(self) -> list[int]:
        """Exit codes of the processes, negative for a signal."""
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.pids]

    def kill(self) -> None:
        """End everything that is left of the run."""
        with suppress(ProcessLookupError):
            self.signal_all(signal.SIGCONT)
            self.signal_all(signal.SIGKILL)


def _children(pid: int) -> list[int]:
    return [int(child) for child in subprocess.run(['pgrep', '-P', str(pid)], capture_output=True, text=True).stdout.split()]


def fail_in_step(error: Exception) -> Callable[[], None]:
    """Let the 20th step of the first process raise an error."""
    def prepare() -> None:
        count_skipped, calls = Meter.count_skipped, []

        def raise_late(self, *args) -> None:
            calls.append(None)
            if len(calls) == 20 and os.environ.get('RANK', '0') == '0':
                raise error
            count_skipped(self, *args)
        Meter.count_skipped = raise_late
    return prepare


def small_files() -> None:
    """Let no file grow beyond 300 kB, less than a checkpoint or an export."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))


def delete(run: Run, pattern: str) -> None:
    for path in sorted(run.images.glob(pattern)):
        path.unlink()


def interrupt_a_stuck_run(run: Run) -> None:
    """Interrupt a run twice that waits for a loader process which does nothing any more."""
    os.kill(run.worker(), signal.SIGSTOP)
    time.sleep(1)
    run.signal_all(signal.SIGINT)
    time.sleep(1.2)
    run.signal_all(signal.SIGINT)


class Way(NamedTuple):
    """A way out.

    Args:
        code: Promised exit code of one of the processes; the others have it, too, or 1, or had finished.
        options: Options of train_glmc.py.
        act: Called with the run when it trains; None for a run that ends by itself.
        prepare: Called in each process before it starts.
        least_workers: Loader processes that the way needs.
        text: Text of the log's last lines.
    """
    code: int
    options: tuple[str, ...] = ()
    act: Callable[[Run], None] | None = None
    prepare: Callable[[], None] = lambda: None
    least_workers: int = 0
    text: str = ''


WAYS = {
    'bad image': Way(2, prepare=lambda: None, text='error: --data-dir'),
    'image deleted': Way(2, act=lambda run: delete(run, 'train/ant/*.png'), text='error: --data-dir'),
    'class deleted, skip': Way(2, ('--on-bad-image', 'skip'), lambda run: delete(run, 'train/cat/*'), text='cat/'),
    'exception': Way(1, prepare=fail_in_step(ZeroDivisionError('unexpected')), text='ZeroDivisionError: unexpected'),
    'non-finite loss': Way(1, ('--lr', '1e30', '--max-skipped-steps', '0'), text='not finite'),
    'out of memory': Way(1, prepare=fail_in_step(MemoryError('no memory')), text='error: out of memory'),
    'SIGTERM': Way(75, act=lambda run: run.signal_all(signal.SIGTERM), text='Stopped by SIGTERM'),
    'SIGUSR1': Way(75, act=lambda run: run.signal_all(signal.SIGUSR1), text='Stopped by SIGUSR1'),
    'SIGINT': Way(75, act=lambda run: run.signal_all(signal.SIGINT), text='Stopped by SIGINT'),
    'SIGTERM to one process': Way(75, act=lambda run: os.kill(run.ranks()[-1], signal.SIGTERM), text='Stopped by'),
    'SIGKILL of a process': Way(-9, act=lambda run: os.kill(run.ranks()[-1], signal.SIGKILL)),
    'SIGKILL of a worker': Way(1, act=lambda run: os.kill(run.worker(), signal.SIGKILL), least_workers=1,
                               text='error: a loader process'),
    'worker stuck, two SIGINT': Way(130, act=interrupt_a_stuck_run, least_workers=1, text='interrupted'),
    'disk full': Way(1, ('--epochs', '1'), prepare=small_files, text='no space left'),
}


def measure(name: str, workers: int, processes: int, launched: bool = False, limit: float = 5.0) -> dict:
    """End a run in this way, which may take `limit` seconds.

    Returns:
        Row of the table; `problem` is empty if the code, the log and the time are as promised.
    """
    way, folder = WAYS[name], Path(tempfile.mkdtemp())
    run = Run(folder, workers, processes, launched)
    if name == 'bad image':
        (run.images / 'train' / 'ant' / 'bad.jpg').write_bytes(b'x')
    row, problem, seconds = dict(way=name, workers=workers, processes=processes, launcher=launched), '', GONE
    try:
        run.start(way)
        if way.act is None and not launched:
            run.read_until(way.text, 120)  # the error
        elif way.act is not None:
            way.act(run)
        started = time.monotonic()
        run.read_until(None, 120 if launched and way.act is None else GONE)
        seconds = time.monotonic() - started
    except TimeoutError:
        problem = 'does not end: ' + run.log[-300:]
    run.kill()
    codes = run.codes()
    others = {way.code, 1, 0} if name == 'disk full' else {way.code, 1}  # the first process alone exports
    promised = way.code in codes and set(codes) <= others
    if launched:  # the launcher reports the codes of its processes
        promised = f'exitcode  : {way.code} ' in run.log and codes != [0]
    if not problem and seconds > limit and not (launched and way.act is None):
        problem = 'slow'
    elif not problem and not promised:
        problem = 'code'
    elif not problem and (way.text not in run.log or ('Traceback' in run.log) > (launched or name == 'exception')):
        problem = 'log: ' + run.log[-3000:]
    os.close(run.pipe)
    shutil.rmtree(folder, ignore_errors=True)
    return {**row, 'codes': ' '.join(map(str, codes)), 'seconds': round(seconds, 1), 'problem': problem}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--only', nargs='+', choices=list(WAYS), default=list(WAYS), metavar='WAY', help='some ways')
    parser.add_argument('--workers', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--processes', nargs='+', type=int, default=[1, 2])
    parser.add_argument('--launcher', action='store_true', help='start two processes by accelerate launch')
    parser.add_argument('--limit', type=float, default=5, help='seconds that a run may take to end')
    parser.add_argument('--csv', help='write the table there')
    args = parser.parse_args()
    rows = []
    for name in args.only:
        for processes in args.processes:
            for workers in args.workers:
                if workers >= WAYS[name].least_workers:
                    rows.append(measure(name, workers, processes, args.launcher and processes > 1, args.limit))
                    print(*rows[-1].values(), sep=' | ', flush=True)
    if args.csv:
        with open(args.csv, 'w', newline='', encoding='utf-8') as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    sys.exit(any(row['problem'] for row in rows))


if __name__ == '__main__':
    main()
