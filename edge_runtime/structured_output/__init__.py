"""Schemas, tools and grammars → which tokens may follow.

A JSON schema, a tool list or a grammar enters, then token after token; masks and forced endings leave.
It knows no logits and no kernels.
"""
