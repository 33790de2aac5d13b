"""How byte-level BPE vocabularies cut text before merging, by the names GGUF files give them (``tokenizer.ggml.pre``).

A vocabulary's merges were learned on text cut this way; another cut gives other ids without any error. The patterns
are those of the models' own ``tokenizer.json``. ``default`` is the exception: it stands in files written before the
key existed, and its meaning is what llama.cpp gives it.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex
from tokenizers.normalizers import NFC, Normalizer
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizers

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = _CASED % ("", "") + r"|\p{N}" + _REST
_GPT4O = _CASED % (f"{_CONTRACTIONS}?", f"{_CONTRACTIONS}?") + r"|\p{N}{1,3}" + _REST


@dataclass(frozen=True, slots=True)
class ByteLevelRules:
    """What surrounds the merges of one family of byte-level vocabularies."""

    patterns: tuple[str, ...]
    """Applied in turn, each to the fragments the one before left; matches and what lies between them are fragments."""
    single_digits: bool = False
    """Each numeric character is a fragment of its own, before the patterns."""
    nfc: bool = False
    """Text is brought into Unicode normalization form C first."""
    ignore_merges: bool = False
    """A fragment that is a token is that token, even where no merges lead to it."""
    add_bos: bool = False
    """Whether BOS comes before a text when the file does not say."""

    def normalizer(self) -> Normalizer | None:
        return NFC() if self.nfc else None

    def pre_tokenizer(self) -> PreTokenizer:
        digits: list[PreTokenizer] = [Digits(individual_digits=True)] if self.single_digits else []
        splits = [Split(Regex(pattern), behavior="isolated") for pattern in self.patterns]
        return PreTokenizers([*digits, *splits, ByteLevel(add_prefix_space=False, use_regex=False)])


_GPT2_RULES = ByteLevelRules((_GPT2,))
_SMOLLM_RULES = ByteLevelRules((_GPT2,), single_digits=True)
_LLAMA3_RULES = ByteLevelRules((_LLAMA3,), ignore_merges=True, add_bos=True)
_QWEN2_RULES = ByteLevelRules((_QWEN2,), nfc=True)
_GPT4O_RULES = ByteLevelRules((_GPT4O,))

BYTE_LEVEL_RULES: dict[str, ByteLevelRules] = {
    "default": ByteLevelRules((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": _GPT2_RULES,
    "phi-2": _GPT2_RULES,
    "olmo": _GPT2_RULES,
    "smollm": _SMOLLM_RULES,
    "starcoder": _SMOLLM_RULES,
    "refact": _SMOLLM_RULES,
    "llama-bpe": _LLAMA3_RULES,
    "llama3": _LLAMA3_RULES,
    "llama-v3": _LLAMA3_RULES,
    "falcon3": _LLAMA3_RULES,
    "pixtral": _LLAMA3_RULES,
    "dbrx": ByteLevelRules((_LLAMA3,)),
    "smaug-bpe": ByteLevelRules((_LLAMA3,)),
    "qwen2": _QWEN2_RULES,
    "deepseek-r1-qwen": _QWEN2_RULES,
    "tekken": ByteLevelRules((_TEKKEN,), ignore_merges=True, add_bos=True),
    "gpt-4o": _GPT4O_RULES,
    "llama4": _GPT4O_RULES,
}
"""By ``tokenizer.ggml.pre``."""
