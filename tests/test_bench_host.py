"""The benchmark of the host's part of a token: every setting is measured, on the logits that it made ready."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(autouse=True)
def scripts_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))


def test_every_setting_has_a_row(capsys):
    from bench_host import SETTINGS, main

    small = ("--vocab", "200", "--tokens", "6", "--seen", "5", "--layers", "1", "--rounds", "1")
    assert main(small) == 0
    rows = [line.split("|")[1:4] for line in capsys.readouterr().out.splitlines()[3:]]
    assert [name.strip() for name, _, _ in rows] == list(SETTINGS)
    assert all(0 < float(least) <= float(median) for _, least, median in rows)


def test_tokens_are_chosen_from_the_ready_logits_row_after_row():
    from bench_host import ROWS, ready_logits, without_weights

    logits = ready_logits(np.random.default_rng(1), 300)
    model = without_weights(vocab=300, layers=2, context=32, logits=logits)
    ids = model.generate(np.ones((1, 7), np.int64), max_new_tokens=12, eos_token_id=None).asnumpy()
    rows = [0, *(length % ROWS for length in range(7, 18))]  # the prompt starts at slot 0
    assert ids[0, 7:].tolist() == logits[rows].argmax(1).tolist()


def test_an_answer_without_a_token_to_time_is_refused(capsys):
    from bench_host import main

    with pytest.raises(SystemExit) as end:
        main(["--tokens", "3"])
    assert end.value.code == 2
    assert "--tokens: 3, expected at least 5" in capsys.readouterr().err
