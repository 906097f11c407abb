"""The decoder that distattn trains, its configuration and its loss."""

from distattn.models.config import LinearConfig, ModelConfig, RopeConfig
from distattn.models.decoder import Decoder
from distattn.models.loss import chunked_cross_entropy, per_token_loss

__all__ = ["Decoder", "LinearConfig", "ModelConfig", "RopeConfig", "chunked_cross_entropy", "per_token_loss"]
