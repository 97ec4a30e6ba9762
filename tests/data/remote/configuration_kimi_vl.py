"""A stand-in for the publisher's configuration: nested configurations of plain fields."""

from transformers import PretrainedConfig


class KimiVLConfig(PretrainedConfig):
    model_type = "kimi_vl"

    def __init__(self, vision_config=None, text_config=None, **kwargs):
        super().__init__(**kwargs)
        self.vision_config = PretrainedConfig(**(vision_config or {}))
        self.text_config = PretrainedConfig(**(text_config or {}))
