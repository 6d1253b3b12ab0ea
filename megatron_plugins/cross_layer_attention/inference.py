"""Caches of producers only, in Megatron's inference contexts and engines.

A static context allocates a cache when a layer first writes to it, and consumers write to none
(attention.py). A dynamic context allocates all caches at once, from a number of layers and a map
from layers to caches; here these count producers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

from megatron_plugins.cross_layer_attention import stacks
from megatron_plugins.cross_layer_attention.groups import roles
from megatron_plugins.hybrid import pattern_of
from torch_plugins.config import ConfigError, CrossLayerAttention


@cache
def shared_context_class(base: type) -> type:
    """A subclass of ``DynamicInferenceContext`` in which the layers of a group have one cache.

    Upstream sets ``num_attention_layers`` to the layers of the pipeline stage, and ``layer_map`` to
    the identity, before it sizes anything by them; in a hybrid model with Mamba layers to those
    with attention, and to places among the caches of either kind.
    """

    context_class: Any = base

    class SharedContext(context_class):
        first_layer: int
        last_layer: int | None = None
        """Of the pipeline stage, where upstream's number of layers does not tell."""
        producers: tuple[int | None, ...]
        """Of every layer of the model; None for one without keys and values."""

        def _caches(self) -> dict[int, int]:
            """Cache of every layer that has one, both counted from the stage's first."""
            last = self.last_layer
            after = self.first_layer + self._layers if last is None else last + 1
            own = enumerate(self.producers[self.first_layer : after])
            having = {layer: producer for layer, producer in own if producer is not None}
            order = sorted(set(having.values()))
            return {layer: order.index(producer) for layer, producer in having.items()}

        @property
        def num_attention_layers(self) -> int:
            return len(set(self._caches().values()))

        @num_attention_layers.setter
        def num_attention_layers(self, layers: int) -> None:
            self._layers = layers

        @property
        def layer_map(self) -> dict[int, int]:
            return {**self._upstreams, **self._caches()}

        @layer_map.setter
        def layer_map(self, places: dict[int, int]) -> None:
            identity = all(layer == place for layer, place in places.items())
            assert identity or self.last_layer is not None
            self._upstreams = places

    SharedContext.__name__ = SharedContext.__qualname__ = f"Shared{base.__name__}"
    return SharedContext


def build_context(
    original: Callable[..., None], context: Any, config: Any, *args: Any, **kwargs: Any
) -> None:
    """Wrap of ``DynamicInferenceContext.__init__``.

    Raises:
        ConfigError: queries and keys are to be rotated by one fused kernel.
    """
    options: Any = args[0] if args else kwargs["inference_config"]
    if options.use_flashinfer_fused_rope:
        raise ConfigError(
            f"{CrossLayerAttention.flag()} with use_flashinfer_fused_rope: its kernel rotates "
            "queries and keys together, and a consumer has queries only; set it to False"
        )
    options.use_flashinfer_fused_rope = False  # None leaves the choice to upstream
    pattern = pattern_of(config)
    own = {role.index: role.producer for role in roles(sharing(config), config.num_layers, pattern)}
    context.producers = tuple(own.get(layer) for layer in range(config.num_layers))
    if pattern is None:
        context.first_layer = _first_layer(config, options)
    else:
        starts, rank = stacks.first_layers(config, pattern), _rank(config, options)
        context.first_layer = starts[rank]
        context.last_layer = [*starts, config.num_layers][rank + 1] - 1
    base: Any = type(context)
    context.__class__ = shared_context_class(base)
    original(context, config, *args, **kwargs)


def sharing(config: Any) -> Any:
    """The feature of a transformer configuration, or None."""
    return (getattr(config, "megatron_plugins", None) or {}).get(CrossLayerAttention.key())


def _first_layer(config: Any, options: Any) -> int:
    if config.pipeline_model_parallel_size == 1:
        return 0
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    first: int = get_transformer_layer_offset(config, None, _rank(config, options))
    return first


def _rank(config: Any, options: Any) -> int:
    """Pipeline stage of this process."""
    from megatron.core import parallel_state

    groups = options.pg_collection
    if config.pipeline_model_parallel_size == 1:
        return 0
    if groups is None:
        rank: int = parallel_state.get_pipeline_model_parallel_rank()
        return rank
    return int(groups.pp.rank())


def build_engine(original: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Wrap of ``StaticInferenceEngine.__init__``, which answers any failure of the dynamic engine
    with a warning and an engine of another kind: the failure is raised."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Error initializing dynamic engine", UserWarning)
        original(*args, **kwargs)
