"""A question whose answer Replicate brings: nobody has to ask whether it is there. The token is read from .env.

    python examples/webhook.py https://ADDRESS

What comes to the address has to reach this computer's port 8000, or the one in PORT. A tunnel does that, for example
`cloudflared tunnel --url http://127.0.0.1:8000`, which says the address.
"""

import json
import os
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

import replicate
from dotenv import load_dotenv

MODEL = "tu-usuario/nombre-modelo"
PORT = int(os.environ.get("PORT", "8000"))


class Receiver(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        try:
            # anybody can write to an address: only Replicate can sign, and what is older than this may be a copy
            replicate.webhooks.validate(headers=dict(self.headers), body=body, secret=secret, tolerance=300)
        except ValueError:
            self.send_error(403)
            return
        self.send_response(204)
        self.end_headers()
        # the same one may come twice
        received[json.loads(body)["id"]] = json.loads(body)


if len(sys.argv) != 2:
    sys.exit("Falta la dirección en la que Replicate encuentra este ordenador, https://…")
load_dotenv()
secret = replicate.webhooks.default.secret()
received = {}
server = HTTPServer(("127.0.0.1", PORT), Receiver)
asked = replicate.predictions.create(
    version=replicate.models.get(MODEL).latest_version,
    input={"pregunta": "Dime un producto de limpieza que blanquee la ropa", "temperature": 0},
    webhook=sys.argv[1],
    webhook_events_filter=["completed"],
)
print(f"Esperando la respuesta en el puerto {PORT}", flush=True)
while asked.id not in received:
    server.handle_request()
prediction = received[asked.id]
print("".join(prediction["output"]) if prediction["status"] == "succeeded" else prediction["error"])
