"""The library in loops of one's own: the one in the README, as printed there, and one in the style of timm's train.py."""
import re

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, coloured
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import TrainingTask
from timm.utils import NativeScaler

from glmc.mixing import BatchMixup, GLMCMixer
from glmc.models import GLMCModule
from glmc.tasks import GLMCTask

COUNTS = [16, 8, 8]


def two_views(seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Four batches of noisy colours in two flips: (8, 1, 2, 3, 32, 32) and (8, 1)."""
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(rng.permutation(np.repeat(np.arange(3), COUNTS)))
    images = [torch.from_numpy(np.array(coloured(int(label), k))).permute(2, 0, 1).float() / 255 - 0.5
              for k, label in enumerate(labels)]
    views = torch.stack([torch.stack([image, image.flip(-1)])[None] for image in images])
    return list(zip(views.split(8), labels[:, None].split(8), strict=True))


def accuracy(model: torch.nn.Module) -> float:
    images, labels = (torch.cat(column) for column in zip(*two_views(7), strict=True))
    with torch.inference_mode():
        return (model.eval()(images[:, 0, 0]).argmax(1) == labels[:, 0]).float().mean().item()


def test_former_names_of_mixers_warn():
    with pytest.warns(DeprecationWarning, match='glmc.mixing.FlippedMixup is now BatchMixup'):
        from glmc.mixing import FlippedMixup
    assert FlippedMixup is BatchMixup


def test_loop_of_the_readme_trains_a_plain_timm_model(tmp_path, monkeypatch):
    code, = re.findall(r'```python\n(import numpy.*?)```', (ROOT / 'README.md').read_text(encoding='utf-8'), re.S)
    loop = [line for line in code[code.index('model = '):].splitlines() if line.strip()]
    assert len(loop) <= 13
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {'counts': COUNTS, 'epochs': 25, 'loader': two_views(0)}
    exec(code.replace("'resnet18'", "'test_resnet'"), names)
    model = timm.create_model('test_resnet', num_classes=3)
    model.load_state_dict(torch.load('model.pth', weights_only=True))
    assert accuracy(model) > 0.9


def test_loop_in_the_style_of_timms_script():
    """Task, loss scaler, average, schedule per update and checkpoint state, as timm's train.py uses them."""
    torch.manual_seed(0)
    task = GLMCTask(GLMCModule(timm.create_model('test_resnet', num_classes=3), projection_dim=8), COUNTS)
    assert isinstance(task, TrainingTask)
    mixer, rng, epochs, batches = GLMCMixer(COUNTS, partner='batch'), np.random.default_rng(0), 25, two_views(0)
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt='momentum', lr=0.05, weight_decay=5e-4)
    scheduler, _ = create_scheduler_v2(optimizer, num_epochs=epochs, updates_per_epoch=len(batches), step_on_epochs=False)
    task.setup_ema(decay=0.5)
    scaler, updates = NativeScaler(device='cpu'), 0
    for epoch in range(epochs):
        task.set_progress(epoch / epochs)
        task.train()
        for views, labels in batches:
            outputs = task(*mixer(views, labels, mixer.sample_params(len(views), views.shape[-2:], rng)))
            scaler(outputs['loss'], optimizer, parameters=task.get_clip_parameters(), clip_grad=1.0)
            optimizer.zero_grad()
            updates += 1
            task.update_ema(step=updates)
            scheduler.step_update(updates)
    assert accuracy(task.get_eval_model()) > 0.9 and accuracy(task.get_eval_model(ema=True)) > 0.9
    fresh = GLMCTask(GLMCModule(timm.create_model('test_resnet', num_classes=3), projection_dim=8), COUNTS)
    state = task.get_checkpoint_state()
    fresh.load_checkpoint_state(state['state_dict'], state['task_state'])
    weights = zip(task.trainable_module.state_dict().values(), fresh.trainable_module.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in weights)
