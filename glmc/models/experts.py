"""Experts on a shared stem in timm's registry, and the one wider plain ResNet that equals them (RIDE; arXiv 2010.01809)."""
from collections.abc import Sequence

import timm
import torch
from timm.models import ResNet, build_model_with_cfg, register_model
from timm.models._registry import generate_default_cfgs
from torch import Tensor, nn

from glmc.errors import InputError
from glmc.models.cifar_resnet import CifarResNet
from glmc.models.cosine import CosineClassifier, fold_cosine, follow_norm


class Experts(nn.Module):
    """K copies of the later stages of a residual net on one stem, each with a cosine classifier; logits are their mean.

    The stem is the first stage of a `CifarResNet`, or the first two of timm's `ResNet`.

    Args:
        base: Name of the net in timm.
        num_experts: K.
        width: Width of the experts' stages, as a fraction of the net's.
        cosine_scale: Scale of the classifiers.
        num_classes: C.
        **kwargs: More arguments of the net.

    Raises:
        ValueError: If the net is of another kind.
    """

    def __init__(self, base: str = 'resnet32_cifar', num_experts: int = 3, width: float = 1.0, cosine_scale: float = 30.0,
                 num_classes: int = 100, **kwargs):
        super().__init__()
        if not timm.is_model(base):
            raise ValueError(f'expected the name of a net in timm, found {base[:100]!r}')
        self.stem = timm.create_model(base, num_classes=0, **kwargs)
        stages = stage_names(self.stem)
        self.base, self.kwargs, self.split = base, kwargs, len(stages) // 2
        planes = [stage_planes(self.stem.get_submodule(name)) for name in stages]
        self.planes = [*planes[:self.split], *(max(2, 2 * round(width * each / 2)) for each in planes[self.split:])]  # even
        nets = [timm.create_model(base, num_classes=0, **{**kwargs, 'channels': self.planes}) for _ in range(num_experts)]
        self.experts = nn.ModuleList(nets)
        keep_stages(self.stem, stages[:self.split])
        for net in self.experts:
            keep_stages(net, stages[self.split:])
        self.in_chans, self.cosine_scale = self.stem.in_chans if hasattr(self.stem, 'in_chans') else None, cosine_scale
        self.num_features = self.head_hidden_size = num_experts * nets[0].head_hidden_size
        self.register_buffer('feature_norm', torch.ones(num_experts))
        self.reset_classifier(num_classes)

    def get_classifier(self) -> nn.ModuleList:
        return self.heads

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        width = self.experts[0].head_hidden_size
        self.heads = nn.ModuleList(CosineClassifier(width, num_classes, self.cosine_scale) for _ in self.experts)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for net in (self.stem, *self.experts):
            net.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        return dict(stem=r'^stem\.', blocks=r'^experts\.\d+\.(?:layer|stages\.)(\d+)')

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, K, D) pooled features of (B, c, H, W) images."""
        x = self.stem.forward_features(x)
        features = [net.forward_head(net.forward_features(x), pre_logits=True) for net in self.experts]
        return torch.stack(features, 1)

    def expert_logits(self, images: Tensor) -> Tensor:
        """(B, K, C) logits of each expert for (B, c, H, W) images; in training, the mean feature norms follow."""
        features = self.forward_features(images)
        if self.training:
            follow_norm(self.feature_norm, features)
        return torch.stack([head(part) for head, part in zip(self.heads, features.unbind(1), strict=True)], 1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        if pre_logits:
            return x
        return torch.stack([head(part) for head, part in zip(self.heads, x.unbind(1), strict=True)], 1).mean(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    @torch.no_grad()
    def widened(self) -> nn.Module | None:
        """Plain timm ResNet that has the experts side by side, with block-diagonal filters and folded classifiers.

        Its logits are the mean of s / |r_k|·ŵ·r_k with the mean feature norms |r_k|: linear, but for which they are exact.

        Returns:
            The net, in evaluation mode; None if the experts cannot stand side by side: shortcuts without weights, grouped
            convolutions, norms other than BatchNorm, or layers of another kind.
        """
        pool = getattr(self.stem, 'global_pool', None)
        if not isinstance(self.stem, ResNet) or pool.feat_mult() != 1:
            return None
        number = len(self.experts)
        channels = [*self.planes[:self.split], *(number * each for each in self.planes[self.split:])]
        with torch.device('meta'):
            wide = timm.create_model(self.base, num_classes=self.num_classes, **{**self.kwargs, 'channels': channels})
        if not all(isinstance(m, (nn.Conv2d, nn.modules.batchnorm._BatchNorm)) or not list(m.parameters(recurse=False))
                   for m in wide.modules() if m is not wide.fc) \
                or any(conv.groups > 1 for conv in wide.modules() if isinstance(conv, nn.Conv2d)):
            return None
        state, parts = dict(self.stem.state_dict()), [net.state_dict() for net in self.experts]
        shapes = {name: tensor.shape for name, tensor in wide.state_dict().items()}
        state.update({name: side_by_side([part[name] for part in parts], shapes[name]) for name in parts[0]})
        folded = [fold_cosine(head.weight, head.scale, norm)[0]
                  for head, norm in zip(self.heads, self.feature_norm, strict=True)]
        state['fc.weight'], state['fc.bias'] = torch.cat(folded, 1) / number, torch.zeros_like(folded[0][:, 0])
        wide.load_state_dict(state, assign=True)
        wide.pretrained_cfg = wide.default_cfg = {**self.pretrained_cfg, 'architecture': self.base, 'classifier': 'fc'}
        return wide.eval()


def side_by_side(tensors: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """One tensor of a shape from those of each expert: outputs in a row, with zeros between unless all share inputs."""
    first = tensors[0]
    if first.ndim == 0:
        return first
    if first.ndim == 1 or first.shape[1] == shape[1]:
        return torch.cat(list(tensors))
    out = first.new_zeros(tuple(shape))
    rows, columns = first.shape[:2]
    for k, tensor in enumerate(tensors):
        out[k * rows:(k + 1) * rows, k * columns:(k + 1) * columns] = tensor
    return out


def stage_names(net: nn.Module) -> list[str]:
    """Names of the stages of a net.

    Raises:
        ValueError: If it is neither a `CifarResNet` nor timm's `ResNet`.
    """
    if isinstance(net, CifarResNet):
        return [f'stages.{number}' for number in range(len(net.stages))]
    if isinstance(net, ResNet):
        return ['layer1', 'layer2', 'layer3', 'layer4']
    raise ValueError(f'expected a ResNet or resnet32_cifar, found {type(net).__name__}')


def stage_planes(stage: nn.Sequential) -> int:
    """Channels of a stage, as the net's argument `channels` has them."""
    last = stage[-1]
    convolutions = [module for module in last.modules() if isinstance(module, nn.Conv2d)]
    return convolutions[-1].out_channels // getattr(last, 'expansion', 1)


def keep_stages(net: nn.Module, names: Sequence[str]) -> None:
    """Remove all other stages of a net in place and, without the first stage, the layers before it."""
    for name in stage_names(net):
        if name not in names:
            parent, _, own = name.rpartition('.')
            setattr(net.get_submodule(parent), own, nn.Sequential())
    if stage_names(net)[0] not in names:
        for name in ('conv1', 'bn1', 'act1', 'maxpool'):
            if hasattr(net, name):
                setattr(net, name, nn.Identity())


default_cfgs = generate_default_cfgs({'experts.untrained': dict(url='', first_conv=None, classifier=None)})


@register_model
def experts(pretrained: bool = False, **kwargs) -> Experts:
    """Experts on a shared stem: base='resnet32_cifar', num_experts=3, width=1.0, and the arguments of the base."""
    return build_model_with_cfg(Experts, 'experts', pretrained, **kwargs)


def create_experts(net: nn.Module, start: bool, num_experts: int, width: float, **kwargs) -> Experts:
    """Create experts of a net.

    Args:
        net: A `CifarResNet` or timm's `ResNet`.
        start: Whether stem and experts start from the weights of the net; classifiers start at random, so that the experts
            do not stay alike.
        num_experts, width, **kwargs: As those of `Experts`.

    Raises:
        InputError: If the net is of another kind, or has weights that do not fit the width.
    """
    name = net.pretrained_cfg.get('architecture') or type(net).__name__
    try:
        stage_names(net)
        model = timm.create_model('experts', base=name, num_experts=num_experts, width=width, num_classes=net.num_classes,
                                  **kwargs)
    except Exception as error:  # timm raises anything for options that do not fit
        raise InputError(f'--model {name}: cannot have experts: {error}') from error
    model.pretrained_cfg = model.default_cfg = {**net.pretrained_cfg, 'architecture': 'experts', 'classifier': None}
    if start:
        if width != 1:
            raise InputError(f'--expert-width {width:g}: pretrained weights have the full width, expected --expert-width 1')
        for part in (model.stem, *model.experts):
            own = part.state_dict()
            part.load_state_dict({key: value for key, value in net.state_dict().items() if key in own})
    return model
