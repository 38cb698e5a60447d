"""Processes, device, precision, threads, memory and logging of a run."""
import atexit
import logging
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, GradientAccumulationPlugin

from glmc.config import PRECISIONS
from glmc.errors import InputError, PrintableFormatter, RunError, first_line

_logger = logging.getLogger(__name__)
LAUNCHERS = ('accelerate', 'accelerate-launch', 'torchrun', 'accelerate.commands.launch', 'torch.distributed.run')
OFF = ('', '0', 'false', 'no', 'n', 'f', 'off')
DDP = 'expected data parallelism (DDP), --multi_gpu'
UNSUPPORTED = {  # variable of `accelerate launch` -> its flag and the way out
    'ACCELERATE_USE_FSDP': f'--use_fsdp: FSDP is not supported, {DDP}',
    'ACCELERATE_USE_DEEPSPEED': f'--use_deepspeed: DeepSpeed is not supported, {DDP}',
    'ACCELERATE_USE_MEGATRON_LM': f'--use_megatron_lm: Megatron-LM is not supported, {DDP}',
    'ACCELERATE_USE_TP': f'--use_tp: tensor parallelism is not supported, {DDP}',
    'ACCELERATE_USE_PARALLELISM_CONFIG': f'--use_parallelism_config: other parallelism is not supported, {DDP}',
    'ACCELERATE_DYNAMO_BACKEND': '--dynamo_backend: is not passed on, expected --torchcompile of train_glmc.py',
    'ACCELERATE_GRADIENT_CLIPPING': '--gradient_clipping: is not passed on, expected --clip-grad of train_glmc.py',
}


def is_main_process() -> bool:
    """Whether this is the first process of all machines, before there is an Accelerator."""
    return int(os.environ.get('RANK', 0)) == 0


def multiplies_bfloat16() -> bool:
    """Return whether the CPU has instructions for bfloat16; True for processors other than x86, which are not asked."""
    checks = (getattr(torch.cpu, name, None) for name in ('_is_avx512_bf16_supported', '_is_amx_tile_supported'))
    return platform.machine().lower() not in ('x86_64', 'amd64') or any(check is None or check() for check in checks)


def create_accelerator(amp: bool = False, amp_dtype: str | None = None) -> Accelerator:
    """Accelerator for the processes, machines and precision that the launcher or the flags ask for.

    Gradient accumulation is the engine's (`launcher_accumulation`). Running statistics of BatchNorm stay apart during an
    epoch (`TrainingState.equalize_statistics`).

    Args:
        amp: Mixed precision, in float16 unless `amp_dtype` says otherwise.
        amp_dtype: `float16`, `bfloat16`, or None for the launcher's choice.

    Raises:
        InputError: If the device does not support the precision, or the launcher asks for what is not supported.
    """
    warnings.filterwarnings('ignore', '`broadcast_buffers` is deprecated', FutureWarning)  # torch 2.14
    for variable, problem in UNSUPPORTED.items():
        if os.environ.get(variable, '').lower() not in OFF:
            raise InputError(f'{variable}={os.environ[variable]}, {problem}')
    dtype = amp_dtype or ('float16' if amp else None)
    precision = next((name for name, known in PRECISIONS.items() if known == dtype), None)
    launched = os.environ.get('ACCELERATE_MIXED_PRECISION', 'no').lower()
    flag = f'--amp-dtype {amp_dtype}' if amp_dtype else '--amp' if amp else f'ACCELERATE_MIXED_PRECISION={launched}'
    if precision is None and launched not in PRECISIONS:
        raise InputError(f'{flag}, --mixed_precision {launched}: is not supported, expected no, fp16 or bf16')
    try:
        accelerator = Accelerator(
            mixed_precision=precision, step_scheduler_with_optimizer=False,
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)])
    except (ValueError, RuntimeError) as error:
        raise InputError(f'{flag}: {first_line(error)}') from error
    if accelerator.mixed_precision == 'fp16' and accelerator.device.type == 'cpu':  # Accelerate would train in float32
        raise InputError(f'{flag}: float16 needs a GPU, found a CPU; expected bfloat16 or no mixed precision')
    if accelerator.distributed_type in (DistributedType.XLA, DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise InputError(f'accelerate launch: {accelerator.distributed_type.value} is not supported, expected data '
                         'parallelism (DDP) on GPUs or CPUs')
    setup_logging(accelerator.is_main_process)
    atexit.register(end_processes)
    if accelerator.device.type == 'cpu':
        _set_threads()
        if accelerator.mixed_precision == 'bf16' and not multiplies_bfloat16():
            _logger.warning(f'{flag}: this CPU has no instructions for bfloat16; float32 is about ten times as fast')
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
            raise RunError(f'a loader process has died, as when memory runs out: {first_line(error)}; use fewer --workers '
                           'or a smaller --batch-size; --resume auto continues from the newest checkpoint') from error
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
    handler.setFormatter(PrintableFormatter('%(message)s'))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING if main_process else logging.ERROR)
    logging.getLogger('glmc').setLevel(logging.INFO if main_process else logging.ERROR)


def launcher_accumulation() -> int | None:
    """Steps per update that `accelerate launch --gradient_accumulation_steps` or its variable asks for; None for one step.

    Raises:
        InputError: If the value is not a number of steps.
    """
    variable, flag = 'ACCELERATE_GRADIENT_ACCUMULATION_STEPS', 'gradient_accumulation_steps'
    value = os.environ.get(variable) or _launcher_flag(flag) or '1'
    if not value.isascii() or not value.isdigit() or int(value) < 1:
        raise InputError(f'{variable}, --{flag} {value}: expected a number >= 1')
    return int(value) if int(value) > 1 else None


def _launcher() -> psutil.Process | None:
    """Process of `accelerate launch` or torchrun that has started this one; None if there is none, or it cannot be read."""
    try:
        return next((parent for parent in psutil.Process().parents() if any(
            os.path.basename(word) in LAUNCHERS for word in parent.cmdline()[:4])), None)
    except (psutil.Error, OSError):
        return None


def _launcher_flag(name: str) -> str | None:
    """Value of a flag of the launcher, `--name VALUE` or `--name=VALUE` with _ or -; None if it was not given."""
    launcher = _launcher()
    words = launcher.cmdline() if launcher else []
    for index, word in enumerate(words[2:], 2):
        flag, _, value = word.partition('=')
        if flag.startswith('--') and flag[2:].replace('-', '_') == name:
            return value or words[index + 1]
        if word.endswith('.py') or word.startswith('glmc.'):
            break  # options of the script follow
    return None


def _set_threads() -> None:
    """Use the cores that this process may use, by affinity and by the quota of its container, unless the user chose.

    Launchers set OMP_NUM_THREADS themselves, so that the user's value is that of the launcher's own environment.
    """
    from joblib import cpu_count  # comes with scikit-learn

    launched = 'ACCELERATE_MIXED_PRECISION' in os.environ or 'TORCHELASTIC_RUN_ID' in os.environ
    chosen = os.environ.get('OMP_NUM_THREADS')
    if launched:
        launcher = _launcher()
        if launcher is not None:
            chosen = _launcher_flag('num_cpu_threads_per_process') or launcher.environ().get('OMP_NUM_THREADS')
        elif chosen == '1':
            chosen = None  # the default of the launchers
        cores = max(cpu_count() // int(os.environ.get('LOCAL_WORLD_SIZE', 1)), 1)
        torch.set_num_threads(int(chosen) if chosen and chosen.isdigit() and int(chosen) else cores)
    elif not chosen:
        torch.set_num_threads(min(torch.get_num_threads(), cpu_count()))


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the processor."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    try:
        with open('/proc/cpuinfo', encoding='utf-8') as file:
            return next(line.split(':')[1].strip() for line in file if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
