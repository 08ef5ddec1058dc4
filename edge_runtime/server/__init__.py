"""The HTTP server: Ollama's, OpenAI's and Anthropic's APIs, translated to and from the runtime's own.

    settings ─ app ─┬─ ollama ─────┐                        ┌─ models ─ catalog (names → models, loaded on demand)
                    ├─ openai ─────┼─ inference (ChatCall) ─┤
                    ├─ anthropic ──┤  ─ replies (streams)   └─ Model.submit ─ engine
                    ├─ pages       │
                    └─ system ─────┘

`ollama`, `openai` (with `responses`) and `anthropic` translate and do nothing else; `inference` knows no protocol;
`errors` is the one place where an error gets a status and a body; `middleware` runs before everything. Needs the
extra [serve].
"""
