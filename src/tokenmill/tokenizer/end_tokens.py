"""Which tokens end an answer.

Metadata names one end-of-sequence token, often the wrong one for chat: a base model's file keeps the end of document
where the tuned model writes the end of its turn, and tool calls end with a third. A generation has to stop at any of
them, so the ones the metadata names are joined by control tokens whose text has one established meaning.
"""

from __future__ import annotations

from collections.abc import Mapping

_END_TOKENS = (
    "<|endoftext|>",  # GPT-2, Qwen, SmolLM, Phi: end of document
    "<|end_of_text|>",  # Llama 3, Granite
    "</s>",  # Llama 1 and 2, Mistral
    "<eos>",  # Gemma
    "<|im_end|>",  # ChatML: Qwen, SmolLM
    "<|eot_id|>",  # Llama 3: end of turn
    "<|eom_id|>",  # Llama 3: end of message, a tool's result comes next
    "<end_of_turn>",  # Gemma 2 and 3
    "<|end|>",  # Phi 3
    "<|return|>",  # harmony: end of the answer
    "<|call|>",  # harmony: a tool is called
)

_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|end|>")

# In the harmony format <|end|> closes each of several messages of one answer.
_HARMONY = ("<|return|>", "<|call|>")


def end_tokens_by_text(control_tokens: Mapping[str, int]) -> set[int]:
    """The ids of those of ``control_tokens`` (text to id) that end an answer by their established meaning."""
    ends = {text: control_tokens[text] for text in _END_TOKENS if text in control_tokens}
    if all(text in ends for text in _HARMONY):
        ends.pop("<|end|>", None)
    return set(ends.values())


def turn_end_by_text(control_tokens: Mapping[str, int]) -> int | None:
    """The id of the token that ends a chat turn by its established meaning, if ``control_tokens`` has one."""
    return next((control_tokens[text] for text in _TURN_ENDS if text in control_tokens), None)
