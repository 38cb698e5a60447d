"""Features: as the model gives them, extracted once, by several processes, through kills, damage and full disks."""
import hashlib
import json
import logging
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import ROOT, launch_train

from glmc import cli
from glmc.data.datasets import ImageSet
from glmc.data.sources import load_digits_set
from glmc.errors import ImageError, RunError
from glmc.files import reserve
from glmc.models.backbone import create_backbone
from glmc.stage2 import feature_file, features
from glmc.stage2.feature_file import FeatureFile, StoredViews
from glmc.stage2.features import Extractor, Features

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
DATA_CONFIG = dict(input_size=(3, 16, 16), mean=MEAN, std=STD, interpolation='bilinear', crop_pct=1.0)
AUGMENTATION = dict(augmentation='cifar', hflip=0.5)


def digits(number: int = 20) -> ImageSet:
    return load_digits_set('train').subset(np.arange(number))


def extractor(model, **kwargs) -> Extractor:
    return Extractor(model.eval(), data_config=DATA_CONFIG, augmentation=AUGMENTATION, accelerator=Accelerator(),
                     **{'workers': 0, 'precision': 'float32', **kwargs})


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_backbone('resnet32_cifar', 10, channels=(4, 6, 8), depth=1)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 4 images, so that 20 images have five."""
    for module in (features, feature_file):
        monkeypatch.setattr(module, 'BLOCK', 4)


@pytest.fixture
def on_disk(monkeypatch):
    """Features of any size are bfloat16 and remain on the disk."""
    monkeypatch.setattr(feature_file, 'IN_MEMORY', 0)


def count_encoded(monkeypatch) -> list[int]:
    """Sizes of the batches that are encoded from now on."""
    sizes, encode = [], Extractor._encode
    monkeypatch.setattr(Extractor, '_encode', lambda self, images: sizes.append(len(images)) or encode(self, images))
    return sizes


def all_rows(found: Features) -> torch.Tensor:
    return torch.stack([found.rows(torch.arange(len(found)), view) for view in range(found.num_views)])


# --- values ---

def test_plain_features_are_those_of_the_model_and_give_its_logits(model):
    images = digits()
    found = extractor(model, batch_size=7)(images, num_views=2)
    assert found.views.shape == (3, 20, 8) and found.labels.tolist() == images.labels.tolist()
    for k in range(len(images)):
        pixels = torch.from_numpy(np.array(images.image(k).resize((16, 16), 2))).permute(2, 0, 1) / 255
        pixels = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        with torch.inference_mode():
            logits = model(pixels[None].float())[0]
        torch.testing.assert_close(model.fc(found.views[0][k]), logits, rtol=1e-4, atol=1e-4)


def test_augmented_views_differ_and_repeat_with_the_seed(model):
    one, again = (extractor(model)(digits(), num_views=3) for _ in range(2))
    other = extractor(model, seed=7)(digits(), num_views=3)
    assert torch.equal(one.views, again.views)
    assert torch.equal(one.views[0], other.views[0]) and not torch.equal(one.views[1], other.views[1])
    assert all(not torch.equal(one.views[a], one.views[b]) for a in range(4) for b in range(a))


def test_batches_keep_the_order_of_the_images(model):
    small, large = (extractor(model, batch_size=size)(digits(), num_views=1).views for size in (3, 20))
    torch.testing.assert_close(small, large)


def test_extraction_does_not_change_the_model(model):
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    Extractor(model, data_config=DATA_CONFIG, augmentation=AUGMENTATION, accelerator=Accelerator(), workers=0)(digits(), 1)
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_features_are_extracted_once(model, tmp_path, monkeypatch, small_blocks):
    first = extractor(model, cache=tmp_path)(digits(), num_views=1)
    encoded = count_encoded(monkeypatch)
    second = extractor(model, cache=tmp_path)(digits(), num_views=1)
    assert torch.equal(first.views, second.views) and not encoded
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ['.blocks', '.npy']
    second.views.zero_()
    third = extractor(model, cache=tmp_path)(digits(), num_views=1)
    assert torch.equal(first.views, third.views)  # the file is as it was


@pytest.mark.parametrize('change', ['weights', 'statistics', 'images', 'order', 'views', 'seed', 'augmentation', 'size'])
def test_another_model_or_set_has_other_features(model, change):
    images, one = digits(), extractor(model)
    key, other = one.key(images, 1), one
    if change == 'weights':
        with torch.no_grad():
            model.conv1.weight[0, 0, 0, 0] += 1e-3
        other = extractor(model)
    elif change == 'statistics':
        model.bn1.running_mean[0] += 1e-3
        other = extractor(model)
    elif change in ('seed', 'augmentation', 'size'):
        other = extractor(model, **({'seed': 1} if change == 'seed' else {}))
        other.augmentation = {**AUGMENTATION, 'hflip': 0.0} if change == 'augmentation' else AUGMENTATION
        other.data_config = {**DATA_CONFIG, 'input_size': (3, 8, 8)} if change == 'size' else DATA_CONFIG
    images = {'images': digits(19), 'order': images.subset(np.arange(20)[::-1])}.get(change, images)
    assert other.key(images, 2 if change == 'views' else 1) != key


def test_another_classifier_has_the_same_features(model):
    key = extractor(model).key(digits(), 1)
    with torch.no_grad():
        model.fc.weight.zero_()
    assert extractor(model).key(digits(), 1) == key


@pytest.mark.parametrize('workers', [0, 2])
def test_a_file_contains_what_an_extraction_in_memory_gives(model, tmp_path, small_blocks, workers):
    expected = extractor(model, batch_size=3)(digits(18), num_views=2)
    found = extractor(model, batch_size=3, cache=tmp_path, workers=workers)(digits(18), num_views=2)
    assert torch.equal(found.views, expected.views)


def test_large_features_are_16_bits_on_the_disk(model, tmp_path, small_blocks, on_disk, caplog):
    caplog.set_level(logging.INFO)
    expected = extractor(model)(digits(), num_views=2)
    found = extractor(model, cache=tmp_path)(digits(), num_views=2)
    assert torch.equal(all_rows(found), expected.views.bfloat16().float()) and isinstance(found.views, StoredViews)
    assert found.num_views == 3 and found.width == 8
    generator = torch.Generator().manual_seed(0)
    images, views = torch.randint(20, (50,), generator=generator), torch.randint(3, (50,), generator=generator)
    assert torch.equal(found.rows(images, views), expected.rows(images, views).bfloat16().float())
    part = torch.tensor([7, 8, 9, 2])
    assert torch.equal(found.subset(part).rows(torch.tensor([3, 0])), found.rows(torch.tensor([2, 7])))
    assert torch.equal(torch.cat([rows for rows, _ in found.batches(6)]), all_rows(found)[0])
    assert not len(found.rows(torch.empty(0, dtype=torch.int64)))
    (path,) = tmp_path.glob('*.npy')
    assert f'stored as bfloat16, {path.stat().st_size / 2 ** 20:,.1f} MiB in' in caplog.text
    bits = torch.from_numpy(np.load(path).astype(np.int16))
    assert torch.equal(bits.view(torch.bfloat16).float(), all_rows(found))


def test_unreadable_images_end_it_in_one_line(model, tmp_path, small_blocks):
    def read(index):
        if index == 13:
            raise OSError('truncated')
        return digits().read(index)
    images = digits()
    images = ImageSet(read, images.labels, images.names, images.class_names, 'broken')
    for cache in (None, tmp_path):
        with pytest.raises(ImageError, match='broken: cannot decode image .*: truncated'):
            extractor(model, cache=cache)(images)
    encoded = extractor(model, cache=tmp_path)
    assert torch.equal(encoded(digits()).views, extractor(model)(digits()).views)  # the lock is released


# --- kills, damage, full disks ---

def in_child(function) -> multiprocessing.Process:
    process = multiprocessing.get_context('fork').Process(target=function)
    process.start()
    return process


def kill_after(blocks: int, extract: Extractor, images: ImageSet) -> None:
    """Extract in a child, which is killed as it begins to write another block."""
    def work():
        write, written = FeatureFile.write, []

        def killed(self, block, values):
            if len(written) == blocks:
                self._write(self._offset(0, block), np.full(8, 7, np.float32))
                os.write(self.log, b'3 abc')  # half a line
                os.kill(os.getpid(), signal.SIGKILL)
            written.append(block)
            write(self, block, values)
        FeatureFile.write = killed
        extract(images, 1)
    process = in_child(work)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_a_killed_extraction_continues(model, tmp_path, small_blocks, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    kill_after(3, extractor(model, cache=tmp_path), digits())
    assert not list(tmp_path.glob('*.npy')) and len(list(tmp_path.glob('*.npy.part'))) == 1
    encoded = count_encoded(monkeypatch)
    found = extractor(model, cache=tmp_path)(digits(), 1)
    assert sum(encoded) == 2 * 8 and 'Continuing at 60%' in caplog.text
    assert torch.equal(found.views, extractor(model)(digits(), 1).views)


def test_blocks_of_a_dead_run_are_used_by_their_checksum_only(model, tmp_path, small_blocks, monkeypatch, caplog):
    kill_after(3, extractor(model, cache=tmp_path), digits())
    (part,) = tmp_path.glob('*.npy.part')
    content = bytearray(part.read_bytes())
    content[128 + 5 * 32] ^= 1  # row 5, block 1
    part.write_bytes(content)
    encoded = count_encoded(monkeypatch)
    found = extractor(model, cache=tmp_path)(digits(), 1)
    assert sum(encoded) == 3 * 8 and '1 of 5 blocks are damaged' in caplog.text
    assert torch.equal(found.views, extractor(model)(digits(), 1).views)


@pytest.mark.parametrize('damage, blocks', [
    ('row', 1), ('header', 1), ('short', 1), ('long', 0), ('empty', 5), ('log lost', 5), ('log garbage', 5),
    ('log lies', 1)])
def test_damaged_blocks_are_extracted_anew(model, tmp_path, small_blocks, monkeypatch, caplog, damage, blocks):
    expected = extractor(model, cache=tmp_path)(digits())
    (path,), (log,) = tmp_path.glob('*.npy'), tmp_path.glob('*.blocks')
    content = bytearray(path.read_bytes())
    if damage in ('row', 'header'):
        content[{'row': 128 + 7 * 32, 'header': 20}[damage]] ^= 1
    path.write_bytes({'short': content[:-1], 'long': content + b'ab', 'empty': b''}.get(damage, content))
    if damage == 'log lost':
        log.unlink()
    elif damage == 'log garbage':
        log.write_bytes(b'[' * 10 ** 6 + b'\xff\n\n9' + bytes(99))
    elif damage == 'log lies':
        log.write_text(re.sub('(?m)^2 .*', f"2 {'0' * 64}", log.read_text()))
    encoded = count_encoded(monkeypatch)
    for _ in range(2):
        found = extractor(model, cache=tmp_path)(digits())
        assert torch.equal(found.views, expected.views) and np.array_equal(np.load(path), expected.views)
    assert sum(encoded) == 4 * blocks
    assert not blocks or f'{blocks} of 5 blocks are damaged or have no checksum' in caplog.text


def test_a_log_of_another_shape_is_not_used(model, tmp_path, small_blocks, monkeypatch):
    extract = extractor(model, cache=tmp_path)
    monkeypatch.setattr(Extractor, 'key', lambda *args: 'same')
    for number in (16, 20, 12):
        assert torch.equal(extract(digits(number)).views, extractor(model)(digits(number)).views)
        assert (tmp_path / 'same.npy').stat().st_size == 128 + 32 * number


def test_a_full_disk_is_one_line_before_the_first_image(model, tmp_path, monkeypatch):
    encoded = count_encoded(monkeypatch)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
    try:
        with pytest.raises(RunError, match=r'npy\.part: needs 768 bytes, [\d,]+ bytes are free: File too large'):
            extractor(model, cache=tmp_path)(digits())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not encoded and not list(tmp_path.glob('*.npy*'))
    assert len(extractor(model, cache=tmp_path)(digits())) == 20


@pytest.mark.parametrize('fallback', [False, True])
def test_space_is_reserved(tmp_path, monkeypatch, fallback):
    if fallback:
        monkeypatch.delattr(os, 'posix_fallocate')
    path, size = tmp_path / 'file', 3 * 2 ** 20 + 5
    path.write_bytes(b'abc')
    descriptor = os.open(path, os.O_RDWR)
    reserve(path, descriptor, size)
    os.fsync(descriptor)
    os.close(descriptor)
    assert path.stat().st_size == size and path.stat().st_blocks * 512 >= size
    assert path.read_bytes() == b'abc' + bytes(size - 3)


def test_a_folder_that_cannot_be_written_is_one_line(model, tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(RunError, match='file/.*: (Not a directory|File exists)'):
        extractor(model, cache=tmp_path / 'file')(digits())


def test_a_read_only_folder_serves_complete_features(model, tmp_path, monkeypatch):
    expected, opened = extractor(model, cache=tmp_path)(digits()), os.open

    def read_only(path, flags, *mode):
        if flags & (os.O_RDWR | os.O_CREAT):
            raise PermissionError(13, 'Permission denied')
        return opened(path, flags, *mode)
    monkeypatch.setattr(feature_file.os, 'open', read_only)
    assert torch.equal(extractor(model, cache=tmp_path)(digits()).views, expected.views)
    (path,) = tmp_path.glob('*.npy')
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(RunError, match=r'\.blocks: Permission denied'):
        extractor(model, cache=tmp_path)(digits())


def test_a_file_that_becomes_shorter_is_one_line(model, tmp_path, on_disk):
    found = extractor(model, cache=tmp_path)(digits())
    (path,) = tmp_path.glob('*.npy')
    os.truncate(path, 300)
    with pytest.raises(RunError, match='has become shorter'):
        found.rows(torch.arange(20))


# --- several processes ---

def test_processes_share_the_blocks(model, tmp_path, small_blocks, monkeypatch):
    """Two at once, with one key: no block twice, both have all features, and these are those of one process."""
    encode, context = Extractor._encode, multiprocessing.get_context('fork')
    results, start = context.Queue(), context.Barrier(2)

    def work():
        sizes = []

        def slow(self, images):
            sizes.append(len(images))
            time.sleep(0.05)
            return encode(self, images)
        Extractor._encode = slow
        start.wait()
        found = extractor(model, cache=tmp_path)(digits(), 1)
        results.put((sum(sizes), hashlib.sha256(found.views.numpy()).hexdigest()))
    processes = [in_child(work) for _ in range(2)]
    outcomes = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    expected = extractor(model)(digits(), 1).views
    assert sum(images for images, _ in outcomes) == 2 * 20 and all(images >= 2 * 4 for images, _ in outcomes)
    assert {digest for _, digest in outcomes} == {hashlib.sha256(expected.numpy()).hexdigest()}


def test_the_blocks_of_a_process_that_dies_are_done_by_another(model, tmp_path, small_blocks):
    extract, images = extractor(model, cache=tmp_path), digits()
    context = multiprocessing.get_context('fork')
    claimed = context.Event()

    def hold():
        with FeatureFile(tmp_path / extract.key(images, 0), (1, 20, 8), lambda: 'float32') as file:
            assert [file.claim() for _ in range(5)] == list(range(5)) and file.claim() is None
            claimed.set()
            time.sleep(60)
    process = in_child(hold)
    claimed.wait(30)
    waiting = in_child(lambda: extract(images))
    time.sleep(0.5)
    assert waiting.is_alive()
    process.kill()
    waiting.join(30)
    assert waiting.exitcode == 0 and len(list(tmp_path.glob('*.npy'))) == 1


@pytest.mark.slow
def test_two_launched_processes_extract_what_one_does(finished_run, folders, tmp_path):
    options = ('--model', finished_run, '--data-dir', folders, '--stage2', 'ncm', '--workers', '0', '--no-report')
    for number in (1, 2):
        launcher = ('--multi_gpu', '--num_processes', '2', '--main_process_port', '0') if number == 2 else ()
        outcome = launch_train(*options, '--output', tmp_path / str(number), launcher=launcher,
                               script=ROOT / 'finetune_glmc.py')
        assert outcome.code == 0, outcome.err
        assert outcome.out.count('Written to') == 1
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / number / 'features').glob('*.npy')} for number in '12')
    assert one == two and len(one) == 2


def test_by_default_every_core_decodes(model, monkeypatch):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: range(12), raising=False)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
    assert extractor(model, workers=None).workers == 6 and extractor(model, workers=3).workers == 3
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: range(1), raising=False)
    assert extractor(model, workers=None).workers == 1


# --- precision ---

def timed(seconds: dict, cosine: float = 1.0):
    """Substitute for `Extractor._time`."""
    def run(self, precision, batch, budget=0.3):
        direction = [1.0, 0.0] if precision == 'float32' else [cosine, (1 - cosine ** 2) ** 0.5]
        return torch.tensor([direction]), seconds[precision]
    return run


@pytest.fixture
def bfloat16_hardware(monkeypatch):
    monkeypatch.setattr(features, 'SHORT', 0)
    monkeypatch.setattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: True)


@pytest.mark.parametrize('seconds, cosine, expected', [
    (0.5, 1.0, 'bfloat16'), (1.0, 1.0, 'float32'), (0.95, 1.0, 'float32'), (0.5, 0.98, 'float32'), (2.0, 1.0, 'float32')])
def test_the_faster_precision_is_chosen(model, monkeypatch, bfloat16_hardware, caplog, seconds, cosine, expected):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(Extractor, '_time', timed({'float32': 1.0, 'bfloat16': seconds}, cosine))
    extract = extractor(model, precision='auto')
    found = extract(digits())
    assert extract.chosen == expected and len([line for line in caplog.messages if 'Precision of the encoder' in line]) == 1
    assert torch.equal(found.views, extractor(model, precision=expected)(digits()).views)
    assert extractor(model, precision='auto').key(digits(), 0) != extractor(model, precision=expected).key(digits(), 0)


def test_short_extractions_and_other_hardware_remain_in_float32(model, monkeypatch, bfloat16_hardware):
    monkeypatch.setattr(Extractor, '_time', timed({'float32': 1.0, 'bfloat16': 0.1}))
    monkeypatch.setattr(features, 'SHORT', 21)
    for expected in ('float32', 'bfloat16', 'float32'):
        extract = extractor(model, precision='auto')
        extract(digits())
        assert extract.chosen == expected
        monkeypatch.setattr(features, 'SHORT', 19)
        if expected == 'bfloat16':
            monkeypatch.setattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: False)


def test_a_rerun_uses_the_recorded_precision_for_all_sets(model, tmp_path, small_blocks, monkeypatch, bfloat16_hardware):
    times = {'float32': 1.0, 'bfloat16': 0.1}
    monkeypatch.setattr(Extractor, '_time', timed(times))
    kill_after(2, extractor(model, cache=tmp_path, precision='auto'), digits())
    (log,) = tmp_path.glob('*.blocks')
    recorded = json.loads(log.read_text().split('\n')[0])
    assert recorded == dict(shape=[2, 20, 8], dtype='float32', block=4, precision='bfloat16')
    times['bfloat16'] = 10
    extract = extractor(model, cache=tmp_path, precision='auto')
    explicit = extractor(model, precision='bfloat16')
    assert torch.equal(extract(digits(), 1).views, explicit(digits(), 1).views)
    assert torch.equal(extract(digits(7)).views, explicit(digits(7)).views)
    assert not torch.equal(extract(digits(7)).views, extractor(model, precision='float32')(digits(7)).views)


def test_the_launchers_precision_is_used(model, monkeypatch):
    accelerator = Accelerator()
    monkeypatch.setattr(type(accelerator), 'mixed_precision', 'bf16')
    assert Extractor(model, data_config=DATA_CONFIG, augmentation=AUGMENTATION, accelerator=accelerator).chosen == 'bfloat16'


@pytest.mark.slow
def test_without_bfloat16_hardware_nothing_is_timed():
    """As on a processor with AVX2."""
    code = ('import torch; from accelerate import Accelerator; from glmc.stage2 import features; '
            'from glmc.models.backbone import create_backbone; from glmc.data.sources import load_digits_set\n'
            'features.SHORT = 0\n'
            f'extract = features.Extractor(create_backbone("test_resnet", 10), data_config={DATA_CONFIG}, '
            f'augmentation={{}}, accelerator=Accelerator(cpu=True), workers=0)\n'
            'extract(load_digits_set("validation")); print(extract.chosen)')
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120,
                          env={**os.environ, 'ONEDNN_MAX_CPU_ISA': 'AVX2', 'ATEN_CPU_CAPABILITY': 'avx2'})
    assert done.stdout.strip() == 'float32'


# --- progress ---

def test_without_a_terminal_a_line_every_30_seconds(model, tmp_path, small_blocks, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    clock = iter(range(0, 10 ** 6, 10))
    for module in (features, cli):
        monkeypatch.setattr(module, 'time', type('Clock', (), dict(perf_counter=lambda: next(clock), sleep=time.sleep)))
    extractor(model, cache=tmp_path, batch_size=2)(digits(), 1)
    # a batch and the end of each block take 10 seconds: 20 images in 150 seconds
    assert [line for line in caplog.messages if line.endswith('left')] == [
        '4 of 20 images, 0.13 images/s, 2 min left', '8 of 20 images, 0.13 images/s, 90 s left',
        '12 of 20 images, 0.13 images/s, 60 s left', '16 of 20 images, 0.13 images/s, 30 s left',
        '20 of 20 images, 0.13 images/s, 0.0 s left']
    assert caplog.messages[-1].startswith('20 images x 2 views in ')


# --- memory ---

def write_generated(folder: Path, number: int, width: int) -> None:
    """A complete file of features in 16 bits."""
    with FeatureFile(folder / 'key', (1, number, width), lambda: 'float32') as file:
        for block in iter(file.claim, None):
            file.write(block, torch.full((1, len(file.images(block)), width), float(block)))
        assert file.finish() and file.dtype == torch.bfloat16


def peak_memory() -> int:
    """Largest resident MiB of this process so far; getrusage would include those of the program that started it."""
    return int(re.search(r'VmHWM:\s+(\d+) kB', Path('/proc/self/status').read_text())[1]) // 1024


def read_all(folder: Path, number: int, width: int) -> tuple[int, int, float]:
    """Peak MiB of this process before and after reading all rows in random batches of 512, and seconds."""
    before = peak_memory()
    with FeatureFile(folder / 'key', (1, number, width), None) as file:
        found = Features(file.views(), torch.zeros(number, dtype=torch.int64))
    start = time.perf_counter()
    for indices in torch.randperm(number).split(512):
        found.rows(indices)
    seconds = time.perf_counter() - start
    return before, peak_memory(), seconds


def test_reading_rows_occupies_no_memory(tmp_path, on_disk):
    write_generated(tmp_path, 40_000, 1280)  # 98 MiB
    results = multiprocessing.get_context('fork').Queue()
    process = in_child(lambda: results.put(read_all(tmp_path, 40_000, 1280)))  # a peak of its own
    before, peak, _ = results.get(timeout=60)
    process.join()
    assert peak - before < 40


@pytest.mark.slow
def test_reading_400_000_images_takes_less_than_1_gb(tmp_path):
    figures = {}
    for number in (100_000, 200_000, 400_000):
        write_generated(tmp_path / str(number), number, 1280)
        code = (f'import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]; from pathlib import Path; '
                f'from stage2.test_features import read_all; '
                f'print(*read_all(Path({str(tmp_path / str(number))!r}), {number}, 1280))')
        done = subprocess.run([sys.executable, '-c', code], text=True, capture_output=True, check=True, timeout=600)
        figures[number] = before, peak, seconds = [float(word) for word in done.stdout.split()]
        print(f'{number:,} images: {before:.0f} MiB before, {peak:.0f} MiB at most, {seconds:.1f} s')
    assert all(peak < 1000 for _, peak, _ in figures.values())
    assert figures[400_000][2] < 8 * figures[100_000][2]
