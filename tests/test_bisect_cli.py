"""`verify-parity bisect`, as a user calls it."""

from __future__ import annotations

import json
import shutil

import bundles
import pytest
from click.testing import CliRunner
from golden import DATA
from safetensors.torch import load_file, save_file

from kimi_vl.convert import convert
from kimi_vl.verify.cli import cli

BF16 = "tiny8-bf16"
CHANGED = "language_model.model.layers.1.self_attn.o_proj.weight"
pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """Converted from a checkpoint with one weight changed, so that every hash is right."""
    room = tmp_path_factory.mktemp("wrong")
    published = shutil.copytree(DATA / BF16, room / "published")
    index = json.loads((published / "model.safetensors.index.json").read_text())
    file = published / index["weight_map"][CHANGED]
    tensors = load_file(file)
    tensors[CHANGED] = tensors[CHANGED] * 1.02
    save_file(tensors, file, metadata={"format": "pt"})
    convert(published, room / "ckpt")
    return room / "ckpt"


def bisect(candidate, *more):
    arguments = ["bisect", "--reference", DATA / BF16, "--candidate", candidate, *more]
    return CliRunner().invoke(cli, list(map(str, arguments)))


def test_of_a_right_bundle_nothing_is_bad():
    result = bisect(bundles.bundle(BF16), "--case", "steps")
    assert result.exit_code == 0, result.output
    assert "nothing bad in steps" in result.stdout and "not the kernels" in result.stdout


def test_a_wrong_converted_directory_is_told_by_operator_parameter_and_node(wrong):
    result = bisect(wrong, "--case", "text", "--json")
    assert result.exit_code == 1, result.output
    found = json.loads(result.stdout)["bad"]
    assert (found["layer"], found["point"], found["case"], found["call"]) == ("layers.1", "o_proj", "text", 1)
    assert found["reads"] == [CHANGED] and found["nodes"] and found["graph"].startswith("prefill-logits-")
    points = {row["point"]: row for row in found["table"]}
    assert points["attention"]["distance"] < points["attention"]["limit"] < points["o_proj"]["distance"]
    assert {p.name for p in wrong.parent.iterdir()} == {"ckpt", "published"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((DATA / BF16,), "is a published checkpoint, expected a bundle or a converted directory"),
        ((DATA / "nowhere",), "nowhere"),
    ],
)
def test_a_wrong_input_ends_with_2(arguments, says):
    result = bisect(*arguments)
    assert result.exit_code == 2 and says in result.output


def test_an_unknown_case_ends_with_2():
    result = bisect(bundles.bundle(BF16), "--case", "none")
    assert result.exit_code == 2 and "there is no case 'none'" in result.output
