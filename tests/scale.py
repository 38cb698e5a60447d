"""Measure opening, drawing and the memory of loader processes for sets of up to ten million images.

    python tests/scale.py --images 100000 --folder /tmp/scale             makes the files, measures, and deletes them
    python tests/scale.py --images 100000 --folder /tmp/scale --only draw
    python tests/scale.py --images 10000000 --folder /tmp/lists --keep --only draw        with a list.txt made before

All files are hard links of one PNG of 16 pixels. Each measurement has a process of its own, after one listing of the files,
so that the system knows their names. Seconds of opening and drawing are processor time.
"""
import argparse
import csv
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import numpy as np  # noqa: E402
import psutil  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from timm.data import create_dataset  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from glmc.data.loaders import ViewDataset  # noqa: E402
from glmc.data.profiles import Profile  # noqa: E402
from glmc.data.sampling import PairSampler  # noqa: E402
from glmc.data.sources import load_images  # noqa: E402

CLASSES = 1000
LINKS = 60_000  # to one file; ext4 allows 65,000
POWER = 0.5  # of the weighted draw
BATCH = 256
READ = 400_000  # images that the loader processes read before their memory is measured


def write_files(folder: Path, images: int) -> None:
    """Write `train/<class>/<image>.png` and `list.txt`; image i has class i mod 1000."""
    for c in range(CLASSES):
        os.makedirs(folder / 'train' / f'c{c:04}')
    with open(folder / 'list.txt', 'w') as lines:
        for index in range(images):
            if index % LINKS == 0:
                source = folder / f'{index}.png'
                Image.new('RGB', (16, 16), (9, 99, 199)).save(source)
            name = f'c{index % CLASSES:04}/{index:08}.png'
            os.link(source, folder / 'train' / name)
            lines.write(f'{name} {index % CLASSES}\n')


def opened(folder: Path, kind: str):
    """Open the set as training does, from the folder or the list."""
    train = str(folder / 'train')
    return load_images('train', str(folder / 'list.txt') if kind == 'list' else None, data_dir=train)


def measure_timm(folder: Path) -> dict:
    started = time.process_time()
    create_dataset('', root=str(folder / 'train'))
    return {'timm_s': time.process_time() - started}


def measure_folder(folder: Path, kind: str = 'folder') -> dict:
    started = time.process_time()
    images = opened(folder, kind)
    done = time.process_time()
    Profile.of(images.labels, images.num_classes, images.identities())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 10
    return {f'{kind}_s': done - started, f'{kind}_fingerprint_s': time.process_time() - done, f'{kind}_peak_mib': peak}


def measure_list(folder: Path) -> dict:
    return measure_folder(folder, 'list')


def measure_draw(folder: Path) -> dict:
    """Seconds of the draw of an epoch, and those that an epoch after the first waits for its first batch."""
    lines = (folder / 'list.txt').read_text().splitlines()
    labels = np.array([int(line.rpartition(' ')[2]) for line in lines])
    sampler = PairSampler(labels, BATCH, POWER)
    started = time.process_time()
    columns = sampler.sample_epoch(0)
    draw = time.process_time() - started
    del columns
    list(islice(sampler, 10))
    time.sleep(4 * draw)
    sampler.set_epoch(1)
    started = time.perf_counter()
    next(iter(sampler))
    return {'draw_s': draw, 'late_s': time.perf_counter() - started}


def measure_worker(folder: Path, method: str) -> dict:
    """Private memory of a loader process of two, and the seconds until the first batch."""
    images = opened(folder, 'list')
    loader = DataLoader(
        ViewDataset(images, one_pixel), batch_sampler=PairSampler(images.labels, BATCH), num_workers=2,
        multiprocessing_context=method, persistent_workers=True)
    started, read, used, first = time.perf_counter(), 0, 0, 0.0
    while read < READ:
        for views, _ in loader:
            first = first or time.perf_counter() - started
            read += len(views)
            if read >= READ:
                break
        workers = [each for each in psutil.Process().children(recursive=True) if each.num_threads() and is_worker(each)]
        used = max(each.memory_full_info().uss for each in workers) / 2 ** 20
    return {f'{method}_mib': used, f'{method}_first_s': first}


def is_worker(process: psutil.Process) -> bool:
    """Whether it is a loader process rather than a server or tracker of Python: those use no processor time."""
    return sum(process.cpu_times()[:2]) > 3


def one_pixel(image: Image.Image, mode: str) -> list[torch.Tensor]:
    """Views without augmentation, so that reading takes little time."""
    image.load()
    return [torch.zeros(1, 1, 1, dtype=torch.uint8)]


MEASURES = {
    'timm': measure_timm, 'folder': measure_folder, 'list': measure_list, 'draw': measure_draw,
    'fork': lambda folder: measure_worker(folder, 'fork'), 'forkserver': lambda folder: measure_worker(folder, 'forkserver')}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--images', type=int, default=100_000)
    parser.add_argument('--folder', type=Path, required=True, help='new folder for the files, deleted at the end')
    parser.add_argument('--only', nargs='+', choices=MEASURES, default=list(MEASURES))
    parser.add_argument('--csv', type=Path, help='append a row to this file')
    parser.add_argument('--measure', choices=MEASURES, help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument('--keep', action='store_true', help='use the files of an earlier call, and keep them')
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(MEASURES[args.measure](args.folder)))
        return
    row = {'images': args.images}
    try:
        if not (args.keep and args.folder.exists()):
            write_files(args.folder, args.images)
        sum(len(files) for _, _, files in os.walk(args.folder))
        for name in args.only:
            run = subprocess.run([sys.executable, __file__, '--folder', args.folder, '--measure', name],
                                 stdout=subprocess.PIPE, text=True, check=True)
            row |= {key: round(value, 2) for key, value in json.loads(run.stdout).items()}
            print(row, file=sys.stderr, flush=True)
    finally:
        if not args.keep:
            shutil.rmtree(args.folder)
    print(*row, sep=' | ')
    print(*row.values(), sep=' | ')
    if args.csv:
        new = not args.csv.exists()
        with open(args.csv, 'a', newline='', encoding='utf-8') as file:
            writer = csv.DictWriter(file, row)
            if new:
                writer.writeheader()
            writer.writerow(row)


if __name__ == '__main__':
    main()
