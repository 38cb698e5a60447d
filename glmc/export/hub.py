"""Upload of an export to the Hugging Face Hub.

    python -m glmc.hub MODEL ORG/NAME [--private] [--revision BRANCH]

MODEL is an export, a run folder, or a checkpoint, which is exported first.
"""
import logging
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, get_token, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils._http import default_client_factory

from glmc.cli import Parser
from glmc.config import repo_id
from glmc.errors import InputError, RunError, first_line, printable
from glmc.export.card import PLACEHOLDER
from glmc.export.export import export_checkpoint
from glmc.export.load import find_export, newest_checkpoint

_logger = logging.getLogger(__name__)
UPLOADED = ('config.json', 'model.safetensors', 'metrics.json', 'README.md', 'report.html', 'plots/*.png')
PICKLES = ('*.pkl', '*.pickle', '*.pt', '*.pth', '*.bin', '*.ckpt')
RETRY_DELAYS = (2, 10)  # seconds before the second and the third attempt
TIMEOUT = 60  # seconds without a byte from the server until a request fails; the client's default is to wait for ever


class PushError(RuntimeError):
    """A failed upload; the message is one line."""


def push_export(
        folder: Path, name: str, private: bool = False, revision: str | None = None,
        retry_delays: Sequence[float] | None = None, timeout: float | None = None) -> str:
    """Create the repository if it does not exist and upload the export in one commit.

    The uploaded card names the repository in its example; local files do not change. The token comes from HF_TOKEN or
    `hf auth login`.

    Args:
        folder: Export folder.
        name: ORG/NAME, or NAME for the user's namespace.
        private: Create a new repository as private.
        revision: Branch, created if it does not exist; None for `main`.
        retry_delays: Seconds before each further attempt; None for RETRY_DELAYS.
        timeout: Seconds without an answer until a request fails; None for TIMEOUT.

    Returns:
        URL of the repository.

    Raises:
        InputError: If the folder is not an export.
        PushError: If the last attempt fails, or an earlier one with a permanent error such as a wrong token.
    """
    if not (folder / 'config.json').is_file() or not (folder / 'model.safetensors').is_file():
        raise InputError(f'{folder}: no config.json and model.safetensors, expected an export')

    def create_client():
        client = default_client_factory()
        client.timeout = timeout or TIMEOUT
        return client
    set_client_factory(create_client)
    delays = list(retry_delays or RETRY_DELAYS)
    while True:
        try:
            return _upload(folder, name, private, revision)
        except OfflineModeIsEnabled as error:
            raise PushError('HF_HUB_OFFLINE is set') from error
        except Exception as error:  # the client raises its own errors, the transport's and OSError
            if not delays or not _is_temporary(error):
                raise PushError(_reason(error)) from error
            delay = delays.pop(0)
            _logger.info(f'Push to {name}: {_reason(error)}; trying again in {delay:g} s')
            time.sleep(delay)


def _upload(folder: Path, name: str, private: bool, revision: str | None) -> str:
    api = HfApi()
    repo = api.create_repo(name, private=private, exist_ok=True)
    if revision:
        api.create_branch(repo.repo_id, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as copy:
        staged = Path(copy) / 'export'
        shutil.copytree(  # links instead of copies of the weights
            folder, staged, ignore=shutil.ignore_patterns(*PICKLES),
            copy_function=lambda source, target: os.symlink(os.path.realpath(source), target))
        card = staged / 'README.md'
        if card.is_file():
            at = f'@{revision}' if revision else ''
            text = card.read_text(encoding='utf-8').replace(PLACEHOLDER, f'hf-hub:{repo.repo_id}{at}')
            card.unlink()
            card.write_text(text, encoding='utf-8')
        api.upload_folder(
            repo_id=repo.repo_id, folder_path=staged, revision=revision, commit_message='Upload a timm model',
            allow_patterns=list(UPLOADED), ignore_patterns=list(PICKLES))
    return str(repo)


def _is_temporary(error: Exception) -> bool:
    if isinstance(error, (UnicodeError, HFValidationError)):  # a token or a name that no request can contain
        return False
    status = getattr(getattr(error, 'response', None), 'status_code', None)
    return not isinstance(error, HfHubHTTPError) or status is None or status >= 500 or status in (408, 429)


def _reason(error: Exception) -> str:
    """Describe the error in one line without the token."""
    status = getattr(getattr(error, 'response', None), 'status_code', None)
    token = get_token()
    if status in (401, 403):
        refused = {401: 'the token was refused', 403: 'the token has no right to write there'}[status]
        return f"{refused if token else 'no token: set HF_TOKEN or run `hf auth login`'} (HTTP {status})"
    text = 'the token has characters that no token has' if isinstance(error, UnicodeError) else first_line(error)
    return f'{type(error).__name__}: {text.replace(token, "***") if token else text}'


def push_command(folder: Path, name: str, private: bool = False, revision: str | None = None) -> str:
    """Return the shell command that pushes again."""
    words = ['python', '-m', 'glmc.hub', str(folder), name]
    return shlex.join(words + ['--private'] * private + (['--revision', revision] if revision else []))


def try_push(folder: Path, name: str, private: bool = False, revision: str | None = None) -> bool:
    """Push at the end of a run; warn if it fails, with the command that pushes again.

    Returns:
        Whether the push succeeded.
    """
    try:
        _logger.info(f'Pushed to {push_export(folder, name, private, revision)}')
        return True
    except PushError as error:
        _logger.warning(f'Not pushed to {name}: {error}\nPush again with: {push_command(folder, name, private, revision)}')
        return False


def warn_without_token() -> None:
    """Warn at the start of a run, before its logging is set up, that a push at its end would fail."""
    if get_token() is None and os.environ.get('RANK', '0') == '0':
        print('--push-to-hub: no token yet; set HF_TOKEN or run `hf auth login`, or push after the run', file=sys.stderr)


def resolve_export(model: Path, temporary: Path) -> Path:
    """Export folder of an export, of a run, or of a checkpoint.

    Args:
        model: Export folder, run folder, or file in one of them.
        temporary: New folder for the export of a checkpoint.

    Raises:
        InputError: If a checkpoint cannot be read.
    """
    if model.is_file() and (model.parent / 'config.json').is_file():
        return model.parent
    checkpoint = model if model.is_file() else None if find_export(model) else newest_checkpoint(model)
    return export_checkpoint(checkpoint, temporary) if checkpoint else find_export(model) or model


def main() -> int:
    """Run `python -m glmc.hub` and return its exit code."""
    parser = Parser(prog='python -m glmc.hub', description='Upload an export to the Hugging Face Hub.')
    parser.add_argument('export', type=Path, metavar='MODEL', help='export folder, run folder, or checkpoint')
    parser.add_argument('name', type=repo_id, help='ORG/NAME; created if it does not exist')
    parser.add_argument('--private', action='store_true', help='create a new repository as private')
    parser.add_argument('--revision', help='branch')
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    for noisy in ('httpx', 'httpx2', 'huggingface_hub'):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        args = parser.parse_args()
        with tempfile.TemporaryDirectory() as temporary:
            export = resolve_export(args.export, Path(temporary) / 'export')
            print(printable(push_export(export, args.name, args.private, args.revision)))
    except (InputError, RunError, PushError) as error:
        print(f'error: {printable(str(error))}', file=sys.stderr)
        return 2
    return 0
