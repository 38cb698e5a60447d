"""Training tasks in timm's sense: a model and its loss, batch in, dict of losses out."""

from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn


class TaskHooks:
    """Calls that training makes to a task beside those of timm's `TrainingTask`; each does nothing unless overridden.

    A task maps the input and the target of a mixer to a dict: `loss`, a scalar with a gradient; the scalars that
    `loss_names` lists; `output`, (B, C) logits; and whatever its own `after_batch` needs. State beside the model goes into
    `get_task_state` as tensors, so that a run resumes exactly.
    """

    loss_names = ()  # further losses of the dict, for the log

    def set_progress(self, progress: float) -> None:
        """Prepare an epoch; progress is T/T_max in [0, 1)."""

    def after_batch(self, outputs: dict[str, Tensor]) -> None:
        """Update queues and statistics after a forward and backward pass, outside the compiled graph.

        Args:
            outputs: The dict of the task, detached.
        """

    def after_step(self) -> None:
        """Change weights after an update of the optimizer."""

    def classification_loss(self, losses: dict[str, Tensor]) -> Tensor:
        """Loss along whose gradient SAM perturbs the weights; a scalar of the dict of the task."""
        return losses['loss']

    def conventional_classifier(self, ema: bool = False) -> nn.Linear | None:
        """Linear classifier beside the exported, rebalanced one; None if there is none."""

    def update_ema(self, step: int | None = None) -> None:
        """Call `after_step`, then update the average; timm's hook after each update."""
        self.after_step()
        super().update_ema(step=step)


class AuxiliaryHeadsTask(TaskHooks, TrainingTask):
    """Base task for a backbone with training-only heads; the backbone is exported, the heads are task state."""

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """The bare backbone, which is evaluated, exported and kept."""
        module = super().get_eval_model(module, ema)
        return None if module is None else unwrap_model(module).backbone

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Tensor]:
        """Weights of the heads beside the backbone."""
        module = unwrap_model(module if module is not None else self.get_trainable_module(ema))
        return {name: value for name, value in module.state_dict().items() if not name.startswith('backbone.')}

    def load_task_state(
            self, state: dict[str, Tensor], strict: bool = True, module: nn.Module | None = None,
            ema: bool = False) -> None:
        module = unwrap_model(module if module is not None else self.get_trainable_module(ema))
        _, unexpected = module.load_state_dict(state, strict=False)
        missing = self.get_task_state(module).keys() - state.keys()
        if strict and (missing or unexpected):
            raise RuntimeError(f'training heads: missing {sorted(missing)}, unexpected {unexpected}')


class FoldedTask(AuxiliaryHeadsTask):
    """Base task for a classifier of another form, folded into the backbone's own after every update."""

    def after_step(self) -> None:
        unwrap_model(self.get_trainable_module()).fold()

    def update_ema(self, step: int | None = None) -> None:
        """Fold the average, too: it is not the average of the folded classifiers."""
        super().update_ema(step=step)
        if self.has_ema():
            unwrap_model(self.get_trainable_module(ema=True)).fold()
