"""The library in loops of one's own: `glmc.wrap`, and the loops that README.md and docs/library.md print."""
import copy
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import COUNTS as CLASSES
from conftest import ROOT, VALIDATION, coloured, in_two_processes, write_folders
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import TrainingTask
from timm.utils import NativeScaler, random_seed

import glmc
from glmc.export import export_model, load_trained
from glmc.methods import METHODS
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
    code, = re.findall(r'```python\n(import glmc\n.*?)```', (ROOT / 'README.md').read_text(encoding='utf-8'), re.S)
    loop = [line for line in code[code.index('model = '):].splitlines() if line.strip()]
    assert len(loop) <= 13
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    loader = [(views[:, 0, 0], labels[:, 0]) for views, labels in two_views(0)]
    names = {'counts': COUNTS, 'epochs': 25, 'loader': loader}
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


def batch(seed: int = 0, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, 3, 32, 32) images and (B,) labels."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, 32, 32, generator=rng), torch.randint(3, (size,), generator=rng)


def wrap(*args, **options):
    torch.manual_seed(0)
    return glmc.wrap(timm.create_model('test_resnet', num_classes=3), COUNTS, *args, **options)


@pytest.mark.parametrize('method', METHODS)
def test_wrap_trains_with_every_method(method):
    """One batch of images is enough, except for methods that contrast augmentations, which ask for them in one line."""
    if METHODS[method].backbone_options:
        with pytest.raises(ValueError, match=f"method '{method}': trains several experts, which train_glmc.py creates"):
            wrap(method)
        return
    options = {'teacher': timm.create_model('test_resnet', num_classes=3)} if 'teacher' in METHODS[method].options else {}
    task, mixer = wrap(method, **options)
    (images, labels), views = batch(), len(METHODS[method].views)
    if views > 1 and not METHODS[method].paired:
        with pytest.raises(ValueError, match=f'{method}: found 1 augmentation .* expected a list of {views}'):
            mixer(images, labels)
        images = [batch(k)[0] for k in range(views)]
    optimizer = torch.optim.SGD(task.parameters(), lr=0.01)
    before = copy.deepcopy(task.get_eval_model().state_dict())
    task.set_progress(0.9)
    for _ in range(2):
        outputs = task(*mixer(images, labels))
        optimizer.zero_grad()
        outputs['loss'].backward()
        optimizer.step()
        task.after_batch(outputs)
        task.update_ema()
    assert outputs['loss'].isfinite() and outputs['output'].shape == (8, 3)
    assert not any(buffer.requires_grad for buffer in task.buffers())
    after = task.get_eval_model().state_dict()
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    assert type(task.get_eval_model()).__module__.startswith('timm.')


def test_wrap_has_the_defaults_of_the_command_line(script, tmp_path, folders):
    """The task and the mixer are those of a run, but for partners within the batch."""
    from glmc.cli import parse_args
    from glmc.config import train_parser
    for method, row in METHODS.items():
        args, _ = parse_args(train_parser(METHODS), ['--data-dir', str(folders), '--method', method, '--partner', 'batch'])
        expected = {name: getattr(args, name) for name in row.options if name != 'view_augmentation'}
        if row.backbone_options or 'teacher' in expected:
            continue
        assert wrap(method)[0].metadata['recipe'] == expected, method


def test_wrap_mixes_as_the_mixer_does():
    """A plain batch has equal views, a list has one per view, and a second batch holds the partners."""
    images, labels = batch()
    others, other_labels = batch(1)
    for partner, plain, views, targets in (
            ('batch', (images, labels), [[images, images]], [labels]),
            ('batch', ([images, others], labels), [[images, others]], [labels]),
            ('sampler', (images, labels, others, other_labels), [[images] * 2, [others] * 2], [labels, other_labels])):
        mixer = wrap(partner=partner, seed=5)[1]
        direct, rng = GLMCMixer(COUNTS, 0.2, 'area', partner), np.random.default_rng(5)
        views = torch.stack([torch.stack(image, 1) for image in views], 1)
        expected = direct(views, torch.stack(targets, 1), direct.sample_params(8, (32, 32), rng))
        for found, wanted in zip(mixer(*plain), expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_mixtures_continue_from_the_state_of_the_mixer(tmp_path):
    images, labels = batch()
    mixer, resumed = wrap(seed=3)[1], wrap(seed=4)[1]
    mixer(images, labels)
    torch.save(mixer.state_dict(), tmp_path / 'mixer.pth')
    resumed.load_state_dict(torch.load(tmp_path / 'mixer.pth', weights_only=True))
    (one, _), _ = mixer(images, labels)
    (other, _), _ = resumed(images, labels)
    assert torch.equal(one, other)


@pytest.mark.parametrize('arguments, message', [
    (dict(method='glcm'), "method 'glcm': expected one of ce, .*; did you mean glmc?"),
    (dict(mix_bta=1), 'mix_bta: unknown option of method glmc, expected one of .*; did you mean mix_beta?'),
    (dict(method='ce', mix_beta=1), 'mix_beta: unknown option of method ce, expected one of smoothing'),
    (dict(mix_beta=-1), 'mix_beta: expected a number > 0, found -1'),
    (dict(alpha_scope='enc'), "alpha_scope: expected one of losses, encoder; found 'enc'"),
    (dict(counts=[4, 4]), 'counts: found 2 classes, expected 3'),
    (dict(counts=[4, 4, 0]), 'counts: found 0 for class 2, expected'),
    (dict(counts=[4, 4, 0.5]), 'counts: found 0.5 for class 2, expected')])
def test_wrap_refuses_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        glmc.wrap(timm.create_model('test_resnet', num_classes=3), **{'counts': COUNTS, **arguments})
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('options, images, message', [
    ({}, lambda x, y: (x, y, x, y), r'found 4 arguments, expected mixer\(images, labels\)'),
    (dict(partner='sampler'), lambda x, y: (x, y), r'expected mixer\(images, labels, partner_images, partner_labels\)'),
    (dict(partner='sampler'), lambda x, y: (x, y, x[:3], y[:3]), r'partners: found \(3, 2, 3, 32, 32\), expected \(8'),
    ({}, lambda x, y: (x, y[:3]), r'labels of shape \(3,\), expected \(B, c, H, W\) and class indices'),
    ({}, lambda x, y: (x, y[:, None].float()), r'labels of shape \(8, 1\), expected'),
    ({}, lambda x, y: ([x, x, x], y), 'found 3 augmentations of each image, expected a list of 2')])
def test_mixer_refuses_other_batches(options, images, message):
    with pytest.raises(ValueError, match=message):
        wrap(**options)[1](*images(*batch()))


def test_tasks_with_heads_train_in_two_processes_as_one_module(tmp_path):
    """timm's own way would train each process alone, so it is refused."""
    with pytest.raises(NotImplementedError, match='DistributedDataParallel'):
        wrap()[0].prepare_distributed()

    def gradient(rank: int) -> list[float]:
        task, mixer = wrap()
        images, labels = batch(rank)
        wrapped = torch.nn.parallel.DistributedDataParallel(task)
        wrapped(*mixer(images, labels))['loss'].backward()
        return [parameter.grad.sum().item() for parameter in task.parameters()]
    one, other = in_two_processes(gradient, tmp_path)
    assert one == other


def library_page(title: str) -> str:
    """The Python block of a section of docs/library.md."""
    text = (ROOT / 'docs' / 'library.md').read_text(encoding='utf-8')
    section = text.split(f'\n## {title}\n')[1].split('\n## ')[0]
    code, = re.findall(r'```python\n(.*?)```', section, re.S)
    return code


def small(code: str, epochs: int = 10) -> str:
    """A block with a tiny model, few epochs and small batches instead of those of the page."""
    for printed, tiny in (
            (r"'resnet18', num_classes=len\(names\)",
             "'test_resnet', num_classes=len(names), pretrained_cfg_overlay=dict(input_size=(3, 32, 32))"),
            (r'(epochs = .*?)\b60\b', rf'\g<1>{epochs}'), (r'batch_size=64', 'batch_size=8'),
            (r'num_workers=2', 'num_workers=0'),
            (r'Trainer\(', 'Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, ')):
        code = re.sub(printed, tiny, code)
    return code


@pytest.fixture
def my_images(tmp_path, monkeypatch) -> Path:
    """A working folder with `my_images`, in which the blocks run."""
    random_seed(0)
    write_folders(tmp_path / 'my_images' / 'train', CLASSES)
    write_folders(tmp_path / 'my_images' / 'val', VALIDATION, start=100)
    monkeypatch.chdir(tmp_path)
    return tmp_path / 'my_images'


@pytest.mark.parametrize('title', ['Your own loop', "timm's script", 'Lightning'])
def test_loops_of_the_page_export_a_plain_timm_model(title, my_images, monkeypatch):
    if title == 'Lightning':
        pytest.importorskip('lightning')
    scope = {}
    exec(small(library_page(title)), scope)
    exec(library_page('Evaluate, export, predict'), scope)
    trained = load_trained('my_export')
    assert trained.class_names == list(CLASSES) and trained.metadata['profile']['class_counts'] == list(CLASSES.values())
    images = torch.stack([torch.from_numpy(np.array(coloured(label, 50))) for label in range(3)]).permute(0, 3, 1, 2) / 255
    plain = timm.create_model('local-dir:my_export', pretrained=True).eval()
    mean, std = (torch.tensor(scope['config'][name])[:, None, None] for name in ('mean', 'std'))
    logits = plain((images - mean) / std)
    assert torch.equal(logits, scope['task'].get_eval_model().eval()((images - mean) / std))
    assert logits.argmax(1).tolist() == [0, 1, 2]


@pytest.mark.parametrize('title', ['The second image of a pair', 'More than one augmentation'])
def test_further_blocks_of_the_page_run(title, my_images):
    scope = {}
    exec(small(library_page('Your own loop'), epochs=1), scope)
    exec(small(library_page(title)), scope)
    assert scope['losses']['loss'].isfinite()
    assert scope['task'].metadata['method'] == {'The second image of a pair': 'cmo'}.get(title, 'gpaco')


def test_training_continues_from_an_export_with_its_order_of_classes(my_images):
    """torchvision sorts class names by their characters, timm and this package without regard to case."""
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=3)
    order = [*reversed(CLASSES)]
    config = timm.data.resolve_model_data_config(model)
    export_model('output/probe/export', model, class_names=order, data_config=config)
    scope = {}
    exec(library_page('Pretrained weights'), scope)
    assert scope['names'] == order and scope['counts'] == [CLASSES[name] for name in order]
    weights = zip(model.state_dict().values(), scope['task'].get_eval_model().state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in weights)
    norms = [module for module in scope['task'].modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert norms and not any(norm.training for norm in norms)
