"""Contrastive losses between unit features: one free function per equation."""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from glmc.models.classifier import no_autocast


def similarities(anchors: Tensor, candidates: Tensor, temperature: float) -> Tensor:
    """(N, M) dot products over T, in float32 or float64 whatever autocast says: 8 bits of bfloat16 err by 0.1 at T = 0.05.

    Args:
        anchors: (N, d).
        candidates: (M, d).
        temperature: T.
    """
    dtype = torch.promote_types(anchors.dtype, torch.float32)
    with no_autocast(anchors):
        return anchors.to(dtype) @ candidates.to(dtype).T / temperature


def supervised_contrastive(
        anchors: Tensor, labels: Tensor, candidates: Tensor, candidate_labels: Tensor, own: Tensor,
        temperature: float) -> Tensor:
    """-mean_i 1/|P_i| Σ_{p ∈ P_i} log softmax_{a ≠ i}(z_i·z_a / T)_p (SupCon; arXiv 2004.11362, Eq. 2).

    P_i are the other candidates of the anchor's class. The authors' factor T / 0.07 is left to the learning rate.

    Args:
        anchors: (N, d) unit features.
        labels: (N,) labels.
        candidates: (M, d) unit features, which contain the anchors.
        candidate_labels: (M,) labels; candidates of label -1 are ignored.
        own: (N,) place of each anchor among the candidates.
        temperature: T.

    Returns:
        Scalar; an anchor without positives adds 0.
    """
    others = (candidate_labels >= 0).repeat(len(anchors), 1).scatter(1, own[:, None], False)  # (N, M)
    positives = others & (labels[:, None] == candidate_labels)
    log_p = log_softmax(similarities(anchors, candidates, temperature), others)
    return -(masked_sum(log_p, positives) / positives.sum(1).clamp(min=1)).mean()


def balanced_contrastive(
        anchors: Tensor, labels: Tensor, candidates: Tensor, candidate_labels: Tensor, own: Tensor, prototypes: Tensor,
        temperature: float) -> Tensor:
    """SupCon with a prototype of each class, in which each class weighs alike in the denominator (BCL; arXiv 2207.09052).

    -mean_i 1/|P_i| Σ_{p ∈ P_i} [ z_i·z_p/T - log Σ_{j ≠ i} exp(z_i·z_j/T) / u_ij ], over candidates and prototypes; u_ij is
    the number of those of j's class, without i.

    Args:
        anchors, labels, candidates, candidate_labels, own: As those of `supervised_contrastive`.
        prototypes: (C, d) unit features.
        temperature: T.

    Returns:
        Scalar.
    """
    classes = torch.arange(len(prototypes), device=labels.device)
    all_labels = torch.cat([candidate_labels, classes])  # (M + C,)
    others = (all_labels >= 0).repeat(len(anchors), 1).scatter(1, own[:, None], False)  # (N, M + C)
    same = labels[:, None] == all_labels
    of_class = (all_labels == classes[:, None]).sum(1)  # (C,) candidates and the prototype
    number = of_class[all_labels.clamp(min=0)] - same.long()  # (N, M + C) u
    sims = similarities(anchors, torch.cat([candidates, prototypes]), temperature)
    number = number.clamp(min=1).to(sims.dtype)  # 0 only for an anchor without another candidate of its class
    denominator = (sims - number.log()).masked_fill(~others, -torch.inf).logsumexp(1, keepdim=True)
    positives = others & same
    return -(masked_sum(sims - denominator, positives) / positives.sum(1)).mean()


def parametric_contrastive(
        anchors: Tensor, labels: Tensor, candidates: Tensor, candidate_labels: Tensor, own: Tensor, logits: Tensor,
        temperature: float, alpha: float, gamma: float = 1.0) -> Tensor:
    """One softmax over class logits and similarities to candidates (PaCo; arXiv 2107.12028, Eq. 4).

    -mean_i [ log p_i(y_i) + α Σ_{j ∈ P_i} log p_i(j) ] / (1 + α·|P_i|), where p_i normalises over the C logits and, with
    weight γ, over z_i·z_j / T of all candidates but i itself. α = γ = 0 is cross-entropy.

    Args:
        anchors, labels, candidates, candidate_labels, own: As those of `supervised_contrastive`.
        logits: (N, C) logits, adjusted by the log prior.
        temperature: T.
        alpha: α, weight of a candidate of the anchor's class; the class logit weighs 1.
        gamma: γ, weight of the candidates in the denominator.

    Returns:
        Scalar.
    """
    sims = similarities(anchors, candidates, temperature)
    others = (candidate_labels >= 0).repeat(len(anchors), 1).scatter(1, own[:, None], False)  # (N, M)
    positives = others & (labels[:, None] == candidate_labels)
    logits = logits.to(sims.dtype)
    weighted = torch.cat([logits, sims + (math.log(gamma) if gamma else -math.inf)], 1)
    included = torch.cat([torch.ones_like(logits, dtype=torch.bool), others], 1)
    log_p = torch.cat([logits, sims], 1) - weighted.masked_fill(~included, -torch.inf).logsumexp(1, keepdim=True)
    weight = torch.cat([F.one_hot(labels, logits.shape[1]), alpha * positives.to(sims.dtype)], 1)  # (N, C + M)
    return -((weight * log_p).sum(1) / weight.sum(1)).mean()


def pick_positives(
        labels: Tensor, queue_labels: Tensor, number: int, uniform: Tensor, positions: Tensor) -> Tensor:
    """Choose at random up to k slots of the queue of each anchor's class (KCL; OpenReview OqtLIabPTit).

    Args:
        labels: (B,) labels.
        queue_labels: (K,) labels of the slots, -1 for an empty one.
        number: k.
        uniform: (K,) random numbers in [0, 1), shared by all anchors, each of which starts at another slot of them.
        positions: (B,) place of each anchor in the batch of all processes.

    Returns:
        (B, K) bool, at most k true in a row.
    """
    size = len(queue_labels)
    start = positions[:, None] * 7919  # a prime: anchors side by side see numbers far apart
    score = uniform[(torch.arange(size, device=labels.device) + start) % size]  # (B, K)
    match = labels[:, None] == queue_labels
    chosen = torch.where(match, score, -1.0).topk(min(number, size), dim=1).indices
    return match & torch.zeros_like(match).scatter(1, chosen, True)


def k_positive_contrastive(
        queries: Tensor, keys: Tensor, queue: Tensor, queue_labels: Tensor, picked: Tensor, temperature: float) -> Tensor:
    """InfoNCE with up to k more positives from a queue (KCL; OpenReview OqtLIabPTit).

    -mean_i [ log p_i(k_i) + Σ_{j ∈ S_i} log p_i(Q_j) ] / (1 + |S_i|), where p_i normalises over z_i·(k_i, Q) / T. Without
    positives it is the loss of MoCo (arXiv 1911.05722).

    Args:
        queries: (B, d) unit features.
        keys: (B, d) unit features of the other view; constants.
        queue: (K, d) unit features.
        queue_labels: (K,) labels of the slots; those of label -1 are ignored.
        picked: (B, K) bool, the positives S_i of `pick_positives`.
        temperature: T.

    Returns:
        Scalar.
    """
    labels = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    return targeted_contrastive(queries, keys, queue, queue_labels, picked, temperature, labels, torch.zeros_like(queue[:1]),
                                target_weight=0.0, active=queries.new_zeros(()))


def targeted_contrastive(
        queries: Tensor, keys: Tensor, queue: Tensor, queue_labels: Tensor, picked: Tensor, temperature: float,
        labels: Tensor, targets: Tensor, target_weight: float, active: Tensor) -> Tensor:
    """`k_positive_contrastive` with a fixed target of each class as a further positive (TSC; arXiv 2111.13998).

    -mean_i [ log p_i(k_i) + Σ_{j ∈ S_i} log p_i(Q_j) + λ·log p_i(t_y) ] / (2 + |S_i|), where p_i normalises over the C
    targets, too; as in the authors' code. Their paper's supplement divides all but the last term, by 1 + k.

    Args:
        queries, keys, queue, queue_labels, picked, temperature: As those of `k_positive_contrastive`.
        labels: (B,) labels.
        targets: (C, d) unit vectors, that of each class.
        target_weight: λ.
        active: Scalar; 0 leaves the targets out, 1 includes them. A tensor, so that a change recompiles nothing.

    Returns:
        Scalar.
    """
    own_key = (queries.to(torch.promote_types(queries.dtype, torch.float32)) * keys).sum(1, keepdim=True) / temperature
    sims = torch.cat([own_key, similarities(queries, torch.cat([queue, targets]), temperature)], 1)  # (B, 1 + K + C)
    included = torch.cat([active.new_ones(1) > 0, queue_labels >= 0, (active > 0).expand(len(targets))])
    log_p = log_softmax(sims, included.expand_as(sims))
    of_key, of_queue, of_targets = log_p.split([1, len(queue), len(targets)], 1)
    of_target = active * target_weight * of_targets.gather(1, labels[:, None])
    total = of_key[:, 0] + masked_sum(of_queue, picked) + of_target[:, 0]
    return -(total / (1 + picked.sum(1) + active)).mean()


def other_classes_contrastive(
        queries: Tensor, keys: Tensor, labels: Tensor, queue: Tensor, queue_labels: Tensor, temperature: float) -> Tensor:
    """InfoNCE among other classes: -mean_i log p_i(k_i), p_i over k_i and the Q_j with y_j ≠ y_i (SSD; arXiv 2109.04075).

    Args:
        queries, keys, queue, queue_labels, temperature: As those of `k_positive_contrastive`.
        labels: (B,) labels.

    Returns:
        Scalar.
    """
    own_key = (queries.to(torch.promote_types(queries.dtype, torch.float32)) * keys).sum(1, keepdim=True) / temperature
    sims = torch.cat([own_key, similarities(queries, queue, temperature)], 1)  # (B, 1 + K)
    others = (queue_labels >= 0) & (labels[:, None] != queue_labels)
    included = torch.cat([torch.ones_like(others[:, :1]), others], 1)
    return -log_softmax(sims, included)[:, 0].mean()


def log_softmax(logits: Tensor, included: Tensor) -> Tensor:
    """Log-softmax over the included entries of each row; the others are left out of the denominator alone."""
    return logits - logits.masked_fill(~included, -torch.inf).logsumexp(1, keepdim=True)


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """(N,) sums of the marked entries of each row."""
    return torch.where(mask, values, 0.0).sum(1)
