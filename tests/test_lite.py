"""A bundle of target lite through its example script, with a stand-in for MindSpore Lite; see fake_mindspore_lite."""

from __future__ import annotations

import configparser
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import bundles
import fake_mindspore_lite
import mindspore as ms
import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from golden import inputs, load_case
from mindspore import nn

from kimi_vl.export import BundleError, export, mindir, plan_export
from kimi_vl.export.bundle import Bundle
from kimi_vl.export.cli import cli
from kimi_vl.export.lite import LiteGraphs
from kimi_vl.export.load import BundleGraphs
from kimi_vl.export.plan import open_converted
from kimi_vl.export.weights import SharedWeights
from kimi_vl.modeling.engine import Engine, Row
from kimi_vl.verify.interpreted import InterpretedGraph

pytestmark = pytest.mark.usefixtures("one_torch_thread")
BF16 = "tiny8-bf16"
SIZES = {"seq": (256,), "prefill_chunk": (32, 64), "image_patches": (64,), "target": "lite"}
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("lite") / "mindir"
    export(plan_export(open_converted(bundles.converted(BF16)), **SIZES), path)
    return path


@pytest.fixture
def lite(monkeypatch):
    monkeypatch.setitem(sys.modules, "mindspore_lite", fake_mindspore_lite)


class Interpreted(BundleGraphs):
    """The same graphs with caches on the host; inputs rounded to bf16, as a device takes them."""

    def __init__(self, directory: Path) -> None:
        held = Bundle.load(directory)

        def load(*arguments):
            return InterpretedGraph(*arguments, "lifted")

        super().__init__(directory, held, SharedWeights(directory, held), load)

    def vision(self, patches, inputs, taps):
        return super().vision(patches, rounded(inputs), taps)

    def text(self, tokens, context, rows, inputs, *options):
        return super().text(tokens, context, rows, rounded(inputs), *options)


def rounded(inputs):
    return {
        n: a.astype(ml_dtypes.bfloat16).astype(np.float32) if a.dtype == np.float32 else a
        for n, a in inputs.items()
    }


@pytest.mark.parametrize("case", ["text", "long", "images2"])
def test_the_bundles_script_gives_the_tokens_that_the_graphs_give(lite, bundle, tmp_path, case):
    script = runpy.run_path(str(bundle / "run_lite.py"))
    held = inputs(load_case(BF16, case))
    np.savez(tmp_path / "inputs.npz", **held)
    arguments = ["--inputs", str(tmp_path / "inputs.npz"), "--new-tokens", str(NEW_TOKENS)]
    result = CliRunner().invoke(script["main"], arguments, catch_exceptions=False)
    engine = Engine(LiteGraphs(bundle).config, Interpreted(bundle))
    row = script["prompt_row"](engine, held["input_ids"][0], held if "pixel_values" in held else {})
    want = script["greedy"](engine, row, NEW_TOKENS)
    assert result.output.strip().split(",") == list(map(str, want))


def test_its_logits_are_the_graphs_to_the_bit_and_near_torchs(lite, bundle):
    case = load_case(BF16, "text")
    graphs = LiteGraphs(bundle)
    got, want = (
        engine.extend(engine.new_cache(1), [Row(case["input_ids"][0])], all_logits=True)[0].logits
        for engine in (Engine(graphs.config, graphs), Engine(graphs.config, Interpreted(bundle)))
    )
    assert all(map(np.array_equal, got, want))
    error = np.concatenate(got) - case["logits"][0]
    assert np.square(error).sum() <= 4 * float(case["bf16_nmse"]) * np.square(case["logits"]).sum()


def test_the_cache_on_the_device_holds_one_sequence(lite, bundle):
    graphs = LiteGraphs(bundle)
    engine = Engine(graphs.config, graphs)
    first, second = engine.new_cache(1), engine.new_cache(1)
    engine.extend(first, [Row(np.arange(5))])
    engine.extend(first, [Row(np.arange(3))])
    engine.extend(second, [Row(np.arange(4))])  # begins anew
    with pytest.raises(
        BundleError, match="the device's cache holds another sequence; run these 8 tokens again"
    ):
        engine.extend(first, [Row(np.arange(2))])


def test_what_it_cannot_run_is_refused(lite, bundle, tmp_path):
    with pytest.raises(BundleError, match=r"has contexts \(256,\), not 128"):
        LiteGraphs(bundle, context=128)
    with pytest.raises(BundleError, match="is for cpu; export with --target lite"):
        LiteGraphs(bundles.bundle(BF16))
    two = Path(shutil.copytree(bundle, tmp_path / "two"))
    bundles.edit(two, lambda manifest: manifest.update(batch=2))
    with pytest.raises(BundleError, match="has graphs for 2 rows, .* export with --batch 1"):
        LiteGraphs(two)


def test_the_configuration_keeps_dtypes_and_caches_and_is_in_the_manifest(bundle):
    assert {"lite.ini", "run_lite.py"} <= Bundle.load(bundle).files.keys()
    options = configparser.ConfigParser()
    options.read(bundle / "lite.ini")
    assert options["ascend_context"]["parameter_as_refdata"] == "variable"
    assert options["ascend_context"]["precision_mode"] == "enforce_origin"
    assert options["ge_session_options"]["ge.exec.precision_mode"] == "must_keep_origin_dtype"


@pytest.mark.parametrize("graph", ["prefill-64x256", "decode-256", "vision-64"])
def test_mindspore_reads_the_graphs_back(bundle, graph):
    file = bundle / Bundle.load(bundle).graphs[graph].file
    cell = nn.GraphCell(ms.load(str(file)))
    held = {n: (tuple(p.shape), str(p.dtype).lower()) for n, p in cell.parameters_dict().items()}
    assert held == mindir.parameters(mindir.read(file))


def test_the_command_names_what_lite_has(bundle, untraced):
    arguments = ["--src", str(bundles.converted(BF16)), "--seq", "256", "--target", "lite", "--dry-run"]
    shown = CliRunner().invoke(cli, arguments)
    assert shown.exit_code == 0 and "lite.ini, run_lite.py" in shown.output
    refused = CliRunner().invoke(cli, [*arguments, "--cache-write", "index-copy"])
    assert (
        refused.exit_code == 2 and "but target lite has scatter, scatter-nd, scatter-update" in refused.output
    )


def test_the_host_side_needs_no_mindspore():
    code = "import sys, kimi_vl.export.lite, kimi_vl.modeling.engine; sys.exit('mindspore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_without_mindspore_lite_the_script_says_so(bundle):
    done = subprocess.run(
        [sys.executable, bundle / "run_lite.py", "--ids", "1,2"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (3, "run_lite: mindspore_lite is not installed\n")
