"""Uploading an export to the Hugging Face Hub.

    python -m glmc.hub EXPORT ORG/NAME [--private] [--revision BRANCH]
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
from glmc.errors import InputError
from glmc.export.card import PLACEHOLDER

_logger = logging.getLogger(__name__)
UPLOADED = ('config.json', 'model.safetensors', 'metrics.json', 'README.md', 'report.html', 'plots/*.png', 'classifiers/*')
PICKLES = ('*.pkl', '*.pickle', '*.pt', '*.pth', '*.bin', '*.ckpt')
WAITS = (2, 10)  # seconds before the second and the third try
SILENCE = 60  # seconds without a byte from the server after which a request has failed; the client alone waits for ever


class PushError(RuntimeError):
    """The Hub did not take the export; the message is one line."""


def push_export(
        folder: Path, name: str, private: bool = False, revision: str | None = None,
        waits: Sequence[float] | None = None, silence: float | None = None) -> str:
    """Create the repository if need be and upload the export, in one commit.

    The card's loading lines name the repository; files on this machine stay as they are. The token is that of HF_TOKEN
    or of `hf auth login`.

    Args:
        folder: Export.
        name: ORG/NAME, or NAME for one's own.
        private: Of a new repository.
        revision: Branch, made if need be; None for `main`.
        waits: Seconds before each further try, WAITS by default.
        silence: Seconds without an answer after which a request has failed, SILENCE by default.

    Returns:
        Address of the repository.

    Raises:
        InputError: If the folder is no export.
        PushError: If the last try failed, or the first with nothing to hope for: a wrong token, no right to write.
    """
    if not (folder / 'config.json').is_file() or not (folder / 'model.safetensors').is_file():
        raise InputError(f'{folder}: no config.json and model.safetensors, expected an export')
    set_client_factory(lambda: _client(silence or SILENCE))
    for wait in (*(waits or WAITS), None):
        try:
            return _upload(folder, name, private, revision)
        except OfflineModeIsEnabled as error:
            raise PushError('HF_HUB_OFFLINE is set') from error
        except Exception as error:  # the client raises its own, the transport's and OSError
            if wait is None or not _is_temporary(error):
                raise PushError(_reason(error)) from error
            _logger.info(f'Push to {name}: {_reason(error)}; trying again in {wait:g} s')
            time.sleep(wait)
    return ''


def _client(silence: float):
    client = default_client_factory()
    client.timeout = silence
    return client


def _upload(folder: Path, name: str, private: bool, revision: str | None) -> str:
    api = HfApi()
    repo = api.create_repo(name, private=private, exist_ok=True)
    if revision:
        api.create_branch(repo.repo_id, branch=revision, exist_ok=True)
    at = f'@{revision}' if revision else ''
    with tempfile.TemporaryDirectory() as copy:
        staged = Path(copy) / 'export'
        shutil.copytree(folder, staged, ignore=shutil.ignore_patterns(*PICKLES), copy_function=_link)
        card = staged / 'README.md'
        if card.is_file():
            text = card.read_text(encoding='utf-8').replace(PLACEHOLDER, f'hf-hub:{repo.repo_id}{at}')
            card.unlink()
            card.write_text(text, encoding='utf-8')
        api.upload_folder(
            repo_id=repo.repo_id, folder_path=staged, revision=revision, commit_message='Upload a timm model',
            allow_patterns=list(UPLOADED), ignore_patterns=list(PICKLES))
    return str(repo)


def _link(source: str, target: str) -> None:
    """No copy of the weights."""
    Path(target).symlink_to(Path(source).resolve())


def _is_temporary(error: Exception) -> bool:
    if isinstance(error, (UnicodeError, HFValidationError)):  # a token or a name that no request can carry
        return False
    status = getattr(getattr(error, 'response', None), 'status_code', None)
    return not isinstance(error, HfHubHTTPError) or status is None or status >= 500 or status in (408, 429)


def _reason(error: Exception) -> str:
    status = getattr(getattr(error, 'response', None), 'status_code', None)
    token = get_token()
    if status in (401, 403):
        known = {401: 'the token was refused', 403: 'the token has no right to write there'}[status]
        return f"{known if token else 'no token: set HF_TOKEN or run `hf auth login`'} (HTTP {status})"
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, UnicodeError):
        text = 'the token has characters that no token has'
    return f'{type(error).__name__}: {text.replace(token, "***") if token else text}'


def push_command(folder: Path, name: str, private: bool = False, revision: str | None = None) -> str:
    """The one command that pushes again."""
    words = ['python', '-m', 'glmc.hub', str(folder), name]
    return shlex.join(words + ['--private'] * private + (['--revision', revision] if revision else []))


def try_push(folder: Path, name: str, private: bool = False, revision: str | None = None) -> bool:
    """Push at the end of a run: whatever happens, the run has succeeded."""
    try:
        _logger.info(f'Pushed to {push_export(folder, name, private, revision)}')
        return True
    except PushError as error:
        _logger.warning(f'Not pushed to {name}: {error}\nPush again with: {push_command(folder, name, private, revision)}')
        return False


def warn_without_token() -> None:
    """Said when a run starts, before it has set up its logging, not hours later."""
    if get_token() is None and os.environ.get('RANK', '0') == '0':
        print('--push-to-hub: no token yet; set HF_TOKEN or run `hf auth login`, or push after the run', file=sys.stderr)


def main() -> int:
    parser = Parser(prog='python -m glmc.hub', description='Upload an export to the Hugging Face Hub.')
    parser.add_argument('export', type=Path, help='folder')
    parser.add_argument('name', type=repo_id, help='ORG/NAME; it is made if need be')
    parser.add_argument('--private', action='store_true', help='make a new repository private')
    parser.add_argument('--revision', help='branch')
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    for noisy in ('httpx', 'httpx2', 'huggingface_hub'):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        args = parser.parse_args()
        print(push_export(args.export, args.name, args.private, args.revision))
    except (InputError, PushError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0
