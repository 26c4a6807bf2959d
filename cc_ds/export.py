"""What stands in an exported folder beside the stock checkpoint: the connection.

config.json, model*.safetensors, ...   stock Hugging Face; loads in AutoModelForCausalLM
cc_config.json                         CCConfig
cc_connection.safetensors              decision_maker.weight (L, H); the transform when fitted (connection/transform.py)

Plain SFT trains no connection and leaves no cc_connection.safetensors.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import cached_file

from cc_ds.config import CCConfig, from_dict
from cc_ds.connection.transform import Transform
from cc_ds.dist.consolidate import StoredTensor, stored_tensors
from cc_ds.dist.zero import gathered
from cc_ds.models.lora import lora_scale, merged_when_read

CONNECTION_FILE = "cc_connection.safetensors"
CONFIG_FILE = "cc_config.json"
CONNECTION_TENSORS = ("decision_maker.weight", "trained_transform.weight")
"""What a state dict holds of the connection; the second only with CCConfig.transform_share."""
LORA_FILE = "cc_lora.json"


@dataclass(frozen=True, slots=True)
class StoredConnection:
    """The connection as a model folder or a model on the hub holds it; every part may be absent."""

    folder: str
    cc_config: CCConfig | None = None
    decision_maker: Tensor | None = None
    transform: Transform | None = None


def check_model_folder(path_or_id: str | Path) -> None:
    """A path to a folder must be a model folder with weights; a name on the hub is left to the loader.

    Raises:
        ValueError: a path that looks local and does not exist, or a folder without config.json or weights.
    """
    folder = Path(path_or_id)
    if not folder.exists():
        if str(path_or_id).startswith((".", "/", "~")) or str(path_or_id).count("/") > 1:
            raise ValueError(f"{path_or_id}: no such model folder")
        return
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: not a model folder, it has no config.json")
    if not any(folder.glob("*.safetensors")) or not any(
        file.name != CONNECTION_FILE for file in folder.glob("*.safetensors")
    ):
        pickled = sorted(file.name for file in folder.glob("*.bin"))
        remedy = (
            f"it has {', '.join(pickled)}, which are pickles and are not read: convert them to safetensors first"
            if pickled
            else "copy its *.safetensors files there, or name the folder that has them"
        )
        raise ValueError(f"{folder}: a model folder without weights (no *.safetensors); {remedy}")


def load_part(part: type, path_or_id: str | Path, option: str, **kwargs) -> Any:
    """`part.from_pretrained(path_or_id)`: a model's config or its tokenizer.

    Args:
        part: AutoConfig or AutoTokenizer.
        option: what the user named the model with.

    Raises:
        ValueError: there is no such model, or it is neither in the cache nor can the hub be asked.
    """
    try:
        return part.from_pretrained(path_or_id, **kwargs)
    except OSError as error:
        raise ValueError(
            f"{option} {path_or_id}: can't be loaded ({str(error).splitlines()[0]}); name a model folder, or a model "
            f"on the hub (one that is in the cache, where the hub can't be reached)"
        ) from error


def read_cc_config(path_or_id: str | Path, **hub) -> CCConfig | None:
    """The settings of the connection that are stored with a model (`read_connection`); None: it has none."""
    path = _stored_file(path_or_id, CONFIG_FILE, hub)
    if path is None:
        return None
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); export the model again") from error
    return from_dict(CCConfig, stored, source=path)


def read_connection(path_or_id: str | Path, **hub) -> StoredConnection:
    """The connection stored in a folder, or beside a model on the hub, whose files are fetched or found in the cache.

    A model without these files has none; nor has one whose files are not in the cache while the hub can't be reached.

    Args:
        hub: cache_dir, local_files_only, revision and token, as for the stock model's `from_pretrained`.

    Raises:
        ValueError: a file that is truncated or not safetensors, or settings that are not known.
        OSError: the hub has no such model or does not give it out.
    """
    cc_config, path = read_cc_config(path_or_id, **hub), _stored_file(path_or_id, CONNECTION_FILE, hub)
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    if path is not None:
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                metadata = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: truncated or not safetensors ({error}); export the model again") from error
    decision_maker = tensors.pop("decision_maker.weight", None)
    try:
        transform = Transform.from_file(tensors, metadata)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return StoredConnection(str(path_or_id), cc_config, decision_maker, transform)


def _stored_file(path_or_id: str | Path, name: str, hub: dict[str, Any]) -> str | None:
    return cached_file(path_or_id, name, _raise_exceptions_for_missing_entries=False, **hub)


def apply_connection(model, stored: StoredConnection) -> None:
    """Put a stored Decision Maker and transform into a model.

    Raises:
        ValueError: sizes that are not the model's, NaN or Inf.
    """
    if stored.decision_maker is not None:
        weight = model.decision_maker.weight
        shape = (model.config.num_hidden_layers, model.config.hidden_size)
        if tuple(stored.decision_maker.shape) != shape:
            raise ValueError(
                f"{stored.folder}/{CONNECTION_FILE}: decision_maker.weight has shape "
                f"{tuple(stored.decision_maker.shape)}, the model needs {shape} (layers, hidden size)"
            )
        with gathered([weight], modify=True), torch.no_grad():
            weight.copy_(stored.decision_maker)
        model.gate_was_stored = True
    if model.trained_transform is not None:
        weight = model.trained_transform.weight
        shared = stored.transform is not None and stored.transform.scope == "shared"
        with gathered([weight], modify=True):
            model.trained_transform.start_from(stored.transform.matrix if shared else None)
    if stored.transform is not None:
        try:
            model.set_transform(stored.transform)
        except ValueError as error:
            raise ValueError(f"{stored.folder}/{CONNECTION_FILE}: {error}") from error


def write_connection(
    folder: str | Path,
    cc_config: CCConfig,
    decision_maker: Tensor | None,
    trained_transform: Tensor | None,
    transform: Transform | None,
) -> None:
    """Write cc_config.json and cc_connection.safetensors; a transform that was fitted counts before a trained one.

    With neither a Decision Maker nor a transform there is no cc_connection.safetensors; one that was there is removed.
    """
    folder = Path(folder)
    tensors = {} if decision_maker is None else {"decision_maker.weight": decision_maker.detach().cpu().contiguous()}
    metadata = {"format": "pt"}
    if transform is None and trained_transform is not None:
        transform = Transform([trained_transform.T])
    if transform is not None:
        fitted, described = transform.to_file()
        tensors |= fitted
        metadata |= described
    if tensors:
        save_file(tensors, folder / CONNECTION_FILE, metadata=metadata)
    else:
        (folder / CONNECTION_FILE).unlink(missing_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(asdict(cc_config), indent=2) + "\n", encoding="utf-8")


def trained_connection(tensors: Mapping[str, Tensor], method: str) -> dict[str, Tensor]:
    """`tensors` without the Decision Maker where plain SFT has left it untrained, or of other weights."""
    return {name: tensor for name, tensor in tensors.items() if method != "sft" or name != CONNECTION_TENSORS[0]}


def write_description(model, folder: str | Path) -> None:
    """Write config.json, generation_config.json and cc_config.json: a model folder without its weights.

    A model with LoRA adds cc_lora.json, for whoever merges its adapters.
    """
    folder = Path(folder)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    (folder / CONFIG_FILE).write_text(json.dumps(asdict(model.cc_config), indent=2) + "\n", encoding="utf-8")
    scale = lora_scale(model)
    if scale is not None:
        (folder / LORA_FILE).write_text(json.dumps({"scale": scale}) + "\n", encoding="utf-8")


def export_checkpoint(checkpoint: Path, folder: Path, max_shard_bytes: int) -> int:
    """A checkpoint's weights as a model folder that plain transformers loads, shard by shard.

    Args:
        checkpoint: a checkpoint-N folder of a run.
        folder: made if it is not there; must hold no weights yet.
        max_shard_bytes: of a safetensors file; a single larger tensor gets a file of its own.

    Returns:
        The highest anonymous memory of this process, in bytes: one shard, whatever the model's size.

    Raises:
        ValueError: a checkpoint without its description or with damaged files, or a folder in use.
    """
    from cc_ds.checkpoint import read_state  # which imports the model, which imports this file

    description = checkpoint / "model"
    if not (description / "config.json").is_file():
        raise ValueError(f"{checkpoint}: no model/config.json there; name a checkpoint-N folder of a run")
    if any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} holds weights already; name another --output")
    stored_config = json.loads((description / "config.json").read_text(encoding="utf-8"))
    dtype = getattr(torch, stored_config.get("dtype") or "float32")
    tensors = stored_tensors(checkpoint / "engine")
    if (description / LORA_FILE).is_file():
        tensors = merged_when_read(tensors, json.loads((description / LORA_FILE).read_text(encoding="utf-8"))["scale"])
    shutil.copytree(description, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(LORA_FILE))

    ours = {tensor.name: tensor.read().to(dtype) for tensor in tensors if tensor.name in CONNECTION_TENSORS}
    cc_config = from_dict(CCConfig, json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8")), CONFIG_FILE)
    kept = trained_connection(ours, read_state(checkpoint)["trained"]["method"])
    write_connection(folder, cc_config, *map(kept.get, CONNECTION_TENSORS), None)
    shards = _plan_shards([tensor for tensor in tensors if tensor.name not in ours], dtype.itemsize, max_shard_bytes)
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names = ["model.safetensors"] if len(shards) == 1 else names
    peak = 0
    for name, shard in zip(names, shards):
        loaded = {tensor.name: _as(tensor.read(), dtype) for tensor in shard}
        peak = max(peak, _anonymous_memory())
        save_file(loaded, folder / name, metadata={"format": "pt"})
        del loaded
    if len(shards) > 1:
        weight_map = {tensor.name: name for name, shard in zip(names, shards) for tensor in shard}
        total = sum(tensor.numel() for shard in shards for tensor in shard) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return peak


def _plan_shards(tensors: list[StoredTensor], itemsize: int, max_bytes: int) -> list[list[StoredTensor]]:
    shards: list[list[StoredTensor]] = [[]]
    room = max_bytes
    for tensor in tensors:
        size = tensor.numel() * itemsize
        if shards[-1] and size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(tensor)
        room -= size
    return shards


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()


def _anonymous_memory() -> int:
    """Bytes of this process that are not pages of a file, which the kernel can drop; 0 where it does not say."""
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii")
    except FileNotFoundError:
        return 0
    return int(re.search(r"RssAnon:\s+(\d+)", text)[1]) * 1024
