"""A question, and its answer once it is whole. The token is read from .env: REPLICATE_API_TOKEN=r8_..."""

import replicate
from dotenv import load_dotenv

MODEL = "tu-usuario/nombre-modelo"

load_dotenv()
answer = replicate.run(
    replicate.models.get(MODEL).latest_version,
    input={"pregunta": "Dime un producto de limpieza que blanquee la ropa", "temperature": 0},
    # until its end: otherwise the client returns after 60 seconds with what there is by then
    wait=False,
)
print("".join(answer))
