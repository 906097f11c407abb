"""The shape of a decoder, as frozen dataclasses that OmegaConf checks; parameter and FLOP counts follow from it."""

from __future__ import annotations

from dataclasses import dataclass, field

from distattn.errors import ConfigError

ROPE_SCALINGS = ("none", "linear", "dynamic_ntk", "yarn", "llama3")
SOFTMAX = "softmax"
LINEAR_KINDS = ("linear", "lightning", "retention", "simple_gla", "gla", "delta", "gated_delta", "kda")
AAREN = "aaren"
TITANS_MAC, TITANS_MAG, TITANS_MAL = TITANS = ("titans_mac", "titans_mag", "titans_mal")
LAYER_KINDS = (SOFTMAX, *LINEAR_KINDS, AAREN, *TITANS)
GATE_RANK = 16
"""Inner width of the projections that make one gate a key dimension (gla, kda)."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding and how it is stretched beyond the context that the model was first trained on.

    theta: base of the frequencies. scaling: one of ``ROPE_SCALINGS``; all others than ``none`` use factor and
    original_seq_len (tokens). seq_len (tokens): dynamic_ntk only, the length that the frequencies are computed for; a
    setting and not the length of the batch, so that every rank and every packed document rotates alike. beta_fast,
    beta_slow (rotations over the original context) and attention_factor (multiplies cos and sin; 0 means YaRN's
    0.1·ln(factor) + 1): yarn only. low_freq_factor, high_freq_factor: llama3 only.
    """

    theta: float = 10_000.0
    scaling: str = "none"
    factor: float = 1.0
    original_seq_len: int = 8192
    seq_len: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def validate(self, head_dim: int, key: str = "model.rope") -> None:
        """Raise ConfigError for the first value that cannot be used; ``key`` is the section's name in messages."""
        if self.scaling not in ROPE_SCALINGS:
            raise ConfigError(f"{key}.scaling is {self.scaling!r}, but it must be one of {', '.join(ROPE_SCALINGS)}.")
        _require(self.theta > 1, f"{key}.theta", self.theta, "greater than 1")
        _require(self.factor >= 1, f"{key}.factor", self.factor, "at least 1")
        _require(self.original_seq_len >= 1, f"{key}.original_seq_len", self.original_seq_len, "at least 1 token")
        if self.scaling == "dynamic_ntk":
            _require(self.seq_len >= 1, f"{key}.seq_len", self.seq_len, "at least 1 token")
            _require(head_dim > 2, "model.head_dim", head_dim, "greater than 2 for dynamic_ntk scaling")
        if self.scaling == "yarn":
            allowed = f"greater than 0 and less than {key}.beta_fast = {self.beta_fast}"
            _require(0 < self.beta_slow < self.beta_fast, f"{key}.beta_slow", self.beta_slow, allowed)
            allowed = "at least 0 (0 means 0.1·ln(factor) + 1)"
            _require(self.attention_factor >= 0, f"{key}.attention_factor", self.attention_factor, allowed)
        if self.scaling == "llama3":
            allowed = f"greater than 0 and less than {key}.high_freq_factor = {self.high_freq_factor}"
            valid = 0 < self.low_freq_factor < self.high_freq_factor
            _require(valid, f"{key}.low_freq_factor", self.low_freq_factor, allowed)


@dataclass(frozen=True)
class LinearConfig:
    """Layers of linear attention, where ``model.layers`` has some.

    num_heads: of queries and keys; num_value_heads: a multiple of it; head_dim, value_head_dim: of keys and of values.
    conv_width: taps of the short convolution before the heads, 1 is none. output_gate: none, sigmoid or silu of a projection,
    times the normalised output. aaren and the memory of titans layers have as many keys as values, and no output gate; aaren
    has no convolution either.
    """

    num_heads: int = 4
    num_value_heads: int = 4
    head_dim: int = 16
    value_head_dim: int = 16
    conv_width: int = 4
    output_gate: str = "silu"

    def validate(self) -> None:
        """Raise ConfigError for the first value that cannot be used."""
        for name in ("num_heads", "num_value_heads", "head_dim", "value_head_dim", "conv_width"):
            _require(getattr(self, name) >= 1, f"model.linear.{name}", getattr(self, name), "at least 1")
        if self.num_value_heads % self.num_heads:
            raise ConfigError(
                f"model.linear.num_value_heads is {self.num_value_heads}, but it must be a multiple of "
                f"model.linear.num_heads = {self.num_heads}."
            )
        if self.output_gate not in ("none", "sigmoid", "silu"):
            raise ConfigError(f"model.linear.output_gate is {self.output_gate!r}, but it must be none, sigmoid or silu.")

    @property
    def conv_channels(self) -> int:
        """Channels of queries, keys and values together."""
        return 2 * self.num_heads * self.head_dim + self.num_value_heads * self.value_head_dim

    @property
    def memory_channels(self) -> int:
        """Channels of a memory's queries, keys and values together."""
        return self.num_value_heads * (2 * self.head_dim + self.value_head_dim)

    def matmul_parameters(self, kind: str, dim: int) -> int:
        """Weights of one layer that are multiplied with each token."""
        values = self.num_value_heads * self.value_head_dim
        if kind == AAREN:
            return dim * self.num_value_heads * self.head_dim + 2 * dim * values
        count = dim * self.conv_channels + values * dim + (0 if self.output_gate == "none" else dim * values)
        if kind in ("gla", "kda"):
            count += GATE_RANK * (dim + self.num_value_heads * self.head_dim)
        if kind in ("simple_gla", "gated_delta"):
            count += dim * self.num_value_heads
        if kind in ("delta", "gated_delta", "kda"):
            count += dim * self.num_value_heads
        return count

    def other_parameters(self, kind: str) -> int:
        """Norm, convolution, rates and learned queries of one layer."""
        if kind == AAREN:
            return self.num_value_heads * self.head_dim
        convolution = self.conv_channels * self.conv_width if self.conv_width > 1 else 0
        rates = 2 * self.num_value_heads if kind in ("gated_delta", "kda") else 0
        return self.value_head_dim + convolution + rates

    def state_flops(self, kind: str) -> int:
        """Forward and backward FLOPs of a token and layer with the state: write and read it, at 2 a multiply-add, thrice."""
        rows = 1 if kind == AAREN else self.head_dim
        return 12 * self.num_value_heads * rows * self.value_head_dim


@dataclass(frozen=True)
class MemoryConfig:
    """The memory of titans layers, beside its heads, which are those of ``LinearConfig``.

    chunk: rows that learn from one memory, and a segment of titans_mac. persistent: learned tokens that every row attends to.
    depth: layers of the memory; 1, a matrix, is what there is.
    """

    chunk: int = 16
    persistent: int = 4
    depth: int = 1

    def validate(self) -> None:
        """Raise ConfigError for the first value that cannot be used."""
        _require(self.chunk >= 1, "model.memory.chunk", self.chunk, "at least 1 row")
        _require(self.persistent >= 0, "model.memory.persistent", self.persistent, "at least 0 tokens")
        if self.depth != 1:
            raise ConfigError(
                f"model.memory.depth is {self.depth}, but it must be 1: a memory of several layers is no linear map of its "
                "state, so that ranks could not pass it on before they have all of what came earlier, and would take turns."
            )

    def matmul_parameters(self, kind: str, model: ModelConfig) -> int:
        """Weights of one titans layer, its attention left out, that are multiplied with each token."""
        shape, width = model.linear, model.num_heads * model.head_dim
        values = shape.num_value_heads * shape.value_head_dim
        count = model.dim * (shape.memory_channels + 3 * shape.num_value_heads)
        if kind == TITANS_MAC:
            return count + values * (model.dim + width) + width * shape.num_value_heads * shape.head_dim
        return count + values * (width if kind == TITANS_MAG else model.dim)

    def other_parameters(self, kind: str, model: ModelConfig) -> int:
        """Persistent tokens, convolution and norms of one layer."""
        shape = model.linear
        convolution = shape.memory_channels * shape.conv_width if shape.conv_width > 1 else 0
        norms = model.dim if kind == TITANS_MAL else 2 * model.num_heads * model.head_dim
        return self.persistent * model.dim + convolution + shape.value_head_dim + norms

    def state_flops(self, kind: str, model: ModelConfig) -> int:
        """Forward and backward FLOPs of a token and layer that no matrix of weights has: the error, the write and the reads of
        the memory, persistent tokens, and titans_mac's two attentions inside the segment."""
        reads = 2 if kind == TITANS_MAC else 1
        memory = 6 * (2 + reads) * model.linear.num_value_heads * model.linear.head_dim * model.linear.value_head_dim
        attended = self.persistent + (self.chunk + 1 if kind == TITANS_MAC else 0)
        return memory + 12 * model.num_heads * model.head_dim * attended


@dataclass(frozen=True)
class ModelConfig:
    """A pre-norm decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU. The default widths are the quickstart's.

    dim is the width of the residual stream and ffn_dim that of the gated hidden layer. heads × head_dim need not equal
    dim. Linear layers have no biases. sliding_window: keys that a query sees at most, itself included, within its
    document; 0 is the whole document. (The plan's mask decides; this is for whoever makes the plan.) init_std: standard
    deviation of the initial weights; see ``Decoder.init_weights`` for the ones that differ. layers: the kinds of the layers,
    separated by commas, ``kind*n`` for n in a row, repeated from the start until there are num_layers, of ``LAYER_KINDS``.
    linear: the shape of all but softmax, memory: more of titans layers, which have softmax attention too. attention_gate:
    softmax attention times a sigmoid gate of x.
    init_from: a folder with a Hugging Face model (``distattn.models.hf_weights``) that weights and shape are taken from.
    """

    vocab_size: int = 256
    dim: int = 128
    num_layers: int = 2
    num_heads: int = 12
    num_kv_heads: int = 4
    head_dim: int = 16
    ffn_dim: int = 384
    norm_eps: float = 1e-5
    qk_norm: bool = False
    tie_embeddings: bool = True
    sliding_window: int = 0
    layers: str = SOFTMAX
    attention_gate: bool = False
    linear: LinearConfig = field(default_factory=LinearConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    init_std: float = 0.02
    init_from: str = ""
    rope: RopeConfig = field(default_factory=RopeConfig)

    def validate(self) -> None:
        """Raise ConfigError, naming key, value and what is allowed, for the first value that cannot be used."""
        for name in ("vocab_size", "dim", "num_layers", "num_heads", "num_kv_heads", "head_dim", "ffn_dim"):
            _require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "at least 1")
        if self.num_heads % self.num_kv_heads:
            divisors = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            raise ConfigError(
                f"model.num_kv_heads is {self.num_kv_heads}, but it must divide model.num_heads = {self.num_heads}: "
                f"use one of {', '.join(map(str, divisors))}."
            )
        _require(self.head_dim % 2 == 0, "model.head_dim", self.head_dim, "even, because RoPE rotates pairs")
        _require(0 < self.norm_eps < 1, "model.norm_eps", self.norm_eps, "between 0 and 1")
        allowed = "at least 0 (0 is the whole document)"
        _require(self.sliding_window >= 0, "model.sliding_window", self.sliding_window, allowed)
        _require(self.init_std > 0, "model.init_std", self.init_std, "greater than 0")
        self.rope.validate(self.head_dim)
        self.linear.validate()
        self.memory.validate()
        _require(len(self.layer_kinds) == self.num_layers, "model.layers", repr(self.layers), "a pattern of layer kinds")

    @property
    def layer_kinds(self) -> list[str]:
        """The kind of each layer. Raises ConfigError for a pattern that is none."""
        pattern: list[str] = []
        for item in self.layers.split(","):
            kind, star, times = item.strip().partition("*")
            if kind == "agent":
                raise ConfigError(
                    f"model.layers is {self.layers!r}, but agent attention is not causal: its agents see all tokens of a "
                    "document, later ones too, and a decoder predicts those. distattn.models.agent.AgentAttention is a layer "
                    "for models that see whole documents."
                )
            if kind not in LAYER_KINDS or (star and not (times.isdecimal() and int(times))):
                raise ConfigError(
                    f"model.layers is {self.layers!r}, but it must be kinds, or kind*n, separated by commas, such as "
                    f"gated_delta*3,softmax; the kinds are {', '.join(LAYER_KINDS)}."
                )
            pattern += [kind] * int(times or 1)
        return [pattern[i % len(pattern)] for i in range(self.num_layers)]

    @property
    def num_softmax_layers(self) -> int:
        return self.layer_kinds.count(SOFTMAX)

    @property
    def _num_attending_layers(self) -> int:
        """Those with softmax attention, alone or beside a memory."""
        return sum(kind == SOFTMAX or kind in TITANS for kind in self.layer_kinds)

    def num_parameters(self) -> int:
        """Trainable parameters; tied embeddings are counted once."""
        embedding = self.vocab_size * self.dim
        norms = self.num_layers * 2 * self.dim + self.dim
        norms += self._num_attending_layers * (2 * self.head_dim if self.qk_norm else 0)
        others = sum(
            self.memory.other_parameters(kind, self) if kind in TITANS else self.linear.other_parameters(kind)
            for kind in self.layer_kinds
            if kind != SOFTMAX
        )
        return self._block_matmul_parameters() + norms + others + embedding * (1 if self.tie_embeddings else 2)

    def attention_flops(self, mask_area: int) -> int:
        """Forward and backward attention FLOPs of all layers for ``mask_area`` allowed (query, key) pairs.

        4 · area · heads · head_dim forward (q kᵀ and p v at 2 FLOPs a multiply-add), twice that backward: 12 in all.
        That is the model-FLOPs convention of MFU (PaLM, appendix B): the product q kᵀ that flash kernels repeat in the
        backward (then 2.5 times the forward) is not counted, nor is activation checkpointing. The area is exact, so
        causal masks and packed documents get no credit for pairs that they skip. titans_mac attends by its own mask, in
        segments, which ``flops_per_token`` counts.
        """
        layers = self._num_attending_layers - self.layer_kinds.count(TITANS_MAC)
        return 12 * mask_area * self.num_heads * self.head_dim * layers

    def flops_per_token(self, mask_area: int, num_tokens: int) -> float:
        """Mean training FLOPs (forward and backward) of a token in a stream of num_tokens under a mask of that area.

        6 · N + attention_flops(mask_area) / num_tokens, with N the weights that are multiplied: the output projection
        counts (tied or not), the embedding look-up and the norms do not. A linear layer adds 12 · value heads · K · V, aaren
        12 · heads · V, a titans layer what ``MemoryConfig.state_flops`` says.
        """
        matmul_parameters = self._block_matmul_parameters() + self.vocab_size * self.dim
        states = sum(
            self.memory.state_flops(kind, self) if kind in TITANS else self.linear.state_flops(kind)
            for kind in self.layer_kinds
            if kind != SOFTMAX
        )
        return 6.0 * matmul_parameters + states + self.attention_flops(mask_area) / max(num_tokens, 1)

    def _block_matmul_parameters(self) -> int:
        projections = 2 * (self.num_heads + self.num_kv_heads) + (self.num_heads if self.attention_gate else 0)
        softmax = self._num_attending_layers * self.dim * self.head_dim * projections
        linear = sum(
            self.memory.matmul_parameters(kind, self) if kind in TITANS else self.linear.matmul_parameters(kind, self.dim)
            for kind in self.layer_kinds
            if kind != SOFTMAX
        )
        return softmax + linear + self.num_layers * 3 * self.dim * self.ffn_dim


def _require(condition: bool, key: str, value: object, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{key} is {value}, but it must be {allowed}.")
