#!/usr/bin/env python
"""Writes a checkpoint of random weights in the published layout, at the published dimensions or any others.

    python scripts/make_synthetic.py --layers 2 --out ./synthetic      # 3.6 GB
    python scripts/make_synthetic.py --layers 27 --out ./full --header-only

What the published weights are needed for but cannot be had: measuring the conversion, the export and the network at
full width.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click

from kimi_vl.convert import ConversionError, EnvironmentProblem
from kimi_vl.modeling.configuration import ConfigError, ModelConfig

sys.path.insert(0, str(Path(__file__).parent))
from synthetic_kit.layout import (
    INDEX,
    ITEM_BYTES,
    SHARD_BYTES,
    Shard,
    Tensor,
    index,
    published_tensors,
    shards,
)
from synthetic_kit.side_files import side_files
from synthetic_kit.values import draw, spans

PUBLISHED = Path(__file__).parents[1] / "tests/data/published/config.json"
PART = ".part"
ROOM = 1.01  # of the checkpoint's size has to be free


def configuration(file: Path, layers: int, vision_layers: int | None = None) -> dict[str, Any]:
    """The parsed `file` with other numbers of layers. Raises ConfigError."""
    ModelConfig.from_file(file)
    raw = json.loads(file.read_text(encoding="utf-8"))
    raw.setdefault("text_config", {})["num_hidden_layers"] = layers
    if vision_layers is not None:
        raw.setdefault("vision_config", {})["num_hidden_layers"] = vision_layers
    return raw


def make(
    out: Path,
    raw: dict[str, Any],
    *,
    seed: int = 0,
    threads: int = 2,
    shard_bytes: int = SHARD_BYTES,
    header_only: bool = False,
    progress: Callable[[int], object] = lambda nbytes: None,
) -> None:
    """Writes a checkpoint for the configuration `raw` to `out`, which is there only when it is whole.

    Args:
        out: a new or an empty directory.
        raw: the parsed ``config.json``.
        seed: the same seed gives the same files, whatever the number of threads.
        shard_bytes: of tensors in a file, at most.
        header_only: weights are holes in files of full size, which take no room and read as zeros.
        progress: called with the number of bytes of tensors written since its last call.

    Raises:
        ConversionError, ConfigError: `out` or `raw` cannot be used; nothing was written.
        EnvironmentProblem, OSError: no room, a failing disk.
    """
    config = ModelConfig.from_dict(raw)
    small = {name: text.encode() for name, text in side_files(raw, seed).items()}
    files = shards(published_tensors(config), shard_bytes)
    small[INDEX] = index(files).encode()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConversionError(f"{out}: is there already; choose a new or an empty directory to write to")
    part = out.absolute().with_name(out.name + PART)
    if part.exists():
        raise ConversionError(f"{part}: was left by a run that was killed; remove it")
    part.parent.mkdir(parents=True, exist_ok=True)
    need = sum(map(len, small.values())) + sum(len(f.head) if header_only else f.nbytes for f in files)
    free = shutil.disk_usage(part.parent).free
    if free < need * ROOM:
        raise EnvironmentProblem(
            f"{out}: needs {need * ROOM / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free there"
        )
    part.mkdir()
    try:
        for name, content in small.items():
            (part / name).write_bytes(content)
        with ThreadPoolExecutor(threads) as pool:
            for shard in files:
                with open(part / shard.name, "wb") as f:
                    f.write(shard.head)
                    f.truncate(shard.nbytes)
                    f.flush()
                    if not header_only:
                        _fill(f.fileno(), shard, seed, config.text.rope_theta, pool, progress)
                    os.fsync(f.fileno())
        os.replace(part, out)
    except BaseException:
        shutil.rmtree(part)
        raise


def _fill(
    fd: int,
    shard: Shard,
    seed: int,
    theta: float,
    pool: ThreadPoolExecutor,
    progress: Callable[[int], object],
) -> None:
    def write(job: tuple[Tensor, int, int, int]) -> int:
        tensor, offset, start, count = job
        data = memoryview(draw(tensor, start, count, seed, theta)).cast("B")
        at = offset + start * ITEM_BYTES[tensor.dtype]
        done = 0
        while done < len(data):
            done += os.pwrite(fd, data[done:], at + done)
        return done

    jobs = [(tensor, offset, *span) for tensor, offset in shard.tensors for span in spans(tensor)]
    for nbytes in pool.map(write, jobs):
        progress(nbytes)


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.option(
    "--layers", type=click.IntRange(min=1), required=True, help="Text layers; the published model has 27."
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A new or an empty directory.")
@click.option("--seed", default=0, type=click.IntRange(min=0))
@click.option(
    "--vision-layers", type=click.IntRange(min=1), help="Vision blocks.  [default: the configuration's]"
)
@click.option(
    "--config",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    default=PUBLISHED,
    help="A config.json with other dimensions.",
    show_default="the published one",
)
@click.option("--threads", default=os.cpu_count() or 1, type=click.IntRange(min=1))
@click.option("--header-only", is_flag=True, help="Full-size files with holes in place of weights.")
def cli(
    layers: int,
    out: Path,
    seed: int,
    vision_layers: int | None,
    config: Path,
    threads: int,
    header_only: bool,
) -> None:
    """Writes a checkpoint of random weights in the published layout.

    \b
    Examples:
      python scripts/make_synthetic.py --layers 2 --out ./synthetic
      python scripts/make_synthetic.py --layers 27 --out ./full --header-only
    """
    from tqdm import tqdm

    raw = configuration(config, layers, vision_layers)
    tensors = published_tensors(ModelConfig.from_dict(raw))
    total = sum(tensor.nbytes for tensor in tensors)
    click.echo(f"{out}: {len(tensors)} tensors, {total / 1e9:.2f} GB, seed {seed}")
    # disable=None: no bar where nobody looks
    with tqdm(total=total, unit="B", unit_scale=True, disable=True if header_only else None) as bar:
        make(out, raw, seed=seed, threads=threads, header_only=header_only, progress=bar.update)


if __name__ == "__main__":
    try:
        cli()
    except (ConversionError, ConfigError) as e:  # bad input: one sentence, no traceback
        print(f"make_synthetic: {e}", file=sys.stderr)
        sys.exit(2)
    except (EnvironmentProblem, OSError) as e:
        print(f"make_synthetic: {e}", file=sys.stderr)
        sys.exit(3)
