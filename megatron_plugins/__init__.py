"""Adapters to Megatron-Core. Importing this package arms the plugins, as the entry point does."""
