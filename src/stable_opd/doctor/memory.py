"""Whether a training step fits into the device's memory."""

from collections.abc import Iterator

from stable_opd.doctor.findings import Symptom, check, symptom
from stable_opd.memory import MAKE_ROOM, MemoryPlan


@check("memory", "error", "The run would end out of memory.", MAKE_ROOM)
def memory(memory: MemoryPlan, capacity: int) -> Iterator[Symptom]:
    """What a training step needs in its largest phase, against the memory of the device."""
    shortage = memory.shortage(capacity)
    if shortage:
        yield symptom(shortage)
