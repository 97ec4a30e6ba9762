"""Runs the modules that a checkpoint brings along, in a process and a Python of its own.

Requests come on stdin, answers go to stdout; what the checkpoint's code prints goes to stderr. Both are frames: eight
bytes of length, then an .npz. A request holds the inputs of a case and `n`, the greedy tokens wanted (0: the taps). An
answer holds arrays, or `error`, one sentence. The first answer says that the network is loaded, and its class.
"""

from __future__ import annotations

import io
import json
import os
import struct
import sys
from pathlib import Path
from typing import IO, Any

import numpy as np


def read_frame(stream: IO[bytes]) -> dict[str, np.ndarray] | None:
    """The next frame's arrays; None where the other side has ended."""
    head = stream.read(8)
    if len(head) < 8:
        return None
    (length,) = struct.unpack("<Q", head)
    with np.load(io.BytesIO(stream.read(length)), allow_pickle=False) as arrays:
        return dict(arrays)


def write_frame(stream: IO[bytes], **arrays: Any) -> None:
    content = io.BytesIO()
    np.savez(content, **arrays)
    stream.write(struct.pack("<Q", content.tell()) + content.getvalue())
    stream.flush()


def load(directory: Path) -> Any:
    """The network of `auto_map`, in fp32, strictly filled. Not by AutoModel: another class may be registered there."""
    import torch
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    reference = json.loads((directory / "config.json").read_text(encoding="utf-8"))["auto_map"]
    kind: Any = get_class_from_dynamic_module(reference["AutoModelForCausalLM"], str(directory))
    config = kind.config_class.from_pretrained(str(directory))
    # The eager way of the vision tower adds its mask, which is boolean; the other ones apply it.
    config.vision_config._attn_implementation = "sdpa"
    config.text_config._attn_implementation = "eager"
    network, info = kind.from_pretrained(
        str(directory),
        config=config,
        torch_dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if wrong := sorted(str(k) for k in info[key] if not str(k).endswith("rotary_emb.inv_freq")):
            raise ValueError(f"{key.replace('_', ' ')} in the weights: {wrong[0]} and {len(wrong) - 1} more")
    return network.eval().requires_grad_(False)


def routing(gate: Any, args: tuple, out: tuple[Any, Any]) -> tuple[Any, Any, Any]:
    """Selection scores, experts and weights; the gate returns the last two, of all tokens in a row."""
    indices, weights = out
    logits = args[0].flatten(0, -2).float() @ gate.weight.float().T
    return logits.sigmoid() + gate.e_score_correction_bias, indices, weights


def answer(network: Any, request: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Taps and logits, or the fields of `Greedy`."""
    import torch
    from recording import Recorder, as_numpy, greedy, text_arguments

    mask = request["attention_mask"].astype(bool)
    arguments = text_arguments(request["input_ids"].astype(np.int64), mask)
    if "pixel_values" in request:
        arguments["pixel_values"] = torch.from_numpy(request["pixel_values"])
        arguments["image_grid_hws"] = torch.from_numpy(request["image_grid_hws"].astype(np.int64))
    if n := int(request["n"]):
        return vars(greedy(network, arguments, n))
    recorder = Recorder(network.language_model.model.layers, network.multi_modal_projector, routing)
    with recorder:
        logits = network(**arguments, use_cache=False).logits
    return recorder.taps(mask) | {"logits": as_numpy(logits) * mask[..., None]}


def main(directory: Path) -> None:
    frames = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        import torch
        import transformers

        torch.set_grad_enabled(False)
        network = load(directory)
        if network.config.text_config.hidden_size < 512:
            torch.set_num_threads(1)  # threads would wait for each other
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        write_frame(frames, kind=type(network).__name__, **versions)
        while (request := read_frame(sys.stdin.buffer)) is not None:
            write_frame(frames, **answer(network, request))
    except Exception as e:  # whatever the checkpoint's code raises
        there = sys.modules.get("transformers")
        version = f"transformers {there.__version__}" if there else f"{sys.executable}"
        said = (str(e).strip().splitlines() or ["no text"])[0]
        write_frame(frames, error=f"{type(e).__name__} with {version}: {said}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
