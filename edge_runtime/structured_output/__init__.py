"""Schemas, tools and grammars → which tokens may follow.

Enter: a JSON schema, a tool list or a grammar, then token after token. Leave: masks and forced endings.
Knows no logits and no kernels.
"""
