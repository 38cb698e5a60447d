"""From files to predictions.csv: the commands of docs/your-own-data.md, as printed there, on small nets and images."""
import csv
import re
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from conftest import COUNTS, ROOT, coloured, write_folders
from test_docs import run

CLASSES = ['ant', 'house bee', 'zoo, cat']  # in sorted order; a comma and spaces, as people have them
TINY = '--model test_resnet --img-size 32 --batch-size 8 --workers 0 --epochs 6 --lr 0.02 --augmentation cifar --method glmc'


def commands(title: str) -> list[str]:
    """The commands of a section, with a tiny net instead of the one of the page."""
    text = (ROOT / 'docs' / 'your-own-data.md').read_text(encoding='utf-8')
    block = re.search(r'```bash\n# needs: [^\n]*\n(.*?)```', text.split(f'\n## {title}\n')[1], re.S)[1]
    lines = [line.replace('accelerate launch ', 'python ').replace('--model resnet50 --pretrained', TINY)
             for line in block.splitlines()]
    return [f'{line} -j 0' if ' -m ' in line else line for line in lines]


def photos(number: int) -> list[tuple[int, int]]:
    """(label, number) of some images of each class."""
    return [(label, number + k) for label in range(3) for k in range(4)]


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """A working folder with `my_photos`, one per class, named after it."""
    (tmp_path / 'my_photos').mkdir()
    for label, name in enumerate(CLASSES):
        coloured(label, 500).save(tmp_path / 'my_photos' / f'{name}.jpg')
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    yield tmp_path
    AcceleratorState._reset_state(True)


def write_images(folder: Path) -> None:
    folder.mkdir()
    for label, number in (*photos(0), *photos(100), (0, 50), (0, 51), (0, 52), (0, 53)):
        coloured(label, number).save(folder / f'{label}-{number}.jpg')


def rows(split: str) -> list[tuple[str, str]]:
    """File and class name of each image of a split."""
    images = photos(100) if split == 'test' else [*photos(0), (0, 50), (0, 51), (0, 52), (0, 53)]
    return [(f'{label}-{number}.jpg', CLASSES[label]) for label, number in images]


def write_photo_folders(root: Path) -> None:
    counts = dict(zip(CLASSES, COUNTS.values(), strict=True))
    write_folders(root / 'my_images' / 'train', counts)
    for split, start in (('val', 100), ('test', 200)):
        write_folders(root / 'my_images' / split, dict.fromkeys(CLASSES, 4), start=start)


def write_csv_files(root: Path) -> None:
    write_images(root / 'images')
    for split in ('train', 'test'):
        with open(root / f'{split}.csv', 'w', newline='', encoding='utf-8-sig') as file:
            csv.writer(file).writerows([('file', 'species'), *rows(split)])


def write_parquet(root: Path) -> None:
    datasets = pytest.importorskip('datasets')
    write_images(root / 'images')
    (root / 'my_set').mkdir()
    for split in ('train', 'test'):
        files, names = zip(*rows(split), strict=True)
        features = datasets.Features(image=datasets.Image(), species=datasets.Value('string'))
        images = [dict(bytes=(root / 'images' / file).read_bytes(), path=file) for file in files]
        datasets.Dataset.from_dict(dict(image=images, species=list(names)), features=features).to_parquet(
            str(root / 'my_set' / f'{split}-00000-of-00001.parquet'))


@pytest.mark.parametrize('title, write', [
    ('Photos in folders, with validation and test', write_photo_folders),
    ('A CSV with names', write_csv_files),
    ('A Hugging Face set with string labels', write_parquet)])
def test_from_files_to_predictions_in_three_commands(title, write, workplace, monkeypatch, capsys):
    write(workplace)
    three = commands(title)
    assert len(three) == 3 and three[-1].startswith('python -m glmc.predict')
    for command in three:
        run(command, monkeypatch)
        assert 'Traceback' not in capsys.readouterr().err
    with open('predictions.csv', newline='', encoding='utf-8') as file:
        predictions = list(csv.DictReader(file))
    assert [row['label'] for row in predictions] == CLASSES == [Path(row['file']).stem for row in predictions]
