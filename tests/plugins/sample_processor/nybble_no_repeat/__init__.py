"""No n-gram twice, for nybble. Imported at every start, so it imports no torch."""

from nybble import hookimpl

NYBBLE_API = (1, 0)


@hookimpl
def nybble_logits_processors():
    return {"no_repeat": "nybble_no_repeat.processor:NoRepeat"}
