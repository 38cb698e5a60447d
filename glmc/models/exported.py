"""The form of a trained model that is evaluated and exported."""
from torch import nn

from glmc.models.experts import Experts
from glmc.models.lora import merge_adapters


def exported_form(model: nn.Module) -> nn.Module:
    """Plain timm model of a trained one: adapters are merged, experts become one wide net where they can.

    Returns:
        A copy; the model itself if it is plain, or experts that exist in no plain form.
    """
    wide = model.widened() if isinstance(model, Experts) else None
    return merge_adapters(model) if wide is None else wide
