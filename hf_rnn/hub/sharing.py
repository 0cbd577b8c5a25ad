"""What a checkpoint's folder needs before it is shared, and its upload."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from transformers.utils import logging

from hf_rnn.hub.bundle import bundle, is_coded, is_ours, read_config
from hf_rnn.hub.loading import load
from hf_rnn.skeleton.integrity import find_damaged_file
from hf_rnn_trainers.model_card import make_card
from hf_rnn_trainers.model_card.card import NO_LICENCE
from hf_rnn_trainers.model_card.files import CHECKPOINT, matching

logger = logging.get_logger(__name__)


def write_code(folder: str | Path) -> None:
    """Bundle a checkpoint of the package, unless its weights are coded: those only the package reads, and the module
    that is there already says what to install."""
    config = read_config(folder)
    if is_ours(config) and not is_coded(config):
        bundle(folder)


def check_card(path: Path) -> None:
    """Raise ValueError unless a README.md has metadata that the Hub takes."""
    try:
        card = ModelCard.load(path)
        if not card.data.to_dict():
            raise ValueError("it has no metadata between lines of ---")
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"card: {path} is no model card ({error}); mend it, or remove it to have one made") from error


def _adopt_card(path: Path, name: str, repository: str, licence: str | None) -> None:
    """Have a card that a trainer wrote load the model by its name on the Hub, and state the licence if one is given."""
    loads = rf'((?:from_pretrained\(|pipeline\("[\w-]+", )"){re.escape(name)}"'
    text = re.sub(loads, lambda found: f'{found[1]}{repository}"', path.read_text())
    text = text.replace(f"\n# {name}\n", f"\n# {repository.split('/')[-1]}\n")
    if licence is not None:
        text = text.replace(f"Weights: {NO_LICENCE}.", f"Weights: {licence}.")
    path.write_text(text)
    if licence is not None:
        check_card(path)
        card = ModelCard.load(path)
        card.data.license = licence
        card.save(path)


def prepare(folder: str | Path, repository: str, licence: str | None = None) -> list[str]:
    """Make a folder ready to be shared: weights that load, code for those without the package, a card.

    Args:
        repository: the name by which a card that is made here loads the model.
        licence: of the weights, for the card.

    Returns:
        The names of what is to be uploaded, the files of `hf_rnn_trainers.model_card.files.CHECKPOINT`.

    Raises:
        ValueError, OSError: no whole checkpoint, with what is missing or broken.
    """
    folder = Path(folder)
    config = read_config(folder)
    damaged = find_damaged_file(folder)
    if damaged != folder:
        raise ValueError(f"weights: {damaged} cannot be read; copy the file again")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"weights: expected model.safetensors in {folder}; pickled weights are not uploaded")
    model = load(str(folder))
    write_code(folder)
    card = folder / "README.md"
    if card.exists():
        _adopt_card(card, folder.resolve().name, repository, licence)
    else:
        make_card(repository, model, licence=licence, coded=is_coded(config)).save(card)
    check_card(card)
    names, left = matching(folder, CHECKPOINT)
    if left:
        logger.warning(f"{folder}: not uploaded, since these do not belong to a checkpoint: {', '.join(left[:9])}")
    return names


def push(
    folder: str | Path,
    repository: str,
    private: bool | None = None,
    revision: str | None = None,
    licence: str | None = None,
    message: str = "Upload by hf-rnn push",
) -> str:
    """Check a checkpoint's folder and upload it, in one commit. `prepare` tells what is checked and written.

    Uploads that fail for want of a connection are tried again, by huggingface_hub.

    Returns:
        The repository's address.

    Raises:
        ValueError: the folder is no whole checkpoint; nothing has been uploaded.
        OSError: the Hub refused, with what it said.
    """
    api = HfApi()
    if "/" not in repository:  # one's own, by the name that the card is to load
        with _refusals_told(repository):
            repository = f"{api.whoami()['name']}/{repository}"
    names = prepare(folder, repository, licence)
    with _refusals_told(repository):
        repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            allow_patterns=names,
        )
    return f"{api.endpoint}/{repository}"


@contextmanager
def _refusals_told(repository: str) -> Iterator[None]:
    """OSError with the Hub's own words."""
    try:
        yield
    except HfHubHTTPError as error:
        raise OSError(f"{repository}: the Hub refused: {error}") from error
    except RuntimeError as error:  # how huggingface_hub tells of a file that failed to upload
        raise OSError(f"{repository}: the upload failed: {error}; {error.__cause__ or 'try again'}") from error
