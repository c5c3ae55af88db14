"""The encoders: base configs, weights in, inputs, where adapters go, what an encoder's content is.

Only the settings are imported here, so that a recipe can be read before torch and transformers are: take `load_encoder`, `build_on_meta`
and `trainable_line` from `stairstep.models.load`, `Encoder` from `stairstep.models.encoder`.
"""

from .settings import AdapterSettings, ModelSettings, TargetSettings

__all__ = ["AdapterSettings", "ModelSettings", "TargetSettings"]
