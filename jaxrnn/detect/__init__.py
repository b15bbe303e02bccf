"""Records -> symptoms, and when they began.

detectors       the named rules (collapse, spike, …), and the alarms that go on before a symptom
rule_language   what a rule is: `loss > 3 * median(loss, 200)`
"""

from jaxrnn.detect.detectors import (
    ALARMS,
    DETECTORS,
    HYSTERESIS,
    PASSING,
    Alarm,
    Detector,
    Watch,
    alarms_of,
    applicable,
    began,
    by_name,
    custom,
    first,
    first_since,
    onset,
    onsets,
    symptoms,
)

__all__ = [
    'ALARMS',
    'DETECTORS',
    'HYSTERESIS',
    'PASSING',
    'Alarm',
    'Detector',
    'Watch',
    'alarms_of',
    'applicable',
    'began',
    'by_name',
    'custom',
    'first',
    'first_since',
    'onset',
    'onsets',
    'symptoms',
]
