"""Distillation from the logits of a teacher."""
import torch
import torch.nn.functional as F
from torch import Tensor


def distillation(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """τ²·KL(softmax(t/τ) ‖ softmax(s/τ)) (Hinton et al., arXiv 1503.02531).

    Args:
        logits: (B, C) logits s of the student.
        teacher_logits: (B, C) logits t of the teacher; constants.
        temperature: τ.

    Returns:
        Scalar, mean over the batch; 0 for equal logits.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_p = (logits.to(dtype) / temperature).log_softmax(1)
    log_teacher = (teacher_logits.detach().to(dtype) / temperature).log_softmax(1)
    return temperature ** 2 * F.kl_div(log_p, log_teacher, reduction='batchmean', log_target=True)
