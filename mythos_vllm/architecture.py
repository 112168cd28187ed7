"""What vLLM reads of a configuration before there is a model: the cache's form and the quantisation."""

from typing import Any

from vllm.platforms import current_platform
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from mythos_vllm.checks import dequantises, latent_cache_fits


class MythosArchitecture(ModelArchConfigConvertorBase):
    """Says which models keep latents and which folders are dequantised: vLLM's own list of model types with latent
    attention cannot have an out-of-tree one."""

    def is_deepseek_mla(self) -> bool:
        """Whether vLLM plans a cache of latents."""
        return latent_cache_fits(self.hf_text_config, current_platform.is_cpu())

    def get_quantization_config(self) -> dict[str, Any] | None:
        """The folder's quantisation; None where its matrices are dequantised as they are loaded."""
        return None if dequantises(self.hf_config) else super().get_quantization_config()
