"""The inference service of mini-llm: a language model behind HTTP."""

__version__ = "0.1.0"
