"""Which model folder a path means. Nothing heavy is imported: a mistyped path is answered at once."""

from pathlib import Path

from laser_dist.errors import UserError
from laser_dist.run_folder import latest_checkpoint


def model_folder(path: str | Path) -> str:
    """The model folder in `path`: itself, or a checkpoint's model/, or a run's newest checkpoint's; else a hub id."""
    folder = Path(path).expanduser()
    if (folder / "checkpoints" / "latest").is_file():
        folder = latest_checkpoint(folder)
        if not folder.is_dir():
            pointer = folder.parent / "latest"
            raise UserError(f"{pointer} names {folder.name}, which is not there: write the name of one that is into it")
    if (folder / "model").is_dir():
        folder = folder / "model"
    if folder.is_dir():
        if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise UserError(f"{folder} holds no model: expected config.json or adapter_config.json in it")
        return str(folder)
    if str(path).startswith((".", "/", "~")) or str(path).count("/") > 1:
        raise UserError(f"{path}: this folder does not exist")
    return _download(str(path))


def _download(hub_id: str) -> str:
    """The hub repository as a local folder, so that its card and its adapters are found as in any other folder."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(hub_id, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(f"{hub_id} is neither a folder nor a hub model that can be downloaded: {reason}") from error
