"""Text to token ids and back: tokenizers, incremental detokenizing and chat templates."""

from tokenmill.tokenizer.chat_template import ChatTemplateError, ChatTemplates
from tokenmill.tokenizer.detokenizer import IncrementalDetokenizer
from tokenmill.tokenizer.load import TokenizerCheckpoint, load_tokenizer
from tokenmill.tokenizer.tokenizer import Tokenizer, TokenizerError

__all__ = [
    "ChatTemplateError",
    "ChatTemplates",
    "IncrementalDetokenizer",
    "Tokenizer",
    "TokenizerCheckpoint",
    "TokenizerError",
    "load_tokenizer",
]
