"""The looped model for Hugging Face transformers. `import mythos_hf` makes the Auto classes know it; no remote code."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from mythos_hf.configuration_mythos import MythosConfig
from mythos_hf.modeling_mythos import MythosForCausalLM, MythosModel
from mythos_hf.tokenization_mythos import MythosTokenizer

AutoConfig.register("mythos", MythosConfig, exist_ok=True)
AutoModel.register(MythosConfig, MythosModel, exist_ok=True)
AutoModelForCausalLM.register(MythosConfig, MythosForCausalLM, exist_ok=True)
AutoTokenizer.register(MythosConfig, fast_tokenizer_class=MythosTokenizer, exist_ok=True)

__all__ = ["MythosConfig", "MythosForCausalLM", "MythosModel", "MythosTokenizer"]
