"""A Hugging Face folder read layer by layer: the model without memory, its tensors on demand.

A tensor is in memory only while it is in a module; everything else is on the ``meta`` device.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..export.weights import fill, parameters_on_meta, tensor_files
from ..feature import ConfigError
from ..w4a4_config import W4A4
from .marker import SECTION, is_marker, read

CLIPS = (".input_quantizer.clip_high", ".input_quantizer.clip_low")


class Folder:
    """An exported model.

    Attributes:
        config: of transformers, without ``quantization_config``.
        fields: of ``config.json``.
        feature, modules: of a folder with W4A4's clips; None and empty otherwise.
        files: of each tensor by its name.

    Raises:
        ConfigError: not a model folder, quantized in another way, or its weights are no
            safetensors.
    """

    def __init__(
        self, path: Path, trust_remote_code: bool = False, quantized: bool = False
    ) -> None:
        self.path, self.trust_remote_code, self.quantized = path, trust_remote_code, quantized
        if not (path / "config.json").is_file():
            raise ConfigError(f"{path}: no config.json; give the folder of a Hugging Face model")
        try:
            self.fields: dict[str, Any] = json.loads((path / "config.json").read_text())
        except ValueError as error:
            raise ConfigError(f"{path / 'config.json'}: {error}") from error
        self.feature, self.modules = self._section()
        self.files = {name: path / file for name, file in tensor_files(path).items()}
        self.config = self._config()
        self._open: dict[Path, Any] = {}

    def _section(self) -> tuple[W4A4 | None, list[str]]:
        section = self.fields.get(SECTION)
        if section is None or self.quantized:
            return None, []
        if not is_marker(section):
            raise ConfigError(
                f"{self.path}: quantized already ({section.get('quant_method')}); give the folder "
                "that it was made from"
            )
        return read(section)

    def _config(self) -> Any:
        from transformers import AutoConfig

        if self.fields.get("model_type") == "plugin_decoder":
            import torch_plugins.hf  # noqa: F401  the package's code, not the folder's
        elif "auto_map" in self.fields and not self.trust_remote_code:
            raise ConfigError(
                f"{self.path}: carries code of its own; read it, then say --trust-remote-code"
            )
        if self.fields.get("desync_residual") is not None:
            raise ConfigError(
                f"{self.path}: desync_residual: each of its ranks has inputs of its own, which one "
                "clip or scale of a linear layer would not fit; quantize another model"
            )
        if self.fields.get("dense_moe") is not None:
            raise ConfigError(
                f"{self.path}: dense_moe: its experts are computed without their linear layers, "
                "which W4A4 quantizes; not supported yet"
            )
        config = AutoConfig.from_pretrained(
            self.path, trust_remote_code=self.trust_remote_code, local_files_only=True
        )
        vars(config).pop(SECTION, None)
        return config

    def get(self, name: str) -> Tensor:
        """A tensor of the folder."""
        from safetensors import safe_open

        path = self.files[name]
        if path not in self._open:
            self._open[path] = safe_open(path, "pt")
        tensor: Tensor = self._open[path].get_tensor(name)
        return tensor

    def clips(self, linear: str) -> tuple[Tensor, Tensor | None] | None:
        """``clip_high`` and ``clip_low`` of a linear layer, where it has any."""
        high, low = (linear + clip for clip in CLIPS)
        if high not in self.files:
            return None
        return self.get(high), self.get(low) if low in self.files else None

    def digest(self) -> str:
        """SHA-256 of configuration and weights."""
        total = hashlib.sha256()
        for path in (self.path / "config.json", *sorted(set(self.files.values()))):
            with path.open("rb") as file:
                while piece := file.read(2**24):
                    total.update(piece)
        return total.hexdigest()

    def skeleton(self) -> Any:
        """The causal language model in eval mode, its parameters on ``meta``.

        Raises:
            ConfigError: the folder lacks a tensor of it.
        """
        model = self.build(torch.float32)
        self.check(model)
        return model

    def build(self, dtype: torch.dtype) -> Any:
        """The same, whatever tensors the folder has."""
        from transformers import AutoModelForCausalLM

        with parameters_on_meta():
            model: Any = AutoModelForCausalLM.from_config(
                self.config, dtype=dtype, trust_remote_code=self.trust_remote_code
            )
        return model.eval().requires_grad_(False)

    def check(self, model: Any) -> None:
        """Raise :class:`ConfigError` where the folder lacks a tensor of a model."""
        known = self.files.keys() | self.tied(model).keys()
        lacking = [name for name in model.state_dict() if name not in known]
        if lacking:
            raise ConfigError(
                f"{self.path}: no tensor {lacking[0]} of {type(model).__name__}; models that "
                "transformers stores under other names, such as experts, are not supported"
            )

    def tied(self, model: Any) -> dict[str, str]:
        """Parameters that the folder leaves out, each with the one that it is."""
        ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
        return {name: source for name, source in ties.items() if name not in self.files}

    def pour(self, model: Any, names: Iterable[str], dtype: torch.dtype | None = None) -> None:
        """Fill the parameters and buffers of these names; floating-point tensors in a dtype."""
        fill(model, ((name, cast(self.get(name), dtype)) for name in names))
        ties = self.tied(model).items()
        fill(model, ((name, cast(self.get(other), dtype)) for name, other in ties))


def cast(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Floating-point tensors in a dtype; others, and all with None, as they are."""
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)
