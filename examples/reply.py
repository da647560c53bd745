"""Prints two replies to one message: with knowledge, and by the bare LLM.

Example run:
    python examples/reply.py [MODEL]
"""

import sys

from transformers import pipeline

import modeling_vikdf  # registers "vikdf-dialogue"


chat = pipeline("vikdf-dialogue", model=sys.argv[1] if len(sys.argv) > 1 else modeling_vikdf.DEFAULT_CHECKPOINT)
messages = [{"role": "user", "content": "I spent the whole day at the beach with my dog."}]
for use_knowledge in (True, False):
    [reply] = chat(messages, return_full_text=False, max_new_tokens=40, use_knowledge=use_knowledge)
    print("with knowledge:" if use_knowledge else "the LLM alone: ", reply["generated_text"])
