"""Export of the bare backbone as an ordinary timm model folder with its metrics.

    python -m glmc.export CHECKPOINT [FOLDER]    exports again, from a checkpoint alone
"""
import copy
import json
import logging
import os
import shutil
from pathlib import Path

import timm
import torch
from timm.models._hub import save_config_for_hf
from torch import nn

from glmc.cli import Parser, run_script
from glmc.errors import InputError, RunError, first_line
from glmc.export.card import write_card
from glmc.export.load import WEIGHTS, build_from_checkpoint, file_digest
from glmc.files import ESCAPED, set_aside, sync, sync_folder
from glmc.models.exported import exported_form
from glmc.training.checkpoint import write_tensors

_logger = logging.getLogger(__name__)


def export_model(
        folder: str | Path, model: nn.Module, *, data_config: dict, class_names: list[str],
        metrics: dict | None = None, source: dict | None = None) -> Path:
    """Write weights, config.json, metrics.json and the model card, then load them and compare the logits bit for bit.

    Args:
        folder: Target; an earlier export there is replaced once the new one is verified.
        model: Bare timm model; its adapters are merged.
        data_config: timm's data config of the evaluation: input_size, mean, std, interpolation, crop_pct, crop_mode.
        class_names: C names.
        metrics: Content of metrics.json; None writes neither it nor the model card.
        source: `glmc` entry of config.json: `method`, `profile`, `prior` ('train', 'uniform' or C weights), `precision`,
            `recipe`, `license`, `dataset_name`, `base_model`.

    Returns:
        The folder.

    Raises:
        RunError: If the written files cannot be loaded or give other logits; an earlier export is kept.
        OSError: If a file cannot be written; an earlier export is kept.
    """
    folder, model = Path(folder), exported_form(model)
    partial = folder.with_name(folder.name + '.tmp')
    shutil.rmtree(partial, ignore_errors=True)
    try:
        if os.path.lexists(partial):
            set_aside(partial)
        _write_files(partial, model, data_config, class_names, metrics, source or {})
        error = verify_export(partial, model)
        if error:
            raise RunError(f'{folder}: not exported: {error}; an earlier export and the checkpoints are unchanged; '
                           '`python -m glmc.export CHECKPOINT FOLDER` tries again from a checkpoint')
        for path in partial.iterdir():
            sync(path)
        sync_folder(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)
    if os.path.lexists(folder):  # a file
        _logger.warning(f'{folder}: is no folder of an export, set aside as {set_aside(folder).name}')
    os.replace(partial, folder)
    sync_folder(folder.parent)
    return folder


def _write_files(
        folder: Path, model: nn.Module, data_config: dict, class_names: list[str], metrics: dict | None,
        source: dict) -> None:
    folder.mkdir(parents=True)
    tensors = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
               for name, value in model.state_dict().items()}
    write_tensors(folder / WEIGHTS, tensors, {'format': 'pt'})
    config = dict(label_names=list(class_names), glmc=source, pretrained_cfg=dict(
        tag='glmc', license=source.get('license'), origin_url=None, paper_ids=None, hf_hub_id=None))
    save_config_for_hf(model, str(folder / 'config.json'), model_config=config, data_config=data_config)
    if metrics is None:
        return
    metrics = {**metrics, 'weights_sha256': file_digest(folder / WEIGHTS)}
    (folder / 'metrics.json').write_text(json.dumps(metrics, indent=1, ensure_ascii=False) + '\n', **ESCAPED)
    write_card(folder)


@torch.no_grad()
def verify_export(folder: Path, model: nn.Module) -> str | None:
    """Load the folder as a user would and compare the logits of two random images, in float32 on the CPU.

    Returns:
        The error in words, or None if the logits are equal bit for bit.
    """
    reference = copy.deepcopy(model).to('cpu', torch.float32, memory_format=torch.contiguous_format).eval()
    try:
        loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
        size = timm.data.resolve_model_data_config(loaded)['input_size']
        images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
        equal = torch.equal(reference(images), loaded(images))
    except Exception as error:  # timm and the model raise anything
        return f'the written files cannot be loaded: {first_line(error).rstrip(":")}'
    return None if equal else 'the loaded model gives other logits than the trained one, or NaN'


def export_checkpoint(checkpoint: str | Path, folder: str | Path | None = None) -> Path:
    """Export the model of a checkpoint, by default to `export` beside the folder of the checkpoint.

    Returns:
        The folder.

    Raises:
        InputError: If the checkpoint cannot be read or `folder` exists.
        RunError: If the export cannot be verified.
    """
    checkpoint = Path(checkpoint)
    folder = Path(folder or checkpoint.parent.parent / 'export')
    if folder.exists():
        raise InputError(f'{folder}: exists, expected a new folder for the export')
    state, model, _ = build_from_checkpoint(checkpoint)
    return export_model(folder, model, **state['description']['export'], metrics=state['metrics'])


def main() -> int:
    """Run `python -m glmc.export` and return its exit code."""
    parser = Parser(prog='python -m glmc.export', description='Export the model of a checkpoint.')
    parser.add_argument('checkpoint', help='.safetensors file of a run')
    parser.add_argument('folder', nargs='?', help='target folder; default: export/ of the run')

    def export() -> None:
        args = parser.parse_args()
        print(export_checkpoint(args.checkpoint, args.folder))
    return run_script(export)
