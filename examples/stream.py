"""Prints a dialogue of two turns; each reply appears word by word, as it is generated.

Example run:
    python examples/stream.py [MODEL]
"""

import sys

from transformers import pipeline

import modeling_vikdf  # registers "vikdf-dialogue"


chat = pipeline("vikdf-dialogue", model=sys.argv[1] if len(sys.argv) > 1 else modeling_vikdf.DEFAULT_CHECKPOINT)
messages = []
for text in ("My grandmother bakes bread every Sunday.", "Would you like a slice?"):
    messages.append({"role": "user", "content": text})
    print(f"you> {text}\nvikdf> ", end="")
    reply = ""
    for piece in chat.stream(messages, max_new_tokens=40):
        print(piece, end="", flush=True)
        reply += piece
    print()
    messages.append({"role": "assistant", "content": reply.strip() or "..."})  # the next turn reads it
