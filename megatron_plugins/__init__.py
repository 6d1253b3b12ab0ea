"""Adapters to Megatron-Core. Importing this package arms the plugins, as the entry point does."""

from megatron_plugins._autoload import activate

activate()
