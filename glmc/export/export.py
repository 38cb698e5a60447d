"""Export: the bare backbone as an ordinary timm model folder, and what was measured on it.

    python -m glmc.export CHECKPOINT [FOLDER]    exports again, from a checkpoint alone
"""
import copy
import json
import os
import shutil
import sys
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from torch import nn

from glmc.cli import Parser
from glmc.errors import InputError, RunError
from glmc.export.card import write_card
from glmc.models.backbone import create_backbone
from glmc.training.checkpoint import load_checkpoint


def export_model(
        folder: str | Path, model: nn.Module, *, data_config: dict, class_names: list[str], metrics: dict,
        source: dict | None = None) -> Path:
    """Write `model.safetensors`, `config.json`, `metrics.json` and the model card, read back and compared.

    Args:
        folder: Where to; an earlier export there is replaced once the new one is proved.
        model: Bare timm model.
        data_config: timm's, of the evaluation: input_size, mean, std, interpolation, crop_pct, crop_mode.
        class_names: C names.
        metrics: What `metrics.json` says.
        source: More for the root of config.json: `method`, `profile`, `prior`, `precision`, `recipe`, `license`,
            `base_model`.

    Returns:
        The folder.

    Raises:
        RunError: If what was read back does not give the same logits, bit for bit.
    """
    folder = Path(folder)
    beside = folder.with_name(folder.name + '.tmp')
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    tensors = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
               for name, value in model.state_dict().items()}
    save_file(tensors, beside / 'model.safetensors', metadata={'format': 'pt'})
    os.chmod(beside / 'model.safetensors', (beside.stat().st_mode & 0o666))
    config = dict(
        label_names=list(class_names), glmc=source or {}, pretrained_cfg=dict(
            tag='glmc', license=(source or {}).get('license'), origin_url=None, paper_ids=None, hf_hub_id=None))
    save_config_for_hf(model, str(beside / 'config.json'), model_config=config, data_config=data_config)
    (beside / 'metrics.json').write_text(json.dumps(metrics, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
    write_card(beside)
    verify_export(beside, model)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(beside, folder)
    return folder


@torch.no_grad()
def verify_export(folder: Path, model: nn.Module) -> None:
    """Load the folder as a user would and compare logits on two random images, in float32 on the CPU."""
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    size = timm.data.resolve_model_data_config(loaded)['input_size']
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    reference = copy.deepcopy(model).to('cpu', torch.float32, memory_format=torch.contiguous_format).eval()
    if not torch.equal(reference(images), loaded(images)):
        raise RunError(f'{folder}: the exported model does not give the logits of the trained one; checkpoints are kept, '
                       'python -m glmc.export CHECKPOINT exports again')


def export_checkpoint(checkpoint: str | Path, folder: str | Path | None = None) -> Path:
    """Export the model of a checkpoint, by default to `export` beside the checkpoint's folder.

    Raises:
        InputError: If the checkpoint cannot be read or `folder` exists.
    """
    checkpoint = Path(checkpoint)
    folder = Path(folder or checkpoint.parent.parent / 'export')
    if folder.exists():
        raise InputError(f'{folder}: exists, expected a new folder for the export')
    state = load_checkpoint(checkpoint)
    description = state['description']
    model = create_backbone(**description['model'])
    model.load_state_dict(state['ema']['state_dict_ema'] if state['ema'] else state['model']['state_dict'])
    return export_model(folder, model, **description['export'], metrics=state['metrics'])


def main() -> int:
    parser = Parser(prog='python -m glmc.export', description='Export the model of a checkpoint.')
    parser.add_argument('checkpoint', help='.safetensors file of a run')
    parser.add_argument('folder', nargs='?', help='where to; default: export/ of the run')
    args = parser.parse_args()
    try:
        print(export_checkpoint(args.checkpoint, args.folder))
    except InputError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0
