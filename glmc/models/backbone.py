"""Creation of timm backbones, and their starting weights."""
import difflib
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import timm
import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from timm.models import load_state_dict, parse_model_name, resolve_model_input_args
from timm.models._hub import (
    HF_WEIGHTS_NAME,
    _get_safe_alternatives,
    hf_split,
    load_state_dict_from_hf,
    load_state_dict_from_path,
)
from torch import Tensor, nn

from glmc.errors import InputError, first_line
from glmc.models.experts import create_experts
from glmc.models.lora import add_adapters

_logger = logging.getLogger(__name__)


def create_backbone(
        name: str, num_classes: int | None = None, img_size: int | list[int] | None = None,
        in_chans: int | None = None, pretrained: bool = False, checkpoint_path: str | None = None, trained: bool = False,
        lora: dict | None = None, experts: dict | None = None, **kwargs) -> nn.Module:
    """Create a timm model, with the image size for models that need it, and errors a user can act on.

    Weights of a file, a folder or the Hub are adapted as timm adapts its own: prefixes, the first convolution to the
    channels, position embeddings to the image size. A classifier of other classes keeps its initialisation. One log
    line names the tensors that are not used.

    Args:
        name: timm architecture, `hf-hub:…` or `local-dir:…`.
        num_classes: C classes; None for the model's own.
        img_size: Side in pixels, or height and width; None for the model's own.
        in_chans: Image channels; None for the model's own.
        pretrained: Whether to start from the pretrained weights of `name`.
        checkpoint_path: Weights to start from instead, safetensors or tensors of `torch.save` (`--initial-checkpoint`).
        trained: Whether the weights are those of a trained model to evaluate, whose classifier must fit (`--checkpoint`).
        lora: `rank` and `targets` of `lora.add_adapters`; None for no adapters.
        experts: `num_experts`, `width` and `cosine_scale` of `experts.Experts`; None for the net itself.
        **kwargs: More arguments of `timm.create_model`; None is omitted.

    Raises:
        InputError: If timm does not know the model, cannot create it with these options, or the weights cannot be fetched,
            contain anything but tensors, or do not fit.
    """
    model = _create_model(name, num_classes, img_size, in_chans, pretrained, checkpoint_path, trained, **kwargs)
    if experts and lora:
        raise InputError(f"--lora-rank {lora['rank']}: not with a method of several experts")
    if experts:
        others = {name: value for name, value in dict(kwargs, in_chans=in_chans).items() if value is not None}
        model = create_experts(model, bool(pretrained or checkpoint_path), **experts, **others)
    return add_adapters(model, **lora) if lora else model


def _create_model(
        name: str, num_classes: int | None, img_size: int | None, in_chans: int | None, pretrained: bool,
        checkpoint_path: str | None, trained: bool, **kwargs) -> nn.Module:
    """Create a timm model without adapters; arguments and errors as those of `create_backbone`."""
    if ':' not in name and not timm.is_model(name.split('.')[0]):
        nearest = ', '.join(difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.3)) or 'none'
        raise InputError(f'--model {name}: not a model of timm {timm.__version__}; nearest: {nearest}')
    flag = '--checkpoint' if trained else '--initial-checkpoint'
    has_weights = bool(pretrained or checkpoint_path)
    try:
        source, place = parse_model_name(name)
        if source == 'hf-hub':
            _require_hub(name, place, 'config.json', flag)
        kwargs = resolve_model_input_args(name, dict(img_size=img_size, in_chans=in_chans), **kwargs)
        if num_classes is not None:
            kwargs['num_classes'] = num_classes  # config.json of a folder has its own
        with torch.device('meta') if has_weights else nullcontext():
            model = timm.create_model(**kwargs)
    except InputError:
        raise
    except Exception as error:  # options and config files of others make timm raise anything
        problem = 'cannot be loaded' if ':' in name else 'timm cannot create it with these options'
        raise InputError(f'--model {name}: {problem}: {_reason(error)}') from error
    if checkpoint_path:
        where = f'{flag} {checkpoint_path}: '
        if not Path(checkpoint_path).is_file():
            raise InputError(f'{where}no such file')
        return _create_with_weights(model, kwargs, lambda: load_state_dict(checkpoint_path), where, trained, label_offset=0)
    if not pretrained:
        return model
    if source is None:
        return _create_pretrained(name, kwargs, flag)
    if source == 'hf-hub':
        _require_hub(name, place, HF_WEIGHTS_NAME, flag)
    read = load_state_dict_from_hf if source == 'hf-hub' else load_state_dict_from_path
    return _create_with_weights(model, kwargs, lambda: read(place), f'--model {name}: cannot be loaded: ', trained)


def export_source(name: str, flag: str = '--model') -> str:
    """timm's name of a trained model: `local-dir:…` for an export or run folder, else the name itself.

    Args:
        name: Folder, `hf-hub:…` or `local-dir:…`.
        flag: Option that the error names.

    Raises:
        InputError: If it is a folder without an export.
    """
    if not Path(name).is_dir():
        return name
    export = find_export(Path(name))
    if export is None:
        raise InputError(f'{flag} {name}: no config.json in this folder, expected an export or a run that has one')
    return f'local-dir:{export}'


def find_export(folder: Path) -> Path | None:
    """Export folder: the folder itself, or `export` in that of a run; None if there is none."""
    return next((place for place in (folder, folder / 'export') if (place / 'config.json').is_file()), None)


def _create_pretrained(name: str, kwargs: dict, flag: str) -> nn.Module:
    """Create an architecture of timm with its own pretrained weights."""
    cfg = kwargs['pretrained_cfg']
    place = cfg.get('hf_hub_id') or cfg.get('url') or cfg.get('file')
    if not place:
        known = timm.list_pretrained()
        tags = [other for other in known if other.split('.')[0] == kwargs['model_name']]
        nearest = tags or difflib.get_close_matches(kwargs['model_name'], known, n=3, cutoff=0.3)
        raise InputError(f'--pretrained: timm has no weights of {name}; it has {", ".join(nearest[:5]) or "none alike"}')
    if cfg.get('hf_hub_id'):
        _require_hub(name, place, cfg.get('hf_hub_filename') or HF_WEIGHTS_NAME, flag)
    try:
        return timm.create_model(**kwargs, pretrained=True)
    except Exception as error:  # the clients of the Hub and of URLs raise anything
        raise _download_error(name, place, error, flag) from error


def _require_hub(name: str, model_id: str, filename: str, flag: str) -> None:
    """Raise InputError at once if a file is not in the cache and the Hub cannot be reached, which timm tries for a minute.

    A server that answers, if slowly or with an error, is none of this function's concern.
    """
    try:
        repo, revision = hf_split(model_id)
        if any(isinstance(try_to_load_from_cache(repo, file, revision=revision), str)
               for file in (filename, *_get_safe_alternatives(filename))):
            return
        get_hf_file_metadata(hf_hub_url(repo, filename, revision=revision), timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (HfHubHTTPError, ValueError, AssertionError):
        return  # an answer, or no valid name: timm reports it
    except Exception as error:  # the exceptions of the HTTP library depend on the version of the client
        if type(error).__name__ != 'ReadTimeout':  # slow, but connected
            raise _download_error(name, model_id, error, flag) from error


def _download_error(name: str, place: str, error: Exception, flag: str) -> InputError:
    return InputError(f'--model {name}: cannot download {place}: {_reason(error)}; '
                      f'expected a network, an architecture with {flag} FILE, or --model local-dir:FOLDER')


def _reason(error: Exception) -> str:
    """Return one line that says why weights or a model cannot be loaded."""
    if isinstance(error, OfflineModeIsEnabled):
        return 'HF_HUB_OFFLINE is set'
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return f'HTTP {error.response.status_code}, no such model or no access to it'
    if 'weights_only' in str(error):
        return 'content other than tensors; only tensors are loaded (weights_only)'
    return first_line(error)


def _create_with_weights(
        reference: nn.Module, kwargs: dict, read: Callable[[], dict], where: str, trained: bool, **overlay) -> nn.Module:
    """Create a model and load weights of any source, adapted by timm.

    Args:
        reference: The model on the meta device.
        kwargs: Arguments of `timm.create_model`.
        read: Function that reads the state dict.
        where: Start of the error and log lines.
        trained: Whether the classifier must fit.
        **overlay: Entries of the pretrained_cfg during the loading.
    """
    cfg = kwargs['pretrained_cfg']
    classes = f' with {reference.num_classes} classes' if trained else ''
    expected = f"{where}expected weights of {kwargs['model_name']}{classes}, found: "
    try:
        state_dict, others = _without_prefix(dict(_tensors(read())), reference.state_dict().keys())
        in_chans = getattr(reference, 'in_chans', None) or kwargs.get('in_chans') or cfg['input_size'][0]
        channels = _source_channels(reference, state_dict, cfg, in_chans)
        overlay = dict(overlay, state_dict=state_dict, source=None, custom_load=False, num_classes=reference.num_classes,
                       input_size=(channels, *cfg['input_size'][1:]))
        kwargs = {**kwargs, 'in_chans': in_chans}  # else the channels of the weights
        with _loading(type(reference), _names(cfg.get('classifier')), trained) as unused:
            model = timm.create_model(**kwargs, pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as error:  # a foreign file makes torch, safetensors and timm raise anything
        raise InputError(f'{expected}{_reason(error)}') from error
    model.pretrained_cfg = model.default_cfg = cfg  # without the weights
    unused += others
    if unused:
        more = f' and {len(unused) - 3} more' if len(unused) > 3 else ''
        source = where.removesuffix('cannot be loaded: ')
        _logger.info(f'{source}not used: {", ".join(unused[:3])}{more}')
    return model


@contextmanager
def _loading(model_class: type[nn.Module], classifiers: tuple[str, ...], trained: bool) -> Iterator[list[str]]:
    """Check the weights that timm has adapted; yields the names of unused ones, which are complete at the end.

    timm passes adapted weights to `load_state_dict` of the model only, and accepts missing ones.
    """
    unused = []

    def load(model: nn.Module, state_dict: dict, strict: bool = True):
        own = model.state_dict()
        fitting = {name: tensor for name, tensor in state_dict.items()
                   if name in own and (tensor.shape == own[name].shape or tensor.numel() == own[name].numel() == 1)}
        head = [name for name in own if name.startswith(tuple(f'{name}.' for name in classifiers))]
        if not trained and not fitting.keys() >= set(head):
            found = [name for name in head if name in state_dict]
            if found:
                unused.append(f'classifier of {len(state_dict[found[0]])} classes')
            fitting = {name: tensor for name, tensor in fitting.items() if name not in head}
        else:
            head = []
        unused.extend(ascii(name)[1:-1][:100] for name in state_dict if name not in own)
        result = nn.Module.load_state_dict(model, fitting, strict=False)
        missing = [name for name in result.missing_keys if name not in head]
        if missing:
            name, fit, total = missing[0], len(fitting), len(own) - len(head)
            form = f'{name} of shape {_shape(state_dict[name])}' if name in state_dict else f'no {name}'
            raise ValueError(f'{fit} of {total} tensors, {form}, expected shape {_shape(own[name])}')
        return type(result)([], [])

    model_class.load_state_dict = load
    try:
        yield unused
    finally:
        del model_class.load_state_dict


def _tensors(values: dict, prefix: str = '') -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of nested dicts with their names."""
    for name, value in values.items():
        if '.lora_A.' in str(name):
            raise ValueError('adapters that are not merged; python -m glmc.export CHECKPOINT FOLDER merges them')
        if isinstance(value, dict):
            yield from _tensors(value, f'{prefix}{name}.')
        elif isinstance(value, Tensor):
            yield f'{prefix}{name}', value


def _without_prefix(state_dict: dict[str, Tensor], own) -> tuple[dict[str, Tensor], list[str]]:
    """Remove the prefix under which most tensors of the model are, and return the names without it apart.

    Of several such prefixes, that of a moving average is preferred, then the shortest.
    """
    counts = Counter()
    for name in state_dict:
        words = name.split('.')
        ends = ('.'.join(words[i:]) for i in range(len(words)))
        counts.update(name[:len(name) - len(end)] for end in ends if end in own)
    prefix = max(counts, key=lambda prefix: (counts[prefix], 'ema' in prefix, -len(prefix)), default='')
    if counts[prefix] * 2 < len(own):
        return state_dict, []  # names of another library, which timm may know
    inside = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
    return inside, [ascii(name)[1:-1][:100] for name in state_dict if not name.startswith(prefix)]


def _source_channels(model: nn.Module, state_dict: dict[str, Tensor], cfg: dict, in_chans: int) -> int:
    """Return the image channels of the weights, from the shape of the first convolution."""
    for name in _names(cfg.get('first_conv')):
        weight, conv = state_dict.get(f'{name}.weight'), model.get_submodule(name)
        if weight is not None and weight.ndim == 4 and isinstance(conv, nn.Conv2d):
            return weight.shape[1] * in_chans * conv.groups // conv.in_channels
    return cfg['input_size'][0]


def _names(value) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value or ())


def _shape(tensor: Tensor) -> str:
    return 'x'.join(map(str, tensor.shape)) or 'scalar'
