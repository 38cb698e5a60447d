"""Accelerate's trackers TensorBoard, Weights & Biases and Trackio, in addition to summary.csv."""
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import filter_trackers

from glmc.errors import InputError
from glmc.report.pictures import Picture

PROJECT = 'glmc'


def require_trackers(names: str | None) -> list[str]:
    """Return the names of the trackers without repetitions.

    Args:
        names: Comma-separated names, or None.

    Raises:
        InputError: If a package is missing.
    """
    wanted = list(dict.fromkeys(names.split(','))) if names else []
    for name in wanted:
        if find_spec(name) is None:
            raise InputError(f'--report-to {name}: the package is not installed: pip install {name}')
    return wanted


def start_trackers(accelerator: Accelerator, names: Sequence[str], folder: Path, options: dict) -> None:
    """Start the trackers and log the options; `accelerator.log` and `log_pictures` write to them afterwards.

    Args:
        accelerator: Accelerator of the run.
        names: Result of `require_trackers`.
        folder: Run folder; its name is the name of the run, TensorBoard and Weights & Biases write below it.
        options: Hyper-parameters.
    """
    if not names:
        return
    accelerator.project_configuration.logging_dir = str(folder)
    accelerator.log_with = filter_trackers(list(names), str(folder))
    kwargs = {'wandb': dict(name=folder.name, dir=str(folder)), 'trackio': dict(name=folder.name)}
    flat = {name: value if isinstance(value, (int, float, str)) else str(value) for name, value in options.items()}
    started = {name: kwargs[name] for name in names if name in kwargs}
    accelerator.init_trackers('tensorboard' if list(names) == ['tensorboard'] else PROJECT, flat, started)


def log_row(accelerator: Accelerator, row: dict) -> None:
    """Log a row of summary.csv without its empty cells."""
    if accelerator.trackers:
        accelerator.log({name: value for name, value in row.items() if name != 'epoch' and value != ''}, step=row['epoch'])


def finish_trackers(accelerator: Accelerator) -> None:
    """Close the trackers; `accelerator.end_training` would also destroy the process group that others still use."""
    for tracker in accelerator.trackers:
        tracker.finish()


def log_pictures(accelerator: Accelerator, name: str, pictures: Sequence[Picture], step: int) -> None:
    """Log pictures to the trackers that support images, the images of each picture one above the other.

    Args:
        accelerator: Accelerator of the run.
        name: Name of the series.
        pictures: Pictures of equal size.
        step: Epoch.
    """
    if not pictures:
        return
    stacked = [np.concatenate([np.asarray(image.convert('RGB')) for image in picture.images]) for picture in pictures]
    for tracker in accelerator.trackers:
        if tracker.name == 'tensorboard':
            tracker.log_images({name: np.stack(stacked)}, step=step, dataformats='NHWC')
        elif tracker.name == 'wandb':
            tracker.log_images({name: stacked}, step=step)
        elif tracker.name == 'trackio':
            import trackio
            tracker.log({f'{name}/{k}': trackio.Image(image) for k, image in enumerate(stacked)}, step=step)
