#!/usr/bin/env python3
"""Throughput and memory of the training step and of the input pipeline, beside a plain loop of the published structure.

    python benchmark_glmc.py --model resnet32_cifar --dataset hfds/PATH/TO/cifar100 --val-split test \
        --imbalance-factor 100 --augmentation cifar --amp-dtype bfloat16 --compare-loss

Takes all options of train_glmc.py. Everything is measured in one process, in turns, so that a ratio holds where the
machine's speed drifts. A turn warms up, which fills the loaders' queues, and then times --steps steps as a whole; start-up
of worker processes is not timed.

    plain      the published structure: two worker loaders, four PIL views per pair, float32, contiguous, two forward
               passes, the loss read every step
    run        this project, as the same options train it: input pipeline and step
    step       its step alone, on a batch that is on the device
    input      its input pipeline alone
    timm       timm's own loader with the same augmentation, one decoding per view, as many views
"""
import argparse
import csv
import json
import sys
from pathlib import Path

from glmc.benchmark.agreement import compare_loss
from glmc.benchmark.measure import PARTS, Benchmark
from glmc.cli import parse_args, run_script
from glmc.config import positive_int, train_parser
from glmc.methods import METHODS
from glmc.setup import Setup
from glmc.training.launch import create_accelerator, is_main_process

FACTS = ('model', 'parameters', 'method', 'batch_size', 'views', 'precision', 'channels_last', 'torchcompile',
         'joint_forward', 'partner', 'loader', 'train_images', 'device', 'threads', 'date', 'commit', 'command')
FIGURES = ('images_per_second', 'views_per_second', 'views_per_second_per_core', 'ms_per_step', 'ms_min', 'ms_max',
           'ratio_to_plain', 'tflops', 'matmul_share', 'peak_memory')


def main() -> None:
    parser = train_parser(METHODS)
    add_benchmark_options(parser)
    args, explicit = parse_args(parser)
    bench = Benchmark(Setup(args, explicit, create_accelerator(args.amp, args.amp_dtype)))
    agreement = compare_loss(bench) if args.compare_loss else None
    measured = bench.measure(args.rounds, args.steps)
    result = {'facts': bench.facts(), 'parts': bench.figures(*measured), 'agreement': agreement}
    print(report(result), flush=True)
    if args.json:
        with open(args.json, 'w', encoding='utf-8') as file:
            json.dump(result, file, indent=1, ensure_ascii=False)
    if args.csv:
        append_rows(args.csv, result)
    if agreement and not agreement['agrees']:
        sys.exit(1)


def add_benchmark_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group('benchmark').add_argument
    add('--rounds', type=positive_int, default=5, metavar='N', help='turns that each part gets')
    add('--steps', type=positive_int, default=20, metavar='N', help='timed steps a turn')
    add('--skip', nargs='*', default=[], choices=PARTS, metavar='PART', help=f"parts to leave out: {', '.join(PARTS)}")
    add('--compare-loss', action='store_true',
        help='first show that plain and run agree on the same images; exit code 1 if they do not')
    add('--json', metavar='FILE', help='write all figures there')
    add('--csv', metavar='FILE', help='add a row for each part there')


def append_rows(path: str, result: dict) -> None:
    """A row for each part, with what it holds for; the head line if the file is new."""
    facts, parts = result['facts'], result['parts']
    head = ('part', *FIGURES, 'matmul_tflops', 'input_size', *FACTS, 'torch')
    common = {name: facts[name] for name in FACTS}
    common.update(torch=facts['versions']['torch'], matmul_tflops=f"{parts['matmul_tflops']:.4g}",
                  input_size='x'.join(map(str, facts['input_size'])))
    new = not Path(path).exists()
    with open(path, 'a', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, head)
        if new:
            writer.writeheader()
        for name, row in parts['rows'].items():
            figures = {figure: f'{row[figure]:.5g}' for figure in FIGURES if row.get(figure) is not None}
            writer.writerow({'part': name, **figures, **common})


def report(result: dict) -> str:
    """The table that is printed."""
    facts, parts = result['facts'], result['parts']
    how = [name for name, on in (
        ('channels_last', facts['channels_last']), ('joint forward', facts['joint_forward']),
        (f"compiled ({facts['torchcompile']})", facts['torchcompile'])) if on]
    lines = [
        f"{facts['model']}, {facts['parameters'] / 1e6:.2f} M parameters, {'x'.join(map(str, facts['input_size']))}, "
        f"batch {facts['batch_size']}, {facts['method']}, {', '.join([facts['precision'], *how])}, {facts['loader']}",
        f"{facts['device']}, {facts['threads']} of {facts['cores']} cores' threads, {facts['date']}", '',
        f"{'':6s}{'ms/step':>10s}{'min … max':>19s}{'images/s':>11s}{'views/s':>10s}{'per core':>10s}{'x plain':>9s}"
        f"{'TFLOP/s':>9s}{'of matmul':>11s}{'memory':>9s}"]
    lines += [_report_line(name, row) for name, row in parts['rows'].items()]
    lines += ['', f"A step: {parts['step_gflop']:.4g} GFLOP; matmul: {parts['matmul_tflops']:.4g} TFLOP/s; "
              f"median of {facts['rounds']} turns of {facts['steps']} steps."]
    if parts['bound']:
        slow, rows = parts['bound'], parts['rows']
        of_run = f" of {rows['run']['ms_per_step']:.4g}" if 'run' in rows else ''
        lines.append(f"The {slow} bounds run: {rows[slow]['ms_per_step']:.4g}{of_run} ms.")
    lines += [f'{name} is left out: {reason}' for name, reason in parts['skipped'].items() if reason != '--skip']
    return '\n'.join(lines)


def _report_line(name: str, row: dict) -> str:
    def cell(key: str, form: str, width: int, scale: float = 1) -> str:
        return (form.format(row[key] * scale) if row.get(key) is not None else '–').rjust(width)
    spread = f"{row['ms_min']:.4g} … {row['ms_max']:.4g}"
    return (f"{name:6s}{cell('ms_per_step', '{:.4g}', 10)}{spread:>19s}{cell('images_per_second', '{:.0f}', 11)}"
            f"{cell('views_per_second', '{:.0f}', 10)}{cell('views_per_second_per_core', '{:.0f}', 10)}"
            f"{cell('ratio_to_plain', '{:.2f}', 9)}{cell('tflops', '{:.4g}', 9)}{cell('matmul_share', '{:.0%}', 11)}"
            f"{cell('peak_memory', '{:.2f} GB', 9, 1e-9)}")


if __name__ == '__main__':
    sys.exit(run_script(main, is_main_process(), debug='--debug' in sys.argv))
