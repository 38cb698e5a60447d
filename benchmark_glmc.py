#!/usr/bin/env python3
"""Measure speed and memory of the training step and of the input pipeline, compared with a plain GLMC loop.

    python benchmark_glmc.py --model resnet50 --data-dir my_images
    python benchmark_glmc.py -c hparams/cifar100_lt_if100.yaml --data-dir data --amp-dtype bfloat16 --compare-loss

Takes all options of train_glmc.py (`python train_glmc.py --help`) and measures the training that they describe. Five
parts are measured in turns, in one process, so that ratios hold although the speed of a machine drifts:

    plain   the published structure: two loaders with workers, four PIL views per pair, float32, two forward passes,
            and the loss read after every step
    run     this project: input pipeline and training step
    step    the training step alone, on a batch that is already on the device
    input   the input pipeline alone
    timm    timm's loader with the same augmentation and as many views, one decoding per view

Each turn warms up, which also fills the queues of the loaders, and then times --steps steps as a whole. The start of
worker processes is not timed.
"""
import glmc  # noqa: F401, first: Ctrl-C during the imports is one line

# isort: split
import csv
import json
import sys
from pathlib import Path

from glmc.cli import parse_args, run_script, show_help
from glmc.config import benchmark_parser, method_rows

if __name__ == '__main__':
    show_help(lambda: benchmark_parser(method_rows(), __doc__))  # before the imports that take seconds
# isort: split
from glmc.benchmark.agreement import compare_loss
from glmc.benchmark.measure import SPEED_COLUMNS, Benchmark
from glmc.evaluation.text import aligned
from glmc.files import ESCAPED, NAMES
from glmc.methods import METHODS
from glmc.setup import Setup
from glmc.training.launch import create_accelerator, is_main_process

METADATA_COLUMNS = (
    'model', 'parameters', 'method', 'batch_size', 'views', 'precision', 'channels_last', 'torchcompile', 'joint_forward',
    'partner', 'loader', 'train_images', 'device', 'threads', 'date', 'commit', 'command')


def main() -> None:
    args, explicit = parse_args(benchmark_parser(METHODS, __doc__))
    bench = Benchmark(Setup(args, explicit, create_accelerator(args.amp, args.amp_dtype)))
    agreement = compare_loss(bench) if args.compare_loss else None
    result = {'metadata': bench.metadata(), 'parts': bench.measure(args.rounds, args.steps), 'agreement': agreement}
    print(report(**result), flush=True)
    if args.json:
        with open(args.json, 'w', **ESCAPED) as file:
            json.dump(result, file, indent=1, ensure_ascii=False)
    if args.csv:
        append_rows(Path(args.csv), **result)
    if agreement and not agreement['agrees']:
        sys.exit(1)


def append_rows(path: Path, metadata: dict, parts: dict, agreement: dict | None) -> None:
    """Append one row for each part to a CSV, after a head line if the file is new."""
    head = ('part', *SPEED_COLUMNS, 'matmul_tflops', 'input_size', *METADATA_COLUMNS, 'torch')
    common = {name: metadata[name] for name in METADATA_COLUMNS}
    common.update(torch=metadata['versions']['torch'], matmul_tflops=f"{parts['matmul_tflops']:.4g}",
                  input_size='x'.join(map(str, metadata['input_size'])))
    new = not path.exists()
    with open(path, 'a', newline='', **NAMES) as file:
        writer = csv.DictWriter(file, head)
        if new:
            writer.writeheader()
        for name, row in parts['rows'].items():
            speed = {column: f'{row[column]:.5g}' for column in SPEED_COLUMNS if row.get(column) is not None}
            writer.writerow({'part': name, **speed, **common})


def report(metadata: dict, parts: dict, agreement: dict | None) -> str:
    """Settings, a table with one row for each part, and the bottleneck, as printed."""
    options = [name for name, on in (
        ('channels_last', metadata['channels_last']), ('joint forward', metadata['joint_forward']),
        (f"compiled ({metadata['torchcompile']})", metadata['torchcompile'])) if on]
    head = ['', 'ms/step', 'min … max', 'images/s', 'views/s', 'views/s per core', 'speed-up', 'TFLOP/s', 'of matmul',
            'GPU memory']
    rows = parts['rows']
    lines = [
        f"{metadata['model']}, {metadata['parameters'] / 1e6:.2f} M parameters, "
        f"{'x'.join(map(str, metadata['input_size']))}, batch {metadata['batch_size']}, {metadata['method']}, "
        f"{', '.join([metadata['precision'], *options])}, {metadata['loader']}",
        f"{metadata['device']}, threads: {metadata['threads']}, cores: {metadata['cores']}, {metadata['date']}", '',
        aligned([head, *(report_cells(name, row) for name, row in rows.items())]), '',
        f"Medians of {metadata['rounds']} turns of {metadata['steps']} steps; speed-up over plain. "
        f"One step: {parts['step_gflop']:.4g} GFLOP; matmul: {parts['matmul_tflops']:.4g} TFLOP/s."]
    if parts['bottleneck']:
        slow = parts['bottleneck']
        run = f"; run: {rows['run']['ms_per_step']:.4g} ms" if 'run' in rows else ''
        lines.append(f"Bottleneck of run: {slow} ({rows[slow]['ms_per_step']:.4g} ms{run}).")
    lines += [f'{name} is skipped: {reason}' for name, reason in parts['skipped'].items() if reason != '--skip']
    return '\n'.join(lines)


def report_cells(name: str, row: dict) -> list[str]:
    """Cells of one part in the printed table, a dash where a column does not apply."""
    def cell(column: str, form: str, scale: float = 1) -> str:
        return form.format(row[column] * scale) if row.get(column) is not None else '–'
    return [name, cell('ms_per_step', '{:.4g}'), f"{row['ms_min']:.4g} … {row['ms_max']:.4g}",
            cell('images_per_second', '{:.0f}'), cell('views_per_second', '{:.0f}'),
            cell('views_per_second_per_core', '{:.0f}'), cell('ratio_to_plain', '{:.2f}'), cell('tflops', '{:.4g}'),
            cell('matmul_share', '{:.0%}'), cell('peak_memory', '{:.2f} GB', 1e-9)]


if __name__ == '__main__':
    sys.exit(run_script(main, is_main_process(), debug='--debug' in sys.argv))
