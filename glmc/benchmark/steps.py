"""Three training steps with the options of train_glmc.py: seconds and memory as a line of JSON, for `glmc.data.check`.

    python -m glmc.benchmark.steps --model resnet50 --data-dir my_images --batch-size 8
"""
import json
import resource
import sys

import torch

from glmc.benchmark.measure import Benchmark
from glmc.cli import parse_args, run_script
from glmc.config import train_parser
from glmc.methods import METHODS
from glmc.setup import Setup
from glmc.training.launch import create_accelerator

OPTIONS = ('--resident', 'off', '--workers', '0')


def main() -> None:
    args, explicit = parse_args(train_parser(METHODS), [*sys.argv[1:], *OPTIONS])
    print(json.dumps(measure_steps(Benchmark(Setup(args, explicit, create_accelerator(args.amp, args.amp_dtype))))))


def measure_steps(bench: Benchmark) -> dict:
    """Measure one step after another, and the reading of as many batches.

    Returns:
        step: Seconds of a training step. input: Seconds of reading a batch in one process. before, peak: Bytes of memory
        before the first step and at most, of the GPU or of this process. device: its type.
    """
    device = bench.device
    before = memory(device)
    work, read = bench.step(), bench.input()
    work(1)
    read(1)
    return dict(step=bench.seconds(work, 2) / 2, input=bench.seconds(read, 2) / 2, before=before, peak=memory(device),
                device=device.type)


def memory(device: torch.device) -> int:
    """Most bytes so far."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


if __name__ == '__main__':
    sys.exit(run_script(main))
