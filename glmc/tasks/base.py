"""Training tasks in timm's sense: a model and its loss, batch in, dict of losses out."""
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from glmc.models.classifier import set_classifier


class HeadFits(NamedTuple):
    """Classifiers fitted to the features of the pretrained encoder, which heads can start from.

    Attributes:
        linear: Class prior ('train', 'uniform' or C weights) -> (C, D) weight and (C,) bias that embody it.
        class_means: () -> (C, D) means of the normalised features of each class.
    """
    linear: Callable[[str | Sequence[float]], tuple[Tensor, Tensor]]
    class_means: Callable[[], Tensor]


class TaskHooks:
    """Calls that training makes to a task beside those of timm's `TrainingTask`; each does nothing unless overridden.

    A task maps the input and the target of a mixer to a dict: `loss`, a scalar with a gradient; the scalars that
    `loss_names` lists; `output`, (B, C) logits; and whatever its own `after_batch` needs. State beside the model goes into
    `get_task_state` as tensors, so that a run resumes exactly.
    """

    loss_names = ()  # further losses of the dict, for the log

    def set_progress(self, progress: float) -> None:
        """Prepare an epoch; progress is T/T_max in [0, 1)."""

    def before_batch(self, images: int, batch_fraction: float) -> None:
        """Prepare a forward pass, outside the compiled graph.

        Args:
            images: Images of this process.
            batch_fraction: These over the mean of all processes, 1 but for an uneven last step.
        """

    def after_batch(self, outputs: dict[str, Tensor]) -> None:
        """Update queues and statistics after a forward and backward pass, outside the compiled graph.

        Args:
            outputs: The dict of the task, detached.
        """

    def after_step(self) -> None:
        """Change weights after an update of the optimizer."""

    def init_heads(self, fits: HeadFits, prior: str | Sequence[float]) -> None:
        """Start the classifiers from fits to the features of the encoder, in place (linear probe first; arXiv 2202.10054).

        Args:
            fits: Fits to the training images.
            prior: Class prior that the exported classifier embodies.
        """
        set_classifier(self.get_eval_model(), *fits.linear(prior))

    def classification_loss(self, losses: dict[str, Tensor]) -> Tensor:
        """Loss along whose gradient SAM perturbs the weights; a scalar of the dict of the task."""
        return losses['loss']

    def conventional_classifier(self, ema: bool = False) -> nn.Linear | None:
        """Linear classifier beside the exported, rebalanced one; None if there is none."""

    def reference_models(self, ema: bool = False) -> dict[str, nn.Module]:
        """Further models by name, which are evaluated at the end beside the exported one; metrics.json has NAME_top1.

        Args:
            ema: Whether those of the average of the weights.
        """
        return {}

    def update_ema(self, step: int | None = None) -> None:
        """Call `after_step`, then update the average; timm's hook after each update."""
        self.after_step()
        super().update_ema(step=step)


class AuxiliaryHeadsTask(TaskHooks, TrainingTask):
    """Base task for a backbone with training-only heads; the backbone is exported, the heads are task state."""

    def prepare_distributed(self, device_ids: list | None = None, **ddp_kwargs) -> NoReturn:
        """Raise: timm's default would train each process on its own, since several modules of the task run in a step."""
        raise NotImplementedError(f'{type(self).__name__}.prepare_distributed: not supported; wrap the task itself: '
                                  'torch.nn.parallel.DistributedDataParallel(task, device_ids) or accelerator.prepare(task)')

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """The bare backbone, which is evaluated, exported and kept."""
        module = super().get_eval_model(module, ema)
        return None if module is None else unwrap_model(module).backbone

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Tensor]:
        """Weights of the heads beside the backbone."""
        return heads(unwrap_model(module if module is not None else self.get_trainable_module(ema)))

    def load_task_state(
            self, state: dict[str, Tensor], strict: bool = True, module: nn.Module | None = None,
            ema: bool = False) -> None:
        module = unwrap_model(module if module is not None else self.get_trainable_module(ema))
        _, unexpected = module.load_state_dict(state, strict=False)
        missing = heads(module).keys() - state.keys()
        if strict and (missing or unexpected):
            raise RuntimeError(f'training heads: missing {sorted(missing)}, unexpected {unexpected}')


def heads(module: nn.Module) -> dict[str, Tensor]:
    """State of a module without that of its `backbone`."""
    return {name: value for name, value in module.state_dict().items() if not name.startswith('backbone.')}


class FoldedTask(AuxiliaryHeadsTask):
    """Base task for a classifier of another form, folded into the backbone's own after every update."""

    def after_step(self) -> None:
        unwrap_model(self.get_trainable_module()).fold()

    def update_ema(self, step: int | None = None) -> None:
        """Fold the average, too: it is not the average of the folded classifiers."""
        super().update_ema(step=step)
        if self.has_ema():
            unwrap_model(self.get_trainable_module(ema=True)).fold()
