"""A question, and its answer as it grows. The token is read from .env: REPLICATE_API_TOKEN=r8_..."""

import replicate
from dotenv import load_dotenv

MODEL = "tu-usuario/nombre-modelo"

load_dotenv()
for event in replicate.stream(
    replicate.models.get(MODEL).latest_version,
    input={"pregunta": "Dime un producto de limpieza que blanquee la ropa", "temperature": 0},
):
    # an event that is no text is an empty one
    print(str(event), end="", flush=True)
print()
