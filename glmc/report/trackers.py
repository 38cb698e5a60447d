"""Accelerate's trackers beside summary.csv: TensorBoard, Weights & Biases, Trackio."""
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
    """The trackers' names, once each.

    Raises:
        InputError: If a package is missing.
    """
    wanted = list(dict.fromkeys(names.split(','))) if names else []
    for name in wanted:
        if find_spec(name) is None:
            raise InputError(f'--report-to {name}: the package is not installed: pip install {name}')
    return wanted


def start_trackers(accelerator: Accelerator, names: Sequence[str], folder: Path, options: dict) -> None:
    """Start the trackers and store the options; from now on `accelerator.log` and `log_pictures` reach them.

    Args:
        accelerator: Of the run.
        names: Of `require_trackers`.
        folder: Of the run, whose name the trackers show; TensorBoard and Weights & Biases write below it.
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
    """A row of summary.csv, its empty cells aside."""
    if accelerator.trackers:
        accelerator.log({name: value for name, value in row.items() if name != 'epoch' and value != ''}, step=row['epoch'])


def finish_trackers(accelerator: Accelerator) -> None:
    """Close the trackers; `accelerator.end_training` would also take the process group from under the other processes."""
    for tracker in accelerator.trackers:
        tracker.finish()


def log_pictures(accelerator: Accelerator, name: str, pictures: Sequence[Picture], step: int) -> None:
    """Pictures of one size, the images of each above each other, to the trackers that take them."""
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
