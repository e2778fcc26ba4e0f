"""FlashSloth in vLLM: an out-of-tree plugin (entry point `vllm.general_plugins`).

Shape suffixes in this package: N tokens of a step (all requests, one behind the other), D width of the language model,
I images, V views, C H W channels and pixels, M un-pooled patches of an image, E width of the encoder, Q queries of a
turn, B turns, T tokens from a turn's question to its last query, K images that a turn sees.
"""

ARCHITECTURE = "FlashSlothForConditionalGeneration"
PHI_ARCHITECTURE = "PhiForCausalLM"
# vLLM's modalities: images, and turns, which bring what the embedded query module needs
IMAGE, TURN = "image", "turn"


def register() -> None:
    """Make vLLM know FlashSloth. vLLM calls it in every process; more than once does no harm."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import _TRANSFORMERS_BACKEND_MODELS
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from flashsloth import FlashSlothConfig

    from .settings import TOKENIZER_MODE, FlashSlothSettings, TransformersBackendSettings

    if MODELS_CONFIG_MAP.get(ARCHITECTURE) is FlashSlothSettings:
        return
    MODELS_CONFIG_MAP[ARCHITECTURE] = FlashSlothSettings
    for name in _TRANSFORMERS_BACKEND_MODELS:
        MODELS_CONFIG_MAP.setdefault(name, TransformersBackendSettings)
    # also where a folder brings code of its own
    _CONFIG_REGISTRY[FlashSlothConfig.model_type] = FlashSlothConfig
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:FlashSlothForVllm")
    ModelRegistry.register_model(PHI_ARCHITECTURE, f"{__name__}.phi:PhiForCausalLM")
    TokenizerRegistry.register(TOKENIZER_MODE, "vllm.tokenizers.hf", "CachedHfTokenizer")
    RENDERER_REGISTRY.register(TOKENIZER_MODE, f"{__name__}.renderer", "FlashSlothRenderer")
