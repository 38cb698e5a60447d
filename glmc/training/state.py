"""What training changes, as one nested state that a checkpoint holds."""
import random
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.task import TrainingTask

from glmc.training.meter import Meter


@dataclass(frozen=True)
class Position:
    """Where a run stands.

    Args:
        epoch: 0-based, of the step that comes next.
        step: Steps of it that are done.
        global_batch: Images of a step, over all processes.
        accum_steps: Steps of an update.
    """
    epoch: int = 0
    step: int = 0
    global_batch: int = 1
    accum_steps: int = 1

    @property
    def last_epoch(self) -> int:
        """The last epoch that has trained, if only in part."""
        return self.epoch if self.step else self.epoch - 1

    def at(self, epoch: int, step: int = 0) -> 'Position':
        return replace(self, epoch=epoch, step=step)

    def for_batch(self, global_batch: int, accum_steps: int) -> 'Position':
        """The same place in the epoch for steps of another size, at the beginning of an update."""
        if (global_batch, accum_steps) == (self.global_batch, self.accum_steps):
            return self
        step = self.step * self.global_batch // global_batch
        return Position(self.epoch, step // accum_steps * accum_steps, global_batch, accum_steps)


class TrainingState:
    """Everything that training changes.

    Args:
        accelerator: Of the run.
        task: Model, heads, moving average.
        optimizer: With its learning rate, which the scheduler has set.
        ema: Whether there is a moving average.
    """

    def __init__(self, accelerator: Accelerator, task: TrainingTask, optimizer, ema: bool):
        self.accelerator, self.task, self.optimizer, self.ema = accelerator, task, optimizer, ema

    def capture(self, position: Position, meter: Meter | None) -> dict:
        """The state; all processes must call this together.

        Args:
            position: Where the run stands.
            meter: Of the epoch, if it stands inside of one.
        """
        scaler, own = self.accelerator.scaler, dict(rng=rng_state(), meter=meter and _on_cpu(meter.state()))
        return dict(
            position=asdict(position), processes=gather_object([own]),
            model=self.task.get_checkpoint_state(),
            ema=self.task.get_checkpoint_state(ema=True) if self.ema else None,
            optimizer=self.optimizer.state_dict(), scaler=scaler and scaler.state_dict())

    def restore(self, state: dict) -> dict | None:
        """Put all back.

        Returns:
            State of this process's meter, None between epochs.
        """
        self.task.load_checkpoint_state(*trained_weights(state, ema=False))
        if self.ema and state['ema']:
            self.task.load_checkpoint_state(*trained_weights(state, ema=True), ema=True)
        self.optimizer.load_state_dict(state['optimizer'])
        self._lay_out_like_parameters()
        if state['scaler'] and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state['scaler'])
        processes, index = state['processes'], self.accelerator.process_index
        if len(processes) == self.accelerator.num_processes:
            set_rng_state(processes[index]['rng'])
            return processes[index]['meter']
        return _combined([process['meter'] for process in processes], first=index == 0)

    def _lay_out_like_parameters(self) -> None:
        """Momentum in its parameter's memory layout: the file has it contiguous, and torch's fused optimizers on the CPU go
        through both by address."""
        inner = getattr(self.optimizer, 'optimizer', self.optimizer)
        for parameter, values in inner.state.items():
            for name, value in values.items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def trained_weights(state: dict, ema: bool) -> tuple[dict, dict | None]:
    """Of a captured state: weights of the bare model, and the task's own beside them; of the average with `ema`."""
    saved, suffix = (state['ema'], '_ema') if ema else (state['model'], '')
    return saved[f'state_dict{suffix}'], saved.get(f'task_state{suffix}')


def _on_cpu(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def _combined(meters: list[dict | None], first: bool) -> dict | None:
    """What all processes counted of their own, now counted by the first."""
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
    """Put the global generators of this process back."""
    version, internal, gauss = state['python']
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state['numpy']
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state['torch'])
    if state['cuda'] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'])
