"""Loading of trained models: export folder, run folder, checkpoint, Hub id, or a plain timm model."""
import hashlib
import json
import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from timm.data import resolve_input_data_config
from timm.models._hub import download_from_hf
from torch import Tensor, nn

from glmc.config import PRECISIONS
from glmc.data.lists import read_class_counts
from glmc.errors import InputError, first_line
from glmc.models.backbone import create_backbone, export_source, find_export
from glmc.models.exported import exported_form
from glmc.training.checkpoint import load_checkpoint
from glmc.training.checkpoints import BEST
from glmc.training.resume import epoch_checkpoints
from glmc.training.schema import MAX_SIDE, check_no_nan, check_state, is_data_config
from glmc.training.state import trained_weights

_logger = logging.getLogger(__name__)
WEIGHTS = 'model.safetensors'  # of an export
FLAGS = {'checkpoint': '--checkpoint', 'num_classes': '--num-classes', 'in_chans': '--in-chans', 'global_pool': '--gp'}


@dataclass(frozen=True)
class TrainedModel:
    """A model with the metadata of its training.

    Args:
        name: Name as the user typed it.
        model: Bare timm model in eval mode.
        data_config: timm's data config: input_size, mean, std, interpolation, crop_pct, crop_mode.
        class_names: C names, or None.
        metadata: `method`, `profile`, `prior`, `precision`, `recipe` … of the training; missing keys are unknown.
        conventional: GLMC's conventional classifier, which only a checkpoint contains.
    """
    name: str
    model: nn.Module
    data_config: dict
    class_names: list[str] | None
    metadata: dict
    conventional: nn.Linear | None = None

    @property
    def num_classes(self) -> int:
        return self.model.num_classes

    @property
    def architecture(self) -> str:
        return self.model.pretrained_cfg.get('architecture') or self.name


def load_trained(
        name: str, *, checkpoint: str | None = None, data_options: dict | None = None,
        **model_options) -> TrainedModel:
    """Load a model by name.

    Args:
        name: Export folder, run folder, checkpoint of train_glmc.py, `hf-hub:…`, `local-dir:…`, or a timm architecture.
        checkpoint: Weights for a timm architecture, whose classifier must fit; None for its pretrained weights.
        data_options: Overrides of the data config: img_size, in_chans, mean, std, interpolation, crop_pct.
        **model_options: Further arguments of `create_backbone` for a timm architecture.

    Raises:
        InputError: If the name is none of these or cannot be loaded, or an option would change a trained model.
    """
    path, data_options = Path(name), data_options or {}
    if path.is_file():
        in_export = (path.parent / 'config.json').is_file()  # the weights file of an export
        trained = _load_export(str(path.parent)) if in_export else _load_checkpoint(path)
    elif path.is_dir() or ':' in name:
        checkpoint_of_run = None if ':' in name or find_export(path) else newest_checkpoint(path)
        if checkpoint_of_run:
            _logger.info(f'{name}: no export yet, loading {checkpoint_of_run}')
        trained = _load_checkpoint(checkpoint_of_run) if checkpoint_of_run else _load_export(name)
    elif '/' in name:
        raise InputError(f'--model {name}: no such file or folder; a Hub model is hf-hub:ORG/NAME')
    else:
        return _with_data_config(_load_architecture(name, checkpoint, **model_options), data_options)
    _check_options(trained, checkpoint=checkpoint, **model_options)
    _set_input_size(trained, data_options.get('img_size'))
    return _with_data_config(trained, data_options)


def _load_checkpoint(path: Path) -> TrainedModel:
    state, model, task_state = build_from_checkpoint(path)
    model = exported_form(model)
    export = state['description']['export']
    metadata = {**export['source'], 'precision': state['metrics'].get('precision')}
    model.pretrained_cfg = {**model.pretrained_cfg, **export['data_config']}
    return TrainedModel(
        str(path), model, {}, export['class_names'], metadata, _conventional_classifier(task_state or {}))


def build_from_checkpoint(path: Path) -> tuple[dict, nn.Module, dict | None]:
    """Return the state of a checkpoint, its model with the weights, or their average if there is one, and the task's state.

    Raises:
        InputError: If the file is no checkpoint of train_glmc.py, or its parts do not fit each other.
    """
    state = check_state(path, load_checkpoint(path))
    model = create_backbone(**state['description']['model'])
    weights, task_state = trained_weights(state, ema=bool(state['ema']))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"{path}: its weights are not those of {state['description']['model']['name']}: "
                         f'{first_line(error)}') from error
    return state, model, task_state


def file_digest(path: Path) -> str:
    """sha256 of a file, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while part := file.read(2 ** 20):
            digest.update(part)
    return digest.hexdigest()


def _check_weights(export: Path) -> None:
    """Raise an InputError if the weights of an export differ from the checksum in its metrics.json."""
    try:
        metrics = json.loads((export / 'metrics.json').read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError):
        return  # an export without figures
    recorded = metrics.get('weights_sha256') if isinstance(metrics, dict) else None
    if recorded is not None and (export / WEIGHTS).is_file() and file_digest(export / WEIGHTS) != recorded:
        raise InputError(f'--model {export}: {WEIGHTS} is damaged or not from this run: its sha256 differs from '
                         'weights_sha256 in metrics.json')


def newest_checkpoint(folder: Path) -> Path | None:
    """Best checkpoint of a run on its held-out images, else the newest; None if there is none.

    Args:
        folder: Folder of a run, or of its checkpoints.
    """
    for place in (folder / 'checkpoints', folder):
        best = [place / BEST] if (place / BEST).is_file() else []
        if found := [*epoch_checkpoints(place), *best]:
            return found[-1]
    return None


def _conventional_classifier(task_state: dict) -> nn.Linear | None:
    """Create the conventional classifier of GLMC or SSD from the task's state; None for another method."""
    if not {'classifier.weight', 'classifier.bias'} <= task_state.keys() or 'rebalancer.weight' in task_state:
        return None
    try:
        classifier = nn.Linear(*reversed(task_state['classifier.weight'].shape))
        classifier.load_state_dict({name: task_state[f'classifier.{name}'] for name in ('weight', 'bias')})
    except (KeyError, TypeError, RuntimeError) as error:
        raise InputError(f'conventional classifier of a checkpoint: cannot be read: {first_line(error)}') from error
    return classifier


def _load_export(name: str) -> TrainedModel:
    """Load an export or run folder, `local-dir:…` or `hf-hub:…`."""
    name = export_source(name)
    if name.startswith('local-dir:'):
        _check_weights(Path(name.removeprefix('local-dir:')))
    model = create_backbone(name, pretrained=True, trained=True)
    try:
        scheme, _, place = name.partition(':')
        file = Path(place) / 'config.json' if scheme == 'local-dir' else download_from_hf(place, 'config.json')
        config = json.loads(Path(file).read_text(encoding='utf-8'))
    except Exception as error:  # a server: the client raises anything
        raise InputError(f'--model {name}: cannot be loaded: {first_line(error)}') from error
    class_names = valid_class_names(config.get('label_names'), model.num_classes)
    metadata = valid_metadata(config.get('glmc'), model.num_classes)
    check_no_nan(f'--model {name}', model.state_dict())
    return TrainedModel(name.removeprefix('local-dir:'), model, {}, class_names, metadata)


def _load_architecture(name: str, checkpoint: str | None, **model_options) -> TrainedModel:
    model = create_backbone(
        name, pretrained=checkpoint is None, checkpoint_path=checkpoint, trained=True, **model_options)
    class_names = valid_class_names(model.pretrained_cfg.get('label_names'), model.num_classes)
    return TrainedModel(name, model, {}, class_names, {})


def valid_metadata(source, num_classes: int) -> dict:
    """Return the entries of config.json's `glmc` that have the form of an export's and drop the others.

    Args:
        source: Content of the entry, possibly written by others.
        num_classes: C.
    """
    metadata = _valid_entries(source, METADATA_CHECKS)
    profile = _valid_entries(metadata.pop('profile', None), PROFILE_CHECKS)
    if isinstance(metadata.get('prior'), list) and len(metadata['prior']) != num_classes:
        del metadata['prior']
    return {**metadata, 'profile': profile} if profile else metadata


def _valid_entries(values, checks: dict) -> dict:
    values = values if isinstance(values, dict) else {}
    return {name: value for name, value in values.items() if name not in checks or checks[name](value)}


def _is_text(value) -> bool:
    return isinstance(value, str)


def _is_counts(values) -> bool:
    return isinstance(values, list) and bool(values) and all(type(n) is int and 0 <= n < 2 ** 53 for n in values)


def _is_thresholds(values) -> bool:
    return _is_counts(values) and len(values) == 2 and values[0] <= values[1]


def _is_prior(value) -> bool:
    """Whether the value is `train`, `uniform` or a list of weights, one per class."""
    if not isinstance(value, list):
        return value in ('train', 'uniform')
    return all(type(weight) in (int, float) and 0 <= weight < 2 ** 53 for weight in value) and any(value)


METADATA_CHECKS = {
    'method': _is_text, 'precision': _is_text, 'license': _is_text, 'base_model': _is_text, 'prior': _is_prior,
    'dataset_name': _is_text, 'recipe': lambda value: isinstance(value, dict)}
PROFILE_CHECKS = {'class_counts': _is_counts, 'shot_thresholds': _is_thresholds, 'fingerprint': _is_text}


def valid_class_names(names, num_classes: int) -> list[str] | None:
    """Return C different class names as text, or None if there are not as many."""
    if not isinstance(names, (list, tuple)) or len(names) != num_classes:
        return None
    names = [str(name) for name in names]
    return names if len(set(names)) == num_classes else None


def _check_options(trained: TrainedModel, **options) -> None:
    """Raise for options that would change weights, classes or channels; `img_size` only sets the size of the images."""
    fixed = {'num_classes': trained.num_classes, 'in_chans': trained.model.pretrained_cfg['input_size'][0]}
    for option, value in options.items():
        if option != 'img_size' and value not in (None, fixed.get(option)):
            flag = FLAGS.get(option, f'--model-kwargs {option}')
            raise InputError(f"{flag} {value}: is for a bare architecture; {trained.name} is a trained model with "
                             f"{fixed['num_classes']} classes and {fixed['in_chans']} channels")


def _set_input_size(trained: TrainedModel, img_size: int | list[int] | None) -> None:
    """Resize the position embedding of a model with a fixed input size, such as a vision transformer."""
    if img_size and hasattr(trained.model, 'set_input_size'):
        try:
            trained.model.set_input_size((img_size, img_size) if isinstance(img_size, int) else tuple(img_size))
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f'--img-size {img_size}: {trained.name} cannot take it: {first_line(error)}') from error


def _with_data_config(trained: TrainedModel, data_options: dict) -> TrainedModel:
    try:
        data_config = resolve_input_data_config(trained.model, data_options)
    except Exception as error:  # config files of others make timm raise anything
        raise InputError(f'--model {trained.name}: {first_line(error)}') from error
    if not is_data_config(data_config):
        raise InputError(f'--model {trained.name}: found a wrong data config, expected input_size of at most {MAX_SIDE:,} '
                         'pixels, mean, std, interpolation and crop_pct')
    return replace(trained, model=trained.model.eval(), data_config=data_config)


@torch.inference_mode()
def check_model(trained: TrainedModel) -> None:
    """Raise an InputError unless the model maps a black image of its input size to (1, C) logits."""
    channels, height, width = size = trained.data_config['input_size']
    if channels not in (1, 3):
        raise InputError(f'--model {trained.name}: found an input of {channels} channels, expected 1 or 3')
    device = next(trained.model.parameters()).device
    try:
        logits = trained.model.eval()(torch.zeros(1, *size, device=device))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise InputError(f'--model {trained.name}, --img-size: cannot take an image of {height}x{width}: '
                         f'{first_line(error)}') from error
    if not trained.num_classes or not isinstance(logits, Tensor) or logits.shape != (1, trained.num_classes):
        raise InputError(f'--model {trained.name}: expected a classifier, found a model without one')


def training_counts(trained: TrainedModel, class_counts: str | None = None) -> list[int]:
    """Return the (C,) training images per class, which decide the shot groups.

    Args:
        trained: Model that may know them.
        class_counts: File that takes precedence (`--class-counts`).

    Raises:
        InputError: If they are unknown, or of another number of classes.
    """
    counts = read_class_counts(class_counts) if class_counts else trained.metadata.get('profile', {}).get('class_counts')
    if counts is None:
        raise InputError(f'--model {trained.name}: the number of training images per class is unknown; expected '
                         '--class-counts FILE (JSON list, metrics.json of a run, or one number per line)')
    if len(counts) != trained.num_classes:
        raise InputError(f'--class-counts {class_counts or "of the export"}: found {len(counts)} classes, '
                         f'--model {trained.name} has {trained.num_classes}')
    return counts


def trained_precision(trained: TrainedModel, amp: bool) -> str | None:
    """Return the mixed precision of the training as a dtype name.

    Args:
        trained: Model that may know it.
        amp: Whether `--amp` is given.

    Returns:
        None if `--amp` or the launcher chooses the precision, the training had none, or this device lacks it.
    """
    precision = trained.metadata.get('precision')
    if amp or os.environ.get('ACCELERATE_MIXED_PRECISION', 'no') != 'no' or precision == 'no':
        return None
    return None if precision == 'fp16' and not torch.cuda.is_available() else PRECISIONS.get(precision)
