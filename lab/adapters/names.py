"""Names of an adapter's files, as peft gives them; no torch is needed to look for them."""

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
