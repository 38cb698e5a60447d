"""State of a task beside the trained module: queues, slow encoders, class statistics."""
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glmc.tasks.gather import gather, missing_rows

PREFIX = 'memory.'


class MemoryMixin:
    """Mixin for a task with state that is neither trained nor averaged, the same in all processes.

    Attributes:
        memory: This state by name, an `nn.ModuleDict`; part of the task state.
        padding: Rows that this process lacks to the largest of the step.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.memory = nn.ModuleDict()
        self.padding = 0

    def before_batch(self, images: int, batch_fraction: float) -> None:
        self.padding = missing_rows(images, batch_fraction)

    def gathered(self, outputs: dict[str, Tensor], *names: str) -> tuple[Sequence[Tensor], Tensor, Tensor]:
        """Features of all processes, their labels, and whether every process had a finite loss and finite features.

        Args:
            outputs: The dict of the task, detached, with (B,) `labels`.
            names: Names of (B, d) features.
        """
        features = torch.cat([outputs[name] for name in names], 1)
        finite = (outputs['loss'].isfinite() & features.isfinite().all()).expand(len(features))
        rows = torch.cat([features, torch.stack([outputs['labels'], finite], 1).to(features.dtype)], 1)
        rows = gather(rows, self.padding, fill=-1)  # one exchange
        widths = [outputs[name].shape[1] for name in names]
        return rows[:, :-2].split(widths, 1), rows[:, -2].long(), (rows[:, -1] != 0).all()

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Tensor]:
        """State of the base class, and the memory, which the average of the weights shares."""
        state = super().get_task_state(module, ema)
        return state if ema else {**state, **self.memory.state_dict(prefix=PREFIX)}

    def load_task_state(
            self, state: dict[str, Tensor], strict: bool = True, module: nn.Module | None = None,
            ema: bool = False) -> None:
        others = {name: value for name, value in (state or {}).items() if not name.startswith(PREFIX)}
        super().load_task_state(others, strict, module, ema)
        if not ema:
            memory = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
            self.memory.load_state_dict(memory, strict=strict)
