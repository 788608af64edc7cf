"""The floor: hookspecs, the plugin host, errors, environment, logging. Imports nothing of nybble."""
