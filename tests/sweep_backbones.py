"""Every architecture of timm under GLMC: shapes of all of them, real training and export of the smallest of each module.

    python tests/sweep_backbones.py backbones.csv            everything; given again, it goes on where it stopped
    python tests/sweep_backbones.py backbones.csv --summary  counts, and each exception with its cause

`shapes`: on the meta device, the model is wrapped and gives logits, projections and predictions of the right shapes for
two views. `train`: with real weights, two training steps, export, the export loaded by timm, logits bit for bit. Each model
has a process of its own, which bounds the memory.
"""
import argparse
import csv
import logging
import os
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import timm  # noqa: E402
import torch  # noqa: E402
from timm.models import get_model_input_config, model_entrypoint  # noqa: E402

from glmc.errors import InputError  # noqa: E402
from glmc.export.export import export_model  # noqa: E402
from glmc.models.backbone import create_backbone  # noqa: E402
from glmc.models.glmc import GLMCModule  # noqa: E402
from glmc.tasks.glmc import GLMCTask  # noqa: E402

COLUMNS = ('check', 'model', 'module', 'parameters', 'outcome', 'detail', 'seconds')
NUM_CLASSES, SECONDS, MAX_PARAMETERS, MAX_BYTES = 10, 300, 300_000_000, 16 * 2 ** 30


def shapes(name: str) -> str:
    """Wrap the model on the meta device and look at what comes out; the number of its parameters."""
    with torch.device('meta'):
        model = create_backbone(name, num_classes=NUM_CLASSES)
        module = GLMCModule(model, projection_dim=16)
        view = torch.empty(2, *get_model_input_config(model)['input_size'])
        for output in module(view, view):
            assert [tuple(value.shape) for value in output] == [(2, NUM_CLASSES)] * 2 + [(2, 16)] * 2
    return str(sum(parameter.numel() for parameter in model.parameters()))


def train(name: str) -> str:
    """Two steps, export, and what the export says of itself: it compares its logits with the model's."""
    torch.manual_seed(0)
    model = create_backbone(name, num_classes=NUM_CLASSES)
    data_config = timm.data.resolve_model_data_config(model)
    task = GLMCTask(GLMCModule(model, projection_dim=16), [20] * 5 + [4] * 5).train()
    task.set_progress(0.5)
    optimizer = torch.optim.SGD(task.parameters(), lr=1e-3)
    before = [parameter.detach().clone() for parameter in task.parameters()]
    for _ in range(2):
        views = torch.randn(2, 2, *get_model_input_config(model)['input_size']).unbind(0)
        targets = torch.rand(2, 2, NUM_CLASSES).softmax(-1).unbind(0)
        loss = task(views, targets)['loss']
        assert loss.isfinite(), f'loss {loss.item()}'
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    still = sum(torch.equal(old, new) for old, new in zip(before, task.parameters(), strict=True))
    metrics = dict(model=name, method='glmc', train_images=120, num_classes=NUM_CLASSES, fingerprint='', seed=0, processes=1,
                   precision='no', seconds=0, device='cpu', command='', evaluated_on='nothing')
    with tempfile.TemporaryDirectory() as folder:
        export_model(Path(folder) / 'export', task.get_eval_model(), data_config=data_config, metrics=metrics,
                     class_names=[str(c) for c in range(NUM_CLASSES)],
                     source=dict(method='glmc', profile=dict(class_counts=[20] * 5 + [4] * 5)))
    return f'{still} of {len(before)} parameters did not move' if still else ''


def in_a_process(check: Callable[[str], str], name: str) -> tuple[str, str]:
    """Outcome (`ok`, `rejected`, `failed`) and its detail."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        resource.setrlimit(resource.RLIMIT_DATA, (MAX_BYTES, MAX_BYTES))
        try:
            answer = f'ok\t{check(name)}'
        except InputError as error:
            answer = f'rejected\t{error}'
        except BaseException as error:  # whatever a model raises is a finding
            answer = f'failed\t{type(error).__name__}: {error}'
        os.write(write, ' '.join(answer.split('\n'))[:4000].encode())
        os._exit(0)
    os.close(write)
    end = time.time() + SECONDS
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.time() > end:
            os.kill(pid, 9)
        time.sleep(0.01)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with os.fdopen(read, encoding='utf-8', errors='replace') as pipe:
        answer = pipe.read() or f'failed\tended with {code}'
    outcome, _, detail = answer.partition('\t')
    return outcome, detail


def module_of(name: str) -> str:
    return model_entrypoint(name).__module__.rsplit('.', 1)[-1]


def smallest(rows: Iterable[dict]) -> list[str]:
    """The smallest model of each module that could be wrapped, but for those made for tests and those that are too large."""
    found: dict[str, dict] = {}
    for row in rows:
        if row['check'] == 'shapes' and row['outcome'] == 'ok' and not row['model'].startswith('test_'):
            other = found.setdefault(row['module'], row)
            if int(row['parameters']) < int(other['parameters']):
                found[row['module']] = row
    return sorted(row['model'] for row in found.values() if int(row['parameters']) <= MAX_PARAMETERS)


def read_rows(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with open(path, newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


def sweep(path: Path, check: Callable[[str], str], names: Iterable[str]) -> None:
    """Check the models that the file has no row of."""
    done = {row['model'] for row in read_rows(path) if row['check'] == check.__name__}
    new = not path.exists()
    with open(path, 'a', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, COLUMNS)
        if new:
            writer.writeheader()
        for name in names:
            if name in done:
                continue
            started = time.time()
            outcome, detail = in_a_process(check, name)
            parameters, detail = (detail, '') if check is shapes and outcome == 'ok' else ('', detail)
            writer.writerow(dict(
                check=check.__name__, model=name, module=module_of(name), parameters=parameters, outcome=outcome,
                detail=detail, seconds=f'{time.time() - started:.1f}'))
            file.flush()


def summary(rows: list[dict]) -> str:
    lines = [f'timm {timm.__version__}, torch {torch.__version__}']
    for check in ('shapes', 'train'):
        own = [row for row in rows if row['check'] == check]
        counts = Counter(row['outcome'] for row in own)
        lines.append(f'{check}: {len(own)} models, ' + ', '.join(f'{n} {outcome}' for outcome, n in counts.items()))
        if check == 'train':
            left = {row['module'] for row in rows} - {row['module'] for row in own}
            lines[-1] += f", of {len(own)} modules; not of {', '.join(sorted(left)) or 'none'}"
        lines += [f"    {row['model']}: {row['detail']}" for row in own if row['outcome'] != 'ok']
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('csv', type=Path)
    parser.add_argument('--filter', nargs='+', default=['*'], help='names, as timm.list_models takes them')
    parser.add_argument('--only', choices=('shapes', 'train'), help='one of the checks')
    parser.add_argument('--summary', action='store_true', help='only say what the file holds')
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if not args.summary and args.only != 'train':
        sweep(args.csv, shapes, timm.list_models(args.filter))
    if not args.summary and args.only != 'shapes':
        sweep(args.csv, train, smallest(read_rows(args.csv)))
    print(summary(read_rows(args.csv)))


if __name__ == '__main__':
    main()
