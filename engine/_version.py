"""The version, written once; pyproject.toml reads it through the package link."""

__version__ = "0.1.0"
