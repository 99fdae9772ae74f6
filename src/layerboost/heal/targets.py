"""Which weights are trained, in the words of a plan: a layer's role, a part of it, and a module's own name."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from layerboost.errors import UsageError
from layerboost.layer_plan import LayerPlan
from layerboost.model.config import empty_model
from layerboost.model.families import Anatomy, anatomy_of
from layerboost.model.hybrid import Hybrid
from layerboost.progress import say

if TYPE_CHECKING:
    from layerboost.heal import Config

Role = Literal["before", "kept", "changed", "removed"]
_PARTS = ("attention", "mlp")


@dataclass(frozen=True)
class Target:
    """A module that is trained.

    Attributes:
        name: of the module, in the base model.
        adapted: whether it gets a LoRA adapter.
        whole: its parameters that are trained whole: own name, and name in the base model.
    """

    name: str
    layer: int
    module: nn.Module
    adapted: bool = False
    whole: tuple[tuple[str, str], ...] = ()


def roles(layers: list[LayerPlan]) -> list[Role]:
    """Per layer: `before` the first change, where student and teacher are one, `kept`, `changed`, or `removed`."""
    first = next((i for i, plan in enumerate(layers) if plan.mixer != "full_attention"), len(layers))
    names: dict[str, Role] = {"full_attention": "kept", "no_attention": "removed"}
    return ["before" if i < first else names.get(plan.mixer, "changed") for i, plan in enumerate(layers)]


def find_targets(model: Hybrid, layers: list[LayerPlan], config: "Config") -> list[Target]:
    """Modules that `config.targets` names and the student has, in the model's order.

    Raises:
        UsageError: a target that no module answers to, or nothing that could be trained.
    """
    if all(plan.mixer == "full_attention" for plan in layers):
        return []
    present, named = set(roles(layers)), {target.split(".")[0] for target in config.targets}
    if not present & named:
        raise UsageError(
            f"targets: no layer of this plan is {' or '.join(sorted(named))}; its layers are "
            f"{', '.join(role for role in get_args(Role) if role in present)}"
        )
    found: list[Target] = []
    unmet = {target for target in config.targets if _role_is_there(target, layers)}
    stack = model.anatomy.layers
    for index, (layer, plan, role) in enumerate(zip(model.decoder_layers, layers, roles(layers), strict=True)):
        gone = (model.anatomy.attention, *model.anatomy.norms) if plan.mixer == "no_attention" else ()
        for name, module in layer.named_modules():
            if name.split(".")[0] in gone:
                continue
            path = f"{role}.{_part(name, model.anatomy)}.{name.rpartition('.')[2]}"
            asked = {target for target in config.targets if f"{path}.".startswith(f"{target}.")}
            target = _target(module, f"{stack}.{index}.{name}", index, bool(asked), role, config)
            if target is not None:
                found.append(target)
                if target.adapted or config.train == "full":
                    unmet -= asked
    if unmet:
        raise UsageError(
            f"targets: {', '.join(sorted(unmet))} names nothing that could be trained here; experts that are packed "
            f"into one tensor take train=full alone; a target is one of {', '.join(get_args(Role))}, and may go on "
            f"with .attention or .mlp, and the name of a linear module"
        )
    if not found and "before" not in config.targets:
        say("nothing that takes adapters is left behind the first change, so layers before it are trained")
        return find_targets(model, layers, config.model_copy(update={"targets": [*config.targets, "before"]}))
    if not found:
        advice = "set train=full" if config.train == "lora" else "name more of them"
        raise UsageError(f"targets: {', '.join(config.targets)} have nothing that could be trained; {advice}")
    return found


def _role_is_there(target: str, layers: list[LayerPlan]) -> bool:
    """The default names every role, and few plans have all of them: those alone that are there have to be met."""
    role, *rest = target.split(".")
    return bool(rest) and role in roles(layers)


def _target(module: nn.Module, name: str, layer: int, asked: bool, role: Role, config: "Config") -> Target | None:
    norm = config.norms and "norm" in type(module).__name__.lower()
    if (config.train == "full" and asked) or (norm and role in {t.split(".")[0] for t in config.targets}):
        whole = tuple((own, f"{name}.{own}") for own, _ in module.named_parameters(recurse=False))
        return Target(name, layer, module, whole=whole) if whole else None
    if asked and isinstance(module, (nn.Linear, Conv1D)):
        return Target(name, layer, module, adapted=True)
    return None


def check_modules(config: PreTrainedConfig, targets: list[str]) -> None:
    """Raises UsageError for a module that no layer has, whatever the plan; no weights are needed."""
    named = [target for target in targets if target.count(".") == 2]
    if not named:
        return
    base = empty_model(config).base_model
    anatomy = anatomy_of(base)
    known: dict[str, dict[str, None]] = {part: {} for part in _PARTS}
    for layer in getattr(base, anatomy.layers):
        for name, module in layer.named_modules():
            if next(module.parameters(recurse=False), None) is not None:
                known[_part(name, anatomy)][name.rpartition(".")[2]] = None
    for target in named:
        _, part, module_name = target.split(".")
        if module_name not in known[part]:
            raise UsageError(
                f"targets: {target}: no layer has a module {module_name} in its {part}; it has {', '.join(known[part])}"
            )


def _part(name: str, anatomy: Anatomy) -> str:
    """Of a layer, to which a module of it belongs."""
    return "attention" if name.split(".")[0] in (anatomy.attention, *anatomy.norms) else "mlp"


def check_target(target: str) -> str:
    """Raises ValueError unless it reads `role[.part[.module]]`."""
    role, *rest = target.split(".")
    if role not in get_args(Role) or len(rest) > 2 or (rest and rest[0] not in _PARTS):
        raise ValueError(
            f"target {target!r} must be a role ({', '.join(get_args(Role))}), and may go on with .attention or .mlp, "
            "and the name of a linear module, such as changed.attention.q_proj"
        )
    return target
