"""The ledger: what a run that starts again reads, and that only rank 0 writes it."""

from __future__ import annotations

import json

import pytest

from sbtrain.checkpoint.ledger import Ledger


def test_a_new_run_has_everything_before_it(tmp_path):
    ledger = Ledger(tmp_path)
    assert ledger.unfinished(["a", "b"]) == ["a", "b"]
    assert ledger.checkpoint is None and ledger.step == 0
    assert not ledger.path.exists(), "reading writes nothing"


def test_the_next_process_reads_what_was_recorded(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.record_checkpoint("checkpoints/step_3", 3, write=True)
    ledger.finish("a", write=True)
    ledger.record_checkpoint("checkpoints/step_9", 9, write=True)
    again = Ledger(tmp_path)
    for one in (ledger, again):
        assert one.unfinished(["a", "b", "c"]) == ["b", "c"]
        assert one.checkpoint == tmp_path / "checkpoints/step_9" and one.step == 9
    assert json.loads(ledger.path.read_text()) == {
        "stages_done": ["a"],
        "checkpoint": "checkpoints/step_9",
        "step": 9,
    }


def test_ranks_that_do_not_write_follow_in_memory(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.record_checkpoint("checkpoints/step_3", 3, write=False)
    ledger.finish("a", write=False)
    assert ledger.step == 3 and ledger.unfinished(["a", "b"]) == ["b"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "lacking"), [({}, "checkpoint"), ({"step": 3, "checkpoint": None}, "stages_done"), ([], "step")]
)
def test_a_ledger_that_lacks_a_key_is_refused(tmp_path, content, lacking):
    (tmp_path / "ledger.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"ledger\.json lacks .*{lacking}.*choose another run_dir"):
        Ledger(tmp_path)
