"""Processes, device, precision, threads, memory and logging of a run."""
import atexit
import logging
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

from glmc.config import PRECISIONS
from glmc.errors import InputError, RunError, first_line

_logger = logging.getLogger(__name__)


def is_main_process() -> bool:
    """Whether this is the first process of all machines, before there is an Accelerator."""
    return int(os.environ.get('RANK', 0)) == 0


def create_accelerator(amp: bool = False, amp_dtype: str | None = None) -> Accelerator:
    """Accelerator for the processes, machines and precision that the launcher or the flags ask for.

    Gradient accumulation is the engine's: a value in the environment is ignored. Running statistics of BatchNorm stay
    apart during an epoch (`TrainingState.equalize_statistics`).

    Args:
        amp: Mixed precision, in float16 unless `amp_dtype` says otherwise.
        amp_dtype: `float16`, `bfloat16`, or None for the launcher's choice.

    Raises:
        InputError: If the device does not support the precision.
    """
    warnings.filterwarnings('ignore', '`broadcast_buffers` is deprecated', FutureWarning)  # torch 2.14
    dtype = amp_dtype or ('float16' if amp else None)
    precision = next((name for name, known in PRECISIONS.items() if known == dtype), None)
    try:
        accelerator = Accelerator(
            mixed_precision=precision, step_scheduler_with_optimizer=False,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
    except (ValueError, RuntimeError) as error:
        raise InputError(f'--amp-dtype {amp_dtype or "float16"}: {str(error).splitlines()[0]}') from error
    setup_logging(accelerator.is_main_process)
    atexit.register(end_processes)
    if accelerator.device.type == 'cpu':
        _use_all_cores()
    elif accelerator.device.type == 'cuda':
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision('high')
        _logger.info('GPU: cuDNN chooses its convolutions by timing; float32 matrix products use TF32')
    if 'MASTER_ADDR' in os.environ and 'WORLD_SIZE' not in os.environ and accelerator.num_processes == 1:
        _logger.warning('The launcher was asked for several processes but started one (`--cpu` does that); on CPUs: '
                        'ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes N …')
    return accelerator


def end_processes() -> None:
    """Destroy the process group, if there is one, before the processes end at different times."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turn lack of memory, on the device or the host, and the death of another process into a RunError of one line."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if 'DataLoader worker' in str(error):
            raise RunError(f'a loader process has died, as when memory runs out: {first_line(error)}; use fewer --workers or '
                           'a smaller --batch-size; --resume auto continues from the newest checkpoint') from error
        if 'closed by peer' in str(error) or 'reset by peer' in str(error):
            raise RunError('another process of this run has ended; --resume auto continues from the newest checkpoint'
                           ) from error
        signs = ('out of memory', "can't allocate memory")
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(sign in str(error) for sign in signs):
            raise
        message = (f'out of memory: {first_line(error)}; use a smaller --batch-size, --grad-checkpointing or --amp-dtype '
                   'bfloat16; checkpoints are kept, --resume auto continues from the newest')
        if not is_main_process():
            _logger.error(message)  # the main process, which prints errors, may not know of this one
        raise RunError(message) from error


def setup_logging(main_process: bool) -> None:
    """One plain line per message on standard error, from the main process only."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter('%(message)s'))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING if main_process else logging.ERROR)
    logging.getLogger('glmc').setLevel(logging.INFO if main_process else logging.ERROR)


def _use_all_cores() -> None:
    """Use all cores where `accelerate launch` has set OMP_NUM_THREADS=1, its default."""
    launched = 'ACCELERATE_MIXED_PRECISION' in os.environ
    if launched and os.environ.get('OMP_NUM_THREADS') == '1':
        local_processes = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
        torch.set_num_threads(max(len(os.sched_getaffinity(0)) // local_processes, 1))


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the processor."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as file:
            return next(line.split(':')[1].strip() for line in file if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
