"""convert: a plan applied to the weights, without training."""

from pathlib import Path

from layerboost.artifacts import HEALING, ModelRecord, Plan, load, text_digest
from layerboost.errors import PlanError, UsageError
from layerboost.model.config import check_plan
from layerboost.model.loading import describe, find_model, load_original, original_config, tokenizer_digest
from layerboost.model.saving import save_hybrid
from layerboost.provenance import base_provenance


def inputs(model: ModelRecord, folder: Path, plan: Plan) -> dict[str, str]:
    """Digests of all that decides what comes out."""
    return {
        "model": model.digest,
        "tokenizer": tokenizer_digest(folder),
        "plan": text_digest([layer.entry() for layer in plan.layers]),
    }


def run(model: str | Path, plan: Plan | Path, *, out: Path) -> Path:
    """Write the hybrid checkpoint of a base model under a plan: surviving tensors byte-equal, nothing else.

    Raises:
        UsageError: a healed model stands in the place, which took longer to make than this.
        CheckpointError: the model cannot be read.
        PlanError: the plan does not fit the model, or was made for another one.
    """
    if (out / HEALING).exists():
        raise UsageError(f"{out} is a healed model; name another --out, or remove it")
    if not isinstance(plan, Plan):
        plan = load(Plan, plan)
    folder = find_model(model)
    if folder.resolve() == out.resolve():
        raise UsageError(f"{out} is the model itself; name another --out")
    config = original_config(folder)
    check_plan(plan.layers, config)
    record = describe(model, folder, config)
    if plan.model is not None and plan.model.digest != record.digest:
        raise PlanError(
            f"plan was made for {plan.model.name} (digest {plan.model.digest[:12]}), this is {record.name} (digest "
            f"{record.digest[:12]}); plan again on this model, or remove the key model from the plan"
        )
    loaded = load_original(folder)
    loaded.convert(plan.layers, base_provenance(record))
    save_hybrid(loaded, out, original=folder, inputs=inputs(record, folder, plan), what="converted, not healed yet")
    return out
