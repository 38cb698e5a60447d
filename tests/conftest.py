"""Shared by several tests: small image sets made on the spot, and the scripts run as a user runs them."""
import io
import json
import logging
import multiprocessing
import os
import socket
import subprocess
import sys
import tarfile
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PACKS = ROOT.parent / 'shared' / 'data'
COUNTS = {'ant': 14, 'bee': 7, 'cat': 4}  # training images per class of the small sets; 5 + 4 + 4 for validation
VALIDATION = {'ant': 5, 'bee': 4, 'cat': 4}
TINY = ['--model', 'test_resnet', '--img-size', '32', '--batch-size', '8', '--workers', '0', '--epochs', '1',
        '--lr', '0.01', '--no-report', '--method', 'glmc']

sys.path.insert(0, str(ROOT))
os.environ.setdefault('HF_HUB_OFFLINE', '1')  # every data set used here is on this disk
torch.set_num_threads(1)  # tiny models gain nothing from more, and lose where several tests run at once
Outcome = namedtuple('Outcome', 'code out err')


def pytest_configure(config) -> None:
    """Hide the GPU from all tests, unless `-m cuda` selects those that need it."""
    if 'cuda' not in config.option.markexpr.replace('not cuda', ''):
        os.environ['CUDA_VISIBLE_DEVICES'] = ''


def coloured(label: int, number: int, size: tuple[int, int] = (32, 32), mode: str = 'RGB') -> Image.Image:
    """A noisy image whose colour tells its class."""
    rng = np.random.default_rng((label, number))
    pixels = rng.integers(0, 90, (size[1], size[0], 3))
    pixels[..., label % 3] += 150
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def write_folders(folder: Path, counts: dict[str, int], suffix: str = '.png', start: int = 0) -> Path:
    """`folder/class/number.suffix`."""
    for label, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for number in range(start, start + count):
            coloured(label, number).save(folder / name / f'{number}{suffix}')
    return folder


def write_shards(root: Path, shard_size: int) -> Path:
    """The images of `folders` as WebDataset shards, with the _info.json that timm wants."""
    splits = {}
    for split, counts, start in (('train', COUNTS, 0), ('validation', VALIDATION, 100)):
        samples = [(label, start + n) for label, count in enumerate(counts.values()) for n in range(count)]
        shards = [samples[at:at + shard_size] for at in range(0, len(samples), shard_size)]
        names = [f'{split}-{number:04d}.tar' for number in range(len(shards))]
        for name, shard in zip(names, shards, strict=True):
            with tarfile.open(root / name, 'w') as tar:
                for label, number in shard:
                    file = io.BytesIO()
                    coloured(label, number).save(file, 'PNG')
                    _add(tar, f'{label}-{number}.png', file.getvalue())
                    _add(tar, f'{label}-{number}.cls', str(label).encode())
        splits[split] = dict(
            name=split, num_samples=len(samples), filenames=names, shard_lengths=[len(shard) for shard in shards])
    (root / '_info.json').write_text(json.dumps(dict(splits=splits)))
    return root


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def run_command(*command, cwd: Path = ROOT, **environment) -> Outcome:
    """Run a command in a new process."""
    defaults = {'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    env = {**os.environ, **defaults, **environment}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True,
                          errors='surrogateescape', timeout=600)
    return Outcome(done.returncode, done.stdout, done.stderr)


def run_train(*options, cwd: Path = ROOT, **environment) -> Outcome:
    return run_command(sys.executable, ROOT / 'train_glmc.py', *options, cwd=cwd, **environment)


def launch_train(*options, launcher: tuple = (), script: Path = ROOT / 'train_glmc.py', **environment) -> Outcome:
    """`accelerate launch` on the CPU."""
    return run_command(
        sys.executable, '-m', 'accelerate.commands.launch', *launcher, script, *options,
        ACCELERATE_USE_CPU='1', GLOO_SOCKET_IFNAME='lo', **environment)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def in_two_processes(function: Callable[[int], object], tmp_path: Path) -> list:
    """Results of `function(rank)` in two forked processes with a gloo group."""
    context = multiprocessing.get_context('fork')
    results = context.Queue()

    def work(rank: int) -> None:
        torch.distributed.init_process_group('gloo', f'file://{tmp_path}/group', rank=rank, world_size=2)
        results.put((rank, function(rank)))
        torch.distributed.barrier()
    processes = [context.Process(target=work, args=(rank,), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)
    return [found[rank] for rank in range(2)]


def assert_same(ours: Callable, loop: Callable, *inputs: torch.Tensor) -> None:
    """Two functions have the same value, and the same gradients for all inputs."""
    results = []
    for function in (ours, loop):
        leaves = [each.clone().requires_grad_() for each in inputs]
        value = function(*leaves)
        value.backward()
        results.append((value.detach(), [leaf.grad for leaf in leaves]))
    (value, grads), (expected, expected_grads) = results
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    for grad, same in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(torch.zeros(()).double() if grad is None else grad,
                                   torch.zeros(()).double() if same is None else same, rtol=1e-9, atol=1e-11)


@pytest.fixture(autouse=True)
def no_end_of_this_process(monkeypatch):
    """Scripts end their process a few seconds after `main`; in a test that calls them, the process goes on."""
    monkeypatch.setattr('glmc.cli._end_process', lambda code: None)


@pytest.fixture(scope='session')
def folders(tmp_path_factory) -> Path:
    """An image folder: train/ with 14, 7 and 4 images, validation/ with 13."""
    root = tmp_path_factory.mktemp('folders')
    write_folders(root / 'train', COUNTS)
    write_folders(root / 'validation', VALIDATION, start=100)
    return root


@pytest.fixture(scope='session')
def finished_run(folders, tmp_path_factory) -> Path:
    """Folder of a run of 2 epochs on `folders`, by the script in a process of its own; look, but change nothing."""
    output = tmp_path_factory.mktemp('runs')
    outcome = run_train(*TINY, '--epochs', '2', '--data-dir', folders, '--output', output, '--experiment', 'first')
    assert outcome.code == 0, outcome.err
    (output / 'stdout.txt').write_text(outcome.out)
    (output / 'stderr.txt').write_text(outcome.err)
    return output / 'first'


@pytest.fixture
def script(capsys, monkeypatch):
    """Run train_glmc.py in this process: its options -> exit code and what it wrote."""
    import train_glmc
    from glmc.cli import run_script

    def run(*options) -> Outcome:
        AcceleratorState._reset_state(True)
        monkeypatch.setattr(sys, 'argv', ['train_glmc.py', *map(str, options)])
        capsys.readouterr()
        code = run_script(train_glmc.main)
        return Outcome(code, *capsys.readouterr())
    handlers, level = list(logging.getLogger().handlers), logging.getLogger().level
    yield run
    AcceleratorState._reset_state(True)
    logging.getLogger().handlers = handlers
    logging.getLogger().setLevel(level)


@pytest.fixture(scope='session')
def pack():
    """Name -> path of an image pack, or the test is skipped."""
    def find(name: str) -> Path:
        if not (PACKS / name).exists():
            pytest.skip(f'needs the image pack {PACKS / name}, which is absent')
        return PACKS / name
    return find
