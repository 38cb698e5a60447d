"""Model card: README.md of an export, made of what its config.json and metrics.json say."""
import json
import math
import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from glmc.data.profiles import SHOT_NAMES

PLACEHOLDER = 'local-dir:PATH'  # what a push replaces by the repository
METRICS = {  # key of metrics.json -> (metric type of the Hub, name)
    'top1': ('accuracy', 'top-1 accuracy'), 'top5': ('accuracy', 'top-5 accuracy'),
    'many': ('accuracy', 'many-shot accuracy'), 'medium': ('accuracy', 'medium-shot accuracy'),
    'few': ('accuracy', 'few-shot accuracy'), 'class_mean': ('accuracy', 'mean accuracy of the classes'),
    'macro_f1': ('f1', 'macro F1'), 'ece': ('expected_calibration_error', 'ECE'),
}


def write_card(folder: Path) -> Path:
    """Write README.md of an export, with a picture of its plots where there are some."""
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    metrics = json.loads((folder / 'metrics.json').read_text(encoding='utf-8'))
    card = model_card(metrics, config, has_report=(folder / 'report.html').is_file(),
                      has_plots=(folder / 'plots' / 'accuracy.png').is_file())
    (folder / 'README.md').write_text(card, encoding='utf-8')
    return folder / 'README.md'


def model_card(metrics: dict, config: dict, has_report: bool = False, has_plots: bool = False) -> str:
    """Text of the card.

    Args:
        metrics: Of metrics.json.
        config: Of config.json.
        has_report, has_plots: Whether report.html and plots/accuracy.png lie beside the card.
    """
    source = config.get('glmc', {})
    size = config['pretrained_cfg']['input_size'][-1]
    dataset = dataset_name(metrics.get('data'))
    parts = [
        f"# {config['architecture']}, trained with {metrics['method']}",
        f"A plain timm model for {config['num_classes']:,} classes at {size}x{size} pixels, trained on {dataset}, "
        f"{metrics['train_images']:,} images with a long tail.",
        _origin(source), '## Use', _usage(config), '## Measured', _measured(metrics), _pictures(has_report, has_plots),
        '## Training', _training(metrics, source), '## Limits', _limits(metrics)]
    data = card_data(metrics, config)
    return str(ModelCard(f'---\n{data.to_yaml()}\n---\n' + '\n\n'.join(filter(None, parts)) + '\n'))


def card_data(metrics: dict, config: dict) -> ModelCardData:
    """What the Hub reads: library, task, licence, data set, origin, and the metrics."""
    source = config.get('glmc', {})
    known, license = dataset_id(metrics.get('data')), config['pretrained_cfg'].get('license')
    return ModelCardData(
        library_name='timm', pipeline_tag='image-classification', license=license or 'unknown',
        tags=['timm', 'image-classification', 'long-tail', str(metrics['method'])], datasets=known and [known],
        base_model=source.get('base_model'), model_name=f"{config['architecture']}-{metrics['method']}",
        eval_results=_eval_results(metrics) or None)


def _eval_results(metrics: dict) -> list[EvalResult]:
    name = dataset_name(metrics.get('data'))
    where = dict(dataset_type=dataset_id(metrics.get('data')) or _slug(name), dataset_name=name,
                 dataset_split=dataset_name(metrics.get('evaluated_on')))
    return [
        EvalResult(task_type='image-classification', metric_type=kind, metric_value=round(metrics[key], 2),
                   metric_name=title, **where)
        for key, (kind, title) in METRICS.items() if metrics.get(key) is not None and math.isfinite(metrics[key])]


def dataset_name(data: str | None) -> str:
    """Last part of what the user named, so that no path of a machine is shown."""
    return re.sub(r'[\s<>|`\x00-\x1f]+', ' ', Path(data or 'unknown').name).strip() or 'unknown'


def dataset_id(data: str | None) -> str | None:
    """Hub id of a data set, where the user named one: hfds/ORG/NAME or hfds/NAME, not a folder."""
    scheme, _, place = (data or '').partition('/')
    if scheme not in ('hfds', 'hfids') or Path(place).exists() or not re.fullmatch(r'[\w.-]+(/[\w.-]+)?', place):
        return None
    return place


def _slug(name: str) -> str:
    return re.sub(r'[^a-z0-9_.-]+', '-', name.lower()).strip('-') or 'unknown'


def _origin(source: dict) -> str:
    if source.get('base_model'):
        return f"Fine-tuned from `{source['base_model']}`, whose licence and data apply to its weights."
    return 'Started from other weights; their licence and data apply.' if source.get('other_weights') else ''


def _usage(config: dict) -> str:
    ours = config['architecture'].startswith('resnet32')
    note = "This architecture is not one of timm's own: `import glmc` before loading it.\n\n" if ours else ''
    return f"""{note}```python
import timm
model = timm.create_model('{PLACEHOLDER}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
```

The classes are `model.pretrained_cfg['label_names']`, in the order of the outputs."""


def _measured(metrics: dict) -> str:
    if 'top1' not in metrics:
        return 'Not evaluated.'
    few, many = metrics['shot_thresholds']
    ranges = {'many': f'more than {many}', 'medium': f'{few + 1} to {many}', 'few': f'at most {few}'}
    lines = ['| classes | training images | number | accuracy, % | ECE, % |', '|---|---|---|---|---|',
             f"| all images | | {metrics['num_classes']:,} | {metrics['top1']:.2f} | {metrics['ece']:.2f} |"]
    lines += [f"| {name}-shot | {ranges[name]} | {metrics['shot_classes'][name]:,} | {_number(metrics[name])} | "
              f"{_number(metrics.get(f'ece_{name}'))} |" for name in SHOT_NAMES]
    lines += [f"| mean of the classes | | | {_number(metrics['class_mean'])} | |",
              f"| worst class | | | {_number(metrics['worst_class'])} | |"]
    on = f"{metrics['num_images']:,} images of `{dataset_name(metrics['evaluated_on'])}`"
    return '\n'.join(lines) + f'\n\nMeasured on {on}. All figures, class by class, are in `metrics.json`.'


def _number(value: float | None) -> str:
    return '–' if value is None else f'{value:.2f}'


def _pictures(has_report: bool, has_plots: bool) -> str:
    lines = ['![Accuracy of each class over its training images](plots/accuracy.png)'] if has_plots else []
    return '\n\n'.join(lines + (['More plots and tables: `report.html`.'] if has_report else []))


def _training(metrics: dict, source: dict) -> str:
    profile = source.get('profile', {})
    counts = profile.get('class_counts') or [0]
    fingerprint = f", fingerprint `{metrics['fingerprint']}`" if metrics.get('fingerprint') else ''
    facts = [f"{metrics['train_images']:,} images, {max(counts):,} … {min(counts):,} per class{fingerprint}"]
    facts += [f"`{name}`: {value}" for name, value in source.get('recipe', {}).items() if value not in (None, '')]
    facts += [f"seed {metrics['seed']}, {metrics['processes']} process(es), precision {metrics['precision']}, "
              f"{metrics['seconds']:.0f} s on {metrics['device']}"]
    fence = '```' if '```' not in metrics['command'] else '~~~'
    return '\n'.join(f'- {fact}' for fact in facts) + f"\n\n{fence}bash\n{metrics['command']}\n{fence}"


def _limits(metrics: dict) -> str:
    few = (metrics.get('shot_classes') or {}).get('few', 0)
    tail = f' {few:,} classes have few training images: look at their accuracy above before relying on them.' if few else ''
    return (f'Measured on one set of images only, of one training run; images from elsewhere, with other frequencies or '
            f'of classes not listed, were not tried.{tail}')
