"""plan: which layers keep softmax attention, get a window, or lose attention, for a stated budget?"""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from layerboost.artifacts import Plan, Record, Sensitivity, load, save, text_digest
from layerboost.errors import PlanError
from layerboost.layer_plan import LayerPlan
from layerboost.plan.budget import plan_budget
from layerboost.plan.losses import LOSSES, predicted_loss
from layerboost.plan.tiers import plan_tiers
from layerboost.provenance import provenance

_LONGEST_DEFAULT = 4_096


class AtLeast(Record):
    """Fewest layers of each mixer."""

    full_attention: int = Field(0, ge=0)
    sliding_attention: int = Field(0, ge=0)
    no_attention: int = Field(0, ge=0)


class Tiers(Record):
    """The paper's rule: one score per layer, cut twice.

    Attributes:
        score: which damage of removing attention ranks the layers.
        full, sliding: how many layers keep softmax, and how many of the next get a window; the rest lose attention.
        keep_above, remove_below: the same as thresholds on the score; give either counts or thresholds.
        window: of the middle tier; None is the widest that was measured.
    """

    score: str = "recall_kl"
    full: int | None = Field(None, ge=0)
    sliding: int | None = Field(None, ge=0)
    keep_above: float | None = None
    remove_below: float | None = None
    window: int | None = Field(None, ge=1)


class Config(Record):
    """What `plan` is told.

    Attributes:
        planner: `budget` minimises predicted loss under the budget; `tiers` is the paper's rule.
        kv_reduction: share of the KV cache to save, for one sequence of `context` tokens. With neither budget, 0.5.
        max_loss: most predicted loss, in nats per token.
        context: tokens; None is the model's context, at most 4,096.
        at_least: fewest layers of each mixer.
        weights: how the damages add up to one loss.
    """

    planner: Literal["budget", "tiers"] = "budget"
    kv_reduction: float | None = Field(None, ge=0, le=1)
    max_loss: float | None = Field(None, ge=0)
    context: int | None = Field(None, ge=2)
    at_least: AtLeast = AtLeast()
    weights: dict[LOSSES, float] = Field({"text_kl": 0.6, "recall_kl": 0.4}, min_length=1)
    tiers: Tiers = Tiers()


def inputs(sensitivity: Sensitivity, config: Config) -> dict[str, str]:
    """Digests of all that decides what comes out."""
    return {
        "sensitivity": text_digest(sensitivity.model_dump(mode="json", exclude={"provenance"})),
        "settings": text_digest(config.model_dump(mode="json")),
    }


def run(sensitivity: Sensitivity | Path, config: Config | None = None, *, out: Path | None = None) -> Plan:
    """Choose a mixer for every layer.

    Raises:
        PlanError: the sensitivity cannot be read, or the budget cannot be met.
    """
    config = config or Config()
    if not isinstance(sensitivity, Sensitivity):
        sensitivity = load(Sensitivity, sensitivity)
    model = sensitivity.model
    check(sensitivity)
    _check_budget(config)
    context = config.context or min(model.context, _LONGEST_DEFAULT)
    if config.planner == "tiers":
        layers = plan_tiers(sensitivity, config.tiers)
    else:
        layers = plan_budget(
            sensitivity,
            context=context,
            kv_reduction=config.kv_reduction,
            max_loss=config.max_loss,
            at_least=config.at_least.model_dump(),
            weights=config.weights,
        )
    plan = Plan(
        layers=layers,
        model=model,
        planner=config.model_dump(mode="json", exclude_none=True),
        predicted=predict(sensitivity, layers, context, config.weights),
        inputs=inputs(sensitivity, config),
        provenance=provenance(layers_digest=layers_digest(layers)),
    )
    if out is not None:
        save(plan, out)
    return plan


def layers_digest(layers: list[LayerPlan]) -> str:
    return text_digest([layer.entry() for layer in layers])


def edited(plan: Plan) -> bool:
    """Whether a person wrote the layers, or changed them since they were planned."""
    return plan.provenance.get("layers_digest") != layers_digest(plan.layers)


def check(sensitivity: Sensitivity) -> None:
    """Raises PlanError if the layers do not fit together."""
    model = sensitivity.model
    for name, count in (("layers", len(sensitivity.layers)), ("native_windows", len(model.native_windows))):
        if count != model.num_layers:
            raise PlanError(
                f"sensitivity has {count} {name}, its model has {model.num_layers}; analyze the model again"
            )


def _check_budget(config: Config) -> None:
    """Raises PlanError if something was asked for that the planner would not look at."""
    budgets = config.kv_reduction is not None or config.max_loss is not None or config.at_least != AtLeast()
    if config.planner == "tiers" and budgets:
        raise PlanError("planner tiers knows no budget: leave kv_reduction, max_loss and at_least out, or use budget")
    if config.planner == "budget" and config.tiers != Tiers():
        raise PlanError("tiers.* settings are for planner tiers; ask for it, or leave them out")


def predict(
    sensitivity: Sensitivity, layers: list[LayerPlan], context: int, weights: dict[LOSSES, float]
) -> dict[str, Any]:
    """What a plan should cost: loss if damages added up, KV cache, and how far back it can look."""
    model = sensitivity.model
    base = model.kv_bytes([LayerPlan(mixer="full_attention")] * model.num_layers, context)
    hybrid = model.kv_bytes(layers, context)
    loss = predicted_loss(sensitivity, layers, weights)
    return {
        "loss": None if loss is None else round(loss, 6),
        "context": context,
        "kv_bytes": {"base": base, "hybrid": hybrid},
        "kv_share": round(hybrid / base, 4) if base else None,
        "receptive_field": model.receptive_field(layers),
    }
