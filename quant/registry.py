"""Find a quantization method by name, through the plugin door."""

from __future__ import annotations

from ..plugins.errors import PluginError
from ..plugins.manager import PluginHost
from .base import QuantizationConfig


def get_quantization_config(name: str, host: PluginHost) -> type[QuantizationConfig]:
    """The QuantizationConfig class that a plugin registered under `name`.

    Raises PluginError: nobody did, or what it registered is no QuantizationConfig.
    """
    found = host.resolve("quant", name)
    if not (isinstance(found, type) and issubclass(found, QuantizationConfig)):
        raise PluginError(f"quantization method {name!r} is not a QuantizationConfig", found=repr(found),
                          fix=f"mend the plugin {host.owner('quant', name)}")
    return found
