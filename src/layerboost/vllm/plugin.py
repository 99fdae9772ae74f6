"""Teaches vLLM to open hybrids. vLLM calls `register` in each of its processes, by the entry point of this package."""

_MODEL = "layerboost.vllm.model"


def register() -> None:
    """Name the hybrids' classes to vLLM; they are made when a checkpoint asks for one. Safe to repeat.

    Opening their configurations needs no more than `import layerboost`.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from vllm import ModelRegistry

    import layerboost  # noqa: F401  # teaches transformers the configurations

    known = ModelRegistry.get_supported_archs()
    for stock in set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        name = f"LayerBoost{stock}"
        if name not in known:
            ModelRegistry.register_model(name, f"{_MODEL}:{name}")
