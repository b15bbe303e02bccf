"""Records -> symptoms, and when they began.

detectors       the named rules (collapse, spike, …), and the alarms that go on before a symptom
course          what became of a run after a rule held, and when it began
fields          which field of a record is the loss
live            the same, while a run goes on
rule_language   what a rule is: `loss > 3 * median(loss, 200)`
"""

from jaxrnn.detect.course import SHORT, Event, Judgement, began, judged, still_as_good
from jaxrnn.detect.detectors import (
    ALARMS,
    DETECTORS,
    HYSTERESIS,
    LASTING,
    PASSING,
    WHEN,
    Alarm,
    Detector,
    Watch,
    alarms_of,
    applicable,
    bound,
    by_name,
    custom,
    first,
    first_since,
    named,
    onset,
    onsets,
    symptoms,
    unjudged,
    with_numbers,
)
from jaxrnn.detect.fields import asked_for, loss_of
from jaxrnn.detect.live import SpikeFilter, lasting_alarm

__all__ = [
    'ALARMS',
    'DETECTORS',
    'HYSTERESIS',
    'LASTING',
    'PASSING',
    'SHORT',
    'WHEN',
    'Alarm',
    'Detector',
    'Event',
    'Judgement',
    'SpikeFilter',
    'Watch',
    'alarms_of',
    'applicable',
    'asked_for',
    'began',
    'bound',
    'by_name',
    'custom',
    'first',
    'first_since',
    'judged',
    'lasting_alarm',
    'loss_of',
    'named',
    'onset',
    'onsets',
    'still_as_good',
    'symptoms',
    'unjudged',
    'with_numbers',
]
