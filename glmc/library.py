"""`glmc.wrap`: the methods of this package in a training loop of one's own, on plain (images, labels) batches."""
from collections.abc import Sequence

import numpy as np
import torch
from timm.task import TrainingTask
from torch import Tensor, nn

from glmc.cli import check_value, nearest
from glmc.config import actions
from glmc.data.profiles import Profile, pluralize
from glmc.methods import METHODS, Method, canonical_name


def wrap(model: nn.Module, counts: Sequence[int], method: str = 'glmc', *, seed: int = 0,
         **options) -> tuple[TrainingTask, 'PlainMixer']:
    """Create the task and the mixer of a method for a training loop of one's own.

    `task(*mixer(images, labels))` returns a dict with the scalar `loss`. Call `task.set_progress(epoch / epochs)` before
    each epoch and `task.update_ema()` after each update of the optimizer. `task.get_eval_model()` is `model`, with the
    rebalanced classifier as its own. `task.metadata` is the `glmc` entry of an export's config.json. See docs/library.md.

    Args:
        model: timm model for C classes; it is trained in place.
        counts: (C,) training images per class, integers >= 1.
        method: Name in `METHODS`.
        seed: Seed of the mixtures.
        **options: Options of the method by their names in docs/options.md, such as `mix_beta=0.5`. Defaults are those of
            train_glmc.py, but `partner` is `batch`.

    Returns:
        The task and its mixer, an `nn.Module` without parameters; move both to the device of the model.

    Raises:
        ValueError: For an unknown method or option, a wrong value, counts that do not fit the model, or a model that the
            method cannot train.
    """
    name = canonical_name(method)
    if name not in METHODS:
        raise ValueError(f"method {method!r}: expected one of {', '.join(METHODS)}{nearest(method, METHODS)}")
    row, counts = METHODS[name], class_counts(model, counts)
    if row.backbone_options:
        raise ValueError(f'method {name!r}: trains several experts, which train_glmc.py creates, not a model of yours')
    options = resolve_options(name, row, options)

    def chosen(names: Sequence[str]) -> dict:
        return {option: options[option] for option in names}
    task = row.task(row.module(model, **chosen(row.module_options)), counts, **chosen(row.task_options))
    task.metadata = dict(
        method=name, prior=row.class_prior(counts, options), profile=Profile(tuple(counts)).as_dict(),
        recipe={option: value for option, value in options.items() if not isinstance(value, nn.Module)})
    mixer = row.mixer(counts, **chosen(row.mixer_options))
    return task, PlainMixer(name, row, mixer, partner=options.get('partner'), seed=seed)


def class_counts(model: nn.Module, counts: Sequence[int]) -> list[int]:
    """(C,) training images per class, checked against the classes of the model."""
    counts = np.asarray(counts).tolist()
    if len(counts) != model.num_classes:
        raise ValueError(f'counts: found {len(counts)} classes, expected {model.num_classes}, those of the model')
    wrong = next((c for c, number in enumerate(counts) if number < 1 or number != int(number)), None)
    if wrong is not None:
        raise ValueError(f'counts: found {counts[wrong]} for class {wrong}, expected training images, an integer >= 1')
    return [int(number) for number in counts]


def resolve_options(name: str, row: Method, options: dict) -> dict:
    """Values of all options of a method; those that are not given have the defaults of train_glmc.py."""
    known = sorted(row.options - {'view_augmentation'})  # an option of the loader
    parsers = {action.dest: action for action in actions('method')}
    for option in options:
        if option not in known:
            raise ValueError(f"{option}: unknown option of method {name}, expected one of {', '.join(known) or 'none'}"
                             f'{nearest(option, known)}')
    given = {option: value if isinstance(value, nn.Module) else check_value(parsers[option], value, option)
             for option, value in options.items()}  # a teacher may be a module
    values = {**{option: parsers[option].default for option in known}, **row.defaults, 'partner': 'batch', **given}
    return {option: values[option] for option in known}


class PlainMixer(nn.Module):
    """Plain batches to the input and the target of a task, with random numbers of its own.

    Its state dict contains the state of the random numbers.

    Args:
        name: Name of the method.
        row: The method.
        mixer: Mixer of the method.
        partner: Option of the method, None if it has none.
        seed: Seed of the mixtures.
    """

    def __init__(self, name: str, row: Method, mixer: nn.Module, partner: str | None = None, seed: int = 0):
        super().__init__()
        self.name, self.mixer, self.rng = name, mixer, np.random.default_rng(seed)
        self.num_views, self.repeats_view = len(row.views), row.paired  # each view of a pair is mixed in another way
        self.partners = ('partner_images', 'partner_labels') if partner == 'sampler' else ()

    def forward(self, images: Tensor | Sequence[Tensor], labels: Tensor, *partners) -> tuple:
        """Input and target of the task.

        Args:
            images: (B, c, H, W) normalised images, or a list of V such batches: V augmentations of the same images.
            labels: (B,) class indices.
            *partners: Images and labels of a second, resampled batch of the same shapes, with `partner='sampler'`.

        Raises:
            ValueError: For other shapes, or fewer augmentations or batches than the method needs.
        """
        if len(partners) != len(self.partners):
            raise ValueError(f"{self.name}: found {2 + len(partners)} arguments, expected "
                             f"mixer({', '.join(('images', 'labels', *self.partners))})")
        batches = [self.views(images, labels), *([self.views(*partners)] if partners else [])]
        if len({batch.shape for batch in batches}) > 1:
            raise ValueError(f'partners: found {tuple(batches[1].shape)}, expected {tuple(batches[0].shape)}')
        views = torch.stack(batches, 1)  # (B, images, V, c, H, W)
        labels = torch.stack([labels, *partners[1:]], 1)
        params = self.mixer.sample_params(len(views), views.shape[-2:], self.rng)
        return self.mixer(views, labels, params if params is None else params.to(views.device))

    def views(self, images: Tensor | Sequence[Tensor], labels: Tensor) -> Tensor:
        """(B, V, c, H, W) views of the images, each one the same if there is a single augmentation."""
        images = [images] if isinstance(images, Tensor) else list(images)
        found = len(images)
        if found == 1 and self.repeats_view:
            images = images * self.num_views
        if len(images) != self.num_views:
            raise ValueError(f"{self.name}: found {pluralize(found, 'augmentation')} of each image, expected a list of "
                             f'{self.num_views} (B, c, H, W) batches')
        if images[0].ndim != 4 or labels.shape != images[0].shape[:1]:
            raise ValueError(f'{self.name}: found images of shape {tuple(images[0].shape)} and labels of shape '
                             f'{tuple(labels.shape)}, expected (B, c, H, W) and class indices (B,)')
        return torch.stack(images, 1)

    def get_extra_state(self) -> dict:
        return self.rng.bit_generator.state

    def set_extra_state(self, state: dict) -> None:
        self.rng.bit_generator.state = state
