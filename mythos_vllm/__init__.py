"""The looped model for vLLM, as an out-of-tree plugin (entry point `vllm.general_plugins`)."""

CHECKED = "0.32"
"""The vLLM that the plugin was run with; `pip install mythos_ds[vllm]` takes no other."""


def register() -> None:
    """Make vLLM know the model. vLLM calls this in each of its processes."""
    from vllm import ModelRegistry
    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS

    import mythos_hf  # noqa: F401  transformers then knows the configuration
    from mythos_vllm.architecture import MythosArchitecture
    from mythos_vllm.loop_admission import admit

    MODEL_ARCH_CONFIG_CONVERTORS["mythos"] = MythosArchitecture
    if "MythosForCausalLM" not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model("MythosForCausalLM", "mythos_vllm.model:MythosForCausalLM")
    admit()
