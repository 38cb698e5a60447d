"""Training tasks in timm's sense: a model and its loss, batch in, dict of losses out."""

from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn


class TaskHooks:
    """What every task of the table answers beside timm's calls."""

    loss_names = ()

    def set_progress(self, progress: float) -> None:
        """Called before each epoch with T/T_max in [0, 1)."""

    def conventional_classifier(self, ema: bool = False) -> nn.Linear | None:
        """The classifier beside the rebalanced one that is exported, if there is one."""

    def after_step(self) -> None:
        """Called after each update of the weights."""

    def classification_loss(self, losses: dict[str, Tensor]) -> Tensor:
        """What SAM climbs, of the losses of a batch: all of it."""
        return losses['loss']

    def update_ema(self, step: int | None = None) -> None:
        """timm's call after each update."""
        self.after_step()
        super().update_ema(step=step)


class AuxiliaryHeadsTask(TaskHooks, TrainingTask):
    """A module of a backbone, which is evaluated, exported and kept, and of what stands beside it, the task's state."""

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """The bare backbone: what is evaluated, exported and kept."""
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
    """A classifier of another form, folded into the backbone's own after every update."""

    def after_step(self) -> None:
        unwrap_model(self.get_trainable_module()).fold()

    def update_ema(self, step: int | None = None) -> None:
        """The average of the folded is not the folded average."""
        super().update_ema(step=step)
        if self.has_ema():
            unwrap_model(self.get_trainable_module(ema=True)).fold()
