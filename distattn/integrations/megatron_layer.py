"""A TransformerLayer whose ``cp_comm_type`` may be a list, whatever the release."""

from __future__ import annotations

import inspect
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

# Megatron-core 0.16 takes element n of a cp_comm_type list for layer n of 1 … N, and so fails in the last layer.
LISTS_ARE_SHIFTED = "cp_comm_type[self.layer_number]" in inspect.getsource(TransformerLayer.__init__)


class _LayerList(list):
    """One element a layer; one place too far is the last one, since our layers look theirs up alone."""

    def __getitem__(self, place: Any) -> Any:
        return super().__getitem__(min(place, len(self) - 1) if isinstance(place, int) else place)


class ListedLayer(TransformerLayer):
    """A TransformerLayer whose cp_comm_type may be a list, in releases that look it up one place too far."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        if LISTS_ARE_SHIFTED and isinstance(config.cp_comm_type, list):
            config.cp_comm_type = _LayerList(config.cp_comm_type)
        super().__init__(config, *args, **kwargs)
