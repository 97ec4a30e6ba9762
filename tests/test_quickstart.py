"""The script that users of mindone's Kimi-VL example come with: only the model's path is another one."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import nn
from PIL import Image

from kimi_vl import KimiVLConfig, KimiVLForConditionalGeneration, nano_path

MODEL_PATH = nano_path()


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "cat.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)).save(path)
    return Image.open(path)


def build(debug: bool):
    if debug:
        ms.runtime.launch_blocking()
        config = KimiVLConfig.from_pretrained(MODEL_PATH, attn_implementation="flash_attention_2")
        config.text_config.num_hidden_layers = 2
        config.vision_config.num_hidden_layers = 1
        return KimiVLForConditionalGeneration._from_config(config, torch_dtype=ms.bfloat16)
    with nn.no_init_parameters():
        return KimiVLForConditionalGeneration.from_pretrained(
            MODEL_PATH, mindspore_dtype=ms.bfloat16, attn_implementation="flash_attention_2"
        )


@pytest.mark.parametrize("debug", [False, True])
def test_the_script_runs(debug, image):
    from transformers import AutoProcessor

    model = build(debug)
    processor = AutoProcessor.from_pretrained(MODEL_PATH, trust_remote_code=True)
    messages = [
        {
            "role": "user",
            "content": [
                {"text": None, "type": "image"},
                {"text": "Describe this image in detail.", "type": "text"},
            ],
        }
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=text, images=image, return_tensors="np")
    for key, value in inputs.items():
        tensor = ms.Tensor(value)
        if tensor.dtype == ms.int64:
            tensor = tensor.to(ms.int32)
        elif tensor.dtype != ms.bool_:
            tensor = tensor.to(model.dtype)
        inputs[key] = tensor
    output = model.generate(**inputs, max_new_tokens=20, do_sample=True, temperature=0.7, top_p=0.9)
    response_ids = output[0][inputs["input_ids"].shape[1] :]
    response = processor.decode(response_ids, skip_special_tokens=True)
    assert isinstance(response, str)
    assert 1 <= len(response_ids) <= 20

    # the newer script
    inputs = processor(images=image, text=text, return_tensors="np", padding=True, truncation=True)
    inputs = {k: ms.Tensor(v) for k, v in inputs.items()}
    generated_ids = model.generate(**inputs, max_new_tokens=5, do_sample=False, temperature=1.0)
    trimmed = [out[len(prompt) :] for prompt, out in zip(inputs["input_ids"], generated_ids)]
    response = processor.batch_decode(trimmed, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert len(response) == 1 and isinstance(response[0], str)
