"""The processor: a conversation and its pictures become the inputs of the model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import BatchFeature, ProcessorMixin

from .image_processing import KimiVLImageProcessor, as_tensors, flat_images
from .tokenization import TikTokenTokenizer

IMAGE_TOKEN = "<|media_pad|>"

# What `apply_chat_template` hands on to the processor's call when it tokenizes.
_CALL_OPTIONS = ("padding", "padding_side", "truncation", "max_length", "pad_to_multiple_of")
_IMAGE_KEYS = ("image", "image_url", "url", "path", "base64")


class KimiVLProcessor(ProcessorMixin):
    """Image processor and tokenizer in one, with the calls of the published processor.

    Args:
        image_processor, tokenizer: the parts.
        chat_template: default: the tokenizer's.
    """

    image_token = IMAGE_TOKEN

    def __init__(
        self,
        image_processor: KimiVLImageProcessor,
        tokenizer: TikTokenTokenizer,
        chat_template: Any = None,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)
        self.image_token_id: int = tokenizer.get_vocab().get(IMAGE_TOKEN, -1)
        if self.image_token_id < 0:
            raise ValueError(f"the tokenizer has no special token {IMAGE_TOKEN}; is it a Kimi-VL tokenizer?")

    @classmethod
    def _get_arguments_from_pretrained(
        cls, pretrained_model_name_or_path: str, *args: Any, **kwargs: Any
    ) -> list:
        """The parts are always ours, whatever class names the directory's files give."""
        return [
            KimiVLImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs),
            TikTokenTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs),
        ]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:  # type: ignore[override]
        """From a model directory, a Hub repo id, or ``nano``; no code of the directory is run.

        Raises:
            ValueError: a file of the directory is missing or damaged; the message names it.
        """
        from .configuration_kimi_vl import model_source

        kwargs.pop("trust_remote_code", None)
        return super().from_pretrained(model_source(pretrained_model_name_or_path), **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Saves all files of the published layout, ``preprocessor_config.json`` among them."""
        files = super().save_pretrained(save_directory, *args, **kwargs)
        return [*files, *self.image_processor.save_pretrained(save_directory)]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: None = None,
        audio: None = None,
        *,
        padding: bool | str | None = None,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        add_special_tokens: bool = True,
        split_special_tokens: bool = False,
        return_tensors: Any = None,
    ) -> BatchFeature:
        """The model's inputs.

        Args:
            images: a picture, or lists of pictures in the order of the placeholders (also one list per text); what a
                picture may be, says :func:`image_processing.load_image`.
            text: prompts with one ``<|media_pad|>`` per picture, as `apply_chat_template` gives them.
            padding: True or "longest": to the longest row; "max_length"; False: not at all. Default: to the longest
                row if tensors are asked for.
            truncation: True cuts rows longer than `max_length` (default: the tokenizer's `model_max_length`); a cut
                that would take away part of a picture is an error.
            padding_side, pad_to_multiple_of: as transformers' tokenizers take them; padding is on the left by default.
            add_special_tokens, split_special_tokens: as transformers' tokenizers take them.
            return_tensors: None (ids as lists, pixels as numpy arrays), "np", or "ms" for MindSpore tensors.

        Returns:
            input_ids and attention_mask [B, T] int64, if there is text; with every placeholder repeated once per
            token of its picture. pixel_values [N, 3, 14, 14] float32 and image_grid_hws [n, 2] int64, if there are
            pictures.

        Raises:
            ValueError: the counts of placeholders and pictures differ; a picture cannot be read; rows of unequal
                length without padding; a cut through a picture.
        """
        if videos is not None or audio is not None:
            raise ValueError("videos and audio: this model takes only text and images")
        if text is None and images is None:
            raise ValueError("the processor was called with neither text nor images")
        pictures = list(flat_images(images))
        features = dict(self.image_processor(pictures)) if pictures else {}
        if text is not None:
            texts = [text] if isinstance(text, str) else list(text)
            if not texts or not all(isinstance(t, str) for t in texts):
                raise ValueError("text: expected a string or a list of strings")
            rows = self.tokenizer(
                texts,
                add_special_tokens=add_special_tokens,
                split_special_tokens=split_special_tokens,
                return_attention_mask=False,
            )["input_ids"]
            rows = self._expand(rows, images, features.get("image_grid_hws"))
            if truncation not in (None, False, "do_not_truncate"):
                rows = [self._truncated(row, i, max_length) for i, row in enumerate(rows)]
            if padding is None:
                padding = return_tensors is not None
            rows, masks = self._padded(rows, padding, max_length, pad_to_multiple_of, padding_side)
            text_features: dict[str, Any] = {"input_ids": rows, "attention_mask": masks}
            if return_tensors is not None:
                if len({len(row) for row in rows}) > 1:
                    lengths = ", ".join(str(len(row)) for row in rows)
                    raise ValueError(f"the rows have {lengths} tokens, which is no tensor; use padding=True")
                text_features = {k: np.array(v, np.int64) for k, v in text_features.items()}
            features = {**text_features, **features}
        return as_tensors(features, return_tensors)

    def _expand(self, rows: list[list[int]], images: Any, grids: np.ndarray | None) -> list[list[int]]:
        """Each placeholder repeated once per token of its picture."""
        counts = [row.count(self.image_token_id) for row in rows]
        given = 0 if grids is None else len(grids)
        if sum(counts) != given:
            raise ValueError(
                f"the text has {sum(counts)} image placeholders ({IMAGE_TOKEN}), but {given} images were given"
            )
        if len(rows) > 1 and _one_list_per_row(images, len(rows)):
            for i, (count, row_images) in enumerate(zip(counts, images)):
                n = len(list(flat_images(row_images)))
                if count != n:
                    raise ValueError(
                        f"row {i} of the text has {count} image placeholders ({IMAGE_TOKEN}), but {n} images were given for it"
                    )
        if grids is None:
            return rows
        lengths = iter((grids.prod(axis=1) // self.image_processor.tokens_area).tolist())
        return [
            [
                t
                for token in row
                for t in ([token] * next(lengths) if token == self.image_token_id else [token])
            ]
            for row in rows
        ]

    def _truncated(self, row: list[int], number: int, max_length: int | None) -> list[int]:
        limit = self.tokenizer.model_max_length if max_length is None else max_length
        if len(row) <= limit:
            return row
        kept = row[:limit] if self.tokenizer.truncation_side == "right" else row[-limit:]
        if kept.count(self.image_token_id) != row.count(self.image_token_id):
            raise ValueError(
                f"row {number} has {len(row)} tokens, and cutting it to {limit} would take away part of an image; "
                "use a larger max_length or fewer or smaller images"
            )
        return kept

    def _padded(
        self,
        rows: list[list[int]],
        padding: bool | str,
        max_length: int | None,
        multiple: int | None,
        side: str | None,
    ) -> tuple[list[list[int]], list[list[int]]]:
        """Rows padded to one length, and their masks."""
        length = 0  # no padding
        if padding == "max_length":
            if max_length is None:
                raise ValueError("padding='max_length' needs max_length")
            length = max_length
        elif padding in (True, "longest"):
            length = max(len(row) for row in rows)
        elif padding not in (False, "do_not_pad"):
            raise ValueError(
                f"padding is {padding!r}, expected True, False, 'longest', 'max_length' or 'do_not_pad'"
            )
        if length and multiple:
            length = -(-length // multiple) * multiple
        pad = self.tokenizer.pad_token_id
        if pad is None and any(len(row) < length for row in rows):
            raise ValueError("the tokenizer has no pad token; set tokenizer.pad_token")
        left = (side or self.tokenizer.padding_side) == "left"
        ids, masks = [], []
        for row in rows:
            more = max(0, length - len(row))
            ids.append([pad] * more + row if left else row + [pad] * more)
            masks.append([0] * more + [1] * len(row) if left else [1] * len(row) + [0] * more)
        return ids, masks

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: Any = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The prompt of a conversation, or of a list of conversations.

        Args:
            conversation: messages with `role` and `content`: a string, or a list of parts ``{"type": "text", "text":
                ...}`` and ``{"type": "image"}``. With `tokenize`, every image part holds its picture under "image",
                "url", "path" or "base64".
            chat_template: default: the directory's, or the published one.
            tokenize: give token ids (placeholders repeated as in a call), not text.
            return_dict: with `tokenize`: give all inputs of the model, pictures included.
            return_tensors: as for a call.
            processor_kwargs: options of a call (`padding`, `truncation`, `max_length`, ...); may also be given
                directly.
            kwargs: further variables of the template.

        Raises:
            ValueError: the template refuses the conversation, or as for a call.
        """
        from jinja2 import TemplateError

        options = {**(processor_kwargs or {}), **{k: kwargs.pop(k) for k in _CALL_OPTIONS if k in kwargs}}
        if not isinstance(conversation, (list, tuple)) or not conversation:
            raise ValueError("the conversation is no list of messages, or has none")
        batch = isinstance(conversation[0], (list, tuple))
        if chat_template is None or isinstance(self.chat_template, Mapping):
            chat_template = _template(self.chat_template, chat_template)
        try:
            text = self.tokenizer.apply_chat_template(
                conversation,
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **kwargs,
            )
        except TemplateError as e:
            raise ValueError(f"the chat template refuses the conversation: {e}") from None
        if not tokenize:
            return text
        images = [_pictures(c) for c in (conversation if batch else [conversation])]
        inputs = self(images=images, text=text, return_tensors=return_tensors, **options)
        return inputs if return_dict else inputs["input_ids"]


def _one_list_per_row(images: Any, rows: int) -> bool:
    return (
        isinstance(images, (list, tuple))
        and len(images) == rows
        and all(isinstance(row, (list, tuple)) for row in images)
    )


def _template(templates: Any, name: str | None) -> Any:
    """One template of a processor's one or several."""
    if not isinstance(templates, Mapping):
        return templates
    if name is None and "default" not in templates:
        raise ValueError(f"none of the chat templates ({', '.join(templates)}) is named default; choose one")
    return templates.get(name or "default", name)


def _pictures(conversation: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The pictures that a conversation's parts hold, in their order."""
    pictures = []
    for message in conversation:
        content = message.get("content")
        for part in content if isinstance(content, (list, tuple)) else ():
            if part.get("type") == "text":
                continue
            key = next((k for k in _IMAGE_KEYS if part.get(k) is not None), None)
            if key is not None:
                value = part[key]
                if isinstance(value, Mapping):  # OpenAI's form: {"image_url": {"url": ...}}
                    value = value.get("url")
                pictures.append(f"data:;base64,{value}" if key == "base64" else value)
    return pictures
