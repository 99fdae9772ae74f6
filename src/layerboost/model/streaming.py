"""Base models larger than memory: the decoder layers stay on disk, and are in memory while they are worked with.

What a checkpoint's tensors are called and how they are shaped is left to transformers' own loading, one layer at a
time, so that families with experts, or with names of their own, stream as well.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig, load_state_dict

from layerboost.errors import CheckpointError
from layerboost.model.config import family_of, stock_class
from layerboost.model.hybrid import Hybrid, check_tensors, model_class
from layerboost.model.loading import check_finite, implementation, loadable, original_config, weight_files
from layerboost.model.selfcheck import check_faithful

Resident = Callable[[int], AbstractContextManager[None]]


def stream_original(folder: Path, *, dtype: torch.dtype | None = None, device: str = "cpu") -> tuple[Hybrid, Resident]:
    """A base model as `load_original` gives it, with its decoder layers on the meta device.

    Args:
        dtype: of the weights in memory; None is the checkpoint's own.

    Returns:
        The model, and `resident`: the layer of an index is read from disk and holds what it holds in memory for as long
        as the context lasts. Enter it before `model.mixed`. It raises CheckpointError for weights that are not finite.

    Raises:
        CheckpointError: as `load_original`, of the layers' values apart; or layers cannot be told apart in the files.
    """
    config = original_config(folder)
    with loadable(folder, config):
        headers = {path: load_state_dict(path, map_location="meta") for path in weight_files(folder)}
        probe, info = stock_class(family_of(config)).from_pretrained(
            None, config=config, state_dict={key: shape for found in headers.values() for key, shape in found.items()},
            dtype=dtype or "auto", device_map="meta", ignore_mismatched_sizes=True, output_loading_info=True,
            attn_implementation=implementation(config),
        )  # fmt: skip
        check_tensors(info, folder)
        with init_empty_weights(include_buffers=False):  # buffers are computed, not read
            model = model_class(family_of(config))._from_config(
                config, dtype=probe.config.dtype, attn_implementation=implementation(config)
            )
    layers = f"{model.base_model_prefix}.{model.anatomy.layers}."
    inside = re.compile(rf"(?:^|\.){model.anatomy.layers}\.(\d+)\.")
    files: dict[int | None, dict[str, Path]] = {}
    for path, found in headers.items():
        for key in found:
            number = inside.search(key)
            files.setdefault(int(number[1]) if number else None, {})[key] = path

    @contextmanager
    def resident(index: int) -> Iterator[None]:
        layer = model.decoder_layers[index]
        empty = [(module, dict(module._parameters), dict(module._buffers)) for module in layer.modules()]
        try:
            with loadable(folder, config):
                _fill(model, files[index], device)
            for name, tensor in layer.named_parameters():
                if tensor.is_meta:
                    raise CheckpointError(f"{folder}: tensor {layers}{index}.{name} can no longer be read")
            check_finite(layer.named_parameters(prefix=f"{layers}{index}"), folder)
            yield
        finally:
            for module, parameters, buffers in empty:
                module._parameters.update(parameters)
                module._buffers.update(buffers)

    with loadable(folder, config):
        _fill(model, files[None], device)
    model.eval().tie_weights()
    for module in model.modules():
        module._buffers.update({name: None if b is None else b.to(device) for name, b in module._buffers.items()})
    astray = [name for name, tensor in model.named_parameters() if tensor.is_meta != name.startswith(layers)]
    if astray:
        raise CheckpointError(
            f"{folder}: {family_of(config)} checkpoints name their layers in another way than the model "
            f"({astray[0]}), so that layers cannot be read one by one; load the whole model"
        )
    check_finite(((n, t) for n, t in model.named_parameters() if not t.is_meta), folder)
    with _whole_passes(model, resident):
        check_faithful(model)
    return model, resident


def _fill(model: Hybrid, files: dict[str, Path], device: str) -> None:
    """Put these tensors of a checkpoint, by their names in it, where they belong in the model."""
    dtype = model.config.dtype
    wanted = LoadStateDictConfig(
        device_map={"": torch.device(device)}, dtype=dtype, dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=get_model_conversion_mapping(model), ignore_mismatched_sizes=True,
    )  # fmt: skip
    with ExitStack() as stack:
        opened = {path: stack.enter_context(safe_open(path, framework="pt")) for path in set(files.values())}
        tensors = {key: opened[path].get_slice(key) for key, path in files.items()}  # read when they are put in place
        convert_and_load_state_dict_in_model(model=model, state_dict=tensors, load_config=wanted)


@contextmanager
def _whole_passes(model: Hybrid, resident: Resident) -> Iterator[None]:
    """Each layer is read whenever it runs."""

    def from_disk(index: int, forward: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            with resident(index):
                return forward(*args, **kwargs)

        return run

    for index, layer in enumerate(model.decoder_layers):
        layer.forward = from_disk(index, layer.forward)
    try:
        yield
    finally:
        for layer in model.decoder_layers:
            del layer.forward
