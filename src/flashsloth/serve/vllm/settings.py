"""Settings of vLLM that would break the embedded query module: put right with a warning, or refused."""

from typing import TYPE_CHECKING

from vllm.config import MultiModalConfig
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from flashsloth import FlashSlothConfig

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = init_logger(f"vllm.{__name__}")

TOKENIZER_MODE = "flashsloth"
SCHEDULER = f"{__name__.rpartition('.')[0]}.scheduler.make_scheduler"
EMBEDDED_QUERY_OP = "flashsloth_embedded_query"


class FlashSlothSettings(VerifyAndUpdateConfig):
    """Called by vLLM with what the user asked for."""

    @staticmethod
    def verify_and_update_model_config(model_config: "ModelConfig") -> None:
        """Raises:
        ValueError: a tokenizer mode that does not read FlashSloth's prompts.
        """
        if model_config.tokenizer_mode not in ("auto", "hf", TOKENIZER_MODE):
            raise ValueError(
                f"--tokenizer-mode {model_config.tokenizer_mode} does not mark the questions of FlashSloth's prompts; "
                "leave it out"
            )
        model_config.tokenizer_mode = TOKENIZER_MODE
        if model_config.enable_prompt_embeds:
            raise ValueError("--enable-prompt-embeds: the embedded query module needs tokens; leave it out")
        images = model_config.multimodal_config
        if images is not None and images.mm_processor_cache_gb > 0:
            if images.mm_processor_cache_gb != MultiModalConfig().mm_processor_cache_gb:
                logger.warning("--mm-processor-cache-gb is set to 0: FlashSloth keeps encoded images, not pixels")
            images.mm_processor_cache_gb = 0

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """Raises:
        ValueError: what cannot be put right; the message names the option.
        """
        scheduling, parallel = vllm_config.scheduler_config, vllm_config.parallel_config
        refused = {
            "--scheduler-cls": scheduling.scheduler_cls not in (None, SCHEDULER),
            "--pipeline-parallel-size": parallel.pipeline_parallel_size > 1,
            "--prefill-context-parallel-size": parallel.prefill_context_parallel_size > 1,
            "--enable-dbo": parallel.use_ubatching,
            "--speculative-config": vllm_config.speculative_config is not None,
            "--kv-transfer-config": vllm_config.kv_transfer_config is not None,
            "--ec-transfer-config": getattr(vllm_config, "ec_transfer_config", None) is not None,
        }
        for option, is_set in refused.items():
            if is_set:
                raise ValueError(
                    f"{option} could cut a question from its query tokens, and the embedded query module needs both "
                    "in one step; leave it out"
                )
        scheduling.scheduler_cls = SCHEDULER
        if scheduling.long_prefill_token_threshold > 0:
            logger.warning("--long-prefill-token-threshold is set to 0: a question must not wait for less than itself")
            scheduling.long_prefill_token_threshold = 0
        compilation = vllm_config.compilation_config
        if getattr(compilation.pass_config, "enable_sp", False):
            logger.warning("sequence parallelism is switched off: the embedded query module needs whole questions")
            compilation.pass_config.enable_sp = False
        # CUDA graphs end before the module and begin again behind it
        if compilation.splitting_ops is None:
            compilation.splitting_ops = list(compilation._attention_ops)
        name = f"vllm::{EMBEDDED_QUERY_OP}"
        if compilation.splitting_ops and name not in compilation.splitting_ops:
            compilation.splitting_ops.append(name)


class TransformersBackendSettings(VerifyAndUpdateConfig):
    """Of vLLM's generic models, which would answer without ever running the embedded query module."""

    @staticmethod
    def verify_and_update_model_config(model_config: "ModelConfig") -> None:
        """Raises:
        ValueError: the model is a FlashSloth.
        """
        if model_config.hf_config.model_type == FlashSlothConfig.model_type:
            raise ValueError(
                "--model-impl transformers never runs FlashSloth's embedded query module, and answers are wrong "
                "without it; leave the option out"
            )
