"""Contrastive rows: two processes equal one, the memory, views without an effect on the encoder, and identities of rows."""
import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import in_two_processes

from glmc.cli import parse_args, pick
from glmc.config import train_parser
from glmc.losses.classification import LogitAdjustedLoss
from glmc.methods import METHODS
from glmc.models.backbone import create_backbone
from glmc.models.projected import KeyEncoder, Queue
from glmc.models.targets import Targets, spread_targets
from glmc.tasks.contrastive import ContrastiveTask
from glmc.tasks.gather import gather, missing_rows
from glmc.training.engine import step_generator

COUNTS = [50, 30, 12, 3]
ROWS = ['supcon', 'bcl', 'paco', 'gpaco', 'kcl', 'tsc', 'ssd_features', 'proco']
WITH_QUEUE = ROWS[2:-1]
TINY_VIT = dict(img_size=16, patch_size=8, depth=1, embed_dim=16, num_heads=2)


def new_task(name: str, **changed):
    """Task and mixer of a row on a net without BatchNorm; the projector's has fixed statistics."""
    row, (options, _) = METHODS[name], parse_args(train_parser(METHODS), ['--method', name])
    vars(options).update({'queue_size': 13, 'positives': 2, **changed})
    torch.manual_seed(0)
    backbone = create_backbone('vit_tiny_patch16_224', len(COUNTS), **TINY_VIT)
    module = row.module(backbone, **pick(options, row.module_options))
    task = row.task(module, COUNTS, **pick(options, row.task_options)).train()
    for layer in task.modules():
        if isinstance(layer, torch.nn.BatchNorm1d):
            layer.eval()
    return task, row.mixer(COUNTS, **pick(options, row.mixer_options))


def batch(name: str, number: int, size: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(number)
    views = rng.normal(size=(size, 1, len(METHODS[name].views), 3, 16, 16))
    return torch.from_numpy(views).float(), torch.from_numpy(rng.integers(3, size=(size, 1)))


def train(name: str, rank: int = 0, world: int = 1) -> tuple[dict, dict]:
    """Gradients of the third of three batches of 9 images, dealt out over the processes, and the memory after it."""
    task, mixer = new_task(name)
    for number in range(3):
        task.zero_grad()
        task.set_progress(number / 3)
        views, labels = (rows[rank::world] for rows in batch(name, number))
        share = len(views) * world / 9
        task.before_batch(len(views), share)
        outputs = task(*mixer(views, labels, mixer.sample_params(9, (16, 16), step_generator(0, 0, number))))
        (outputs['loss'] * share).backward()
        task.after_batch({key: value.detach() for key, value in outputs.items()})
        task.update_ema(number)
    gradients = {key: value.grad.numpy() for key, value in task.named_parameters() if value.grad is not None}
    return gradients, {key: value.numpy() for key, value in task.memory.state_dict().items()}


def test_these_are_all_contrastive_rows():
    names = [name for name, row in METHODS.items() if isinstance(row.task, type) and issubclass(row.task, ContrastiveTask)]
    assert names == ROWS


@pytest.mark.parametrize('name', ROWS)
def test_two_processes_equal_one_of_twice_the_batch(name, tmp_path):
    """Nine images: one process has five, the other four."""
    expected, memory = train(name)
    (one, first), (two, second) = in_two_processes(lambda rank: train(name, rank, 2), tmp_path)
    assert one.keys() == two.keys() == expected.keys()
    for key, gradient in expected.items():
        np.testing.assert_allclose((one[key] + two[key]) / 2, gradient, rtol=1e-3, atol=2e-6, err_msg=key)
    for key, value in memory.items():
        np.testing.assert_allclose(first[key], value, rtol=1e-4, atol=1e-6, err_msg=key)
        np.testing.assert_array_equal(first[key], second[key], err_msg=key)


def test_a_gather_is_part_of_a_compiled_graph(tmp_path):
    """Forward and backward pass in two processes, with a row of padding."""
    def compiled(rank: int) -> tuple:
        torch._dynamo.reset()
        rows = (torch.arange(6.).view(3, 2) + 10 * rank)[:3 - rank].requires_grad_()
        function = torch.compile(lambda rows: gather(rows, rank, fill=-1) * 2, fullgraph=True, backend='aot_eager')
        gathered = function(rows)
        (gathered * (rank + 1)).sum().backward()
        return gathered.detach().numpy(), rows.grad.numpy()
    for gathered, gradient in in_two_processes(compiled, tmp_path):
        assert gathered.tolist() == [[0, 2], [20, 22], [4, 6], [24, 26], [8, 10], [-2, -2]]
        assert (gradient == 6).all()


@pytest.mark.parametrize('total, world', itertools.product(range(8, 40), (2, 3, 8)))
def test_rows_that_a_process_lacks(total, world, monkeypatch):
    monkeypatch.setattr('glmc.tasks.gather.rank_and_world', lambda: (0, world))
    sizes = [len(range(rank, total, world)) for rank in range(world)]
    assert [size + missing_rows(size, size * world / total) for size in sizes] == [max(sizes)] * world


@pytest.mark.parametrize('name', ['supcon', 'kcl', 'tsc'])
def test_the_probe_has_no_effect_on_the_encoder(name):
    task, mixer = new_task(name)
    views, labels = batch(name, 0)
    task(*mixer(views, labels, mixer.sample_params(9, (16, 16), step_generator(0, 0, 0))))['loss_c'].backward()
    classifier = set(task.get_eval_model().get_classifier().parameters())
    assert all((p.grad is not None and p.grad.any()) == (p in classifier) for p in task.trainable_module.parameters())


@pytest.mark.parametrize('name', ['paco', 'gpaco'])
def test_paco_without_contrast_is_the_row_balanced_softmax(name):
    task, mixer = new_task(name, contrast_weight=0.0)
    task.gamma = 0.0
    views, labels = batch(name, 0)
    loss = task(*mixer(views, labels, None))['loss']
    images = views[:, 0, :1 + (name == 'gpaco')].transpose(0, 1).flatten(0, 1)
    expected = LogitAdjustedLoss(COUNTS)(task.get_eval_model()(images), labels[:, 0].repeat(len(images) // 9))
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize('name', [*WITH_QUEUE, 'proco'])
def test_a_batch_that_is_not_finite_leaves_no_trace(name):
    task, mixer = new_task(name)
    task.set_progress(0.6)
    for number in range(3):
        before = copy.deepcopy(task.memory.state_dict())
        views, labels = batch(name, number)
        if number == 2:
            views[4] = float('nan')
        outputs = task(*mixer(views, labels, mixer.sample_params(9, (16, 16), step_generator(0, 0, number))))
        task.after_batch({key: value.detach() for key, value in outputs.items()})
        after = task.memory.state_dict()
        changed = {key.split('.')[0] for key in after if not torch.equal(after[key], before[key])}
        parts = dict(tsc={'queue', 'targets'}, proco={'classes'}).get(name, {'queue'})
        assert changed == (set() if number == 2 else parts)


def test_the_queue_keeps_the_newest():
    queue, seen = Queue(7, 2), []
    for number, size in enumerate((3, 2, 4, 7, 1, 9, 5)):
        keys = torch.full((size, 2), float(number)) + torch.arange(size)[:, None] / 100
        labels = torch.arange(size) + 10 * number
        queue.enqueue(keys, labels, torch.tensor(True))
        seen += zip(keys[:, 0].tolist(), labels.tolist(), strict=True)
        filled = queue.labels >= 0
        found = zip(queue.keys[filled][:, 0].tolist(), queue.labels[filled].tolist(), strict=True)
        assert sorted(found) == sorted(seen[-7:])
        assert queue.pointer == len(seen) % 7


def test_padding_and_rejected_batches_are_not_enqueued():
    queue = Queue(5, 2)
    queue.enqueue(torch.ones(3, 2), torch.tensor([1, 2, -1]), torch.tensor(True))
    queue.enqueue(torch.full((3, 2), float('nan')), torch.tensor([3, 3, 3]), torch.tensor(False))
    assert queue.labels.tolist() == [1, 2, -1, -1, -1] and queue.pointer == 2 and queue.keys.isfinite().all()


def test_the_key_encoder_follows_by_its_momentum():
    module = torch.nn.Linear(3, 2)
    keys = KeyEncoder(module, momentum=0.9)
    before = copy.deepcopy(keys.module.state_dict())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 1
    keys.follow(module)
    for name, value in keys.module.state_dict().items():
        torch.testing.assert_close(value, before[name] + 0.1)
    assert not any(parameter.requires_grad for parameter in keys.parameters())


@pytest.mark.parametrize('classes, width', [(2, 3), (4, 8), (9, 8), (100, 128)])
def test_few_targets_are_a_simplex(classes, width):
    targets = spread_targets(classes, width).double()
    expected = torch.full((classes, classes), -1 / (classes - 1)).double().fill_diagonal_(1)
    torch.testing.assert_close(targets @ targets.T, expected, rtol=0, atol=1e-6)


def test_many_targets_are_evenly_spread():
    """More than a simplex has corners: farther apart than random ones, and nearly alike."""
    targets = spread_targets(12, 3, steps=3000)
    closest = [(F.normalize(each, dim=1) @ F.normalize(each, dim=1).T).fill_diagonal_(-1).amax(1) for each in
               (targets, torch.randn(12, 3, generator=torch.Generator().manual_seed(0)))]
    assert closest[0].max() < 0.57 < closest[1].max()  # the icosahedron has 0.447


def test_the_assignment_is_the_best_of_all():
    targets = Targets(6, 5)
    targets.centroids.copy_(F.normalize(torch.randn(6, 5, generator=torch.Generator().manual_seed(1)), dim=1))
    targets.assign(0.5)
    cosines = targets.centroids @ targets.vectors.T
    best = max(itertools.permutations(range(6)), key=lambda order: sum(cosines[c, t].item() for c, t in enumerate(order)))
    assert targets.assigned.tolist() == list(best)
    torch.testing.assert_close(targets.of_classes(), targets.vectors[list(best)])


def test_a_resumed_epoch_keeps_its_assignment():
    targets = Targets(4, 5)
    targets.assign(0.5)
    resumed = Targets(4, 5)
    resumed.load_state_dict(targets.state_dict())
    resumed.centroids.copy_(targets.vectors.flip(0))
    resumed.assign(0.5)
    assert torch.equal(resumed.assigned, targets.assigned)
    resumed.assign(0.6)
    assert resumed.assigned.tolist() == [3, 2, 1, 0]


def test_centroids_are_the_loop():
    targets, rng = Targets(4, 5), torch.Generator().manual_seed(0)
    expected = torch.zeros(4, 5)
    for labels in ([0, 0, 2], [2, 3, -1]):
        features = F.normalize(torch.randn(3, 5, generator=rng), dim=1)
        targets.follow(features, torch.tensor(labels), torch.tensor(True))
        for c in set(labels) - {-1}:
            mean = torch.stack([feature for feature, label in zip(features, labels, strict=True) if label == c]).mean(0)
            expected[c] = F.normalize(0.9 * expected[c] + 0.1 * F.normalize(mean, dim=0), dim=0)
        torch.testing.assert_close(targets.centroids, expected)
