"""The baseline of the benchmark: a GLMC loop with the published structure, written without regard to speed."""
import copy
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_loader, create_transform
from timm.data.transforms import MaybePILToTensor
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, WeightedRandomSampler
from torchvision import transforms

from glmc.cli import Options
from glmc.config import augmentation_options
from glmc.data.datasets import ImageSet
from glmc.data.transforms import CIFAR_PADDING, IMAGENET_LT, policy_transforms
from glmc.losses.glmc import class_weights
from glmc.mixing import random_box
from glmc.models.glmc import GLMCModule
from glmc.setup import Setup


class PlainLoop:
    """GLMC training loop with the published structure.

    Args:
        setup: Run with the model, the options and the training counts.
        images: Training images and labels.
        transform: PIL image -> normalised float tensor (c, H, W).
    """

    def __init__(self, setup: Setup, images: 'PILImages', transform: Callable):
        self.args, self.device, self.size = setup.args, setup.accelerator.device, setup.data_config['input_size'][-2:]
        self.model = plain_model(setup)
        counts = setup.data.profile.counts
        self.weight = class_weights(counts, self.args.reweight_power).to(self.device)
        self.dataset = TwoViews(images, transform)
        self.image_weights = (np.asarray(counts, dtype=float) ** -self.args.resample_power)[images.labels]

    def steps(self) -> Iterator[float]:
        """Train without end, and yield the loss of each step."""
        args = self.args
        lr = args.lr or 0.01
        optimizer = torch.optim.SGD(self.model.parameters(), lr, momentum=args.momentum, weight_decay=args.weight_decay)
        for (i_views, i_labels), (j_views, j_labels) in self.batches():
            views = [view.to(self.device) for view in (*i_views, *j_views)]
            labels = i_labels.to(self.device), j_labels.to(self.device)
            lam = np.random.beta(args.mix_beta, args.mix_beta)
            box = random_box(*self.size, lam, np.random.default_rng())
            loss = plain_loss(self.model, views, labels, (lam, lam, box), self.weight, 1.0, args.consistency_weight)['loss']
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item()

    def batches(self) -> Iterator[tuple]:
        """Pairs of batches from a uniform and a weighted loader, each with its own worker processes."""
        options = dict(batch_size=self.args.batch_size, num_workers=self.args.workers, drop_last=True,
                       pin_memory=self.device.type == 'cuda', persistent_workers=self.args.workers > 0)
        weighted = WeightedRandomSampler(self.image_weights, len(self.dataset))
        loaders = DataLoader(self.dataset, shuffle=True, **options), DataLoader(self.dataset, sampler=weighted, **options)
        while True:
            yield from zip(*loaders, strict=True)


def plain_model(setup: Setup) -> GLMCModule:
    """Copy of the trainable module with the same weights: float32, contiguous, not compiled, in training mode."""
    return copy.deepcopy(setup.task.get_trainable_module()).float().to(memory_format=torch.contiguous_format).train()


def plain_loss(
        model: GLMCModule, views: list[Tensor], labels: tuple[Tensor, Tensor], mixture: tuple, weight: Tensor,
        alpha: float, gamma: float, mean_weight: float | None = None) -> dict[str, Tensor]:
    """Loss of a batch (GLMC Eq. 1-11), step by step, with class weights multiplied into the labels.

    Args:
        model: Module that encodes one view at a time.
        views: i1, i2, j1, j2, each (B, c, H, W) and normalised.
        labels: Labels of i and of j, each (B,).
        mixture: λ of the global view, λ of the labels of the local view, box (y0, y1, x0, x1).
        weight: (C,) class weights.
        alpha: α in [0, 1].
        gamma: γ, the weight of the consistency loss.
        mean_weight: Mean class weight of the training images with `--alpha-scope encoder`; None with `losses`.

    Returns:
        Scalars loss, loss_c, loss_cb and loss_sim.
    """
    (i1, i2, j1, j2), (lam, local_lam, (y0, y1, x0, x1)) = views, mixture
    i, j = (F.one_hot(label, len(weight)).float() for label in labels)
    i_weighted, j_weighted = (one_hot * weight[label][:, None] for one_hot, label in zip((i, j), labels, strict=True))
    global_view = lam * i1 + (1 - lam) * j1
    local_view = i2.clone()
    local_view[:, :, y0:y1, x0:x1] = j2[:, :, y0:y1, x0:x1]
    gradient_scales = mean_weight and tuple(
        torch.tensor(scale, device=i1.device) for scale in (alpha, mean_weight * (1 - alpha)))
    loss_c = loss_cb = 0
    outputs = []
    for view, lam_view in ((global_view, lam), (local_view, local_lam)):
        output = model.forward_view(view, gradient_scales)
        outputs.append(output)
        target, weighted = (lam_view * a + (1 - lam_view) * b for a, b in ((i, j), (i_weighted, j_weighted)))
        loss_c = loss_c - (F.log_softmax(output.logits, 1) * target).sum(1).mean()
        loss_cb = loss_cb - (F.log_softmax(output.rebalanced_logits, 1) * weighted).sum(1).mean()
    (_, _, h1, u1), (_, _, h2, u2) = outputs
    u1, h1, u2, h2 = (F.normalize(vector, dim=1) for vector in (u1, h1.detach(), u2, h2.detach()))
    loss_sim = -(u1 * h2).sum(1).mean() - (u2 * h1).sum(1).mean()
    classification = loss_c + loss_cb / mean_weight if mean_weight else alpha * loss_c + (1 - alpha) * loss_cb
    return dict(loss=classification + gamma * loss_sim, loss_c=loss_c, loss_cb=loss_cb, loss_sim=loss_sim)


class TwoViews(Dataset):
    """Two augmented views of each image, and its label."""

    def __init__(self, images: 'PILImages', transform: Callable):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        image, label = self.images[index]
        return [self.transform(image), self.transform(image)], label


class PILImages(Dataset):
    """PIL images and labels; timm's loader sets `transform`.

    Args:
        images: Image set to read.
        mode: PIL mode, RGB or L.
        predecode: Decode all images now instead of at each access.
    """

    transform = None

    def __init__(self, images: ImageSet, mode: str, predecode: bool):
        self.images, self.mode, self.labels = images, mode, images.labels
        self.decoded = [images.image(index, mode) for index in range(len(images))] if predecode else None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image | Tensor, int]:
        image = self.decoded[index] if self.decoded else self.images.image(index, self.mode)
        return self.transform(image) if self.transform else image, int(self.labels[index])


def timm_augmentation(args: Options) -> dict:
    """Augmentation options as keywords of timm's create_transform and create_loader."""
    options = augmentation_options(args)
    return {**options, **IMAGENET_LT} if options.pop('augmentation') == 'imagenet_lt' else options


def cifar_crop(setup: Setup) -> list[Callable] | None:
    """PIL transforms of `cifar` augmentation, for which timm has no option; None with another augmentation."""
    size, args = tuple(setup.data_config['input_size'][-2:]), setup.args
    if args.augmentation != 'cifar' or args.no_aug:
        return None
    return [transforms.Resize(size), transforms.RandomCrop(size, padding=CIFAR_PADDING),
            transforms.RandomHorizontalFlip(args.hflip),
            *policy_transforms(size, args.aa, mean=setup.data_config['mean'], interpolation=args.train_interpolation)]


def pil_transform(setup: Setup) -> Callable:
    """Training transform: PIL image -> normalised float tensor (c, H, W)."""
    config, crop = setup.data_config, cifar_crop(setup)
    if crop:
        return transforms.Compose([*crop, transforms.ToTensor(), transforms.Normalize(config['mean'], config['std'])])
    return create_transform(config['input_size'], is_training=True, mean=config['mean'], std=config['std'],
                            **timm_augmentation(setup.args))


def timm_loader(setup: Setup, images: PILImages):
    """timm's loader as its training script creates it, with the same augmentation."""
    args, config, device = setup.args, setup.data_config, setup.accelerator.device
    loader = create_loader(
        copy.copy(images), config['input_size'], args.batch_size, is_training=True, num_workers=args.workers,
        mean=config['mean'], std=config['std'], re_prob=args.reprob, re_mode=args.remode, re_count=args.recount,
        pin_memory=device.type == 'cuda', device=device, persistent_workers=args.workers > 0,
        **timm_augmentation(args))
    crop = cifar_crop(setup)
    if crop:
        loader.dataset.transform = transforms.Compose([*crop, MaybePILToTensor()])
    return loader
