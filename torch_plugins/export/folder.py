"""A Hugging Face folder of a Llama-like model, read one tensor at a time.

Only safetensors are read, never a pickle, and no code that the folder carries is run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import ConfigError
from .weights import tensor_files

if TYPE_CHECKING:
    from ..hf import PluginDecoderConfig

KINDS = ("llama", "granite")
"""``model_type`` of the folders that can be read."""

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""By their name in the header of a safetensors file."""

IGNORED = "rotary_emb.inv_freq"
"""What old folders keep beside the weights, and transformers computes itself."""

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Folder:
    """A folder whose tensors are those that its ``config.json`` implies.

    Attributes:
        path: the folder.
        config: transformers' configuration.
        decoder: the decoder's, with the same function.
        shapes: name -> shape of every weight; a head tied to the embedding has none.
        dtype: of all weights.

    Args:
        kind: of :data:`KINDS`, or ``hf`` for whichever it is.

    Raises:
        ConfigError: it is of another kind, cannot be read or expressed, or its tensors are not
            those of its configuration.
    """

    def __init__(self, path: Path, kind: str = "hf") -> None:
        from ..hf.families import decoder_config

        self.path = path
        self.config: Any = _configuration(path, kind)
        skeleton = self.skeleton()
        try:
            self.decoder: PluginDecoderConfig = decoder_config(skeleton)
        except ConfigError as error:
            raise ConfigError(f"{path / 'config.json'}: {error}") from error
        self._file = tensor_files(path)
        headers = {name: self._header(name) for name in self._file}
        wanted = {name: tuple(weight.shape) for name, weight in skeleton.named_parameters()}
        self._check_tensors({name: shape for name, (shape, _) in headers.items()}, wanted)
        self.shapes = wanted
        self.dtype = self._one_dtype({name: headers[name][1] for name in wanted})

    def skeleton(self) -> Any:
        """transformers' model in fp32, without memory."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.config, dtype=torch.float32).eval()

    def read(self, name: str) -> Tensor:
        """A weight, in the file's dtype.

        Raises:
            ConfigError: it holds infinite or NaN values.
        """
        from safetensors import safe_open

        with safe_open(self.path / self._file[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        # Part by part: the check of a whole tensor takes more memory than the tensor.
        if not all(torch.isfinite(part).all() for part in tensor.split(1024)):
            raise ConfigError(f"{self.path}: {name} has infinite or NaN values")
        return tensor

    def _header(self, name: str) -> tuple[tuple[int, ...], str]:
        from safetensors import SafetensorError, safe_open

        path = self.path / self._file[name]
        try:
            with safe_open(path, "pt") as file:
                header = file.get_slice(name)
                return tuple(header.get_shape()), str(header.get_dtype())
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{path}: {name} cannot be read ({error})") from error

    def _check_tensors(
        self, found: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]
    ) -> None:
        if self.config.tie_word_embeddings and HEAD in found:
            if not torch.equal(self.read(HEAD), self.read(EMBEDDING)):
                raise ConfigError(
                    f"{self.path}: {HEAD} differs from {EMBEDDING}, and tie_word_embeddings is "
                    "true: set it to false if the head is the model's"
                )
            found = {name: shape for name, shape in found.items() if name != HEAD}
        found = {name: shape for name, shape in found.items() if not name.endswith(IGNORED)}
        wrong = sorted(n for n in found.keys() | wanted.keys() if found.get(n) != wanted.get(n))
        if wrong:
            lines = [
                f"{name} is {list(found[name]) if name in found else 'missing'}, "
                f"{list(wanted[name]) if name in wanted else 'nothing'} was expected"
                for name in wrong[:8]
            ]
            raise ConfigError(
                f"{self.path}: its tensors do not fit its config.json:\n  " + "\n  ".join(lines)
            )

    def _one_dtype(self, names: dict[str, str]) -> torch.dtype:
        first, dtype = next(iter(names.items()))
        for name, other in names.items():
            if other not in DTYPES:
                raise ConfigError(
                    f"{self.path}: {name} is {other}; weights must be F32, F16 or BF16"
                )
            if other != dtype:
                raise ConfigError(
                    f"{self.path}: {name} is {other} and {first} is {dtype}; save the model in one "
                    "dtype"
                )
        return DTYPES[dtype]


def _configuration(path: Path, kind: str) -> Any:
    """transformers' configuration, of the right kind and without what changes the function."""
    from transformers import AutoConfig

    file = path / "config.json"
    if not file.is_file():
        raise ConfigError(f"{path}: no config.json in it; give a folder that transformers saved")
    try:
        raw = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON ({error})") from error
    found = raw.get("model_type")
    if found not in KINDS:
        raise ConfigError(f"{file}: model_type {found!r}; use one of {', '.join(KINDS)}")
    if kind not in ("hf", found):
        raise ConfigError(f"{file}: model_type {found!r}, not {kind!r}; say {found}")
    for key in ("quantization_config", "compression_config", "auto_map"):
        if raw.get(key):
            what = "code of its own" if key == "auto_map" else "quantized weights"
            raise ConfigError(f"{file}: {key}: the folder has {what}, which are not converted")
    try:
        return AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # transformers raises whatever the file provokes
        raise ConfigError(f"{file}: transformers does not read it ({error})") from error
