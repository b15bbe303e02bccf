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
