"""Frozen weights that take less room: spread over processes, or in fewer bits."""

from typing import Literal

from torch import nn

from layerboost.errors import EnvironmentTrouble, UsageError
from layerboost.heal.student import Healer
from layerboost.passes import ranks


def shard(healer: Healer) -> None:
    """Spread the decoder layers' frozen weights over all processes (FSDP2); each is whole only while it is used.

    Embedding, head and all that is trained stay whole everywhere: they are small, and the loss reads the head directly.

    Raises:
        UsageError: there is one process.
    """
    if ranks()[1] == 1:
        raise UsageError("shard=true spreads weights over several processes, and this is one; start it with torchrun")
    from torch.distributed.fsdp import fully_shard

    base = healer.model.base_model
    inside = {parameter for layer in healer.model.decoder_layers for parameter in layer.parameters()}
    trained = {p for p in healer.parameters.values() if isinstance(p, nn.Parameter)}
    for layer in healer.model.decoder_layers:
        fully_shard(layer, ignored_params=trained)
    fully_shard(base, ignored_params=trained | (set(base.parameters()) - inside))


def quantize(healer: Healer, bits: Literal["int8", "int4"]) -> None:
    """Hold the decoder layers' frozen linear weights in few bits, in place.

    Raises:
        EnvironmentTrouble: torchao is not there.
    """
    try:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise EnvironmentTrouble(f"quantize={bits} needs torchao: pip install torchao") from None
    trained = set(healer.parameters.values())

    def is_frozen(module: nn.Module, _: str) -> bool:
        return isinstance(module, nn.Linear) and module.weight not in trained

    config = Int8WeightOnlyConfig() if bits == "int8" else Int4WeightOnlyConfig()
    for layer in healer.model.decoder_layers:
        quantize_(layer, config, filter_fn=is_frozen)
