"""Trained models on disk and on the Hub: export, loading, model card, upload."""
from glmc.export.export import export_checkpoint, export_model
from glmc.export.load import TrainedModel, load_trained

__all__ = [
    'TrainedModel',
    'export_checkpoint',
    'export_model',
    'load_trained',
]
