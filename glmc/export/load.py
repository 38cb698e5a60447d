"""Trained models wherever they are: export folder, run, checkpoint, Hub id, or a plain timm model."""
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import timm
import torch
from timm.data import resolve_input_data_config
from timm.models._hub import download_from_hf
from torch import nn

from glmc.config import PRECISIONS
from glmc.data.sources import read_class_counts
from glmc.errors import InputError, first_line
from glmc.models.backbone import create_backbone
from glmc.training.checkpoint import load_checkpoint
from glmc.training.state import trained_weights

FLAGS = {'checkpoint': '--checkpoint', 'num_classes': '--num-classes', 'in_chans': '--in-chans', 'global_pool': '--gp'}


@dataclass(frozen=True)
class TrainedModel:
    """A model, and what is known about its training.

    Args:
        name: What the user called it.
        model: Bare timm model.
        data_config: timm's: input_size, mean, std, interpolation, crop_pct, crop_mode.
        class_names: C names, or None.
        facts: `method`, `profile`, `precision` of the training, as far as known.
        conventional: GLMC's other classifier, which only a checkpoint has.
    """
    name: str
    model: nn.Module
    data_config: dict
    class_names: list[str] | None
    facts: dict
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
    """Open what the user named.

    Args:
        name: Export folder, folder of a run, checkpoint of train_glmc.py, `hf-hub:…`, `local-dir:…`, or a timm architecture.
        checkpoint: Weights for an architecture; its pretrained ones without.
        data_options: Overrides of the data config: img_size, in_chans, mean, std, interpolation, crop_pct.
        **model_options: More for `create_backbone`, of an architecture.

    Raises:
        InputError: If it is none of these or cannot be loaded, or options would change a model that is trained already.
    """
    path, data_options = Path(name), data_options or {}
    if path.is_file():
        found = _from_file(path)
    elif path.is_dir() or ':' in name:
        found = _from_export(name, path)
    elif '/' in name:
        raise InputError(f'--model {name}: no such file or folder; a Hub model is hf-hub:ORG/NAME')
    else:
        return _with_data_config(_from_architecture(name, checkpoint, **model_options), data_options)
    _refuse_changes(found, checkpoint=checkpoint, **model_options)
    return _with_data_config(_resized(found, data_options.get('img_size')), data_options)


def _from_file(path: Path) -> TrainedModel:
    if (path.parent / 'config.json').is_file():  # the weights of an export
        return _from_export(str(path.parent), path.parent)
    return _from_checkpoint(path)


def _from_checkpoint(path: Path) -> TrainedModel:
    state = load_checkpoint(path)
    description = state['description']
    model = create_backbone(**description['model'])
    weights, beside = trained_weights(state, ema=bool(state['ema']))
    model.load_state_dict(weights)
    export = description['export']
    facts = {**export['source'], 'precision': state['metrics'].get('precision')}
    model.pretrained_cfg = {**model.pretrained_cfg, **export['data_config']}
    return TrainedModel(str(path), model, {}, export['class_names'], facts, _conventional(beside or {}))


def _conventional(beside: dict) -> nn.Linear | None:
    """GLMC's other classifier, from the weights beside the model."""
    if not {'projector.weight', 'classifier.weight'} <= beside.keys():
        return None
    classifier = nn.Linear(*reversed(beside['classifier.weight'].shape))
    classifier.load_state_dict({name: beside[f'classifier.{name}'] for name in ('weight', 'bias')})
    return classifier


def _from_export(name: str, path: Path) -> TrainedModel:
    if path.is_dir():
        folder = path if (path / 'config.json').is_file() else path / 'export'
        if not (folder / 'config.json').is_file():
            raise InputError(f'--model {name}: no config.json in this folder, expected an export or a run that has one')
        name = f'local-dir:{folder}'
    try:
        model = timm.create_model(name, pretrained=True)
        config = json.loads(_config_path(name).read_text(encoding='utf-8'))
    except Exception as error:  # a foreign config or weights file, a server: timm and the client raise anything
        raise InputError(f'--model {name}: cannot be loaded: {first_line(error)}') from error
    class_names = _known_names(config.get('label_names'), model.num_classes)
    return TrainedModel(name.removeprefix('local-dir:'), model, {}, class_names, known_metadata(config.get('glmc')))


def _config_path(name: str) -> Path:
    scheme, _, place = name.partition(':')
    return Path(place) / 'config.json' if scheme == 'local-dir' else Path(download_from_hf(place, 'config.json'))


def _from_architecture(name: str, checkpoint: str | None, **model_options) -> TrainedModel:
    model = create_backbone(name, pretrained=checkpoint is None, **model_options)
    if checkpoint:
        try:
            timm.models.load_checkpoint(model, checkpoint, weights_only=True)
        except Exception as error:  # whatever a foreign file makes torch or safetensors raise
            raise InputError(f'--checkpoint {checkpoint}: expected weights of {name} with {model.num_classes} classes, '
                             f'found: {first_line(error)}') from error
    class_names = _known_names(model.pretrained_cfg.get('label_names'), model.num_classes)
    return TrainedModel(name, model, {}, class_names, {})


def known_metadata(source) -> dict:
    """What config.json says of the training, less what has not the form of an export's; others may have written it."""
    facts = _well_formed(source, FACTS)
    profile = _well_formed(facts.pop('profile', None), PROFILE)
    return {**facts, 'profile': profile} if profile else facts


def _well_formed(values, forms: dict) -> dict:
    values = values if isinstance(values, dict) else {}
    return {name: value for name, value in values.items() if name not in forms or forms[name](value)}


def _is_text(value) -> bool:
    return isinstance(value, str)


def _are_counts(values) -> bool:
    return isinstance(values, list) and bool(values) and all(type(n) is int and 0 <= n < 2 ** 53 for n in values)


def _are_thresholds(values) -> bool:
    return _are_counts(values) and len(values) == 2 and values[0] <= values[1]


def _is_prior(value) -> bool:
    """Whether the value is `train`, `uniform` or a list of weights, one per class."""
    if not isinstance(value, list):
        return value in ('train', 'uniform')
    return all(type(weight) in (int, float) and 0 <= weight < 2 ** 53 for weight in value) and any(value)


FACTS = {'method': _is_text, 'precision': _is_text, 'license': _is_text, 'base_model': _is_text,
         'prior': _is_prior, 'recipe': lambda value: isinstance(value, dict)}
PROFILE = {'class_counts': _are_counts, 'shot_thresholds': _are_thresholds, 'fingerprint': _is_text}


def _known_names(names, num_classes: int) -> list[str] | None:
    """C different class names, or None."""
    if not isinstance(names, (list, tuple)) or len(names) != num_classes:
        return None
    names = [str(name) for name in names]
    return names if len(set(names)) == num_classes else None


def _refuse_changes(found: TrainedModel, **options) -> None:
    """A trained model keeps its weights, classes and channels; --img-size only says how large its images are."""
    own = {'num_classes': found.num_classes, 'in_chans': found.model.pretrained_cfg['input_size'][0]}
    for option, value in options.items():
        if option != 'img_size' and value not in (None, own.get(option)):
            flag = FLAGS.get(option, f'--model-kwargs {option}')
            raise InputError(f"{flag} {value}: is for a bare architecture; {found.name} is a trained model with "
                             f"{own['num_classes']} classes and {own['in_chans']} channels")


def _resized(found: TrainedModel, img_size: int | None) -> TrainedModel:
    """Models of a fixed input size, as vision transformers, interpolate their position embedding."""
    if img_size and hasattr(found.model, 'set_input_size'):
        try:
            found.model.set_input_size((img_size, img_size))
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f'--img-size {img_size}: {found.name} cannot take it: {first_line(error)}') from error
    return found


def _with_data_config(found: TrainedModel, data_options: dict) -> TrainedModel:
    try:
        data_config = resolve_input_data_config(found.model, data_options)
    except (ValueError, AssertionError) as error:
        raise InputError(f'--model {found.name}: {first_line(error)}') from error
    return replace(found, model=found.model.eval(), data_config=data_config)



def training_counts(trained: TrainedModel, class_counts: str | None = None) -> list[int]:
    """Return the (C,) training images per class, which decide the shot groups.

    Args:
        trained: Model that may know them.
        class_counts: File that takes precedence (`--class-counts`).

    Raises:
        InputError: If they are unknown, or of another number of classes.
    """
    counts = read_class_counts(class_counts) if class_counts else trained.facts.get('profile', {}).get('class_counts')
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
    precision = trained.facts.get('precision')
    if amp or os.environ.get('ACCELERATE_MIXED_PRECISION', 'no') != 'no' or precision == 'no':
        return None
    return None if precision == 'fp16' and not torch.cuda.is_available() else PRECISIONS.get(precision)
