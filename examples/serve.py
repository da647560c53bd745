"""Serves a model in a thread of this process and prints a reply as the openai client receives it, word by word.

`vikdf serve` is the same as a command; its clients look like the second half.

Example run:
    python examples/serve.py [MODEL]
"""

import socket
import sys
import threading
import time

import uvicorn
from openai import OpenAI

from modeling_vikdf import DEFAULT_CHECKPOINT
from modeling_vikdf.building import load_model
from modeling_vikdf.server import create_app


with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
app = create_app(*load_model(sys.argv[1] if len(sys.argv) > 1 else DEFAULT_CHECKPOINT), api_key="secret")
server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
thread = threading.Thread(target=server.run)
thread.start()
while not server.started and thread.is_alive():
    time.sleep(0.1)

client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret")
messages = [{"role": "user", "content": "My grandmother bakes bread every Sunday."}]
for chunk in client.chat.completions.create(model="vikdf", messages=messages, max_tokens=40, stream=True):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
server.should_exit = True
thread.join()
