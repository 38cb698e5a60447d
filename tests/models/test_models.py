"""GLMCModule on heads of every kind in timm, errors a user can act on, and the CIFAR nets by hand."""
import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import get_model_input_config

from glmc.errors import InputError
from glmc.models.backbone import create_backbone
from glmc.models.cifar_resnet import BasicBlock
from glmc.models.classifier import classifies_pre_logits, float32_classifier, linear_classifier
from glmc.models.glmc import GLMCModule, scale_gradient

# Where the classifier takes the pooled features alone, one pass gives both.
SINGLE_PASS = [
    ('resnet18', 64), ('test_vit', 160), ('test_convnext', 160), ('test_byobnet', 160), ('mobilenetv3_small_050', 64),
    ('mambaout_femto', 64), ('resnet32_cifar', 32)]
# Two heads, a norm before the classifier, a convolution, several sizes of tokens, an auxiliary head, a 4-D head.
TWO_PASSES = [
    ('levit_128s', 64), ('efficientvit_m0', 64), ('shvit_s1', 64), ('dla46_c', 64), ('crossvit_tiny_240', 240),
    ('efficientvim_m1', 64), ('volo_d1_224', 64), ('swiftformer_xs', 64), ('pit_ti_distilled_224', 224),
    ('sequencer2d_s', 224)]


@pytest.fixture(autouse=True, scope='module')
def one_thread():
    """Nets this small spend longer waiting for each other's threads than computing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def seeded_backbone(name: str = 'test_byobnet', img_size: int | None = None, num_classes: int = 5, **kwargs):
    torch.manual_seed(0)
    return create_backbone(name, num_classes, img_size=img_size, **kwargs)


def images_for(backbone, batch: int = 2, seed: int = 1) -> torch.Tensor:
    size = get_model_input_config(backbone)['input_size']
    return torch.randn(batch, *size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize('name, img_size', SINGLE_PASS + TWO_PASSES)
def test_rebalanced_logits_are_the_bare_models(name, img_size):
    backbone = seeded_backbone(name, img_size)
    module = GLMCModule(backbone, projection_dim=6).eval()
    images = images_for(backbone)
    with torch.no_grad():
        output, expected = module.forward_view(images), backbone(images)
        pre_logits = backbone.forward_head(backbone.forward_features(images), pre_logits=True)
    assert torch.equal(output.rebalanced_logits, expected)
    assert expected.shape == (2, 5)
    assert module.single_pass == ((name, img_size) in SINGLE_PASS)
    assert module.classifier.in_features == module.projector.in_features == backbone.head_hidden_size
    assert torch.equal(output.logits, module.classifier(pre_logits))
    assert torch.equal(output.projection, module.projector(pre_logits))
    assert torch.equal(output.prediction, module.predictor(output.projection))
    assert output.prediction.shape == (2, 6)


@pytest.mark.parametrize('name, img_size', [('levit_128s', 64), ('efficientvit_m0', 64), ('test_vit', 160)])
@pytest.mark.parametrize('training', [True, False])
def test_probe_leaves_the_backbone_as_it_was(name, img_size, training):
    backbone = seeded_backbone(name, img_size).train(training)
    before, random_state = copy.deepcopy(backbone.state_dict()), torch.get_rng_state()
    classifies_pre_logits(backbone)
    assert all(module.training == training for module in backbone.modules())
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_probe_is_not_misled_by_a_classifier_of_zeros():
    backbone = seeded_backbone('efficientvit_m0', 64)
    for parameter in backbone.get_classifier().parameters():
        torch.nn.init.zeros_(parameter)
    assert not classifies_pre_logits(backbone)


@pytest.mark.parametrize('name, img_size', SINGLE_PASS + TWO_PASSES)
def test_classifier_computes_in_float32_where_all_else_does_not(name, img_size):
    backbone = seeded_backbone(name, img_size).eval()
    images = images_for(backbone)
    with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16):
        with float32_classifier(backbone):
            logits = backbone(images)
        coarse = backbone(images)
    assert logits.dtype == torch.float32 and coarse.dtype == torch.bfloat16
    assert (logits - coarse).norm() <= 0.1 * logits.norm()
    assert all('forward' not in vars(module) for module in backbone.modules())


def test_logits_are_told_apart_in_float32():
    """A thousand classes whose logits differ by less than bfloat16 can say."""
    backbone = seeded_backbone('test_resnet', num_classes=1000).eval()
    with torch.no_grad():
        backbone.get_classifier().bias.copy_(10 + torch.rand(1000, generator=torch.Generator().manual_seed(0)) / 100)
    images = images_for(backbone)
    with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16):
        assert all(len(row.unique()) < 100 for row in backbone(images))
        with float32_classifier(backbone):
            assert all(len(row.unique()) > 900 for row in backbone(images))


@pytest.mark.parametrize('name, img_size', [('resnet32_cifar', 32), ('levit_128s', 64)])
def test_each_view_is_a_forward_pass_of_its_own(name, img_size):
    module = GLMCModule(seeded_backbone(name, img_size), 6).train()
    twin = copy.deepcopy(module)
    views = images_for(module.backbone, 4), images_for(module.backbone, 4, seed=2)
    both = module(*views)
    for output, view in zip(both, views, strict=True):
        expected = twin.forward_view(view)
        assert all(torch.equal(a, b) for a, b in zip(output, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(module.buffers(), twin.buffers(), strict=True))


@pytest.mark.parametrize('balanced', [False, True])
@pytest.mark.parametrize('name, img_size', [('resnet32_cifar', 32), ('levit_128s', 64)])
def test_joint_forward_is_one_batch_of_both_views(name, img_size, balanced):
    module = GLMCModule(seeded_backbone(name, img_size), 6, balanced, joint_forward=True).train()
    twin = copy.deepcopy(module)
    views = images_for(module.backbone, 4), images_for(module.backbone, 4, seed=2)
    global_out, local_out = module(*views)
    both = twin.forward_view(torch.cat(views))
    for first, second, joint in zip(global_out, local_out, both, strict=True):
        assert (first is second is joint is None) or torch.equal(torch.cat([first, second]), joint)
    assert (global_out.logits is None) == balanced


@pytest.mark.parametrize('factor', [0.0, 0.3, 1.0])
def test_a_scaled_gradient_belongs_to_the_same_values(factor):
    features = [torch.randn(4, 3, generator=torch.Generator().manual_seed(n)).requires_grad_() for n in range(2)]
    for scaled in (scale_gradient(features, torch.tensor(factor)), scale_gradient(tuple(features), torch.tensor(factor))):
        assert all(torch.equal(a, b) for a, b in zip(scaled, features, strict=True))
        gradients = torch.autograd.grad(sum(n * value.square().sum() for n, value in enumerate(scaled, 1)), features)
        for n, (gradient, value) in enumerate(zip(gradients, features, strict=True), 1):
            torch.testing.assert_close(gradient, factor * 2 * n * value.detach())
    assert scale_gradient(features, None) is features


@pytest.mark.parametrize('name, img_size', [('resnet32_cifar', 32), *TWO_PASSES])
def test_shares_part_the_gradients_of_the_encoder_and_change_no_output(name, img_size):
    """The encoder hears so much of each classifier, and each classifier all of its own."""
    module, alpha = GLMCModule(seeded_backbone(name, img_size), 6).eval().double(), 0.3
    images = images_for(module.backbone).double().requires_grad_()
    plain, parted = module.forward_view(images), module.forward_view(images, (torch.tensor(alpha), torch.tensor(0.1)))
    assert all(torch.equal(a, b) for a, b in zip(plain, parted, strict=True))

    def gradient(logits: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(logits.square().sum(), images, retain_graph=True)[0]

    torch.testing.assert_close(gradient(parted.logits), alpha * gradient(plain.logits))
    torch.testing.assert_close(gradient(parted.rebalanced_logits), 0.1 * gradient(plain.rebalanced_logits))
    own = [torch.autograd.grad(output.logits.square().sum(), module.classifier.weight, retain_graph=True)[0]
           for output in (plain, parted)]
    assert torch.equal(*own)


@pytest.mark.parametrize('name, img_size', [('resnet32_cifar', 32), ('levit_128s', 64), ('dla46_c', 64)])
def test_every_parameter_learns(name, img_size):
    module = GLMCModule(seeded_backbone(name, img_size), 6).train()
    for output in module(images_for(module.backbone), images_for(module.backbone, seed=2)):
        sum(value.square().sum() for value in output).backward()
    assert [key for key, parameter in module.named_parameters() if parameter.grad is None] == []


def test_heads_are_single_linear_layers():
    module = GLMCModule(seeded_backbone('resnet32_cifar'), projection_dim=6)
    beside = {name: tuple(value.shape) for name, value in module.named_parameters() if not name.startswith('backbone.')}
    assert beside == {
        'classifier.weight': (5, 64), 'classifier.bias': (5,), 'projector.weight': (6, 64), 'projector.bias': (6,),
        'predictor.weight': (6, 6), 'predictor.bias': (6,)}


def test_balanced_module_has_only_the_backbones_classifier():
    module = GLMCModule(seeded_backbone('resnet32_cifar'), 6, balanced=True).eval()
    output = module.forward_view(images_for(module.backbone))
    assert output.logits is None
    assert torch.equal(output.rebalanced_logits, module.backbone(images_for(module.backbone)))
    assert not any(name.startswith('classifier') for name in module.state_dict())


def test_an_encoder_without_a_classifier_is_an_error():
    with torch.device('meta'):
        encoder = timm.create_model('mobilenetv5_300m_enc')
    with pytest.raises(InputError, match='--model mobilenetv5_300m_enc: expected a model with a classifier'):
        GLMCModule(encoder)


def test_an_unknown_model_is_an_error_with_near_names():
    with pytest.raises(InputError, match='--model resnet81: not a model of timm .*; nearest: .*resnet18') as error:
        create_backbone('resnet81', 5)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('kwargs', [dict(no_such_option=1), dict(checkpoint_path='/no/such/file.safetensors')])
def test_what_timm_cannot_create_is_one_line(kwargs):
    with pytest.raises(InputError) as error:
        create_backbone('resnet32_cifar', 5, **kwargs)
    assert str(error.value).startswith('--')
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('name, img_size, in_chans', [('test_vit', 64, 1), ('resnet18', 48, 1), ('test_convnext', 64, 3)])
def test_size_and_channels_reach_the_model(name, img_size, in_chans):
    backbone = seeded_backbone(name, img_size, in_chans=in_chans).eval()
    assert backbone(torch.zeros(1, in_chans, img_size, img_size)).shape == (1, 5)


@pytest.mark.parametrize('name, width, num_classes, parameters', [
    ('resnet32_cifar', 16, 10, 464_154), ('resnet32_cifar', 16, 100, 470_004), ('resnet32x4_cifar', 64, 100, 7_409_316)])
def test_cifar_nets_have_their_size(name, width, num_classes, parameters):
    # 31 convolutions without bias, each with a BatchNorm: the stem, then 5 blocks of 2 in 3 stages
    channels = [3, width, *[width] * 10, *[2 * width] * 10, *[4 * width] * 10]
    body = sum(9 * c_in * c_out + 2 * c_out for c_in, c_out in zip(channels[:-1], channels[1:], strict=True))
    assert body + (4 * width + 1) * num_classes == parameters
    assert sum(p.numel() for p in create_backbone(name, num_classes).parameters()) == parameters


def test_shortcut_subsamples_and_pads_with_zeros():
    block = BasicBlock(4, 8, stride=2).eval()
    torch.nn.init.zeros_(block.conv2.weight)  # the residual branch adds nothing
    x = torch.rand(2, 4, 6, 6)
    expected = torch.zeros(2, 8, 3, 3)
    for channel in range(4):
        for row in range(3):
            for column in range(3):
                expected[:, 2 + channel, row, column] = x[:, channel, 2 * row, 2 * column]
    with torch.no_grad():
        torch.testing.assert_close(block(x), expected)


def test_block_is_two_convolutions_and_its_input():
    torch.manual_seed(0)
    block, x = BasicBlock(4, 4).eval(), torch.rand(2, 4, 6, 6)
    scale = 1 / (1 + 1e-5) ** 0.5  # BatchNorm as it starts: mean 0, variance 1, eps 1e-5
    with torch.no_grad():
        inner = (F.conv2d(x, block.conv1.weight, padding=1) * scale).clamp(min=0)
        expected = (F.conv2d(inner, block.conv2.weight, padding=1) * scale + x).clamp(min=0)
        torch.testing.assert_close(block(x), expected)


def test_cifar_net_stages():
    net = create_backbone('resnet32_cifar', 10).eval()
    x = torch.rand(1, 3, 32, 32)
    features = net.forward_features(x)
    assert features.shape == (1, 64, 8, 8)
    pre_logits = net.forward_head(features, pre_logits=True)
    torch.testing.assert_close(pre_logits, features.mean((2, 3)))
    assert torch.equal(net.forward_head(features), net(x))
    assert torch.equal(net.fc(pre_logits), net(x))
    assert [len(stage) for stage in net.stages] == [5, 5, 5]
    assert [block.stride for stage in net.stages for block in stage] == [1] * 5 + [2] + [1] * 4 + [2] + [1] * 4


def test_cifar_net_resets_its_classifier():
    net = create_backbone('resnet32_cifar', 10)
    x = torch.rand(2, 3, 32, 32)
    net.reset_classifier(7, 'max')
    assert net(x).shape == (2, 7)
    torch.testing.assert_close(
        net.forward_head(torch.arange(8.0).view(1, 2, 2, 2), pre_logits=True), torch.tensor([[3.0, 7.0]]))
    net.reset_classifier(0)
    assert net(x).shape == (2, 64)
    assert net.num_classes == 0


def test_cifar_net_drops_out_before_its_classifier():
    net = create_backbone('resnet32_cifar', 10, drop_rate=0.5).train()
    pooled = net.forward_head(torch.ones(4, 64, 8, 8), pre_logits=True)
    assert set(pooled.unique().tolist()) == {0.0, 2.0}


def test_gradient_checkpointing_changes_no_gradient():
    plain = seeded_backbone('resnet32_cifar').train()
    saving = copy.deepcopy(plain)
    saving.set_grad_checkpointing()
    x = torch.rand(4, 3, 32, 32)
    for net in (plain, saving):
        net(x).square().sum().backward()
    assert saving.grad_checkpointing
    assert not plain.grad_checkpointing
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize('name, img_size, found', [
    ('levit_128s', 64, '2 heads'), ('dla46_c', 64, 'Conv2d'), ('efficientvit_m0', 64, '')])
def test_what_cannot_be_folded_is_one_line(name, img_size, found):
    backbone = create_backbone(name, 5, img_size=img_size)
    with pytest.raises(InputError, match=f'--model {name}: expected a classifier that is one linear layer.*{found}'):
        linear_classifier(backbone)
