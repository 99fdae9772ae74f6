"""The one place where checkpoints are read. Nothing is unpickled, and no code that comes with a checkpoint is run."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from layerboost.artifacts import KVShape, ModelRecord, check_intact, read_json, write_text
from layerboost.errors import CheckpointError, EnvironmentTrouble
from layerboost.layer_plan import LayerPlan, full_plan, parse_layers
from layerboost.model.config import (
    PREFIX,
    base_config_class,
    config_class,
    empty_model,
    family_of,
    hybrid_config,
    native_windows,
    stock_class,
)
from layerboost.model.families import anatomy_of, refusal
from layerboost.model.hybrid import Hybrid, check_tensors, has_soft_cap, model_class
from layerboost.model.mixers import HeadShape
from layerboost.model.selfcheck import check_faithful

REFERENCE = "reference"  # what the shipped model is called where a model is asked for
# as safetensors calls what may have a fraction
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_NOT_ENOUGH = ("tokenizer_config", "special_tokens_map", "added_tokens", "chat_template", "merges")
# spaces, numbers, contractions, ends of lines, other scripts: where tokenizers differ
_SAMPLE = "def read(self, n):\n    return n  # it's 2,024.50\r\n\n\tÜber 北京 — naïve?  THE END\u00a0🙂"
# code is read by nothing here without a flag, but is among the files that a portable export must have whole
_WANTED = ["model*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.model", "*.jinja", "*.py"]


def find_model(source: str | Path) -> Path:
    """The folder of a model: a local one, a download of a hub id, or under `reference` the one that is shipped; a
    folder of that name is `./reference`, or a Path.

    Raises:
        CheckpointError: neither is there.
    """
    name, path = str(source), Path(source).expanduser()
    if source == REFERENCE or (name == REFERENCE and not path.is_dir()):
        return Path(str(resources.files("layerboost") / "reference"))
    if name and path.is_dir():
        return path
    if path.is_file():
        raise CheckpointError(f"{name} is a file; name the folder of a checkpoint, or a hub id")
    return _download(name, _WANTED)


def find_config(source: str | Path) -> PreTrainedConfig:
    """The configuration of a model, without fetching its weights."""
    return read_config(find_model(source) if is_local(source) else _download(str(source), ["config.json"]))


def is_local(source: str | Path) -> bool:
    """Whether a model is here already."""
    return str(source) == REFERENCE or Path(source).expanduser().exists()


def _download(name: str, patterns: list[str]) -> Path:
    path = Path(name)
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1 or not name:
        raise CheckpointError(f"{name} does not exist; name the folder of a checkpoint, or a hub id like owner/name")
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (RepositoryNotFoundError, HFValidationError) as trouble:
        raise CheckpointError(f"{name} is neither a local folder nor a model on the hub: {_line(trouble)}") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as trouble:
        raise CheckpointError(
            f"{name} is not a local folder, and the hub cannot be asked for it: {_line(trouble)}"
        ) from None
    except Exception as trouble:  # the hub's http client raises errors of its own when there is no network
        if not type(trouble).__module__.startswith(("httpx", "httpcore")):
            raise
        raise CheckpointError(
            f"{name} is not a local folder, and the hub cannot be reached: {_line(trouble)}"
        ) from None


def read_config(folder: Path, *, quantised: bool = False) -> PreTrainedConfig:
    """The configuration of a base model or a hybrid.

    Args:
        quantised: whether one of quantised weights is allowed.

    Raises:
        CheckpointError: missing, damaged, of a family that is not supported, or quantised.
    """
    raw = read_json(folder / "config.json", CheckpointError)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(
            f"{folder / 'config.json'}: key model_type is missing; this is not a model's configuration"
        )
    if raw.get("quantization_config") and not quantised:
        raise CheckpointError(f"{folder}: quantised checkpoints are not supported; start from the original weights")
    family = model_type.removeprefix(PREFIX)
    raw.pop("auto_map", None)  # code that comes along is not run, and would not be there where this is saved to
    for key in ("attn_implementation", "experts_implementation"):  # which may be code of the hub, and is ours to choose
        raw.pop(key, None)
        raw.pop(f"_{key}", None)
    made = config_class(family) if model_type.startswith(PREFIX) else base_config_class(family)
    with _valid(folder, model_type):
        config = made.from_dict(raw)
    reason = refusal(config)
    if reason:
        raise CheckpointError(f"{folder}: {family} models cannot be converted: {reason}")
    with _valid(folder, model_type):
        model = _built_empty(config)
    anatomy_of(model.base_model)
    return config


@contextlib.contextmanager
def _valid(folder: Path, model_type: str) -> Iterator[None]:
    """Whatever a wrong value in a configuration runs into, said in one line."""
    try:
        yield
    except Exception as trouble:
        raise CheckpointError(
            f"{folder / 'config.json'} is not a valid {model_type} configuration: {_line(trouble)}"
        ) from None


def _built_empty(config: PreTrainedConfig) -> Any:
    """`empty_model`; raises whatever its code raises on values it cannot work with."""
    sizes = ("num_hidden_layers", "vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
    for key in (*sizes, "num_key_value_heads", "max_position_embeddings", "head_dim", "sliding_window"):
        value = getattr(config, key, None)
        optional = value is None and key in ("num_key_value_heads", "head_dim", "sliding_window", "intermediate_size")
        optional = optional or (value == 0 and key == "sliding_window")  # none, to some families
        if not optional and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{key} must be a whole number of at least 1, found {value!r}")
    return empty_model(config)


def check_pair(hybrid: Path, hybrid_config: PreTrainedConfig, base: Path, base_config: PreTrainedConfig) -> None:
    """Raises CheckpointError unless the hybrid is as it was written, and was made from this base model."""
    if is_hybrid(base_config):
        raise CheckpointError(f"{base} is a hybrid; name the original model")
    for key in ("vocab_size", "num_hidden_layers", "hidden_size"):
        ours, theirs = getattr(hybrid_config, key), getattr(base_config, key)
        if ours != theirs:
            raise CheckpointError(f"{hybrid} has {key} {ours}, {base} has {theirs}; name the model it was made from")
    check_intact(hybrid)
    origin = hybrid_config.layerboost.get("provenance", {}).get("base", {}).get("digest")
    if origin is not None and origin != digest(base):
        raise CheckpointError(
            f"{hybrid} was made from a model of digest {origin[:12]}, {base} has {digest(base)[:12]}; name the model "
            "it was made from"
        )


def is_hybrid(config: PreTrainedConfig) -> bool:
    return bool(config.model_type.startswith(PREFIX))


def plan_of(config: PreTrainedConfig, folder: Path) -> list[LayerPlan]:
    """The plan of a hybrid's configuration; raises CheckpointError for a base model."""
    if not is_hybrid(config):
        raise CheckpointError(f"{folder} is a {config.model_type} model, not a hybrid; convert it first")
    spec = getattr(config, "layerboost", None)
    where = f"{folder / 'config.json'}: layerboost"
    if not isinstance(spec, dict) or not _is_provenance(spec.get("provenance", {})):
        raise CheckpointError(f"{where}: schema, layers or provenance are not as layerboost writes them; convert again")
    return parse_layers(spec.get("layers"), where)


def _is_provenance(value: Any) -> bool:
    """Objects where objects are expected, text and numbers in them."""
    if not isinstance(value, dict):
        return False
    base, healing = value.get("base", {}), value.get("healing", {})
    texts = isinstance(base, dict) and all(isinstance(text, str) for text in base.values())
    return texts and isinstance(healing, dict) and isinstance(healing.get("tokens", 0), int)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, each with a header that can be read.

    Raises:
        CheckpointError: none, a shard missing, a truncated file, or pickled weights alone.
    """
    if (folder / "adapter_config.json").exists():
        raise CheckpointError(f"{folder} holds an adapter beside the weights; merge it into the model first")
    index = folder / "model.safetensors.index.json"
    if index.exists() and not (folder / "model.safetensors").exists():
        shards = read_json(index, CheckpointError).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise CheckpointError(f"{index}: key weight_map must map tensor names to files")
        files = [folder / name for name in sorted(set(shards.values()))]
        if any(Path(name).name != name for name in shards.values()):
            raise CheckpointError(f"{index}: a shard lies outside the folder; that is not allowed")
    else:
        files = [folder / "model.safetensors"]
    for path in files:
        if not path.exists():
            if [p for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern)]:
                raise CheckpointError(
                    f"{folder} holds pickled weights only, which are never opened because they can run code; save the "
                    "model as safetensors first"
                )
            raise CheckpointError(f"{folder}: weights are missing: {path.name} does not exist")
        try:
            with safe_open(path, framework="pt") as opened:
                opened.keys()
        except (SafetensorError, OSError) as trouble:
            raise CheckpointError(f"{path} is damaged or truncated ({_line(trouble)}); fetch it again") from None
    return files


def digest(folder: Path) -> str:
    """sha256 over the configuration and the weights: what makes a model this model."""
    total = hashlib.sha256(json.dumps(read_json(folder / "config.json", CheckpointError), sort_keys=True).encode())
    for path in weight_files(folder):
        found = path.stat()
        total.update(_weights_digest(path, found.st_size, found.st_mtime_ns))
    return total.hexdigest()


@lru_cache(maxsize=256)
def _weights_digest(path: Path, size: int, changed: int) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def describe(source: str | Path, folder: Path, config: PreTrainedConfig) -> ModelRecord:
    name = folder.resolve().name if Path(source).expanduser().is_dir() else str(source)
    return model_record(config, name, digest(folder), _stored_dtype(folder) if config.dtype is None else None)


def _stored_dtype(folder: Path) -> torch.dtype | None:
    """Of the first weights with a fraction, which is what transformers loads them as where nothing else is said."""
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118, not a mapping
                if (dtype := _DTYPES.get(opened.get_slice(name).get_dtype())) is not None:
                    return dtype
    return None


def model_record(config: PreTrainedConfig, name: str, digest: str, stored: torch.dtype | None = None) -> ModelRecord:
    """Args:
    stored: dtype of the weights, for a configuration that does not say.
    """
    shape = HeadShape.of(config)
    dtype = config.dtype or stored or torch.float32
    return ModelRecord(
        name=name,
        digest=digest,
        num_layers=config.num_hidden_layers,
        kv_shape=KVShape(
            num_key_value_heads=shape.groups,
            head_dim=shape.head_dim,
            bytes_per_value=(getattr(torch, dtype) if isinstance(dtype, str) else dtype).itemsize,
        ),
        native_windows=native_windows(config),
        context=config.max_position_embeddings,
    )


def load_original(folder: Path, *, dtype: torch.dtype | None = None, device: str = "cpu") -> Hybrid:
    """A base model as a hybrid that keeps everything: bit-equal to the original, and its mixers can be changed.

    Args:
        dtype: of the weights in memory; None is the checkpoint's own.

    Raises:
        CheckpointError: not a whole, finite checkpoint of a supported family, a hybrid already, or of a family without
            contract tests and not converted faithfully when tried.
    """
    config = original_config(folder)
    model = _load(model_class(family_of(config)), config, folder, dtype, device)
    check_faithful(model)
    return model


def original_config(folder: Path) -> PreTrainedConfig:
    """The configuration of a base model as a hybrid that keeps everything; raises CheckpointError for a hybrid."""
    config = read_config(folder)
    if is_hybrid(config):
        raise CheckpointError(f"{folder} is a hybrid already; name the original model")
    return hybrid_config(config, full_plan(config.num_hidden_layers))


def load_model(folder: Path, *, dtype: torch.dtype | None = None, device: str = "cpu") -> Any:
    """A model as it is: a hybrid under its own plan, anything else through transformers' own class."""
    config = read_config(folder)
    family = family_of(config)
    if is_hybrid(config):
        return _load(model_class(family), config, folder, dtype, device)
    return _load(stock_class(family), config, folder, dtype, device)


def _load(kind: Any, config: PreTrainedConfig, folder: Path, dtype: torch.dtype | None, device: str) -> Any:
    weight_files(folder)
    with loadable(folder, config):
        model, info = kind.from_pretrained(
            folder, config=config, dtype=dtype or "auto", use_safetensors=True, local_files_only=True,
            ignore_mismatched_sizes=True, output_loading_info=True, attn_implementation=implementation(config),
        )  # fmt: skip
        check_tensors(info, folder)
    check_finite(model.named_parameters(), folder)
    return model.to(device).eval()


def implementation(config: PreTrainedConfig) -> str | None:
    """The attention implementation to load a model with; None is transformers' choice."""
    return "eager" if has_soft_cap(config) else None


@contextlib.contextmanager
def loadable(folder: Path, config: PreTrainedConfig) -> Iterator[None]:
    """Whatever a family's code runs into on files that it was not made for, said in one line."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as trouble:
        raise CheckpointError(f"{folder} cannot be loaded as {config.model_type}: {_line(trouble)}") from None


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], folder: Path) -> None:
    """Raises CheckpointError for the first of these named tensors that is not finite."""
    for name, tensor in tensors:
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{folder}: tensor {name} holds values that are not finite; fetch the model again")


def load_tokenizer(folder: Path) -> Any:
    """Raises CheckpointError if the folder has no tokenizer that can be read without running code from it."""
    if not any(path.stem not in _NOT_ENOUGH for path in tokenizer_files(folder)):
        # transformers would make an empty one up
        raise CheckpointError(f"{folder} has no tokenizer; copy tokenizer.json of the original model into it")
    try:
        return AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, config=_named_config(folder)
        )
    except Exception as trouble:  # tokenizers raise bare exceptions on damaged files
        raise CheckpointError(f"{folder} has no tokenizer that can be read: {_line(trouble)}") from None


def _named_config(folder: Path) -> PreTrainedConfig | None:
    """Of a model in the hub's cache, its configuration under the model's name, by which transformers knows tokenizers
    that are not what their files say; None elsewhere."""
    repository = folder.resolve().parent.parent.name
    if folder.resolve().parent.name != "snapshots" or not repository.startswith("models--"):
        return None
    config: PreTrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    config._name_or_path = repository.removeprefix("models--").replace("--", "/", 1)
    return config


def tokenizer_digest(folder: Path) -> str:
    """sha256 over the tokenizer's files."""
    total = hashlib.sha256()
    for path in tokenizer_files(folder):
        total.update(path.as_posix().encode() + b"\0" + hashlib.sha256((folder / path).read_bytes()).digest())
    return total.hexdigest()


def tokenizer_files(folder: Path) -> list[Path]:
    """Relative to the folder, in order; chat templates with names of their own are in a folder inside."""
    found = [path for path in folder.iterdir() if _is_tokenizer_file(path)]
    return sorted(path.relative_to(folder) for path in [*found, *folder.glob("additional_chat_templates/*.jinja")])


def copy_beside_weights(original: Path, folder: Path) -> None:
    """What belongs to a checkpoint and is no weight: its tokenizer, and how it is meant to write.

    Raises:
        CheckpointError: the copy of the tokenizer gives other tokens.
    """
    for path in [*tokenizer_files(original), Path("generation_config.json")]:
        if (original / path).is_file():
            (folder / path).parent.mkdir(exist_ok=True)
            shutil.copyfile(original / path, folder / path)
    _keep_tokenizer(original, folder)


def _keep_tokenizer(original: Path, folder: Path) -> None:
    """transformers chooses a tokenizer's class by the type of the model beside it as well, which may overrule the class
    that the files name; a hybrid has another type, so the class that was chosen is written down."""
    try:
        wanted = load_tokenizer(original)
    except CheckpointError:  # whoever has no use for it may convert without
        return
    found = load_tokenizer(folder)
    if type(found) is not type(wanted):
        path = folder / "tokenizer_config.json"
        raw = read_json(path, CheckpointError) if path.exists() else {}
        write_text(path, json.dumps(raw | {"tokenizer_class": type(wanted).__name__}, indent=2, ensure_ascii=False))
        found = load_tokenizer(folder)
    if not same_tokens(wanted, found):
        raise CheckpointError(
            f"{original}: its tokenizer, a {type(wanted).__name__}, gives other tokens beside a hybrid, where "
            f"transformers opens a {type(found).__name__}; this model cannot be converted faithfully"
        )


def same_tokens(one: Any, other: Any) -> bool:
    """Whether two tokenizers cut the same sample into the same tokens."""
    return bool(one(_SAMPLE)["input_ids"] == other(_SAMPLE)["input_ids"])


def _is_tokenizer_file(path: Path) -> bool:
    known = ("tokenizer", "special_tokens_map", "vocab", "merges", "added_tokens", "chat_template", "spiece")
    return (
        path.is_file()
        and path.name.startswith(known)
        and path.suffix in (".json", ".txt", ".model", ".jinja", ".tiktoken")
    )


def pick_device(name: str) -> str:
    """`auto` is the GPU if there is one; raises EnvironmentTrouble if a named device is not there."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return "cuda" if there["cuda"] else "cpu"
    if not there[name]:
        raise EnvironmentTrouble(
            f"device {name} is not available; use {', '.join(d for d in there if there[d])} or auto"
        )
    return name


def _line(trouble: Exception) -> str:
    lines = [line for line in str(trouble).splitlines() if line.strip()]
    return (lines[0] if lines else type(trouble).__name__).strip()[:300]


os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
