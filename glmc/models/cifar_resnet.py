"""ResNet-32 for 32x32 images, as in He et al. (arXiv 1512.03385, section 4.2), in timm's registry.

`resnet32_cifar` is the network of the paper: 16/32/64 channels, 0.46 M parameters. `resnet32x4_cifar` is four times as
wide, 7.4 M parameters: the network behind the CIFAR numbers that GLMC's publication gives for "ResNet-32".
"""
import torch
import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d
from timm.models import build_model_with_cfg, checkpoint_seq, register_model
from timm.models._registry import generate_default_cfgs
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a parameter-free shortcut: subsample, then pad the new channels with 0 (option A)."""

    def __init__(self, in_chs: int, out_chs: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_chs)
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chs)
        self.stride, self.padding = stride, (out_chs - in_chs) // 2

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.padding or self.stride > 1:
            shortcut = F.pad(x[:, :, ::self.stride, ::self.stride], (0, 0, 0, 0, self.padding, self.padding))
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


class CifarResNet(nn.Module):
    """Three stages of basic blocks at full, half and quarter resolution, with timm's classifier interface.

    Args:
        channels: Width of each stage.
        depth: Blocks per stage; the net has 6·depth + 2 weighted layers.
        num_classes, in_chans, global_pool, drop_rate: As everywhere in timm.
    """

    def __init__(self, channels=(16, 32, 64), depth=5, num_classes=100, in_chans=3, global_pool='avg', drop_rate=0.0):
        super().__init__()
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.num_features = self.head_hidden_size = channels[-1]
        self.grad_checkpointing = False
        self.conv1 = nn.Conv2d(in_chans, channels[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        widths = (channels[0], *channels)
        self.stages = nn.ModuleList(
            nn.Sequential(*(BasicBlock(widths[s] if b == 0 else widths[s + 1], widths[s + 1], 2 if s and b == 0 else 1)
                            for b in range(depth)))
            for s in range(len(channels)))
        self.feature_info = [
            dict(num_chs=width, reduction=2 ** s, module=f'stages.{s}') for s, width in enumerate(channels)]
        self.reset_classifier(num_classes, global_pool)
        self.apply(_kaiming_init)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        return dict(stem=r'^conv1|^bn1', blocks=r'^stages\.(\d+)' if coarse else r'^stages\.(\d+)\.(\d+)')

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=True)
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in self.stages:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint_seq(stage, x)
            else:
                x = stage(x)
        return x  # (B, channels[-1], H/4, W/4)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = F.dropout(self.global_pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def _kaiming_init(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.kaiming_normal_(module.weight)


def _cfg() -> dict:
    return dict(
        url='', num_classes=100, input_size=(3, 32, 32), pool_size=(8, 8), crop_pct=1.0, interpolation='bicubic',
        mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010), first_conv='conv1', classifier='fc')


default_cfgs = generate_default_cfgs({'resnet32_cifar.untrained': _cfg(), 'resnet32x4_cifar.untrained': _cfg()})


def _create(variant: str, pretrained: bool, **kwargs) -> CifarResNet:
    return build_model_with_cfg(CifarResNet, variant, pretrained, **kwargs)


@register_model
def resnet32_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-32 of He et al.: 16/32/64 channels, 0.46 M parameters, 32x32 input."""
    return _create('resnet32_cifar', pretrained, **dict(dict(channels=(16, 32, 64)), **kwargs))


@register_model
def resnet32x4_cifar(pretrained: bool = False, **kwargs) -> CifarResNet:
    """ResNet-32 at four times the width: 64/128/256 channels, 7.4 M parameters, 32x32 input."""
    return _create('resnet32x4_cifar', pretrained, **dict(dict(channels=(64, 128, 256)), **kwargs))
