"""Model card: README.md of an export, written from its config.json and metrics.json."""
import json
import math
import re
import shlex
from pathlib import Path, PureWindowsPath

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from glmc.data.profiles import SHOT_NAMES, classes_without_images, pluralize
from glmc.evaluation.text import shot_ranges
from glmc.files import ESCAPED

PATH_OPTIONS = ('--data-dir', '--train-list', '--val-list', '--class-map', '--class-counts', '--output', '--feature-cache',
                '--initial-checkpoint', '--checkpoint')
PLACEHOLDER = 'local-dir:PATH'  # replaced by the repository in an upload
MAX_NAME = 100  # characters of a name
NUM_WORST = 5  # classes that are named
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
    height, width = config['pretrained_cfg']['input_size'][-2:]
    plot = '![Accuracy of each class over its training images](plots/accuracy.png)' if has_plots else ''
    parts = [
        f"# {config['architecture']}, trained with {plain(str(metrics['method']))}",
        f"A timm image classifier for {config['num_classes']:,} classes at {height}x{width} pixels, trained on "
        f"{metrics['train_images']:,} images of the data set `{data_sets(metrics, source)[0]}`{_imbalance(source)}.",
        _origin(source), '## Usage', _usage(config), '## Results', _results(metrics), _worst_classes(metrics, config), plot,
        'More plots and tables: `report.html`.' if has_report else '',
        '## Training', _training(metrics, source), '## Limitations', _limitations(metrics)]
    return str(ModelCard(f'---\n{card_data(metrics, config).to_yaml()}\n---\n' + '\n\n'.join(filter(None, parts)) + '\n'))


def card_data(metrics: dict, config: dict) -> ModelCardData:
    """Return the card's metadata for the Hub: library, task, data set and metrics; licence and base model if known."""
    source = config.get('glmc', {})
    name, hub_id = data_sets(metrics, source)
    slug = re.sub(r'[^a-z0-9_.-]+', '-', name.lower()).strip('-') or 'unknown'
    results = [
        EvalResult(
            task_type='image-classification', dataset_type=hub_id or slug, dataset_name=name,
            dataset_split=dataset_name(metrics.get('evaluated_on')), metric_type=kind, metric_name=title,
            metric_value=round(metrics[key], 2))
        for key, (kind, title) in METRICS.items() if metrics.get(key) is not None and math.isfinite(metrics[key])]
    return ModelCardData(
        library_name='timm', pipeline_tag='image-classification',
        license=config['pretrained_cfg'].get('license'), base_model_relation=source.get('base_model') and 'finetune',
        tags=['timm', 'image-classification', 'long-tail', str(metrics['method'])], datasets=hub_id and [hub_id],
        base_model=source.get('base_model'), model_name=f"{config['architecture']}-{metrics['method']}",
        eval_results=results or None)


def data_sets(metrics: dict, source: dict) -> tuple[str, str | None]:
    """Return the name of the data set, which `--dataset-name` overrides, and its Hub id or None."""
    data, chosen = metrics.get('data'), source.get('dataset_name')
    if not chosen:
        return dataset_name(data), dataset_id(data)
    known = dataset_id(f'hfds/{chosen}') if '/' in chosen else dataset_id(data)
    return plain(chosen), known


def dataset_name(data: str | None) -> str:
    """Return the last part of a data set's name or path, which hides the folders of this machine."""
    return plain(Path(data or 'unknown').name)


def plain(text: str) -> str:
    """Return a text on one line without characters that Markdown or HTML would interpret in a code span or a table."""
    text = re.sub(r'[\s<>|`\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]+', ' ', text).strip()
    return (f'{text[:MAX_NAME - 1]}…' if len(text) > MAX_NAME else text) or 'unknown'


def public_command(command: str) -> str:
    """Return a command that others can run: without `--resume` and the folders of this machine."""
    words, shown, skip = shell_words(command), [], False
    for number, word in enumerate(words):
        option, equals, value = word.partition('=') if word.startswith('-') else ('', '', word)
        if skip or option == '--resume' and equals:
            skip = False
        elif word == '--resume':
            skip = number + 1 < len(words)
        elif number == 0 or (option if equals else words[number - 1]) in PATH_OPTIONS:
            shown.append(f'{option}{equals}{_last_part(value)}')
        else:
            shown.append(f'{option}{equals}{_without_folders(value)}')
    return shlex.join(shown)


def shell_words(command: str) -> list[str]:
    """Split a command into words without control characters."""
    try:
        words = shlex.split(command)
    except ValueError:  # a quote that nothing closes
        words = command.split()
    return [re.sub(r'[\s\x00-\x1f]+', ' ', word) for word in words]


def _last_part(path: str) -> str:
    """Return the last part of a path, of any system."""
    return PureWindowsPath(path).name or 'unknown'


def _without_folders(value: str) -> str:
    """Return the value with the last part of a path that is absolute or starts at home or in an outer folder."""
    scheme, place = re.fullmatch(r'((?:local-dir:|hf-hub:|\w+/(?=[/~.]))?)(.*)', value).groups()
    return scheme + _last_part(place) if re.match(r'[/\\~]|\.\.?[/\\]|[A-Za-z]:[/\\]', place) else value


def dataset_id(data: str | None) -> str | None:
    """Return the Hub id of `hfds/ORG/NAME` or `hfds/NAME`; None for a folder or another source."""
    scheme, _, place = (data or '').partition('/')
    if scheme not in ('hfds', 'hfids') or Path(place).exists() or not re.fullmatch(r'[\w.-]+(/[\w.-]+)?', place):
        return None
    return place


def _imbalance(source: dict) -> str:
    """Return the class counts in numbers, if they are known."""
    counts = source.get('profile', {}).get('class_counts')
    if not counts or min(counts) < 1:
        return ''
    return f', {max(counts):,} to {min(counts):,} per class (imbalance {max(counts) / min(counts):.3g})'


def _origin(source: dict) -> str:
    if source.get('base_model'):
        return f"Fine-tuned from `{plain(source['base_model'])}`, whose licence and data apply to its weights."
    return 'Fine-tuned from other weights, whose licence and data apply.' if source.get('other_weights') else ''


def _usage(config: dict) -> str:
    """Return lines that predict the classes of one image, with timm alone where the architecture is timm's."""
    architecture, channels = config['architecture'], config['pretrained_cfg']['input_size'][0]
    is_ours = architecture.endswith('_cifar') or architecture == 'experts'
    own = f'import glmc  # adds {architecture} to timm\n' if is_ours else ''
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
    ranges = shot_ranges(metrics['shot_thresholds'])
    rows = [('all images', '', metrics['num_classes'], metrics['top1'], metrics['ece'])]
    rows += [(f'{name}-shot', ranges[name], metrics['shot_classes'][name], metrics[name], metrics.get(f'ece_{name}'))
             for name in SHOT_NAMES]
    rows += [('class mean', '', '', metrics['class_mean'], ''), ('worst class', '', '', metrics['worst_class'], '')]
    lines = ['| group | training images per class | classes | accuracy, % | ECE, % |', '|---|---|---|---|---|']
    lines += [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    return '\n'.join(lines) + (
        f"\n\nEvaluated on {metrics['num_images']:,} images of `{dataset_name(metrics['evaluated_on'])}`. "
        '`metrics.json` contains all metrics, also per class.')


def _worst_classes(metrics: dict, config: dict) -> str:
    """Return the classes of the lowest accuracy and those without evaluated images, by name."""
    accuracies, names = metrics.get('per_class_accuracy') or [], list(map(plain, map(str, config.get('label_names') or [])))
    if len(names) != len(accuracies) or not names:
        return ''
    counts, images = metrics['train_counts'], metrics['per_class_images']
    measured = sorted((accuracy, c) for c, accuracy in enumerate(accuracies) if accuracy is not None)
    worst = [f"`{names[c]}` {accuracy:.1f} % ({pluralize(counts[c], 'training image')}, "
             f"{pluralize(images[c], 'test image')})" for accuracy, c in measured[:NUM_WORST] if accuracy < 100]
    lines = [f"Worst classes: {', '.join(worst)}."] if worst else []
    missing = classes_without_images(images, [f'`{name}`' for name in names])
    return '\n\n'.join([*lines, *([f'{missing}.'] if missing else [])])


def _cell(value: str | float | None) -> str:
    if value is None:
        return '–'
    return value if isinstance(value, str) else f'{value:,}' if isinstance(value, int) else f'{value:.2f}'


def _training(metrics: dict, source: dict) -> str:
    fingerprint = f", fingerprint `{metrics['fingerprint']}`" if metrics.get('fingerprint') else ''
    processes = f"{metrics['processes']} process{'' if metrics['processes'] == 1 else 'es'}"
    items = [f"{metrics['train_images']:,} images{_imbalance(source)}{fingerprint}"]
    recipe = source.get('recipe', {})
    items += [f'`{name}`: {plain(str(value))}' for name, value in recipe.items() if value not in (None, '')]
    items += [f"seed {metrics['seed']}, {processes}, mixed precision: {metrics['precision']}, "
              f"{metrics['seconds']:.0f} s on {metrics['device']}"]
    command = public_command(metrics['command'])
    fence = '```' if '```' not in command else '~~~'
    return '\n'.join(f'- {item}' for item in items) + f'\n\n{fence}bash\n{command}\n{fence}'


def _limitations(metrics: dict) -> str:
    text = ('The results come from one training run and one evaluation set. Images from other sources, other class '
            'frequencies and unlisted classes were not tested.')
    few = (metrics.get('shot_classes') or {}).get('few', 0)
    return text + (f" {pluralize(few, 'class')} with few training images: check the few-shot accuracy above before you rely "
                   f"on {'it' if few == 1 else 'them'}." if few else '')
