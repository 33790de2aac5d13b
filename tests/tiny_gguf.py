"""Tiny random models as GGUF files: every format and several architectures, small enough to run in milliseconds."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import gguf
import numpy as np

VOCABULARY = 320
CHAT_TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"]


def write_tiny_gguf(
    path: Path,
    architecture: str = "llama",
    formats: Sequence[str] = ("Q4_K", "Q6_K"),
    layers: int = 2,
    seed: int = 0,
    describe: Callable[[gguf.GGUFWriter], None] = lambda _: None,
    alter: Callable[[str, np.ndarray], np.ndarray] = lambda _, values: values,
) -> Path:
    """Writes a random llama, qwen2 or gemma3 model whose matrices cycle through ``formats``.

    Hidden size 256, four query heads and two KV heads of 64, window 48 on gemma3's local layers. Formats of 32 take
    part with the same shapes, so every matrix fits every format. ``describe`` may add metadata, such as a tokenizer,
    and tensors; ``alter`` may change the values of a matrix, by its name.
    """
    rng = np.random.default_rng(seed)
    hidden, inner, heads, kv_heads, head_dim = 256, 512, 4, 2, 64
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(4096)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)
    if architecture == "gemma3":
        writer.add_sliding_window(48)
    describe(writer)

    used = 0

    def matrix(name: str, rows: int, columns: int, scale: float = 1.0) -> None:
        nonlocal used
        kind = gguf.GGMLQuantizationType[formats[used % len(formats)]]
        used += 1
        values = alter(name, (rng.normal(size=(rows, columns)) * scale / np.sqrt(columns)).astype(np.float32))
        writer.add_tensor(
            name, gguf.quantize(values, kind) if _can_quantize(kind) else _blocks(values, kind), raw_dtype=kind
        )

    def vector(name: str, length: int, center: float = 1.0) -> None:
        writer.add_tensor(name, (center + 0.1 * rng.normal(size=length)).astype(np.float32))

    # Gemma multiplies embeddings by sqrt(hidden); either way they enter the network with a deviation near one, and the
    # tied head does not simply repeat the last token.
    matrix("token_embd.weight", VOCABULARY, hidden, scale=1.0 if architecture == "gemma3" else 8.0)
    vector("output_norm.weight", hidden)
    for i in range(layers):
        block = f"blk.{i}."
        vector(block + "attn_norm.weight", hidden)
        vector(block + "ffn_norm.weight", hidden)
        matrix(block + "attn_q.weight", heads * head_dim, hidden, 2.0)
        matrix(block + "attn_k.weight", kv_heads * head_dim, hidden, 2.0)
        matrix(block + "attn_v.weight", kv_heads * head_dim, hidden)
        matrix(block + "attn_output.weight", hidden, heads * head_dim)
        matrix(block + "ffn_gate.weight", inner, hidden)
        matrix(block + "ffn_up.weight", inner, hidden)
        matrix(block + "ffn_down.weight", hidden, inner)
        if architecture == "qwen2":
            vector(block + "attn_q.bias", heads * head_dim, 0.0)
            vector(block + "attn_k.bias", kv_heads * head_dim, 3.0)
            vector(block + "attn_v.bias", kv_heads * head_dim, 0.0)
        if architecture == "gemma3":
            vector(block + "attn_q_norm.weight", head_dim)
            vector(block + "attn_k_norm.weight", head_dim)
            vector(block + "post_attention_norm.weight", hidden)
            vector(block + "post_ffw_norm.weight", hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_QUANTIZERS = {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"}


def _can_quantize(kind: gguf.GGMLQuantizationType) -> bool:
    return kind.name in _QUANTIZERS


def _blocks(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Random blocks of a format that the gguf package only decodes: random codes under scales that fit ``values``."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = values.shape
    rng = np.random.default_rng(zlib.crc32(f"{kind.name} {rows} {columns}".encode()))
    raw = rng.integers(0, 256, size=(rows, columns // block, size), dtype=np.uint8)
    scale = np.float16(
        values.std() / {"Q2_K": 20, "Q3_K": 40, "Q4_K": 250, "Q5_K": 500, "Q6_K": 1200, "IQ4_NL": 60}[kind.name]
    )
    halves = np.array([scale], dtype=np.float16).view(np.uint8)
    # Where each format keeps its fp16 scale (and minimum): see the block layouts in the GGUF specification.
    for offset in {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,)}[
        kind.name
    ]:
        raw[:, :, offset : offset + 2] = halves
    return raw.reshape(rows, -1)


def write_speaking_model(path: Path) -> Path:
    """A random model with a byte-level vocabulary: one token a byte, a few merges, control tokens."""
    return write_tiny_gguf(path, describe=_byte_level(CHAT_TEMPLATE)[1])


def write_poisoned_model(path: Path, poison: str) -> Path:
    """A speaking model in which the embedding of the character ``poison`` is NaN."""
    tokens, describe = _byte_level(CHAT_TEMPLATE)
    head = np.random.default_rng(1).normal(size=(VOCABULARY, 256)).astype(np.float32)

    def alter(name: str, values: np.ndarray) -> np.ndarray:
        if name == "token_embd.weight":
            values[tokens.index(poison)] = np.nan
        return values

    def describe_with_head(writer: gguf.GGUFWriter) -> None:
        describe(writer)
        writer.add_tensor("output.weight", head)

    return write_tiny_gguf(path, formats=("F32",), describe=describe_with_head, alter=alter)


def write_scripted_model(path: Path, script: Sequence[str], chat_template: str = CHAT_TEMPLATE) -> Path:
    """A model that says ``script`` after a line break and then ends. The pieces, one token each, must differ.

    Its layers add nothing to the embedding of the last token, and the head knows what follows each token.
    """
    tokens, describe = _byte_level(chat_template, script)
    embeddings = np.random.default_rng(0).normal(size=(VOCABULARY, 256)).astype(np.float32)
    head = np.zeros_like(embeddings)
    for token, following in itertools.pairwise([_spelled("\n"), *map(_spelled, script), "<|im_end|>"]):
        head[tokens.index(following)] = embeddings[tokens.index(token)]

    def alter(name: str, values: np.ndarray) -> np.ndarray:
        if name == "token_embd.weight":
            return embeddings
        return np.zeros_like(values) if name.endswith(("attn_output.weight", "ffn_down.weight")) else values

    def describe_with_head(writer: gguf.GGUFWriter) -> None:
        describe(writer)
        writer.add_tensor("output.weight", head)

    return write_tiny_gguf(path, formats=("F32",), layers=1, describe=describe_with_head, alter=alter)


def _spelled(text: str) -> str:
    """As byte-level vocabularies write it."""
    return text.replace(" ", "Ġ").replace("\n", "Ċ")


def _byte_level(chat_template: str, more: Sequence[str] = ()) -> tuple[list[str], Callable[[gguf.GGUFWriter], None]]:
    """The tokens of a byte-level vocabulary, ``more`` among them, and what writes it into a model."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(others))]
    merges = ["t h", "e r", "a n", "i n", "th e", "Ġ the"]
    tokens = [*letters, *(merge.replace(" ", "") for merge in merges), *CONTROL]
    filler = [f"<unused{n}>" for n in range(VOCABULARY - len(tokens) - len(more))]
    types = [1] * (len(tokens) - len(CONTROL)) + [3] * (len(CONTROL) + len(filler)) + [1] * len(more)
    tokens += [*filler, *map(_spelled, more)]

    def describe(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(merges)
        writer.add_eos_token_id(tokens.index("<|im_end|>"))
        writer.add_add_bos_token(False)
        writer.add_chat_template(chat_template)

    return tokens, describe
