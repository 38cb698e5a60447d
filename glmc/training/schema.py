"""Form of a checkpoint: its parts, their types, and the options of its model, which others may have written."""
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from glmc.errors import InputError, printable

LIMIT = 10 ** 15  # of counts and seconds
MAX_SIDE = 10_000  # pixels of an image
FORBIDDEN = {  # arguments of timm.create_model that read files or weights, or change more than the architecture
    'pretrained', 'checkpoint_path', 'trained', 'pretrained_cfg', 'pretrained_cfg_overlay', 'pretrained_strict', 'cache_dir',
    'scriptable', 'exportable', 'no_jit', 'model_name', 'kwargs'}


def is_integer(value, low: int = 0, high: int = LIMIT) -> bool:
    """Whether the value is an int, no bool, from `low` to `high`."""
    return type(value) is int and low <= value <= high


def is_number(value, low: float = -float(LIMIT), high: float = float(LIMIT)) -> bool:
    """Whether the value is a finite int or float, no bool, from `low` to `high`."""
    return type(value) in (int, float) and low <= value <= high


def is_tensors(value) -> bool:
    """Whether the value is a dict of names to tensors."""
    return isinstance(value, dict) and all(isinstance(name, str) and isinstance(t, Tensor) for name, t in value.items())


def is_input_size(value) -> bool:
    """Whether the value is a (channels, height, width) that a model of images may have."""
    return isinstance(value, (list, tuple)) and len(value) == 3 and is_integer(value[0], 1, 4) and all(
        is_integer(side, 1, MAX_SIDE) for side in value[1:])


def is_data_config(value) -> bool:
    """Whether the value is timm's data config: input_size, mean, std, interpolation, crop_pct, crop_mode."""
    return isinstance(value, dict) and is_input_size(value.get('input_size')) and all(
        isinstance(value.get(name), (list, tuple)) and len(value[name]) in (1, 3, value['input_size'][0])
        and all(is_number(number, low, 10 ** 6) for number in value[name])
        for name, low in (('mean', -(10 ** 6)), ('std', 1e-9))) and is_number(value.get('crop_pct'), 0.01, 100) and all(
        isinstance(value.get(name, ''), str) for name in ('interpolation', 'crop_mode'))


def _is_plain(value, depth: int = 0) -> bool:
    """Whether an argument of a model is a value of YAML, with few levels."""
    if isinstance(value, (list, dict)) and depth < 3:
        items = [*value.values(), *value] if isinstance(value, dict) else value
        return all(_is_plain(item, depth + 1) for item in items)
    return value is None or isinstance(value, (str, bool)) or is_number(value)


def _is_model(value) -> bool:
    sides = value.get('img_size') if isinstance(value, dict) else None
    return isinstance(value, dict) and isinstance(value.get('name'), str) and is_integer(value.get('num_classes'), 1) and (
        value.get('in_chans') in (None, 1, 3)) and FORBIDDEN.isdisjoint(value) and all(
        isinstance(name, str) and name.isidentifier() and _is_plain(item) for name, item in value.items()) and all(
        is_integer(side, 1, MAX_SIDE) for side in (sides if isinstance(sides, list) else [sides] if sides else []))


def _is_weights(value, suffix: str = '') -> bool:
    return isinstance(value, dict) and is_tensors(value.get(f'state_dict{suffix}')) and (
        value.get(f'task_state{suffix}') is None or is_tensors(value[f'task_state{suffix}']))


def _is_export(value) -> bool:
    return isinstance(value, dict) and set(value) == {'data_config', 'class_names', 'source'} and is_data_config(
        value['data_config']) and isinstance(value['source'], dict) and isinstance(value['class_names'], list) and all(
        isinstance(name, str) for name in value['class_names'])


def _is_process(value) -> bool:
    return isinstance(value, dict) and isinstance(value.get('rng'), dict) and (
        'meter' in value and (value['meter'] is None or isinstance(value['meter'], dict)))


SCHEMA: dict[str, Callable[[object], bool]] = {
    'position': lambda value: isinstance(value, dict) and set(value) == {
        'epoch', 'step', 'global_batch', 'accum_steps'} and all(map(is_integer, value.values())) and (
        min(value['global_batch'], value['accum_steps']) > 0),
    'processes': lambda value: isinstance(value, list) and bool(value) and all(map(_is_process, value)),
    'model': _is_weights,
    'ema': lambda value: value is None or _is_weights(value, '_ema'),
    'optimizer': lambda value: isinstance(value, dict) and isinstance(value.get('state'), dict) and isinstance(
        value.get('param_groups'), list) and all(isinstance(group, dict) for group in value['param_groups']),
    'scaler': lambda value: value is None or isinstance(value, dict),
    'best': lambda value: value is None or is_number(value),
    'since_best': is_integer,
    'seconds': lambda value: is_number(value, 0),
    'metrics': lambda value: isinstance(value, dict) and isinstance(value.get('method'), str) and is_integer(
        value.get('epoch')) and isinstance(value.get('fingerprint', 0), (str, type(None))),  # None without an index
    'description.model': _is_model,
    'description.training': lambda value: isinstance(value, dict),
    'description.export': _is_export,
}


def check_state(path: str | Path, state: dict) -> dict:
    """Return the state of a checkpoint if it has the form that a run writes.

    Args:
        path: Path of the checkpoint, for errors.
        state: Result of `load_checkpoint`.

    Raises:
        InputError: If a part is missing, has another form, contradicts another, or a weight is NaN.
    """
    state = {'since_best': 0, **state}  # 0.1.0 had none
    for name, is_valid in SCHEMA.items():
        part = state
        for key in name.split('.'):
            part = part.get(key) if isinstance(part, dict) else None
        if not is_valid(part):
            found = type(part).__name__ if isinstance(part, (dict, list)) else printable(str(part))[:60]
            raise InputError(f'{path}: {name}: found {found}, expected that of a checkpoint of train_glmc.py')
    classes, names = state['description']['model']['num_classes'], state['description']['export']['class_names']
    if len(names) != classes:
        raise InputError(f'{path}: description: found {len(names):,} class names, expected {classes:,}')
    for part, suffix in (('model', ''), ('ema', '_ema')):
        check_no_nan(f'{path}', (state[part] or {}).get(f'state_dict{suffix}', {}))
    return state


def check_no_nan(name: str, tensors: dict[str, Tensor]) -> None:
    """Raise an InputError if a weight is NaN.

    Args:
        name: Flag or path, for the error.
        tensors: Weights by name.
    """
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and torch.isnan(tensor).any():
            raise InputError(f'{name}: found NaN in {printable(key)}, expected trained weights')
