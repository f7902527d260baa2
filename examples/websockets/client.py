"""A client of app.py: it sends its arguments, each as a message.

Run it in this folder::

    python client.py Hello "How are you?"
"""

import sys

from simple_websocket import Client

socket = Client.connect("ws://127.0.0.1:8000/messages")
for text in sys.argv[1:]:
    socket.send(text)
    print(socket.receive())
socket.close()
