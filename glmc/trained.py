"""Trained models wherever they are: export folder, run, checkpoint, Hub id, or a plain timm model."""
import json
from dataclasses import dataclass
from pathlib import Path

import timm
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from timm.data import resolve_input_data_config
from timm.models._hub import download_from_hf
from torch import nn

from glmc.checkpoint import load_checkpoint
from glmc.models import create_backbone
from glmc.parsing import InputError


@dataclass(frozen=True)
class TrainedModel:
    """A model, and what is known about its training.

    Args:
        name: What the user called it.
        model: Bare timm model.
        data_config: timm's: input_size, mean, std, interpolation, crop_pct, crop_mode.
        class_names: C names, or None.
        facts: `method`, `profile`, `precision` of the training, as far as known.
    """
    name: str
    model: nn.Module
    data_config: dict
    class_names: list[str] | None
    facts: dict

    @property
    def num_classes(self) -> int:
        return self.model.num_classes

    @property
    def architecture(self) -> str:
        return self.model.pretrained_cfg.get('architecture') or self.name


def open_trained(
        name: str, *, checkpoint: str | None = None, data_options: dict | None = None,
        **model_options) -> TrainedModel:
    """Open what the user named.

    Args:
        name: Export folder, folder of a run, checkpoint of train_glmc.py, `hf-hub:…`, `local-dir:…`, or a timm architecture.
        checkpoint: Weights for an architecture; its pretrained ones without.
        data_options: Overrides of the data config: img_size, in_chans, mean, std, interpolation, crop_pct.
        **model_options: More for `create_backbone`.

    Raises:
        InputError: If it is none of these or cannot be loaded.
    """
    path = Path(name)
    if path.is_file():
        found = _from_checkpoint(path)
    elif path.is_dir() or ':' in name:
        found = _from_export(name, path)
    elif '/' in name:
        raise InputError(f'--model {name}: no such file or folder; a Hub model is hf-hub:ORG/NAME')
    else:
        model = create_backbone(name, pretrained=checkpoint is None, checkpoint_path=checkpoint, **model_options)
        found = TrainedModel(name, model, {}, model.pretrained_cfg.get('label_names'), {})
    found.model.pretrained_cfg = {**found.model.pretrained_cfg, **found.data_config}
    data_config = resolve_input_data_config(found.model, data_options or {})
    return TrainedModel(found.name, found.model.eval(), data_config, found.class_names, found.facts)


def _from_checkpoint(path: Path) -> TrainedModel:
    state = load_checkpoint(path)
    description = state['description']
    model = create_backbone(**description['model'])
    model.load_state_dict(state['ema']['state_dict_ema'] if state['ema'] else state['model']['state_dict'])
    export = description['export']
    facts = {**export['source'], 'precision': state['metrics'].get('precision')}
    return TrainedModel(str(path), model, export['data_config'], export['class_names'], facts)


def _from_export(name: str, path: Path) -> TrainedModel:
    if path.is_dir():
        folder = path if (path / 'config.json').is_file() else path / 'export'
        if not (folder / 'config.json').is_file():
            raise InputError(f'--model {name}: no config.json in this folder, expected an export or a run that has one')
        name = f'local-dir:{folder}'
    try:
        model = timm.create_model(name, pretrained=True)
        config = json.loads(_config_path(name).read_text(encoding='utf-8'))
    except (OSError, RuntimeError, ValueError, AssertionError, KeyError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        detail = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f'--model {name}: cannot be loaded: {detail}') from error
    return TrainedModel(name.removeprefix('local-dir:'), model, {}, config.get('label_names'), config.get('glmc', {}))


def _config_path(name: str) -> Path:
    scheme, _, place = name.partition(':')
    return Path(place) / 'config.json' if scheme == 'local-dir' else Path(download_from_hf(place, 'config.json'))
