"""export: a hybrid for people without LayerBoost, as a checkpoint with its own code or as a stock model."""

import json
import re
import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import jinja2
import torch

from layerboost import __version__
from layerboost.artifacts import (
    CARD,
    MANIFEST,
    check_intact,
    check_output_folder,
    check_space,
    publish_folder,
    read_json,
    recorded_inputs,
)
from layerboost.errors import CheckpointError, UsageError
from layerboost.export.native import native_model
from layerboost.model.config import config_class, family_of
from layerboost.model.hybrid import has_soft_cap, model_class
from layerboost.model.loading import (
    copy_beside_weights,
    digest,
    find_model,
    load_model,
    plan_of,
    read_config,
    weight_files,
)
from layerboost.model.saving import save_weights

Form = Literal["portable", "native"]
CODE = "modeling_layerboost"
# what a hybrid is made of at run time; nothing in it imports anything but torch, transformers and one another
RUNTIME = (
    "errors", "layer_plan", "model.families", "model.cache", "model.kernels", "model.operators", "model.mixers",
    "model.config", "model.hybrid",
)  # fmt: skip

_ENTRY = '''"""A hybrid made by LayerBoost {version} (Apache-2.0); transformers opens it with trust_remote_code=True."""

from .layerboost_config import config_class
from .layerboost_hybrid import model_class

{config} = config_class("{family}")
{model} = model_class("{family}")
for made in ({config}, {model}):
    made.__module__ = __name__
'''


def run(hybrid: str | Path, form: Form, *, out: Path) -> Path:
    """Write a hybrid in another form. What is published was opened again and computes the same.

    Args:
        form: `portable` carries its own code; `native` is a stock transformers model, for plans that one can express.

    Raises:
        CheckpointError: the hybrid cannot be read or is not intact, or no stock model computes the same.
        UsageError: a hybrid stands in the place, or something that is not layerboost's.
    """
    folder = find_model(hybrid)
    config = read_config(folder)
    plan_of(config, folder)
    check_intact(folder)
    if folder.resolve() in (out.resolve(), *out.resolve().parents):
        raise UsageError(f"{out} is the hybrid itself, or inside it; name another --out")
    check_output_folder(out)
    made_from = recorded_inputs(out, damaged=True)  # hours of healing are worth a question, whatever became of them
    if made_from is not None and "form" not in made_from:
        raise UsageError(f"{out} is a hybrid, and no export; name another --out, or remove it")
    check_space(out, sum(path.stat().st_size for path in weight_files(folder)))
    (_portable if form == "portable" else _native)(folder, config, out)
    return out


def _portable(folder: Path, config: Any, out: Path) -> None:
    from layerboost import verify

    names = (config_class(family_of(config)).__name__, model_class(family_of(config)).__name__)
    with publish_folder(out, _inputs(folder, "portable")) as partial:
        for path in folder.iterdir():
            if path.is_file() and path.name not in (MANIFEST, CARD, "config.json", ".lock"):
                shutil.copyfile(path, partial / path.name)
        raw = read_json(folder / "config.json", CheckpointError)
        raw["auto_map"] = {"AutoConfig": f"{CODE}.{names[0]}", "AutoModelForCausalLM": f"{CODE}.{names[1]}"}
        (partial / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        copy_beside_weights(folder, partial)
        for name, text in portable_code(family_of(config), *names).items():
            (partial / name).write_text(text, encoding="utf-8")
        (partial / CARD).write_text(_card("portable", out.name, config), encoding="utf-8")
        failed = [check for check in verify.run(partial, folder, trust_remote_code=True) if not check.holds]
        if failed:
            raise CheckpointError(f"{out} was not written: {failed[0].name}: {failed[0].found}")


def portable_code(family: str, config: str, model: str) -> dict[str, str]:
    """The code that goes along, by file name: LayerBoost's own run-time modules, importing one another beside them."""
    package = resources.files("layerboost")
    entry = _ENTRY.format(version=__version__, family=family, config=config, model=model)
    files = {f"{CODE}.py": entry}
    for module in RUNTIME:
        source = (package / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        beside = re.sub(r"from layerboost\.(?:model\.)?(\w+) import", r"from .layerboost_\1 import", source)
        files[f"layerboost_{module.rpartition('.')[2]}.py"] = beside
    return files


@torch.no_grad()
def _native(folder: Path, config: Any, out: Path) -> None:
    from layerboost import verify

    model = native_model(load_model(folder))
    with publish_folder(out, _inputs(folder, "native")) as partial:
        save_weights(model, partial, out)
        copy_beside_weights(folder, partial)
        (partial / CARD).write_text(_card("native", out.name, config, model), encoding="utf-8")
        failed = [check for check in verify.run(partial, folder) if not check.holds]
        if failed:
            raise CheckpointError(f"{out} was not written: {failed[0].name}: {failed[0].found}")


def _inputs(folder: Path, form: Form) -> dict[str, str]:
    return {"hybrid": digest(folder), "form": form, "layerboost": __version__}


def _card(form: Form, name: str, config: Any, model: Any = None) -> str:
    from transformers import __version__ as transformers_version

    base = config.layerboost.get("provenance", {}).get("base", {}).get("name", "a base model")
    render: Callable[..., str] = jinja2.Template(
        (resources.files("layerboost") / "export" / "card.md.jinja").read_text(encoding="utf-8")
    ).render
    return render(
        form=form, name=name, base=base, layers=config.layerboost["layers"], transformers=transformers_version,
        stock=None if model is None else type(model).__name__,
        soft_cap=form == "native" and has_soft_cap(config),
    )  # fmt: skip
