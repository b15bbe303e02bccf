"""What an investigation of a run of ours says of its words."""

import dataclasses

import small

from jaxrnn.bisect import inspection
from jaxrnn.diagnosis import Diagnosis, Symptom
from jaxrnn.record import layout
from jaxrnn.words import data, investigation, run


def test_words_are_those_of_the_step_that_was_inspected(tmp_path, monkeypatch):
    """Which is another than the first bad one where a collapse was set off before it was seen: its examples are in
    that step's batch."""
    data.write_dataset(layout.Paths(tmp_path).data, small.dataset())
    run.train_run(small.configuration(seed=1).changed(max_steps=30, checkpoint_every=10), tmp_path)
    seen = Diagnosis(
        symptom=Symptom('collapse', 25), first_bad_step=25, where={'pass': 'update', 'examples': [2, 5]}
    )

    def located(subject, diagnosis, screens=()):
        found = inspection.inspect(subject, 21, finite=True, against=11)
        return dataclasses.replace(seen, where={**found.where(), 'examples': [2, 5]}), found

    monkeypatch.setattr(inspection, 'locate', located)
    found = investigation.bisect_run(tmp_path)
    words = investigation.words_of(found.opened, 21)
    assert found.diagnosis.where['words'] == [words[2], words[5]]
    assert words != investigation.words_of(found.opened, 25)


def test_a_run_does_not_end_for_a_part_of_it_that_stands_still():
    """For some hundred steps one tensor in six did in a run of the study, which lost nothing by it. One that stands
    still altogether ends."""
    config = small.configuration(signals=True).changed(on_divergence='stop')

    def ended(still, moved):
        stop = run._stop(config, small.dataset(), None)
        for step in range(400):
            late = step >= 300
            row = {
                'step': step, 'loss': (1.0 + 0.5 * late) * (10 if step < 5 else 1),
                'finite_loss': True, 'finite_state': True,
                'state_still': still if late else 0.0, 'state_moved': moved if late else 1.0,
                'gradient_norm': moved if late else 1.0, 'update_norm': moved if late else 1.0,
            }  # fmt: skip
            stop(row)
        stop.look_last()
        return stop.found

    assert ended(still=1 / 6, moved=1.0) is None
    assert ended(still=1.0, moved=0.0).kind == 'dead'
