"""Fixed targets of classes on the unit sphere, and their assignment to classes (TSC; arXiv 2111.13998)."""
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment  # a requirement of scikit-learn
from torch import Tensor, nn

CENTROID_MOMENTUM = 0.9


class Targets(nn.Module):
    """Evenly spread targets, the running mean direction of each class, and which target each class has.

    Args:
        num_classes: C.
        width: d.
    """

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.register_buffer('vectors', spread_targets(num_classes, width))
        self.register_buffer('centroids', torch.zeros(num_classes, width))
        self.register_buffer('assigned', torch.arange(num_classes))
        self.register_buffer('assigned_at', torch.tensor(-1.0, dtype=torch.float64))

    def of_classes(self) -> Tensor:
        """(C, d) target of each class."""
        return self.vectors[self.assigned]

    @torch.no_grad()
    def follow(self, features: Tensor, labels: Tensor, accept: Tensor) -> None:
        """Move the centroids towards the mean directions of a batch, in place; nothing waits for the device.

        Args:
            features: (n, d) unit features.
            labels: (n,) labels; rows of label -1 do not count.
            accept: Scalar bool; false leaves the centroids as they are.
        """
        members = labels == torch.arange(len(self.vectors), device=labels.device)[:, None]  # (C, n)
        means = F.normalize(torch.where(members[..., None], features, 0.0).sum(1), dim=1)
        moved = F.normalize(CENTROID_MOMENTUM * self.centroids + (1 - CENTROID_MOMENTUM) * means, dim=1)
        self.centroids.copy_(torch.where(members.any(1, keepdim=True) & accept, moved, self.centroids))

    def assign(self, progress: float) -> None:
        """Assign targets to classes for the largest sum of cosines to their centroids, once for each value of progress.

        A run that resumes within an epoch keeps its assignment. It waits for the device.
        """
        if self.assigned_at.item() != progress:
            cosines = self.centroids.double() @ self.vectors.double().T
            self.assigned.copy_(torch.from_numpy(linear_sum_assignment(cosines.cpu().numpy(), maximize=True)[1]))
            self.assigned_at.fill_(progress)


def spread_targets(num_classes: int, width: int, steps: int = 10_000, temperature: float = 0.07, seed: int = 0) -> Tensor:
    """(C, d) unit vectors that minimise 1/C Σ_i log Σ_j exp(t_i·t_j / T); with C <= d + 1 the corners of a regular simplex.

    Args:
        num_classes: C.
        width: d.
        steps: Steps of Adam without such a simplex.
        temperature: T.
        seed: Seed of the rotation of the simplex, or of the start.
    """
    generator = torch.Generator().manual_seed(seed)
    if num_classes <= width + 1:
        rotation, _ = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))
        centred = torch.eye(num_classes, dtype=torch.float64) - 1 / num_classes
        basis = torch.linalg.svd(centred).Vh[:num_classes - 1]
        return F.normalize(centred @ basis.T @ rotation[:num_classes - 1], dim=1).float()
    device = 'cuda' if torch.cuda.is_available() else 'cpu'  # minutes on a core for 1,000 classes
    points = torch.randn(num_classes, width, generator=generator).to(device).requires_grad_()
    optimizer = torch.optim.Adam([points], lr=1e-3)
    for _ in range(steps):
        unit = F.normalize(points, dim=1)
        optimizer.zero_grad()
        (unit @ unit.T / temperature).logsumexp(1).mean().backward()
        optimizer.step()
    return F.normalize(points.detach(), dim=1).cpu()
