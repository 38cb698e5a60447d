"""Compare classifiers of stage 2 on stored features with the same on images that pass the encoder in every epoch.

    python tests/through_encoder.py --model output/RUN --dataset hfds/PATH/TO/cifar100 --val-split test --stage2 maxnorm \
        --feature-views 4

Takes the options of finetune_glmc.py; writes OUTPUT/through_encoder.csv.
"""
import copy
import csv
import logging
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from finetune_glmc import prepare  # noqa: E402
from glmc.cli import parse_args, run_script  # noqa: E402
from glmc.config import finetune_parser  # noqa: E402
from glmc.data.datasets import ImageSet  # noqa: E402
from glmc.errors import InputError  # noqa: E402
from glmc.evaluation.priors import resolve_prior  # noqa: E402
from glmc.evaluation.text import aligned  # noqa: E402
from glmc.export.load import load_trained, trained_precision  # noqa: E402
from glmc.models.classifier import linear_classifier  # noqa: E402
from glmc.run_folder import provenance  # noqa: E402
from glmc.stage2.classifiers import Linear, Stage1  # noqa: E402
from glmc.stage2.features import Extractor, Features  # noqa: E402
from glmc.stage2.finetune import METRICS  # noqa: E402
from glmc.stage2.select import fit, measure, parse_classifiers  # noqa: E402
from glmc.training.launch import create_accelerator  # noqa: E402


class FreshViews:
    """Substitute for the views of `Features`: indexing augments and encodes the images.

    Args:
        extract: Extractor of the encoder.
        images: Training images.
    """

    def __init__(self, extract: Extractor, images: ImageSet):
        self.extract, self.images = copy.copy(extract), images
        self.extract.cache, self.extract.workers = None, 0
        self.shape = (1, len(images), extract.model.head_hidden_size)

    def __getitem__(self, index: tuple[Tensor, Tensor]) -> Tensor:
        _, images = index
        self.extract.seed += 1
        return self.extract(self.images.subset(images.numpy()), num_views=1).views[1]


def main() -> None:
    args, explicit = parse_args(finetune_parser())
    trained = load_trained(args.model[0])
    accelerator = create_accelerator(args.amp, args.amp_dtype or trained_precision(trained, args.amp))
    job = prepare(args, explicit, trained, accelerator)
    data = job['data']
    if data.validation is None:
        raise InputError('--val-split none: expected a split to evaluate on')
    extract = Extractor(
        trained.model, data_config=trained.data_config, augmentation=job['augmentation'], accelerator=accelerator,
        batch_size=args.batch_size, workers=args.workers, seed=args.seed)
    stored, validation = extract(data.train, args.feature_views), extract(data.validation)
    logging.getLogger('glmc.stage2.features').setLevel(logging.WARNING)  # else a line for every batch
    sources = {f'stored, {views} augmented views': Features(stored.views[:1 + views], stored.labels)
               for views in sorted({0, 1, 2, args.feature_views})}
    sources['through the encoder'] = Features(FreshViews(extract, data.train), stored.labels)
    layer, counts = linear_classifier(trained.model), data.profile.counts
    stage1 = Stage1(Linear(layer.weight, layer.bias).detached(), counts,
                    resolve_prior(trained.metadata.get('prior', 'train'), counts))
    rows = []
    for name, classifier in parse_classifiers(args.stage2, args.stage2_kwargs, two_heads=False).items():
        for source, features in sources.items():
            start = time.perf_counter()
            metrics, _ = measure(fit(classifier, stage1, features, args.seed), validation, counts, data.profile.thresholds)
            rows.append(dict(classifier=name, features=source, seconds=f'{time.perf_counter() - start:.1f}',
                             **{name: f'{metrics[name]:.2f}' for name in METRICS}))
    print(aligned([list(rows[0]), *(list(row.values()) for row in rows)], left=2))
    path = Path(args.output) / 'through_encoder.csv'
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'w', newline='', encoding='utf-8') as file:
        run = provenance()
        shared = dict(threads=torch.get_num_threads(), command=run['command'], commit=run['commit'])
        writer = csv.DictWriter(file, [*rows[0], *shared])
        writer.writeheader()
        writer.writerows({**row, **shared} for row in rows)


if __name__ == '__main__':
    sys.exit(run_script(main, debug='--debug' in sys.argv))
