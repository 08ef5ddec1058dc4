"""Answers from a server that speaks OpenAI's chat completions, in the form of this package's own.

Enters: an address, messages and options as of `Model.chat`. Leaves: `Answer` and `AnswerStream`. What travels how is
in `dialects` (names of fields), `requests` (options), `conversation` and `media` (messages); `replies` reads what
comes back; `exchange` is one request and what its failures mean, `connection` retries, waits and cancels; `model` is
the door. Knows no weights, no engine's inside and no server of ours beyond its public API.
"""
