"""What may run quantized layers and experts: every plugin's kernels and backends, broken ones with their cause."""

from __future__ import annotations

from typing import Any

from ...csrc.select import Kernels, LinearKernel, check_pin
from ...moe import Backends, MoEBackend
from ...plugins.errors import PluginError
from ...plugins.manager import PluginHost
from ...quant import REFERENCE


def linear_kernels(host: PluginHost, pin: str | None) -> Kernels:
    """Every linear kernel that plugins offer. Raises UsageError for a pin that nobody offers."""
    check_pin(pin, {*host.names("kernel"), REFERENCE}, "kernel")
    known, broken = resolve_all(host, "kernel", LinearKernel, pin)
    return Kernels(known=known, broken=broken, pin=pin)


def moe_backends(host: PluginHost, pin: str | None) -> Backends:
    """Every MoE backend that plugins offer. Raises UsageError for a pin that nobody offers."""
    check_pin(pin, host.names("moe_backend"), "MoE backend")
    known, broken = resolve_all(host, "moe_backend", MoEBackend, pin)
    return Backends(known=known, broken=broken, pin=pin)


def resolve_all(host: PluginHost, kind: str, base: type, pin: str | None) -> tuple[dict[str, Any], dict[str, str]]:
    """(parts of one kind, subclasses of `base`; causes of those that are broken). Raises PluginError when the pinned
    one is."""
    known, broken = {}, {}
    for name in host.names(kind):
        try:
            known[name] = resolve_class(host, kind, name, base)
        except PluginError as error:
            if name == pin:
                raise
            broken[name] = f"{error.asked}: {error.found}"
    return known, broken


def resolve_class(host: PluginHost, kind: str, name: str, base: type) -> type:
    """What a plugin registered under a name. Raises PluginError where it is no `base` of this name."""
    found, fix = host.resolve(kind, name), f"mend the plugin {host.owner(kind, name)}"
    if not (isinstance(found, type) and issubclass(found, base)):
        raise PluginError(f"{kind} {name!r} is not a {base.__name__}", found=repr(found), fix=fix)
    if (own := getattr(found, "name", None)) != name:
        raise PluginError(f"{kind} {name!r} calls itself by another name", found=repr(own), fix=fix)
    return found
