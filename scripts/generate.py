#!/usr/bin/env python
"""Ask a model about a picture: python scripts/generate.py --image PICTURE --prompt QUESTION

The model is the embedded `nano`, a published or converted directory, a Hub repo id, or an exported bundle.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click


@click.command(context_settings={"show_default": True})
@click.option(
    "--model", "src", default="nano", help="nano, a model directory, a repo id, or an exported bundle."
)
@click.option(
    "--image", "images", multiple=True, help="Path or URL of a picture; may be given several times."
)
@click.option("--prompt", required=True, help="The question.")
@click.option("--system", help="System prompt instead of the model's default.")
@click.option("--max-new-tokens", default=256, type=click.IntRange(min=1))
@click.option("--temperature", default=0.0, type=click.FloatRange(min=0), help="0 = greedy.")
@click.option("--top-p", default=1.0, type=click.FloatRange(min=0, max=1, min_open=True))
@click.option("--top-k", default=0, type=click.IntRange(min=0), help="0 = all.")
@click.option("--repetition-penalty", default=1.0, type=click.FloatRange(min=0, min_open=True))
@click.option("--seed", type=int, help="Of the sampling; default: another one each time.")
@click.option("--max-context", type=click.IntRange(min=1), help="Tokens of the cache; a bundle has its own.")
@click.option(
    "--device",
    type=click.Choice(["CPU", "Ascend"], case_sensitive=False),
    help="Where to run; default: what MindSpore chooses.",
)
def main(
    src: str,
    images: tuple[str, ...],
    prompt: str,
    system: str | None,
    max_context: int | None,
    device: str | None,
    **sampling: Any,
) -> None:
    """Print the model's answer as it is generated.

    \b
    Examples:
      python scripts/generate.py --image photo.png --prompt "Describe the picture."
      python scripts/generate.py --model ./mindir --prompt "Hello!"
      python scripts/generate.py --model ./ckpt --device Ascend --prompt "Hello!"
    """
    if device is not None:
        choose(device)
    from transformers import TextStreamer

    from kimi_vl import KimiVLProcessor

    model = load(src, max_context)
    processor = KimiVLProcessor.from_pretrained(directory(src))
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    content.append({"type": "text", "text": prompt})
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=text, images=list(images) or None, return_tensors="np")
    temperature = sampling.pop("temperature")
    model.generate(
        **inputs,
        **sampling,
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        streamer=TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True),
    )


def choose(device: str) -> None:
    """Let MindSpore run on `device`. Raises EnvironmentProblem: it cannot."""
    import mindspore as ms

    from kimi_vl.convert import EnvironmentProblem

    try:
        ms.set_device(device)
    except RuntimeError as e:
        reason = str(e).strip().splitlines()[0].split(". ")[0]
        raise EnvironmentProblem(
            f"mindspore on this machine has no {device} support ({reason}); install the MindSpore and CANN for it, or "
            "leave --device out"
        ) from None


def directory(src: str) -> str:
    """Where the processor's files are."""
    from kimi_vl import nano_path

    return nano_path() if src == "nano" and not Path(src).is_dir() else src


def load(src: str, max_context: int | None) -> Any:
    if (Path(src) / "bundle.json").is_file():
        from kimi_vl import MindIRModel

        if max_context is not None:
            raise click.UsageError("--max-context: a bundle's context was fixed when it was exported")
        return MindIRModel.from_bundle(src)
    from kimi_vl import KimiVLForConditionalGeneration

    return KimiVLForConditionalGeneration.from_pretrained(src, max_context=max_context)


if __name__ == "__main__":
    from kimi_vl.convert import EnvironmentProblem

    try:
        main()
    except EnvironmentProblem as e:
        print(f"generate: {e}", file=sys.stderr)
        sys.exit(3)
    except (ValueError, OSError) as e:  # bad input: one sentence, no traceback
        print(f"generate: {e}", file=sys.stderr)
        sys.exit(2)
