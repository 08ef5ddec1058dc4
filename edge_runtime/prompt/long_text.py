"""Places where a long text can be cut, such that the tokens of the parts are exactly those of the whole.

Tokenising takes up to 200 bytes of memory per byte, and cannot be interrupted. So a long text is tokenised in pieces.
A cut is certain where the pattern of Qwen2's pre-tokenizer (`tokenizer.QWEN2_PATTERN`) starts a new word whatever the
rest of the text is, and where normalisation to NFC joins nothing. Only characters whose classes have been the same in
every version of Unicode are considered, since the tokenizer's tables are not Python's. Each alternative below:

- Anything but white space, before a space or tab. No word of the pattern goes on with these; runs of white space look
  at what follows them, which is then in the same piece.
- A letter before an ASCII character or Chinese punctuation that is no letter. Words with letters end with letters.
- A digit before an ASCII or Chinese character: every digit is a word of its own.
- A newline before a visible ASCII character or a Chinese one: in white space, a word ends with the last newline.

NFC joins nothing across a cut, since nothing that stands after one composes with what precedes it.

Runs of letters, of punctuation or of white space have no such place; they are one piece, however long.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator

from edge_runtime.system.turns import Turns

LONG_TEXT = 10_000
"""Characters that are tokenised at once, with the GIL."""
PIECE = 32_768
"""Characters in a piece at least; about 10 ms of work."""
LONG_TEXTS = Turns(max(1, (os.cpu_count() or 1) // 2))
"""Long texts that are worked on at the same time; the other cores are for everything else."""

_LETTERS = "A-Za-z\u3041-\u3094\u30a1-\u30fa\u4e00-\u9fa5"
_CHINESE_MARKS = "\u3001\u3002\uff01\uff0c\uff1a\uff1b\uff1f"
_CUT = re.compile(
    r"[^\s\u180e](?=[ \t])"  # U+180E was white space in old tables
    rf"|[{_LETTERS}](?=[\x00-@\[-`{{-\x7f{_CHINESE_MARKS}])"
    rf"|[0-9](?=[\x00-\x7f\u4e00-\u9fa5{_CHINESE_MARKS}])"
    r"|\n(?=[!-~\u4e00-\u9fa5])"
)


def nothing() -> None:
    """The check of work that is always wanted."""


def pieces(text: str, check: Callable[[], None] = nothing, size: int = PIECE) -> Iterator[str]:
    """Cut a text; joined, the pieces are the text.

    Parameters
    ----------
    check : called for every piece, and while the next place is searched; what it raises ends the work.
    size : characters in a piece, at least.
    """
    start = looked = 0
    while len(text) - start > size:
        looked = max(looked, start + size - 1)
        found = _CUT.search(text, looked, looked + PIECE)
        check()
        if found is not None:
            yield text[start : found.end()]
            start = found.end()
        elif looked + PIECE >= len(text):
            break
        else:
            looked += PIECE - 1  # what follows the last character was not seen
    check()
    yield text[start:]


def matches(pattern: re.Pattern[str], longest: int, text: str, check: Callable[[], None]) -> Iterator[re.Match[str]]:
    """All matches, as of `finditer`, which would hold up other threads until the next match.

    Parameters
    ----------
    pattern : matches whatever stands before and after.
    longest : characters of the longest match.
    check : as for `pieces`.
    """
    start = 0
    while start < len(text):
        end = start + PIECE
        found = pattern.search(text, start, end + longest - 1)
        check()
        if found is not None and found.start() < end:
            yield found
            start = found.end()
        else:
            start = end
