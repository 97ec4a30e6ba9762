"""One graph of a bundle written by MindSpore's own export: weights in the network, then `ms.export`.

    python scripts/bench_kit/ms_export.py CKPT GRAPH DST --target cpu --seq 256 --prefill-chunk 256 --image-patches 1024

The graph is the one that `export-mindir` writes with the same options. Its weights are set one by one, each held once,
in what the target computes in: less memory than MindSpore's own loading of a checkpoint takes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import mindspore as ms
import numpy as np

from kimi_vl.convert.transforms import DTYPES
from kimi_vl.export.plan import TARGETS, open_converted, plan_export
from kimi_vl.export.trace import Tracer


def export(ckpt: Path, graph: str, dst: Path, **sizes: object) -> None:
    """Writes `graph` of the plan of `sizes` to the directory `dst`."""
    plan = plan_export(open_converted(ckpt), **sizes)  # type: ignore[arg-type]
    (planned,) = (g for g in plan.graphs if g.name == graph)
    cell = Tracer(plan.config, plan.target, plan.batch, plan.weights.dtype).cell(planned).set_train(False)
    for name, parameter in cell.parameters_dict().items():
        if name in planned.caches:
            shape, dtype = planned.caches[name]
            held = np.zeros(shape, dtype)
        else:
            stored = plan.weights.read(name)
            held = stored.astype(DTYPES[plan.target.parameter_dtype(stored.dtype.name)])
        parameter.set_data(ms.Tensor.from_numpy(held))
    inputs = [ms.Tensor.from_numpy(np.zeros(shape, dtype)) for shape, dtype in planned.inputs.values()]
    dst.mkdir()
    ms.export(cell, *inputs, file_name=str(dst / graph), file_format="MINDIR")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ckpt", type=Path)
    parser.add_argument("graph")
    parser.add_argument("dst", type=Path)
    parser.add_argument("--target", choices=list(TARGETS), default="cpu")
    parser.add_argument("--seq", type=int, required=True)
    parser.add_argument("--prefill-chunk", type=int, required=True)
    parser.add_argument("--image-patches", type=int, required=True)
    args = parser.parse_args()
    export(
        args.ckpt,
        args.graph,
        args.dst,
        target=args.target,
        seq=(args.seq,),
        prefill_chunk=args.prefill_chunk,
        image_patches=(args.image_patches,),
    )
