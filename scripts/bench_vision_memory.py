"""What encoding one picture costs at the published widths: memory beyond the weights, compile time, run time.

    python scripts/bench_vision_memory.py                                  # 4, 8 and 27 layers, 4096 patches
    python scripts/bench_vision_memory.py --layers 27 --patches 1024 5376
    python scripts/bench_vision_memory.py --dtype bfloat16

Tower and projector with random weights, on the C++ operators where they are built (KIMI_VL_KERNELS=off: plain
graphs); each case runs in a fresh process. "Extra" is the peak of its resident memory (VmHWM) when the graph is
compiled, and after the picture was encoded each time, less its resident memory (VmRSS) when MindSpore is imported,
the weights are set and the picture's patches are there. So it holds all that compiling and encoding ask for, the
host's part and the features too, and nothing else. Needs Linux with glibc.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import itertools
import multiprocessing
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

RUNS = 3  # memory has settled by then
MB = 2**20


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 27], metavar="N")
    parser.add_argument("--patches", type=int, nargs="+", default=[4096], metavar="N", help="multiples of 4")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32", help="of the weights")
    args = parser.parse_args(argv)
    if any(patches < 4 or patches % 4 for patches in args.patches):
        parser.error(f"--patches: {args.patches}, expected multiples of 4")
    print("| layers | patches | weights, MB | compile, s | run, s | extra compiled, MB | extra run, MB |")
    print("|---|---|---|---|---|---|---|")
    context = multiprocessing.get_context("spawn")
    for layers, patches in itertools.product(args.layers, args.patches):
        with context.Pool(1) as pool:
            cells = pool.apply(measure, (layers, patches, args.dtype))
        print("|", " | ".join([str(layers), str(patches), *cells]), "|", flush=True)
    return 0


def measure(layers: int, patches: int, dtype: str) -> list[str]:
    """The other cells of a case's row."""
    import mindspore as ms
    import numpy as np

    from kimi_vl import KimiVLForConditionalGeneration
    from kimi_vl.modeling.configuration import ModelConfig, TextConfig, VisionConfig
    from kimi_vl.modeling.engine import Engine
    from kimi_vl.modeling.graphs import VisionGraph
    from kimi_vl.modeling.running import run_cell
    from kimi_vl.modeling.shapes import vision_inputs

    # Of the text model only the width matters, which the projector gives.
    text = TextConfig(
        vocab_size=8, hidden_size=2048, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        n_routed_experts=0, q_lora_rank=None, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    config = ModelConfig(text=text, vision=VisionConfig(num_hidden_layers=layers))
    model = KimiVLForConditionalGeneration(config, dtype=dtype)
    graph = VisionGraph(model.vision_tower, model.multi_modal_projector, config, taps=False).set_train(False)
    weights = sum(p.itemsize * p.size for p in graph.parameters_dict().values())
    ports = vision_inputs(config, patches).items()
    dtypes = {name: "float32" if kind == "float" else kind for name, (_, kind) in ports}
    graphs = SimpleNamespace(
        patches=[patches],
        vision=lambda _, inputs, taps: run_cell(graph, dtypes, inputs),
    )
    engine = Engine(config, graphs)
    pixels = np.random.default_rng(0).standard_normal((patches, 3, 14, 14), np.float32)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # or freed memory, used again, would not be counted

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    empty = engine.vision_inputs(np.zeros_like(pixels), 2, patches // 2, patches)
    start = time.perf_counter()
    graph.compile(*(ms.Tensor.from_numpy(empty[name]) for name in dtypes))
    compiling, compiled = time.perf_counter() - start, memory("VmHWM") - before
    del empty
    seconds, extra = [], []
    for _ in range(RUNS):
        start = time.perf_counter()
        features, _ = engine.encode_images(pixels, np.array([[2, patches // 2]]))
        seconds.append(time.perf_counter() - start)
        extra.append(memory("VmHWM") - before)
        assert np.isfinite(features[0]).all()
    return [
        f"{weights / MB:.0f}", f"{compiling:.1f}", f"{min(seconds):.1f}", f"{compiled:.0f}",
        ", ".join(f"{e:.0f}" for e in extra),
    ]  # fmt: skip


def memory(field: str) -> float:
    """A field of this process's memory in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


if __name__ == "__main__":
    sys.exit(main())
