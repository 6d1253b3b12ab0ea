from torch_plugins.export.folder_model import logits, main  # noqa: F401
