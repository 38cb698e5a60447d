"""Cosine and bilateral classifiers against loops, and what they fold into; MaxNorm's projection."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from glmc.models.backbone import create_backbone
from glmc.models.bilateral import BilateralModule
from glmc.models.classifier import cap_norms, norm_radius
from glmc.models.cosine import CosineGLMCModule, CosineModule


def cosine_module(**kwargs) -> CosineModule:
    torch.manual_seed(0)
    return CosineModule(create_backbone('resnet32_cifar', 5, channels=(4, 6, 8), depth=1), **kwargs)


def test_cosine_classifier_is_the_loop():
    module, features = cosine_module(cosine_scale=7.0), torch.randn(3, 8)
    logits = module.classifier(features)
    for b, c in np.ndindex(3, 5):
        r, w = features[b].tolist(), module.classifier.weight[c].tolist()
        cosine = sum(x * y for x, y in zip(r, w, strict=True)) / (sum(x * x for x in r) * sum(y * y for y in w)) ** 0.5
        assert logits[b, c].item() == pytest.approx(7 * cosine, rel=1e-4, abs=1e-5)


@torch.no_grad()
def test_folded_cosine_ranks_alike_and_equals_it_at_the_mean_norm():
    module = cosine_module()
    module.classifier.weight.mul_(torch.rand(5, 1) + 0.5)  # rows of different norms
    images = torch.randn(16, 3, 16, 16)
    for _ in range(100):
        module(images)
    module.eval().fold()
    cosines, linear, norms = module(images), module.backbone(images), module.encode(images).norm(dim=1, keepdim=True)
    assert torch.equal(cosines.argsort(1), linear.argsort(1))
    torch.testing.assert_close(linear, cosines * norms / module.feature_norm, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(linear, cosines, rtol=1e-2)


@torch.no_grad()
def test_both_cosine_classifiers_of_glmc_and_what_the_rebalanced_one_folds_into():
    torch.manual_seed(0)
    module = CosineGLMCModule(create_backbone('resnet32_cifar', 5, channels=(4, 6, 8), depth=1), 7.0, projection_dim=6)
    images = torch.randn(16, 3, 16, 16)
    for _ in range(100):
        module(images, images)
    module.eval().fold()
    output, features = module.forward_view(images), module.backbone.forward_head(
        module.backbone.forward_features(images), pre_logits=True)
    for logits, head in ((output.logits, module.classifier), (output.rebalanced_logits, module.rebalancer)):
        torch.testing.assert_close(logits, 7 * F.cosine_similarity(features[:, None], head.weight[None], dim=2))
    linear = module.backbone(images)
    assert torch.equal(output.rebalanced_logits.argsort(1), linear.argsort(1))
    norms = features.norm(dim=1, keepdim=True)
    torch.testing.assert_close(linear, output.rebalanced_logits * norms / module.feature_norm, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_folded_branches_are_the_half_and_half_of_the_paper():
    torch.manual_seed(0)
    module = BilateralModule(create_backbone('resnet32_cifar', 5, channels=(4, 6, 8), depth=1)).eval()
    images = torch.randn(6, 3, 16, 16)
    torch.testing.assert_close(module((images, images), torch.tensor(0.5)), module.backbone(images))
    others = torch.randn(6, 3, 16, 16)
    r_i, r_j = module.encode(images), module.encode(others)
    expected = 2 * (0.3 * r_i @ module.classifier.weight.T + 0.7 * r_j @ module.rebalancer.weight.T) + module.classifier.bias
    torch.testing.assert_close(module((images, others), torch.tensor(0.3)), expected)


@pytest.mark.parametrize('module', [CosineModule, CosineGLMCModule, BilateralModule])
def test_only_the_backbones_own_classifier_rests(module):
    module = module(create_backbone('test_vit', 5, img_size=32))
    images = torch.randn(2, 3, 32, 32)
    if isinstance(module, CosineGLMCModule):
        sum(value.square().sum() for output in module(images, images) for value in output).backward()
    elif isinstance(module, CosineModule):
        module(images).square().sum().backward()
    else:
        module((images, images), torch.tensor(0.4)).square().sum().backward()
    resting = {name for name, p in module.named_parameters() if p.grad is None}
    assert resting == {'backbone.head.weight', 'backbone.head.bias'}


def test_capped_rows_are_at_most_the_radius_and_keep_their_direction():
    for seed in range(50):
        weight = torch.randn(7, 5, generator=torch.Generator().manual_seed(seed)) * 10 ** (seed / 10 - 3)
        radius = norm_radius(weight)
        norms = weight.norm(dim=1)
        assert radius.item() == pytest.approx((norms.min() + 0.1 * (norms.max() - norms.min())).item(), rel=1e-5)
        capped = cap_norms(weight, radius)
        assert (capped.norm(dim=1) <= radius * (1 + 1e-6)).all()
        torch.testing.assert_close(torch.cosine_similarity(capped, weight), torch.ones(7))
        assert torch.equal(capped[norms <= radius], weight[norms <= radius])
    assert torch.equal(cap_norms(torch.zeros(2, 3), 1.0), torch.zeros(2, 3))
