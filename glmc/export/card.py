"""Model card: README.md of an export, written from its config.json and metrics.json."""
import json
import math
import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from glmc.data.profiles import SHOT_NAMES
from glmc.files import ESCAPED

PLACEHOLDER = 'local-dir:PATH'  # replaced by the repository in an upload
METRICS = {  # key of metrics.json -> (metric type of the Hub, name)
    'top1': ('accuracy', 'top-1 accuracy'), 'top5': ('accuracy', 'top-5 accuracy'),
    'many': ('accuracy', 'many-shot accuracy'), 'medium': ('accuracy', 'medium-shot accuracy'),
    'few': ('accuracy', 'few-shot accuracy'), 'class_mean': ('accuracy', 'class-mean accuracy'),
    'macro_f1': ('f1', 'macro F1'), 'ece': ('expected_calibration_error', 'ECE'),
}


def write_card(folder: Path) -> Path:
    """Write README.md of an export; it links report.html and plots/accuracy.png if they exist.

    Returns:
        Path of README.md.
    """
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    metrics = json.loads((folder / 'metrics.json').read_text(encoding='utf-8'))
    card = model_card(metrics, config, has_report=(folder / 'report.html').is_file(),
                      has_plots=(folder / 'plots' / 'accuracy.png').is_file())
    (folder / 'README.md').write_text(card, **ESCAPED)
    return folder / 'README.md'


def model_card(metrics: dict, config: dict, has_report: bool = False, has_plots: bool = False) -> str:
    """Return the text of the model card.

    Args:
        metrics: Content of metrics.json.
        config: Content of config.json.
        has_report: Whether the card links report.html.
        has_plots: Whether the card shows plots/accuracy.png.
    """
    source = config.get('glmc', {})
    size = config['pretrained_cfg']['input_size'][-1]
    plot = '![Accuracy of each class over its training images](plots/accuracy.png)' if has_plots else ''
    parts = [
        f"# {config['architecture']}, trained with {metrics['method']}",
        f"A timm image classifier for {config['num_classes']:,} classes at {size}x{size} pixels, trained on "
        f"{metrics['train_images']:,} long-tailed images of the data set `{dataset_name(metrics.get('data'))}`.",
        _origin(source), '## Usage', _usage(config), '## Results', _results(metrics), plot,
        'More plots and tables: `report.html`.' if has_report else '',
        '## Training', _training(metrics, source), '## Limitations', _limitations(metrics)]
    return str(ModelCard(f'---\n{card_data(metrics, config).to_yaml()}\n---\n' + '\n\n'.join(filter(None, parts)) + '\n'))


def card_data(metrics: dict, config: dict) -> ModelCardData:
    """Return the card's metadata for the Hub: library, task, licence, data set, base model and metrics."""
    source = config.get('glmc', {})
    hub_id, name = dataset_id(metrics.get('data')), dataset_name(metrics.get('data'))
    slug = re.sub(r'[^a-z0-9_.-]+', '-', name.lower()).strip('-') or 'unknown'
    results = [
        EvalResult(
            task_type='image-classification', dataset_type=hub_id or slug, dataset_name=name,
            dataset_split=dataset_name(metrics.get('evaluated_on')), metric_type=kind, metric_name=title,
            metric_value=round(metrics[key], 2))
        for key, (kind, title) in METRICS.items() if metrics.get(key) is not None and math.isfinite(metrics[key])]
    return ModelCardData(
        library_name='timm', pipeline_tag='image-classification',
        license=config['pretrained_cfg'].get('license') or 'unknown',
        tags=['timm', 'image-classification', 'long-tail', str(metrics['method'])], datasets=hub_id and [hub_id],
        base_model=source.get('base_model'), model_name=f"{config['architecture']}-{metrics['method']}",
        eval_results=results or None)


def dataset_name(data: str | None) -> str:
    """Return the last part of a data set's name or path, which hides the folders of this machine."""
    return re.sub(r'[\s<>|`\x00-\x1f]+', ' ', Path(data or 'unknown').name).strip() or 'unknown'


def dataset_id(data: str | None) -> str | None:
    """Return the Hub id of `hfds/ORG/NAME` or `hfds/NAME`; None for a folder or another source."""
    scheme, _, place = (data or '').partition('/')
    if scheme not in ('hfds', 'hfids') or Path(place).exists() or not re.fullmatch(r'[\w.-]+(/[\w.-]+)?', place):
        return None
    return place


def _origin(source: dict) -> str:
    if source.get('base_model'):
        return f"Fine-tuned from `{source['base_model']}`, whose licence and data apply to its weights."
    return 'Fine-tuned from other weights, whose licence and data apply.' if source.get('other_weights') else ''


def _usage(config: dict) -> str:
    """Return lines that predict the classes of one image, with timm alone where the architecture is timm's."""
    architecture, channels = config['architecture'], config['pretrained_cfg']['input_size'][0]
    own = f'import glmc  # adds {architecture} to timm\n' if architecture.endswith('_cifar') else ''
    return f"""```python
{own}import timm
import torch
from PIL import Image

model = timm.create_model('{PLACEHOLDER}', pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
names = model.pretrained_cfg['label_names']  # in the order of the outputs
with torch.inference_mode(), Image.open('photo.jpg') as image:
    probabilities = model(transform(image.convert('{'L' if channels == 1 else 'RGB'}')).unsqueeze(0))[0].softmax(-1)
for probability, label in zip(*probabilities.topk({min(5, config['num_classes'])})):
    print(f'{{probability:.3f}}  {{names[label]}}')
```

With GLMC for timm installed, `python -m glmc.predict {PLACEHOLDER} my_photos` writes a CSV of a folder."""


def _results(metrics: dict) -> str:
    if 'top1' not in metrics:
        return 'Not evaluated.'
    few, many = metrics['shot_thresholds']
    ranges = {'many': f'more than {many}', 'medium': f'{few + 1} to {many}', 'few': f'at most {few}'}
    rows = [('all images', '', metrics['num_classes'], metrics['top1'], metrics['ece'])]
    rows += [(f'{name}-shot', ranges[name], metrics['shot_classes'][name], metrics[name], metrics.get(f'ece_{name}'))
             for name in SHOT_NAMES]
    rows += [('class mean', '', '', metrics['class_mean'], ''), ('worst class', '', '', metrics['worst_class'], '')]
    lines = ['| group | training images per class | classes | accuracy, % | ECE, % |', '|---|---|---|---|---|']
    lines += [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    return '\n'.join(lines) + (
        f"\n\nEvaluated on {metrics['num_images']:,} images of `{dataset_name(metrics['evaluated_on'])}`. "
        '`metrics.json` contains all metrics, also per class.')


def _cell(value: str | float | None) -> str:
    if value is None:
        return '–'
    return value if isinstance(value, str) else f'{value:,}' if isinstance(value, int) else f'{value:.2f}'


def _training(metrics: dict, source: dict) -> str:
    counts = source.get('profile', {}).get('class_counts') or [0]
    fingerprint = f", fingerprint `{metrics['fingerprint']}`" if metrics.get('fingerprint') else ''
    processes = f"{metrics['processes']} process{'' if metrics['processes'] == 1 else 'es'}"
    items = [f"{metrics['train_images']:,} images, {max(counts):,} to {min(counts):,} per class{fingerprint}"]
    items += [f"`{name}`: {value}" for name, value in source.get('recipe', {}).items() if value not in (None, '')]
    items += [f"seed {metrics['seed']}, {processes}, mixed precision: {metrics['precision']}, "
              f"{metrics['seconds']:.0f} s on {metrics['device']}"]
    fence = '```' if '```' not in metrics['command'] else '~~~'
    return '\n'.join(f'- {item}' for item in items) + f"\n\n{fence}bash\n{metrics['command']}\n{fence}"


def _limitations(metrics: dict) -> str:
    text = ('The results come from one training run and one evaluation set. Images from other sources, other class '
            'frequencies and unlisted classes were not tested.')
    few = (metrics.get('shot_classes') or {}).get('few', 0)
    return text + (f' {few:,} classes have few training images: check the few-shot accuracy above before you rely on '
                   'them.' if few else '')
