"""Text to token ids and back, over the `tokenizers` library; no torch, no remote code."""

from fastgpt.tokenizer.chat_template import ChatTemplate
from fastgpt.tokenizer.detokenizer import ByteDetokenizer, StopChecker, WindowDetokenizer
from fastgpt.tokenizer.tokenizer import Detokenizer, Tokenizer, TokenizerFiles

__all__ = [
    "ByteDetokenizer",
    "ChatTemplate",
    "Detokenizer",
    "StopChecker",
    "Tokenizer",
    "TokenizerFiles",
    "WindowDetokenizer",
]
