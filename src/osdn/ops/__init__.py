"""Operators: `reference` is the definition, `chunked` the fast path, `api` the public face."""
