"""Trained models on disk and on the Hub: export, loading, model card, upload."""
from glmc.export.card import model_card, write_card
from glmc.export.export import export_checkpoint, export_model, verify_export
from glmc.export.hub import PushError, push_export
from glmc.export.load import TrainedModel, load_trained

__all__ = [
    'PushError',
    'TrainedModel',
    'export_checkpoint',
    'export_model',
    'load_trained',
    'model_card',
    'push_export',
    'verify_export',
    'write_card',
]
