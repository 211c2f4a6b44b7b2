"""The tiny world: a base model, its tokenizer and chat data, small enough to ship.

``model/``, ``chat.jsonl`` and ``prompts.json`` (held-out questions to try a tuned model on) lie in
this directory; ``build.py`` made them, and ``README.md`` says what they are.
"""
