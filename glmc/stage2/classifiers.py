"""Classifiers for the features of a frozen encoder: linear layers, and nearest neighbours. No rule requires a search."""
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from glmc.losses.classification import LogitAdjustedLoss, effective_number_weights, prior_adjustment
from glmc.models.classifier import cap_norms, norm_radius
from glmc.models.cosine import fold_cosine
from glmc.stage2.features import Features
from glmc.stage2.probe import READ, Linear, class_means, linear_probe

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage1:
    """The classifier of the first stage.

    Args:
        linear: Its weights.
        counts: (C,) images per class that it was trained on.
        prior: (C,) probabilities of the class prior that it embodies.
        conventional: GLMC's conventional classifier, which learns the training prior; None if unknown.
    """
    linear: Linear
    counts: list[int]
    prior: Sequence[float]
    conventional: Linear | None = None


def train_linear(
        logits: Callable[[Tensor], Tensor], parameters: list[Tensor], features: Features,
        loss: Callable[[Tensor, Tensor], Tensor], *, lr: float, epochs: int, weight_decay: float,
        generator: torch.Generator, batch_size: int = 64, class_balanced: bool = False,
        after_step: Callable[[], None] = lambda: None, after_epoch: Callable[[], None] = lambda: None) -> None:
    """Train parameters in place by SGD with momentum 0.9 and a cosine to 0, one random view of each image an epoch.

    Args:
        logits: Function of (B, D) features that returns (B, C) logits.
        parameters: Tensors to train.
        features: Features of the training images.
        loss: Function of (B, C) logits and (B,) labels.
        lr: Learning rate of the first epoch.
        epochs: Passes over the images.
        weight_decay: L2 penalty on all parameters.
        generator: Source of the order and the views.
        batch_size: Images per step.
        class_balanced: Sample images with replacement, every class equally often, instead of each once.
        after_step: Called after every step.
        after_epoch: Called after every epoch.
    """
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    size = len(features)
    class_weights = 1 / torch.bincount(features.labels).double()
    for _ in range(epochs):
        if class_balanced:
            order = torch.multinomial(class_weights[features.labels], size, replacement=True, generator=generator)
        else:
            order = torch.randperm(size, generator=generator)
        views = torch.randint(features.num_views, (size,), generator=generator)
        for indices, view in zip(order.split(batch_size), views.split(batch_size), strict=True):
            optimizer.zero_grad()
            batch, labels = features.rows(indices, view), features.labels[indices]
            loss(logits(batch.to(parameters[0].device)), labels.to(parameters[0].device)).backward()
            optimizer.step()
            after_step()
        schedule.step()
        after_epoch()


def softmax_bce(logits: Tensor, labels: Tensor, class_weight: Tensor) -> Tensor:
    """-w_y·(log p_y + Σ_{c≠y} log(1 - p_c)), p = softmax: binary cross-entropy of every class probability.

    The class-balanced loss of the Weight Balancing code (arXiv 2203.14197). Its mean over classes, too, makes the gradient
    about C times smaller than that of weighted cross-entropy.

    Args:
        logits: (B, C) logits.
        labels: (B,) labels.
        class_weight: (C,) weights w.

    Returns:
        Scalar, mean over all B·C probabilities.
    """
    one_hot = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    return F.binary_cross_entropy(logits.softmax(1), one_hot, weight=class_weight[labels][:, None])


class Classifier:
    """Base of the rules that compute a classifier from features: frozen dataclasses of hyper-parameters.

    Fields of type str list their choices in the field's metadata.
    """

    grid: ClassVar[dict] = {}  # field -> values to search
    short_grid: ClassVar[dict | None] = None  # the same for a probe of a pretrained encoder; None for `grid`
    prior: ClassVar[str] = 'uniform'  # class prior that the classifier embodies
    two_heads: ClassVar[bool] = False  # whether `Stage1.conventional` is required

    def class_prior(self, stage1: Stage1) -> str | list[float]:
        """Class prior that the result of `fit` embodies: `train`, `uniform`, or C probabilities."""
        return self.prior

    def fit(self, stage1: Stage1, features: Features, generator: torch.Generator) -> Linear:
        """Compute a new linear layer; the same for the same state of the generator. Changes none of its arguments.

        Args:
            stage1: Classifier of the first stage.
            features: Features of the training images.
            generator: Source of all random numbers.
        """
        raise NotImplementedError

    @staticmethod
    def path(candidates: Sequence['Classifier'], stage1: Stage1, features: Features, seed: int) -> Iterator[Linear]:
        """Fit the candidates of a search in turn; a rule may share work among them."""
        for candidate in candidates:
            yield candidate.fit(stage1, features, torch.Generator().manual_seed(seed))

    def train_copy(
            self, linear: Linear, features: Features, loss: Callable, generator: torch.Generator, **options) -> Linear:
        """Train a copy of a linear layer with the lr, epochs and weight decay of this rule."""
        linear = linear.trainable()
        train_linear(linear, list(linear), features, loss, lr=self.lr, epochs=self.epochs, weight_decay=self.weight_decay,
                     generator=generator, **options)
        return linear.detached()


@dataclass(frozen=True)
class MaxNorm(Classifier):
    """Class-balanced loss under strong weight decay, rows capped at δ = min + radius·(max - min) of their initial norms.

    Weight Balancing (arXiv 2203.14197), as used by GLMC (arXiv 2305.08661, Eq. 13). `project` caps after every step, as in
    GLMC's paper, or every epoch, as in the published code. `loss` is weighted cross-entropy (ce) or, as in the published
    code, `softmax_bce` (bce). The default is ce, which has the higher class mean on held-out images once the weight decay
    and the learning rate are chosen there (results/maxnorm-loss.csv).
    """
    lr: float = 0.01
    epochs: int = 10
    weight_decay: float = 0.1
    beta: float = 0.9999
    radius: float = 0.1
    project: str = field(default='step', metadata=dict(choices=('step', 'epoch')))
    loss: str = field(default='ce', metadata=dict(choices=('ce', 'bce')))
    grid: ClassVar[dict] = dict(radius=(0.05, 0.1, 0.3, 1.0), weight_decay=(0.01, 0.1))
    short_grid: ClassVar[dict] = dict(weight_decay=(0.01,))

    def fit(self, stage1: Stage1, features: Features, generator: torch.Generator) -> Linear:
        linear = stage1.linear.trainable()
        radius = norm_radius(linear.weight, self.radius)
        weight = effective_number_weights(features.counts(len(linear.bias)), self.beta).to(linear.bias.device)
        losses = {'ce': partial(F.cross_entropy, weight=weight), 'bce': partial(softmax_bce, class_weight=weight)}
        clipped, clipped_per_epoch = [], []

        @torch.no_grad()
        def project() -> None:
            clipped.append((linear.weight.norm(dim=1) > radius).sum())
            linear.weight.copy_(cap_norms(linear.weight, radius))

        def after_epoch() -> None:
            if self.project == 'epoch':
                project()
            clipped_per_epoch.append(f'{torch.stack(clipped).float().mean().item():.0f}')
            clipped.clear()

        train_linear(linear, list(linear), features, losses[self.loss], lr=self.lr, epochs=self.epochs,
                     weight_decay=self.weight_decay, generator=generator, after_epoch=after_epoch,
                     after_step=project if self.project == 'step' else lambda: None)
        _logger.info(f'maxnorm: radius {radius.item():.3f}, rows clipped at a projection, by epoch: '
                     + ' '.join(clipped_per_epoch))
        return linear.detached()


@dataclass(frozen=True)
class BalancedSoftmax(Classifier):
    """Cross-entropy of logits + log prior; the exported classifier omits the prior (arXiv 2007.10740).

    The learning rate is ours, chosen on held-out images of short runs (results/README.md).
    """
    lr: float = 0.1
    epochs: int = 10
    weight_decay: float = 5e-4
    grid: ClassVar[dict] = dict(lr=(0.001, 0.01, 0.1))

    def fit(self, stage1: Stage1, features: Features, generator: torch.Generator) -> Linear:
        bias = stage1.linear.bias
        loss = LogitAdjustedLoss(features.counts(len(bias))).to(bias.device)
        return self.train_copy(stage1.linear, features, loss, generator)


@dataclass(frozen=True)
class LogitAdjust(Classifier):
    """Bias - log prior, without training (arXiv 2007.07314).

    Without τ, the prior is the one that stage 1 embodies, and a uniform one changes nothing. With τ, the adjustment is
    τ·log of the training prior.
    """
    tau: float | None = None
    grid: ClassVar[dict] = dict(tau=tuple(k / 10 for k in range(-5, 21)))

    def class_prior(self, stage1: Stage1) -> str | list[float]:
        if self.tau is None:
            return 'uniform'
        prior = prior_adjustment(stage1.prior).double() - prior_adjustment(stage1.counts, self.tau).double()
        return prior.softmax(0).tolist()

    def fit(self, stage1: Stage1, features: Features, generator: torch.Generator) -> Linear:
        weight, bias = stage1.linear
        if self.tau is not None:
            adjustment = prior_adjustment(stage1.counts, self.tau)
        elif min(stage1.prior) == max(stage1.prior):
            return stage1.linear
        else:
            adjustment = prior_adjustment(stage1.prior)
        return Linear(weight, bias - adjustment.to(bias.device))


@dataclass(frozen=True)
class CRT(Classifier):
    """A new classifier, trained on class-balanced sampling (cRT; arXiv 1910.09217; its lr 0.2 is for a batch of 512)."""
    lr: float = 0.025
    epochs: int = 10
    weight_decay: float = 5e-4
    grid: ClassVar[dict] = dict(lr=(0.0025, 0.025, 0.1))
    short_grid: ClassVar[dict] = dict(lr=(0.1,))

    def fit(self, stage1: Stage1, features: Features, generator: torch.Generator) -> Linear:
        bound = stage1.linear.weight.shape[1] ** -0.5
        initial = Linear(*(torch.empty(tensor.shape).uniform_(-bound, bound, generator=generator).to(tensor.device)
                           for tensor in stage1.linear))
        return self.train_copy(initial, features, F.cross_entropy, generator, class_balanced=True)


@dataclass(frozen=True)
class LWS(Classifier):
    """A scale for each class's logit, trained on class-balanced sampling (arXiv 1910.09217; its lr 0.2 is for 512)."""
    lr: float = 0.025
    epochs: int = 5
    weight_decay: float = 5e-4
    grid: ClassVar[dict] = dict(lr=(0.0025, 0.025, 0.1))
    short_grid: ClassVar[dict] = dict(lr=(0.0025,))

    def fit(self, stage1: Stage1, features: Features, generator: torch.Generator) -> Linear:
        linear = stage1.linear.detached()
        scale = torch.ones_like(linear.bias, requires_grad=True)
        train_linear(lambda batch: scale * linear(batch), [scale], features, F.cross_entropy, lr=self.lr,
                     epochs=self.epochs, weight_decay=self.weight_decay, generator=generator, class_balanced=True)
        return linear.scaled(scale.detach())


@dataclass(frozen=True)
class TauNorm(Classifier):
    """Logits divided by ‖w_c‖^τ (arXiv 1910.09217; there without bias).

    A common factor, the geometric mean of ‖w_c‖^τ, keeps the confidence at the level of stage 1.
    """
    tau: float = 0.7
    grid: ClassVar[dict] = dict(tau=tuple(k / 10 for k in range(21)))

    def fit(self, stage1: Stage1, features: Features, generator: torch.Generator) -> Linear:
        log_norm = stage1.linear.weight.norm(dim=1).clamp(min=1e-12).log()
        return stage1.linear.scaled((self.tau * (log_norm.mean() - log_norm)).exp())


@dataclass(frozen=True)
class LabelOverSmoothing(Classifier):
    """Cross-entropy with nearly uniform labels (LOS, ICLR 2025; arXiv 2403.00250)."""
    lr: float = 5e-4
    epochs: int = 20
    weight_decay: float = 0.0
    smoothing: float = 0.98
    grid: ClassVar[dict] = dict(lr=(5e-4, 5e-3, 5e-2), smoothing=(0.9, 0.98))
    short_grid: ClassVar[dict] = dict(lr=(5e-3,))

    def fit(self, stage1: Stage1, features: Features, generator: torch.Generator) -> Linear:
        loss = partial(F.cross_entropy, label_smoothing=self.smoothing)
        return self.train_copy(stage1.linear, features, loss, generator)


@dataclass(frozen=True)
class NearestClassMean(Classifier):
    """Cosine to the class mean of the normalised features of the plain views (NCM; arXiv 1910.09217)."""
    scale: float = 30.0

    def fit(self, stage1: Stage1, features: Features, generator: torch.Generator) -> Linear:
        means, norm = (tensor.to(stage1.linear.device) for tensor in class_means(features, len(stage1.counts)))
        return Linear(*fold_cosine(means, self.scale, norm))


@dataclass(frozen=True)
class HeadAverage(Classifier):
    """w·cb + (1-w)·(c - τ·log π): the average logits of GLMC's two classifiers, exactly one linear layer."""
    weight: float = 0.5
    tau: float = 0.0
    grid: ClassVar[dict] = dict(weight=tuple(k / 10 for k in range(11)), tau=(0.0, 0.5, 1.0))
    two_heads: ClassVar[bool] = True

    def fit(self, stage1: Stage1, features: Features, generator: torch.Generator) -> Linear:
        weight, bias = stage1.conventional
        adjusted = Linear(weight, bias - prior_adjustment(stage1.counts, self.tau).to(bias.device))
        return Linear(*(torch.lerp(c, cb, self.weight) for c, cb in zip(adjusted, stage1.linear, strict=True)))


@dataclass(frozen=True)
class LinearProbe(Classifier):
    """Multinomial logistic regression on standardised features, from zero: stage 1 of an encoder without a classifier."""
    weight_decay: float = 5e-4
    grid: ClassVar[dict] = dict(weight_decay=(1e-2, 2e-3, 5e-4, 1e-4))
    prior: ClassVar[str] = 'train'

    def adjustment(self, counts: list[int]) -> Tensor | None:
        """(C,) addend of the logits in the loss; None for cross-entropy."""
        return None

    def fit(self, stage1: Stage1, features: Features, generator: torch.Generator, **options) -> Linear:
        device, num_classes = stage1.linear.bias.device, len(stage1.counts)
        return linear_probe(features, num_classes, self.adjustment(features.counts(num_classes)), device=device,
                            weight_decay=self.weight_decay, generator=generator, **options)

    @staticmethod
    def path(candidates, stage1: Stage1, features: Features, seed: int) -> Iterator[Linear]:
        """Fit from strong to weak weight decay, each briefly from the one before."""
        fits, options = {}, {}
        for candidate in sorted(candidates, key=lambda candidate: -candidate.weight_decay):
            linear = candidate.fit(stage1, features, torch.Generator().manual_seed(seed), **options)
            fits[candidate], options = linear, dict(start=linear, epochs=10)
        return (fits[candidate] for candidate in candidates)


@dataclass(frozen=True)
class BalancedProbe(LinearProbe):
    """Linear probe by cross-entropy of logits + log prior; the exported classifier omits the prior (arXiv 2007.10740)."""
    prior: ClassVar[str] = 'uniform'

    def adjustment(self, counts: list[int]) -> Tensor:
        return prior_adjustment(counts)


class Moments(NamedTuple):
    """Class means and tied covariance."""
    means: Tensor  # (C, D) float64
    covariance: Tensor  # (D, D) float64

    @classmethod
    def of(cls, features: Features, num_classes: int) -> 'Moments':
        """Sum the plain views over two passes in float64; the covariance is that within the classes, divided by N."""
        sums = torch.zeros(num_classes, features.width, dtype=torch.float64)
        for batch, labels in features.batches(READ):
            sums.index_add_(0, labels, batch.double())
        means = sums / torch.tensor(features.counts(num_classes)).clamp(min=1)[:, None]
        covariance = torch.zeros(features.width, features.width, dtype=torch.float64)
        for batch, labels in features.batches(READ):
            centred = batch.double() - means[labels]
            covariance.addmm_(centred.T, centred)
        return cls(means, covariance / len(features))


@dataclass(frozen=True)
class LinearDiscriminant(Classifier):
    """Linear discriminant analysis with equal priors (Fisher 1936).

    The tied covariance is that of scikit-learn's LinearDiscriminantAnalysis(solver='lsqr'), shrunk to
    (1 - s)·Σ + s·tr(Σ)/D·I.
    """
    shrinkage: float = 0.1
    grid: ClassVar[dict] = dict(shrinkage=(0.01, 0.1, 0.5, 0.9))

    def fit(self, stage1: Stage1, features: Features, generator: torch.Generator) -> Linear:
        return self.solve(Moments.of(features, len(stage1.counts)), stage1.linear.bias.device)

    @staticmethod
    def path(candidates, stage1: Stage1, features: Features, seed: int) -> Iterator[Linear]:
        moments = Moments.of(features, len(stage1.counts))
        for candidate in candidates:
            yield candidate.solve(moments, stage1.linear.bias.device)

    def solve(self, moments: Moments, device: torch.device) -> Linear:
        """Weights Σ⁻¹μ_c and biases -½ μ_cᵀΣ⁻¹μ_c; a class without images gets the mean of the others' weights."""
        means, covariance = moments
        variance = covariance.diagonal().mean()
        shrunk = (1 - self.shrinkage) * covariance
        shrunk.diagonal().add_(self.shrinkage * variance + 1e-9 * variance + 1e-30)  # so that it has an inverse
        weight = torch.linalg.solve(shrunk, means.T).T
        bias = -(weight * means).sum(1) / 2
        centre = weight.mean(0)  # a shift that all classes share, which keeps the logits small
        shift = bias.mean()
        return Linear((weight - centre).float().to(device), (bias - shift).float().to(device))


class Neighbours(NamedTuple):
    """Votes of the nearest training images."""
    features: Features
    num_classes: int
    k: int
    temperature: float
    device: torch.device

    def __call__(self, features: Tensor) -> Tensor:
        """(B, D) features -> (B, C) log shares of the votes."""
        query = F.normalize(features)
        best = query.new_full((len(query), 0), 0)
        classes = torch.zeros(len(query), 0, dtype=torch.int64, device=query.device)
        for batch, labels in self.features.batches(READ):
            similarity = query @ F.normalize(batch.to(query.device)).T
            best, classes = torch.cat((best, similarity), 1), torch.cat(
                (classes, labels.to(query.device).expand(len(query), -1)), 1)
            best, places = best.topk(min(self.k, best.shape[1]))
            classes = classes.gather(1, places)
        votes = query.new_zeros(len(query), self.num_classes)
        votes.scatter_add_(1, classes, (best / self.temperature).softmax(1))
        return votes.clamp(min=1e-12).log()


@dataclass(frozen=True)
class NearestNeighbours(Classifier):
    """Votes of the k training images of highest cosine, with weights exp(cosine / T) (arXiv 1805.01978); not linear."""
    k: int = 20
    temperature: float = 0.07

    def fit(self, stage1: Stage1, features: Features, generator: torch.Generator) -> Neighbours:
        return Neighbours(features, len(stage1.counts), self.k, self.temperature, stage1.linear.bias.device)


CLASSIFIERS = {
    'maxnorm': MaxNorm, 'balanced_softmax': BalancedSoftmax, 'logit_adjust': LogitAdjust, 'crt': CRT, 'lws': LWS,
    'tau_norm': TauNorm, 'los': LabelOverSmoothing, 'ncm': NearestClassMean, 'lda': LinearDiscriminant,
    'knn': NearestNeighbours, 'average': HeadAverage}
PROBE = 'linear_probe'
PROBE_CLASSIFIERS = {  # without a trained classifier
    PROBE: LinearProbe, **{name: rule for name, rule in CLASSIFIERS.items() if not rule.two_heads},
    'balanced_softmax': BalancedProbe}
