"""Adapters to DeepSpeed. Importing this package arms the plugins, as the entry point does."""

from deepspeed_plugins._autoload import activate

activate()
