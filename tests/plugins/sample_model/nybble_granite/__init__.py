"""IBM's Granite for nybble. Imported at every start, so it imports no torch."""

from nybble import hookimpl

NYBBLE_API = (1, 0)


@hookimpl
def nybble_models():
    return {"GraniteForCausalLM": "nybble_granite.model:GraniteForCausalLM"}
