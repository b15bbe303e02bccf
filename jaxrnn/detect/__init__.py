"""Records -> symptoms, and when they began.

rules        the language of rules: `loss > 3 * median(loss, 200)`
detectors    named rules, and the alarms that go on before a symptom
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
