"""The launcher's side of a run: processes, device, precision, threads and logging."""
import logging
import os
import platform

import torch
from accelerate import Accelerator

from glmc.errors import InputError

_logger = logging.getLogger(__name__)
_DTYPES = {'float16': 'fp16', 'bfloat16': 'bf16', None: None}


def is_main_process() -> bool:
    """Whether this is the first process of all machines, before there is an Accelerator."""
    return int(os.environ.get('RANK', 0)) == 0


def create_accelerator(amp: bool = False, amp_dtype: str | None = None) -> Accelerator:
    """Accelerator for the processes, machines and precision that the launcher or the flags ask for.

    Args:
        amp: Mixed precision, in float16 unless `amp_dtype` says otherwise.
        amp_dtype: `float16`, `bfloat16`, or None for the launcher's choice.

    Raises:
        InputError: If the device cannot do it.
    """
    precision = _DTYPES[amp_dtype or ('float16' if amp else None)]
    try:
        accelerator = Accelerator(mixed_precision=precision, step_scheduler_with_optimizer=False)
    except (ValueError, RuntimeError) as error:
        raise InputError(f'--amp-dtype {amp_dtype or "float16"}: {str(error).splitlines()[0]}') from error
    setup_logging(accelerator.is_main_process)
    if accelerator.device.type == 'cpu':
        _use_all_cores()
    if 'MASTER_ADDR' in os.environ and 'WORLD_SIZE' not in os.environ and accelerator.num_processes == 1:
        _logger.warning('The launcher was asked for several processes but started one (`--cpu` does that); on CPUs: '
                        'ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes N …')
    return accelerator


def setup_logging(main_process: bool) -> None:
    """One plain line per message on standard error, from the main process only."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter('%(message)s'))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING if main_process else logging.ERROR)
    logging.getLogger('glmc').setLevel(logging.INFO if main_process else logging.ERROR)


def _use_all_cores() -> None:
    """`accelerate launch` sets OMP_NUM_THREADS=1 unless told otherwise, which leaves the other cores idle."""
    launched = 'ACCELERATE_MIXED_PRECISION' in os.environ
    if launched and os.environ.get('OMP_NUM_THREADS') == '1':
        local_processes = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
        torch.set_num_threads(max(len(os.sched_getaffinity(0)) // local_processes, 1))


def device_name(device: torch.device) -> str:
    """Of the graphics card, or on a CPU the processor's model name."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as file:
            return next(line.split(':')[1].strip() for line in file if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
