"""A trained model as the teacher of another."""
import hashlib
from collections.abc import Sequence

import torch
from timm.models import get_model_input_config
from torch import Tensor, nn

from glmc.errors import InputError
from glmc.models.backbone import create_backbone, export_source


class Teacher(nn.Module):
    """A trained model in evaluation mode, with its own normalisation, on the input of a student; no gradient reaches it.

    timm's `DistillationTeacher` compares both normalisations in every step, which waits for the device and splits a compiled
    graph.

    Args:
        model: Trained timm model.
        mean, std: Normalisation of the student's input, per channel.
    """

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        mean, std, own_mean, own_std = (torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1) for values in (
            mean, std, model.pretrained_cfg['mean'], model.pretrained_cfg['std']))
        self.register_buffer('scale', (std / own_std).float(), persistent=False)
        self.register_buffer('shift', ((mean - own_mean) / own_std).float(), persistent=False)

    def train(self, mode: bool = True) -> 'Teacher':
        """Remain in evaluation mode: the soft labels of an image do not depend on its batch."""
        return super().train(False)

    def get_classifier(self) -> nn.Module:
        return self.model.get_classifier()

    def forward(self, images: Tensor) -> Tensor:
        """(B, C) logits of (B, c, H, W) images, which are normalised for the student."""
        with torch.no_grad():
            return self.model(images * self.scale + self.shift)

    def digest(self) -> Tensor:
        """(32,) uint8 SHA-256 of names and weights."""
        sha = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            sha.update(name.encode())
            sha.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return torch.frombuffer(bytearray(sha.digest()), dtype=torch.uint8)


def load_teacher(name: str | nn.Module | None, student: nn.Module) -> Teacher:
    """Load the teacher of a student.

    Args:
        name: Export or run folder, `hf-hub:…` or `local-dir:…`; or a trained timm model.
        student: timm model whose `pretrained_cfg` has the normalisation of its input.

    Raises:
        InputError: If there is none, it cannot be loaded, or it has other classes or channels.
    """
    if name is None:
        raise InputError('--teacher: missing, expected the export or the run folder of a trained model')
    model = name
    if not isinstance(name, nn.Module):
        try:
            model = create_backbone(export_source(name), pretrained=True, trained=True)
        except InputError as error:
            raise InputError(str(error).replace('--model', '--teacher')) from error
    cfg = student.pretrained_cfg
    for what, found, expected in (
            ('classes', model.num_classes, student.num_classes),
            ('channels', get_model_input_config(model)['input_size'][0], len(cfg['mean']))):
        if found != expected:
            raise InputError(f"--teacher {name if isinstance(name, str) else 'model'}: found {found} {what}, expected "
                             f'{expected}')
    return Teacher(model, cfg['mean'], cfg['std'])
