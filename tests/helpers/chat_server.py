"""A small OpenAI-compatible server on the loopback address: chat completions with faults to order."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class ChatServer(ThreadingHTTPServer):
    """Answers `echo(LAST USER TURN)#NUMBER OF MESSAGES`; `requests` lists the bodies it was sent.

    `faults` are used up one a request before it answers: an HTTP status, "cut" (the connection), or "garbage".
    `dies_after` requests it answers 503 for ever. Prompts with "long" are past its context, those with "mute" it answers
    with nothing; answers longer than max_tokens characters are cut.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.requests: list[dict] = []
        self.headers: list[dict] = []
        self.faults: list[int | str] = []
        self.dies_after: int | None = None
        self.token_ids = True
        self.reasons = False  # answers with reasoning beside them
        self.pause = 0.0  # seconds before each answer
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()

    def handle_error(self, request, client_address):
        pass  # connections that we cut


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ChatServer

    def log_message(self, *args):
        pass

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.requests.append(body)
            server.headers.append(dict(self.headers))
            fault = server.faults.pop(0) if server.faults else None
            if server.dies_after is not None and len(server.requests) > server.dies_after:
                fault = 503
            server.busy += 1
            server.most_busy = max(server.busy, server.most_busy)
        time.sleep(server.pause)
        # before the answer: a client may ask again the moment it has it
        with server.lock:
            server.busy -= 1
        self._respond(body, fault)

    def _respond(self, body: dict, fault: int | str | None):
        last = body["messages"][-1]["content"]
        if self.path != "/v1/chat/completions":
            self._json(404, {"error": {"message": "no such page"}})
        elif fault == "cut":
            self.connection.close()
        elif fault == "garbage":
            self._json(200, {"object": "list"})
        elif fault is not None:
            self._json(fault, {"error": {"message": f"fault {fault}"}})
        elif "long" in last:
            self._json(400, {"error": {"message": "This model's maximum context length is 16 tokens"}})
        else:
            whole = "" if "mute" in last else f"echo({last})#{len(body['messages'])}"
            text = whole[: body["max_tokens"]]
            choice = {
                "message": {"role": "assistant", "content": text},
                "finish_reason": "stop" if text == whole else "length",
            }
            if self.server.reasons:
                choice["message"]["reasoning_content"] = "let me think"
            answer = {"choices": [choice], "usage": {"completion_tokens": len(text)}}
            if body.get("return_token_ids") and self.server.token_ids:
                choice["token_ids"] = [ord(letter) for letter in text]
                answer["prompt_token_ids"] = [1, *(ord(letter) for letter in last)]
            self._json(200, answer)

    def _json(self, status: int, value: dict):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def serve() -> Iterator[ChatServer]:
    """A server in a thread of its own."""
    server = ChatServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
