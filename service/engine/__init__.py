"""The engine: what turns a prompt into text, in a process of its own."""
