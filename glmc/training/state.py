"""Everything that training changes, as one nested state for a checkpoint."""
import logging
import random
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from glmc.models.classifier import Folding
from glmc.training.meter import Meter

_logger = logging.getLogger(__name__)
PER_WEIGHT = ('momentum_buffer', 'exp_avg')  # values of an optimizer that have the shape of their weight
STATISTICS = ('running_mean', 'running_var', 'feature_norm')  # buffers that follow the images of one process


@dataclass(frozen=True)
class Position:
    """Position of a run, between two steps.

    Args:
        epoch: 0-based epoch of the next step.
        step: Steps of that epoch that are done.
        global_batch: Images per step over all processes.
        accum_steps: Steps per update.
    """
    epoch: int = 0
    step: int = 0
    global_batch: int = 1
    accum_steps: int = 1

    @property
    def last_epoch(self) -> int:
        """The last epoch that has trained at least one step."""
        return self.epoch if self.step else self.epoch - 1

    def at(self, epoch: int, step: int = 0) -> 'Position':
        return replace(self, epoch=epoch, step=step)

    def for_batch(self, global_batch: int, accum_steps: int) -> 'Position':
        """The same place in the epoch for steps of another size, at the start of an update."""
        if (global_batch, accum_steps) == (self.global_batch, self.accum_steps):
            return self
        step = self.step * self.global_batch // global_batch
        return Position(self.epoch, step // accum_steps * accum_steps, global_batch, accum_steps)


class TrainingState:
    """Capture and restore everything that training changes.

    Args:
        accelerator: Accelerator of the run.
        task: Task with the model, its training heads and the average of the weights.
        optimizer: Optimizer, with the learning rate that the scheduler has set.
    """

    def __init__(self, accelerator: Accelerator, task: TrainingTask, optimizer):
        self.accelerator, self.task, self.optimizer, self.ema = accelerator, task, optimizer, task.has_ema()

    def capture(self, position: Position, meter: Meter | None) -> dict:
        """Return the state; all processes must call this together.

        Args:
            position: Position of the run.
            meter: Meter of the epoch, inside of one.
        """
        scaler = self.accelerator.scaler
        own = dict(rng=rng_state(), meter=meter and _on_cpu(meter.state()))
        if self.accelerator.num_processes > 1:
            own['statistics'] = [_on_cpu(statistics(module)) for module in self._modules()]
        return dict(
            position=asdict(position), processes=gather_object([own]),
            model=self.task.get_checkpoint_state(),
            ema=self.task.get_checkpoint_state(ema=True) if self.ema else None,
            optimizer=self.optimizer.state_dict(), scaler=scaler and scaler.state_dict())

    def restore(self, state: dict) -> dict | None:
        """Restore a captured state.

        Returns:
            State of this process's meter, None between epochs.
        """
        self.task.load_checkpoint_state(*trained_weights(state, ema=False))
        if self.ema and state['ema']:
            self.task.load_checkpoint_state(*trained_weights(state, ema=True), ema=True)
        elif self.ema:
            self.task.get_trainable_module(ema=True).set(unwrap_model(self.task.get_trainable_module()))
            _logger.info('The checkpoint has no average of the weights: the average starts from its weights')
        _check_groups(state['optimizer']['param_groups'], self.optimizer.param_groups)
        self.optimizer.load_state_dict(state['optimizer'])
        self._match_layout()
        if state['scaler'] and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state['scaler'])
        processes, index = state['processes'], self.accelerator.process_index
        if len(processes) != self.accelerator.num_processes:
            return _combined([process['meter'] for process in processes], first=index == 0)
        set_rng_state(processes[index]['rng'])
        for module, saved in zip(self._modules(), processes[index].get('statistics', ()), strict=False):
            module.load_state_dict(saved, strict=False)
        return processes[index]['meter']

    def equalize_statistics(self, reduce: bool) -> None:
        """Make the running statistics of BatchNorm equal on all processes, for the weights and for their average.

        Args:
            reduce: Take the mean over the processes, else the statistics of the first.
        """
        for module in self._modules() if self.accelerator.num_processes > 1 else ():
            for value in statistics(module).values():
                if reduce:
                    dist.all_reduce(value)
                    value /= self.accelerator.num_processes
                else:
                    dist.broadcast(value, 0)
            if isinstance(module, Folding):
                module.fold()

    def _modules(self) -> list[nn.Module]:
        """The trained module, and its average if there is one."""
        return [unwrap_model(self.task.get_trainable_module(ema)) for ema in ((False, True) if self.ema else (False,))]

    def _match_layout(self) -> None:
        """Give momentum the memory layout of its parameter: the file has it contiguous, and torch's fused optimizers on
        the CPU address both alike."""
        inner = getattr(self.optimizer, 'optimizer', self.optimizer)
        _complete_momentum(inner)
        for parameter, values in inner.state.items():
            for name, value in values.items():
                if name in PER_WEIGHT and value is not None and getattr(value, 'shape', None) != parameter.shape:
                    raise ValueError(f'{name} of the optimizer has not the shape of its weight')
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _complete_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Start the momentum of weights that have none at zero where others have it, which SGD cannot mix."""
    if not any(isinstance(values.get('momentum_buffer'), Tensor) for values in optimizer.state.values()):
        return
    for parameter in (each for group in optimizer.param_groups for each in group['params']):
        if optimizer.state[parameter].get('momentum_buffer') is None:
            optimizer.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter)


def _check_groups(saved: list[dict], groups: list[dict]) -> None:
    """Raise a ValueError if a number of the optimizer's options is none in the saved groups."""
    for found, group in zip(saved, groups, strict=False):  # torch compares their number
        for name, value in group.items():
            if isinstance(value, (int, float)) and not isinstance(found.get(name, value), (int, float)):
                raise ValueError(f'{name} of the optimizer is no number')


def statistics(module: nn.Module) -> dict[str, Tensor]:
    """Buffers of a module that follow the images of its own process, by name."""
    return {name: buffer for name, buffer in module.named_buffers() if name.rpartition('.')[2] in STATISTICS}


def trained_weights(state: dict, ema: bool) -> tuple[dict, dict | None]:
    """Weights of the bare model in a captured state, and the task's own state; those of the average with `ema`."""
    saved, suffix = (state['ema'], '_ema') if ema else (state['model'], '')
    return saved[f'state_dict{suffix}'], saved.get(f'task_state{suffix}')


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def _combined(meters: list[dict | None], first: bool) -> dict | None:
    """Sum the counts of all saved processes for the first process; 0 for the others."""
    if meters[0] is None:
        return None
    sums = {name: torch.stack([meter[name] for meter in meters]).sum(0) * first for name in ('sums', 'not_finite')}
    return {**meters[0], **sums}


def rng_state() -> dict:
    """State of this process's global generators, for `set_rng_state`."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        'python': random.getstate(),
        'numpy': [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        'torch': torch.get_rng_state(),
        'cuda': torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict) -> None:
    """Restore the global generators of this process."""
    version, internal, gauss = state['python']
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state['numpy']
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state['torch'])
    if state['cuda'] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'])
